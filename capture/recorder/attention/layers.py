"""Which decoder layers have attention that can be recorded: found and tested before recording."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from capture.errors import ConfigError
from capture.model.forward import probe_tokens
from capture.model.inputs import plain_forward, without_gradients
from capture.model.sites import Site, text_config
from capture.recorder.attention.summary import (
    AttentionCall,
    AttentionListener,
    AttentionOptions,
    AttentionRule,
    AttentionSite,
    PromptRow,
    implementation_of,
    listen,
    mask_differs,
    rule_of,
    weights_of,
)
from capture.store.records import AttentionLayer
from kernels.dispatch import KernelError

# names of the part of a decoder layer that mixes tokens
MIXERS = (
    "self_attn", "self_attention", "attn", "attention", "linear_attn", "mamba", "mixer", "conv",
    "short_conv", "temporal_block", "token_mixer",
)  # fmt: skip
# parts that look at one token at a time
TOKENWISE = ("norm", "mlp", "moe", "feed_forward", "ffn", "dropout", "experts", "router", "gate")
# tokens of the test beyond a window, so that it shows; longer windows are checked by their mask
BEYOND_WINDOW = 8
LONGEST_TESTED_WINDOW = 512
# relative to the largest output; half-precision functions round their weights
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 4e-2

NO_CALL = "It does not weigh keys by queries through transformers' attention functions."
SECOND = "Only the first attention module of a layer is recorded."
TWICE = "It runs more than once in a forward pass."


class FoundAttention(NamedTuple):
    """What of a model's attention will be recorded.

    Attributes
    ----------
    layers : list of AttentionLayer
        Every decoder layer, for the run file.
    sites : list of AttentionSite
        Those that are recorded.
    """

    layers: list[AttentionLayer]
    sites: list[AttentionSite]

    def checked(self) -> "FoundAttention":
        """Return itself.

        Raises
        ------
        ConfigError
            If no layer has attention that can be recorded.
        """
        if not self.sites:
            reasons = " ".join(sorted({layer.reason or "" for layer in self.layers}))
            raise ConfigError(
                f"Level attention needs a layer whose attention can be recorded, and none of the "
                f"{len(self.layers)} layers has it: {reasons} Record level 'scores'."
            )
        return self


def attach_attention(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    longest: int,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> FoundAttention:
    """Find the attention of every decoder layer and test that it can be recorded.

    One short forward pass over two prompts, one of them padded: the weights that the kernel's
    definition makes of a layer's queries and keys, times its values, must be the output of the
    layer's own attention function. A layer where they are not is labelled with the reason.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
        The MoE sites; they tell where the decoder layers are.
    longest : int, tokens
        Length of the longest prompt whose attention will be recorded.
    layers, heads : sequence of int, optional
        Record these only.

    Raises
    ------
    ConfigError
        If a layer or head asked for has no attention that can be recorded.
    """
    tested = _probe(model, sites)
    found: list[AttentionLayer] = []
    chosen: list[AttentionSite] = []
    for layer, name, module in decoder_layers(model, sites):
        inside = [(n, m) for n, m in module.named_modules(prefix=name) if m in tested]
        if not inside:
            mixer_name, mixer = _mixer(name, module)
            kind = type(mixer).__name__
            found.append(AttentionLayer(layer, mixer_name, None, kind, NO_CALL))
        for number, (attention_name, attention) in enumerate(inside):
            reason = tested[attention].reason if number == 0 else SECOND
            reason = reason or _limit(model, layer, attention, longest)
            kind = type(attention).__name__ if reason else "attention"
            n_heads = tested[attention].n_heads
            wanted = layers is None or layer in layers
            recorded = tuple(h for h in range(n_heads) if heads is None or h in heads)
            if reason or not wanted:
                recorded = ()
            if recorded:
                window = layer_window(model, layer)
                site = AttentionSite(layer, attention_name, attention, recorded, n_heads, window)
                chosen.append(site)
            shown = None if reason else n_heads
            found.append(AttentionLayer(layer, attention_name, shown, kind, reason, recorded))
    _check_choice(found, layers, heads)
    return FoundAttention(found, chosen)


def decoder_layers(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[int, str, nn.Module]]:
    """Yield number, name and module of every layer in the lists that hold the sites."""
    stacks: dict[str, None] = {}
    for site in sites:
        before, number, _ = f".{site.info.module}.".partition(f".{site.info.layer}.")
        if number:
            stacks[before.removeprefix(".")] = None
    for stack in stacks:
        for number, layer in model.get_submodule(stack).named_children():
            if number.isdigit():
                yield int(number), f"{stack}.{number}" if stack else number, layer


def layer_type(model: nn.Module, layer: int) -> str | None:
    """Return what the configuration calls a layer's attention, or None where it does not."""
    types = getattr(text_config(model), "layer_types", None)
    return str(types[layer]) if types and layer < len(types) else None


def layer_window(model: nn.Module, layer: int) -> int | None:
    """Return how far a layer sees by the model's configuration."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    slides = layer_type(model, layer) in (None, "sliding_attention")
    if not slides or not isinstance(window, int) or not getattr(config, "use_sliding_window", True):
        return None
    return window or None


def _limit(model: nn.Module, layer: int, module: nn.Module, longest: int) -> str | None:
    """Return what keeps a layer from seeing all keys of a long prompt, or None.

    The test is too short to show it.
    """
    config = text_config(model)
    chunk = getattr(config, "attention_chunk_size", None)
    if layer_type(model, layer) == "chunked_attention" and chunk and longest > chunk:
        return f"It attends within chunks of {chunk:,} tokens, and a prompt has {longest:,}."
    parts = [name for name, _ in module.named_modules()]
    if any("compressor" in name for name in parts):
        return "It attends to compressed keys, which stand for several tokens."
    most = getattr(config, "index_topk", None)
    if any("indexer" in name for name in parts) and (most is None or longest > most):
        picked = "" if most is None else f", at most {most:,}; a prompt has {longest:,} tokens"
        return f"It attends only to the keys that an indexer picks{picked}."
    return None


class _Tested(NamedTuple):
    """What the test of one attention module gave; no reason = it can be recorded."""

    n_heads: int
    reason: str | None


def _probe(model: nn.Module, sites: Sequence[Site]) -> dict[nn.Module, _Tested]:
    """Run the model once and test every attention module that is called."""
    ids = _probe_ids(model)
    mask = torch.ones_like(ids)
    real = ids.shape[1] - ids.shape[1] // 4
    mask[1, real:] = 0
    rows = [PromptRow(0, 0, 0, ids.shape[1]), PromptRow(1, 1, 0, real)]
    tested: dict[nn.Module, _Tested] = {}

    def tester(module: nn.Module, window: int | None) -> AttentionListener:
        def test(call: AttentionCall) -> None:
            before = tested.get(module)
            reason = _doubt(module, call, rows, window) if before is None else TWICE
            tested[module] = _Tested(call.query.shape[1], reason)

        return test

    listeners = {
        module: tester(module, layer_window(model, number))
        for number, _, layer in decoder_layers(model, sites)
        for module in layer.modules()
    }
    with without_gradients(model), plain_forward(model), listen(listeners):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return tested


def _probe_ids(model: nn.Module) -> torch.Tensor:
    """Return two prompts, long enough that a short window shows."""
    config = text_config(model)
    ids = probe_tokens(model)
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    short = [n for n in sizes if isinstance(n, int) and 0 < n <= LONGEST_TESTED_WINDOW]
    length = max([ids.shape[1], *(n + BEYOND_WINDOW for n in short)])
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    return ids.flatten().repeat(-(-2 * length // ids.numel()))[: 2 * length].view(2, length)


def _doubt(
    module: nn.Module, call: AttentionCall, rows: Sequence[PromptRow], window: int | None
) -> str | None:
    """Return why a module's weights do not follow from queries and keys, or None if they do."""
    try:
        rule = rule_of(module, call, window)
        for row in rows:
            differs = mask_differs(call.mask, row, rule.window, implementation_of(module))
            if differs is not None and bool(differs):
                return "Its mask hides other keys than those after a token or outside a window."
            off = _error(call, row, rule)
            half = call.query.dtype not in TOLERANCE
            if not off <= (HALF_TOLERANCE if half else TOLERANCE[call.query.dtype]):
                return (
                    "Queries and keys do not explain its output: weights made from them are off "
                    f"by {off:.1g} of its largest value."
                )
    except (ValueError, KernelError) as error:
        reason = str(error)
        return reason[:1].upper() + reason[1:].rstrip(".") + "."
    return None


def _error(call: AttentionCall, row: PromptRow, rule: AttentionRule) -> float:
    """Return how far weights times values are from the output, relative to its largest value."""
    n_heads, length = call.query.shape[1], row.length
    every_key = AttentionOptions(bins=1, every=1, top_keys=length)
    out = weights_of(call, row, rule, range(n_heads), every_key, backend="torch")
    weights = torch.zeros(n_heads, length, length, device=call.query.device)
    weights.scatter_add_(2, out.top_ids[0].clamp_min(0).long(), out.top_weights[0])
    columns = slice(row.start, row.start + length)
    value = call.value[row.row, :, columns].float()  # [Hkv, T, Dv]
    if n_heads % value.shape[0]:
        raise ValueError(f"{value.shape[0]} value heads do not fit its {n_heads} query heads")
    expected = weights @ value.repeat_interleave(n_heads // value.shape[0], dim=0)
    given = call.output[row.row, columns].float().transpose(0, 1)  # [H, T, Dv]
    if given.shape != expected.shape:
        raise ValueError(f"its output has shape {list(call.output.shape)}")
    largest = float(given.abs().max())
    return float((expected - given).abs().max()) / largest if largest > 0 else float("inf")


def _mixer(name: str, layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the part of a decoder layer that mixes tokens, by its name, or the layer."""
    parts = dict(layer.named_children())
    for known in MIXERS:
        if known in parts:
            return f"{name}.{known}", parts[known]
    for part, module in parts.items():
        if not any(word in part for word in TOKENWISE):
            return f"{name}.{part}", module
    return name, layer


def _check_choice(
    found: Sequence[AttentionLayer], layers: Sequence[int] | None, heads: Sequence[int] | None
) -> None:
    """Refuse a layer or head that is asked for and cannot be recorded."""
    usable = {layer.layer: layer.heads for layer in found if layer.kind == "attention"}
    for layer in layers or ():
        if layer not in usable:
            why = next((f.reason for f in found if f.layer == layer), "There is no such layer.")
            raise ConfigError(
                f"attention_layers names layer {layer}, whose attention cannot be recorded: {why} "
                f"Choose among {sorted(usable)}."
            )
    most = max((count or 0 for count in usable.values()), default=0)
    for head in heads or ():
        if usable and head >= most:
            raise ConfigError(
                f"attention_heads names head {head}, but layers have up to {most} heads. Count "
                "them from 0."
            )
