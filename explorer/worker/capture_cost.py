"""What a capture or a comparison will cost, found without loading the model."""

import json
import math
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
from explorer.comparison.results_file import Comparison
from explorer.run import Run

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


# of a comparison: a router's two controls beside it; turns with and without it, of so many tokens
_PASSES, _TIMED = 3, 2 * 23 * 256
_CELLS = 4  # of a condition: the base, and whose weights with whose routing
_SMALL = 3  # a token of the small timed batches takes up to so many times as long
_REST = 2  # loading, checks of what a router looks at, writing


def seconds_per_token(run: Run, last: Comparison | None) -> tuple[float, float] | None:
    """Return the least and the most that a forward pass took a token, as it was measured.

    Parameters
    ----------
    run : Run
    last : Comparison or None
        Its passes are taken where there are some, else the recording of the run, which may have
        been slower or faster than a swapped pass by a factor of three.

    Returns
    -------
    (float, float) or None
        None where neither was timed.
    """
    if last is not None:
        live = last.table.query("mode == 'live' and layer.isna()")
        rates = (live["seconds"] / live["tokens"]).astype(float)
        rates = rates[(rates > 0) & (rates < math.inf)]
        if len(rates):
            return float(rates.min()), float(rates.max())
    seconds, tokens = run.info["seconds"], run.info["n_tokens"]
    return (seconds / tokens, 3 * seconds / tokens) if seconds and tokens else None


def comparison_seconds(
    per_token: tuple[float, float],
    *,
    routers: int,
    tokens: int,
    fit_tokens: int,
    seeds: int,
    latency: bool,
    conditions: int,
) -> tuple[float, float]:
    """Return how long a live comparison will take, at least and at most.

    Parameters
    ----------
    per_token : (float, float), seconds
        See :func:`seconds_per_token`.
    routers, conditions : int
        How many there are.
    tokens, fit_tokens, seeds, latency
        As in :func:`explorer.compare`. At least, no router is fitted, has controls or draws.
    """
    low, high = per_token
    timed = _TIMED if latency else 0
    least = routers * (tokens + timed) + conditions * tokens
    most = routers * seeds * (_PASSES * tokens + fit_tokens + _SMALL * timed)
    most += conditions * (_CELLS * tokens + fit_tokens)
    return low * least, _REST * high * most


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
