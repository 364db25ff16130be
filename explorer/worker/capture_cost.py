"""What a capture will cost, found without loading the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer

from capture.prompts import Prompt
from capture.recorder.config import RecordingOptions
from capture.recorder.estimate import AttentionSize, Estimate, choose_attended, estimate
from capture.store.records import SiteInfo

DEMO_WEIGHTS = Path(__file__).resolve().parent.parent.parent / "capture" / "demo" / "weights"
# for models whose tokenizer is not on this machine
CHARACTERS_PER_TOKEN = 4.0
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")


class CaptureCost(NamedTuple):
    """An estimate, and whether its number of tokens was counted or guessed."""

    estimate: Estimate
    counted: bool


def cost(model: str, prompts: Sequence[Prompt], **options: Any) -> CaptureCost | None:
    """Estimate a capture from the model's configuration file.

    Parameters
    ----------
    model : str
        ``"demo"``, a local folder, or a hub id whose files are already on this machine.
    **options
        As in ``capture.CaptureConfig``; all layers and heads are counted.

    Returns
    -------
    Cost or None
        None when the configuration is not on this machine or is not one of a known shape; the
        capture itself then says what it costs, once the model is loaded.
    """
    given = RecordingOptions(**{"sample_tokens": 0} | options)
    config = _read(model, "config.json")
    sites = _sites(config) if config else []
    if not config or not sites:
        return None
    config = config.get("text_config", config)
    lengths, counted = _count(model, prompts)
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int):
        lengths = [min(length, limit) for length in lengths]
    attention = None
    if given.level == "attention" and prompts:
        domains = [prompt.domain for prompt in prompts]
        chosen = choose_attended(domains, lengths, given.attention_prompts, 0).is_attended
        layers = int(config.get("num_hidden_layers", 0))
        attention = AttentionSize(
            [length for length, is_in in zip(lengths, chosen, strict=True) if is_in],
            layers,
            layers * int(config.get("num_attention_heads", 0)),
            given.attention_bins,
            given.attention_every,
            given.attention_top_keys,
        )
    found = estimate(
        n_tokens=sum(lengths) + given.generate * len(prompts),
        sites=sites,
        hidden_size=int(config.get("hidden_size", 0)),
        level=given.level,
        sample_tokens=given.sample_tokens,
        n_domains=len({prompt.domain for prompt in prompts}),
        attention=attention,
    )
    return CaptureCost(found, counted)


def _sites(config: dict[str, Any]) -> list[SiteInfo]:
    config = config.get("text_config", config)
    experts = next((config[n] for n in _EXPERTS if isinstance(config.get(n), int)), 0)
    top_k = next((config[n] for n in _TOP_K if isinstance(config.get(n), int)), 0)
    layers = config.get("num_hidden_layers", 0)
    if not experts or not top_k:
        return []
    return [SiteInfo(layer, 0, "", experts, top_k, 0, "other") for layer in range(layers)]


def _count(model: str, prompts: Sequence[Prompt]) -> tuple[list[int], bool]:
    """Return the tokens of every prompt, counted with the model's tokenizer when it is here."""
    texts = [
        prompt.text or "\n".join(message["content"] for message in prompt.messages or ())
        for prompt in prompts
        if prompt.ids is None
    ]
    path = _path(model, "tokenizer.json")
    if path is None:
        counts = iter([int(len(text) / CHARACTERS_PER_TOKEN) + 1 for text in texts])
    else:
        tokenizer = Tokenizer.from_file(str(path))
        counts = iter([len(found.ids) for found in tokenizer.encode_batch(texts)])
    lengths = [len(p.ids) if p.ids is not None else next(counts) for p in prompts]
    is_exact = path is not None and not any(prompt.messages for prompt in prompts)
    return lengths, is_exact or not texts


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
    if not model.strip():  # would be the working folder
        return None
    local = Path(model).expanduser() / name
    if local.is_file():
        return local
    try:
        cached = try_to_load_from_cache(model, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
