"""What a capture will cost, found without loading the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capture.estimate import Estimate, estimate
from capture.prompts import Prompt
from capture.store.records import Level, SiteInfo

DEMO_WEIGHTS = Path(__file__).resolve().parent.parent.parent / "capture" / "demo" / "weights"
# for models whose tokenizer is not on this machine
CHARACTERS_PER_TOKEN = 4.0
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")


class Cost(NamedTuple):
    """An estimate, and whether its number of tokens was counted or guessed."""

    estimate: Estimate
    counted: bool


def cost(
    model: str,
    prompts: Sequence[Prompt],
    *,
    level: Level,
    generate: int = 0,
    sample_tokens: int = 0,
) -> Cost | None:
    """Estimate a capture from the model's configuration file.

    Parameters
    ----------
    model : str
        ``"demo"``, a local folder, or a hub id whose files are already on this machine.

    Returns
    -------
    Cost or None
        None when the configuration is not on this machine or is not one of a known shape; the
        capture itself then says what it costs, once the model is loaded.
    """
    config = _read(model, "config.json")
    sites = _sites(config) if config else []
    if not config or not sites:
        return None
    config = config.get("text_config", config)
    n_tokens, counted = _count(model, prompts)
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int):
        n_tokens = min(n_tokens, limit * len(prompts))
    found = estimate(
        n_tokens=n_tokens + generate * len(prompts),
        sites=sites,
        hidden_size=int(config.get("hidden_size", 0)),
        level=level,
        sample_tokens=sample_tokens,
        n_domains=len({prompt.domain for prompt in prompts}),
    )
    return Cost(found, counted)


def _sites(config: dict[str, Any]) -> list[SiteInfo]:
    config = config.get("text_config", config)
    experts = next((config[n] for n in _EXPERTS if isinstance(config.get(n), int)), 0)
    top_k = next((config[n] for n in _TOP_K if isinstance(config.get(n), int)), 0)
    layers = config.get("num_hidden_layers", 0)
    if not experts or not top_k:
        return []
    return [SiteInfo(layer, 0, "", experts, top_k, 0, "other") for layer in range(layers)]


def _count(model: str, prompts: Sequence[Prompt]) -> tuple[int, bool]:
    """Return the number of tokens, counted with the model's tokenizer when it is here."""
    given = sum(len(prompt.ids) for prompt in prompts if prompt.ids is not None)
    texts = [prompt.text for prompt in prompts if prompt.text is not None]
    path = _path(model, "tokenizer.json")
    if path is None:
        return given + int(sum(map(len, texts)) / CHARACTERS_PER_TOKEN) + 1, not texts
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return given + sum(len(found.ids) for found in tokenizer.encode_batch(texts)), True


def _read(model: str, name: str) -> dict[str, Any] | None:
    path = _path(model, name)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _path(model: str, name: str) -> Path | None:
    """Return a file of a model on this machine; nothing is downloaded."""
    if model == "demo":
        return DEMO_WEIGHTS / name
    local = Path(model).expanduser() / name
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
