"""How much heads, blocks and layers add to a token: what rules about parts are fitted on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from capture.model.context import Passes
from capture.model.flops import decoder_layers, head_count
from capture.model.sites import Site
from capture.swap.measure import token_losses
from capture.swap.part_gates import gate_parts, output_layers, part_modules
from capture.swap.rules import RouteInputs, as_rows
from explorer.comparison.texts import Texts
from explorer.errors import RouterError
from explorer.routers import Decision, PartMask, RouterInputs
from explorer.routers.live import from_live

Key = tuple[int, int]  # layer, site
LivePart = Literal["expert", "head", "layer", "block"]
ATTENTION = ("attention", "received")
Measured = dict[int, list[torch.Tensor]]
Rows = Callable[[torch.Tensor], torch.Tensor]


class _Open:
    """A gate that lets everything through, and keeps what it was told."""

    def __init__(self, part: LivePart, columns: int) -> None:
        self.part: Literal["head", "layer"] = "head" if part == "head" else "layer"
        self.columns = columns
        self.seen: list[RouterInputs] = []

    def route(self, inputs: RouteInputs, /) -> PartMask:
        self.seen.append(from_live(inputs))
        ones = torch.ones(len(inputs.hidden), self.columns, device=inputs.hidden.device)
        return PartMask(self.part, ones)


def measured_parts(
    model: nn.Module, sites: Sequence[Site], texts: Texts, part: LivePart, *, attention: bool
) -> tuple[dict[Key, RouterInputs], dict[Key, Decision]]:
    """Run texts with all gates open; see what gates see and how much each part adds.

    Returns
    -------
    inputs, targets : dict of (layer, 0)
        A target's gate [T, P], 0..1: the norm of what the part adds, over that of the stream
        behind it for layers and blocks, over that of the token's heaviest head for heads.
    """
    if part == "expert":
        raise RouterError("Experts are no part of a layer here; their scores say how they matter.")
    modules = part_modules(model, sites, part)
    columns = {n: head_count(m, model) if part == "head" else 1 for n, m in modules.items()}
    rules = {layer: _Open(part, columns[layer]) for layer in modules}
    measured: Measured = {layer: [] for layer in modules}
    with _weighed(model, modules, columns, part, measured):
        token_losses(
            model,
            texts.sequences,
            swapped=lambda: gate_parts(model, sites, rules, part=part, attention=attention),
        )
    inputs: dict[Key, RouterInputs] = {}
    targets: dict[Key, Decision] = {}
    for layer, rule in rules.items():
        # passes before the first text belong to the tests that gates make of the model
        n_passes = len(rule.seen)
        whole: dict[str, Any] = {
            name: torch.cat([getattr(one, name) for one in rule.seen])
            for name in ("hidden", "token_ids", "positions", "starts", *ATTENTION)
            if getattr(rule.seen[0], name) is not None
        }
        inputs[layer, 0] = replace(rule.seen[0], **whole)
        targets[layer, 0] = PartMask(rule.part, torch.cat(measured[layer][-n_passes:]))
    return inputs, targets


@contextmanager
def _weighed(
    model: nn.Module,
    modules: Mapping[int, nn.Module],
    columns: Mapping[int, int],
    part: LivePart,
    measured: Measured,
) -> Iterator[None]:
    """Measure in every pass how much parts add, for the real tokens."""
    layers = decoder_layers(model)
    with ExitStack() as stack:
        passes = stack.enter_context(Passes().follow(model))

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return as_rows(tensor.detach(), passes.tokens.on(tensor.device).real).float()

        for number, module in modules.items():
            if part == "head":
                mixer = output_layers(module, columns[number])[0]
                _weigh_heads(mixer, columns[number], measured[number], rows, stack)
            else:
                inner = module if part == "block" else None
                _weigh_stream(layers[number], inner, measured[number], rows, stack)
        yield


def _weigh_heads(
    mixer: nn.Module, n_heads: int, found: list[torch.Tensor], rows: Rows, stack: ExitStack
) -> None:
    """Add each head's share of the token's heaviest one, [T, H], to ``found``."""

    def before(mixer: nn.Module, args: tuple[Any, ...]) -> None:
        norms = _head_norms(mixer, rows(args[0]), n_heads)
        found.append(norms / norms.amax(-1, keepdim=True).clamp_min(1e-20))

    stack.callback(mixer.register_forward_pre_hook(before).remove)


def _weigh_stream(
    layer: nn.Module,
    block: nn.Module | None,
    found: list[torch.Tensor],
    rows: Rows,
    stack: ExitStack,
) -> None:
    """Add the share of the stream that a block, or else the layer, adds, [T, 1], to ``found``."""
    before: list[torch.Tensor] = []  # the stream in front of the layer, or what the block adds

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[:] = [rows(args[0] if args else kwargs["hidden_states"])]

    def inner(_: nn.Module, args: Any, output: Any) -> None:
        before[:] = [rows(_first(output))]

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        stream = rows(_first(output))
        added = before[0] if block is not None else stream - before[0]
        share = added.norm(dim=-1) / stream.norm(dim=-1).clamp_min(1e-20)
        found.append(share.clamp(0, 1)[:, None])

    if block is None:
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
    else:
        stack.callback(block.register_forward_hook(inner).remove)
    stack.callback(layer.register_forward_hook(leave).remove)


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _head_norms(mixer: nn.Module, heads: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return the norm of what each head adds to the stream, [T, H]."""
    weight: Any = mixer.weight
    split = weight.detach().float().reshape(weight.shape[0], n_heads, -1)  # [D, H, W]
    gram = torch.einsum("dhv,dhw->hvw", split, split)
    values = heads.reshape(len(heads), n_heads, -1)
    return torch.einsum("thv,hvw,thw->th", values, gram, values).clamp_min(0).sqrt()
