"""What a capture settles between loading the model and its first forward pass."""

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass

import torch

from capture.errors import ConfigError
from capture.model.inputs import input_device, vocabulary, width
from capture.model.load import LoadedModel
from capture.model.selftest import heeds_padding, writes_as_it_reads
from capture.model.sites import Site, text_config
from capture.model.tokens import TokenizedPrompt
from capture.recorder.attention.layers import FoundAttention, attach_attention
from capture.recorder.attention.summary import AttentionOptions, AttentionTaps
from capture.recorder.config import CaptureConfig
from capture.recorder.estimate import AttentionSize, Estimate, estimate
from capture.recorder.loop import Plan
from capture.recorder.sampling import Attended, Sample
from capture.recorder.sampling import plan_attention as choose
from capture.store import RunInfo
from kernels.dispatch import backend_for

# padded tokens of a forward pass; on a CPU larger ones leave the caches, on a GPU smaller ones
# leave it idle
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "duckdb", "pyarrow", "numba")
KERNEL_PACKAGE = "triton"  # comes with torch for CUDA
OPS = ("gate", "coactivation")
ATTENTION_OPS = ("attention",)
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def max_length(loaded: LoadedModel, config: CaptureConfig) -> int | None:
    """Return how many tokens of a prompt fit, with room for what is generated."""
    options = text_config(loaded.model)
    sizes = [getattr(options, name, None) for name in CONTEXT_NAMES]
    context = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if context is None:
        return config.max_length
    if config.generate >= context:
        raise ConfigError(
            f"generate={config.generate} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Choose at most {context - 1}."
        )
    return min(context - config.generate, config.max_length or context)


@dataclass(frozen=True)
class AttentionPlan:
    """What a capture at level attention settles before it starts.

    Attributes
    ----------
    found : FoundAttention
        Every layer, and those that are recorded.
    attended : Attended
        The prompts.
    taps : AttentionTaps
    size : AttentionSize
        For the estimate.
    """

    found: FoundAttention
    attended: Attended
    taps: AttentionTaps
    size: AttentionSize

    @property
    def without(self) -> str:
        """The layers without an attention map and why, for people; empty when there is none."""
        lines = [
            f"Layer {layer.layer} ({layer.kind}): {layer.reason}"
            for layer in self.found.layers
            if layer.reason is not None
        ]
        return " ".join(lines)


def plan_attention(
    prompts: list[TokenizedPrompt],
    sites: list[Site],
    loaded: LoadedModel,
    config: CaptureConfig,
) -> AttentionPlan | None:
    """Choose prompts and test layers for level attention; None at other levels.

    Raises
    ------
    ConfigError
        If no layer has attention that can be recorded, or one asked for has none.
    """
    if config.level != "attention":
        return None
    lengths = [len(prompt.ids) for prompt in prompts]
    domains = [prompt.domain for prompt in prompts]
    attended = choose(domains, lengths, config.attention_prompts, config.seed)
    kept = [
        length for length, is_kept in zip(lengths, attended.is_attended, strict=True) if is_kept
    ]
    found = attach_attention(
        loaded.model,
        sites,
        longest=max(kept),
        layers=config.attention_layers,
        heads=config.attention_heads,
    )
    if not found.sites:
        reasons = " ".join(sorted({layer.reason or "" for layer in found.layers}))
        raise ConfigError(
            f"Level attention needs a layer whose attention can be recorded, and none of the "
            f"{len(found.layers)} layers has it: {reasons} Record level 'scores'."
        )
    options = AttentionOptions(
        config.attention_bins, config.attention_every, config.attention_top_keys
    )
    size = AttentionSize(
        kept, len(found.sites), sum(len(site.heads) for site in found.sites), *options
    )
    return AttentionPlan(found, attended, AttentionTaps(found.sites, options), size)


def cost_of(
    prompts: list[TokenizedPrompt],
    sites: list[Site],
    loaded: LoadedModel,
    config: CaptureConfig,
    sample: Sample,
    attention: AttentionPlan | None = None,
) -> Estimate:
    """Estimate the size of the run."""
    n_tokens = sum(len(prompt.ids) for prompt in prompts) + config.generate * len(prompts)
    return estimate(
        n_tokens=n_tokens,
        sites=[site.info for site in sites],
        hidden_size=width(loaded.model),
        level=config.level,
        sample_tokens=int(sample.record["planned"]),
        n_domains=len({prompt.domain for prompt in prompts}),
        attention=attention.size if attention is not None else None,
    )


def plan_recording(
    prompts: list[TokenizedPrompt],
    sample: Sample,
    loaded: LoadedModel,
    config: CaptureConfig,
    attention: AttentionPlan | None = None,
    sites: list[Site] | None = None,
) -> Plan:
    """Settle what the loop over batches needs to know; ``sites`` are needed for decoding."""
    padded = config.generate > 0 and len({len(prompt.ids) for prompt in prompts}) > 1

    budget = config.batch_tokens or BATCH_TOKENS.get(loaded.model.device.type, BATCH_TOKENS["cpu"])
    pad_id = getattr(text_config(loaded.model), "pad_token_id", None)
    return Plan(
        prompts=prompts,
        batch_tokens=budget,
        sample=sample,
        level=config.level,
        generate=config.generate,
        pad_id=pad_id if isinstance(pad_id, int) and 0 <= pad_id < vocabulary(loaded.model) else 0,
        end_ids=_end_ids(loaded),
        attended=attention.attended.is_attended if attention is not None else None,
        same_length=padded and not heeds_padding(loaded.model, sites or []),
        cache_differs=config.generate > 0 and not writes_as_it_reads(loaded.model, sites or []),
    )


def _end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the tokens that end a text, from wherever the model says it."""
    generation = getattr(loaded.model, "generation_config", None)
    for owner in (generation, loaded.model.config, loaded.tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def _version(package: str) -> str:
    """Return a package's version, from the package itself where it is loaded: that is faster."""
    version = getattr(sys.modules.get(package), "__version__", None)
    return version if isinstance(version, str) else importlib.metadata.version(package)


def describe_run(
    loaded: LoadedModel,
    config: CaptureConfig,
    sample: Sample,
    attention: AttentionPlan | None = None,
) -> RunInfo:
    """Return what is known of the run before its first token."""
    model = loaded.model
    place = model.device if model.device.type != "meta" else input_device(model)
    device = f"{place} (weights offloaded)" if model.device.type == "meta" else str(place)
    if place.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(place)})"
    names = [*PACKAGES, *([KERNEL_PACKAGE] if importlib.util.find_spec(KERNEL_PACKAGE) else [])]
    ops = OPS if attention is None else OPS + ATTENTION_OPS
    chosen = {} if attention is None else {"attention": attention.attended.record}
    packages = {name: _version(name) for name in names}
    return RunInfo(
        model=loaded.name,
        revision=loaded.revision,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        level=config.level,
        vocab_size=vocabulary(loaded.model),
        hidden_size=width(loaded.model),
        backends={op: backend_for(op, place) for op in ops},
        packages={"python": platform.python_version(), **packages},
        config=config.to_json(),
        sample=sample.record if attention is None else sample.record | chosen,
    )
