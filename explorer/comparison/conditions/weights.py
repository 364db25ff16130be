"""Which part of a model a weight belongs to, and replacing weights for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from capture.model import attributes, inputs
from capture.model.flops import ATTENTION_NAMES, decoder_layers
from capture.model.sites import Site
from explorer.comparison.conditions.base import Subject
from explorer.errors import ConditionError

Part = Literal["attention", "router", "experts", "rest"]
PARTS: tuple[Part, ...] = get_args(Part)
STACK = 3  # axes of experts in one tensor: experts, and the two of a matrix
MATRIX = 2

Named = dict[str, nn.Parameter]


def check_parts(parts: Sequence[str]) -> tuple[Part, ...]:
    """Return names of parts, if they are some; one text may hold several: ``router+experts``.

    Raises
    ------
    ConditionError
        If there is none, or an unknown one.
    """
    parts = parts.split("+") if isinstance(parts, str) else parts
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConditionError(
            f"Parts among {', '.join(PARTS)} were expected, got {', '.join(unknown) or 'none'}."
        )
    return tuple(part for part in PARTS if part in parts)


def part_modules(subject: Subject) -> dict[Part, list[nn.Module]]:
    """Return the modules of each part but the rest, in the order of layers."""
    attention = [
        module
        for layer in decoder_layers(subject.model).values()
        for name, module in layer.named_children()
        if name in ATTENTION_NAMES and not isinstance(module, nn.ModuleList)
    ]
    experts = [module for site in subject.sites for module in expert_modules(site)]
    return {
        "attention": attention,
        "router": [site.router for site in subject.sites],
        "experts": experts,
    }


def expert_modules(site: Site) -> list[nn.Module]:
    """Return the modules that hold a site's experts; JetMoE keeps their second layer apart."""
    second = getattr(site.parent, "output_linear", None)
    return [site.experts, *([second] if isinstance(second, nn.Module) else [])]


def part_parameters(subject: Subject) -> dict[Part, Named]:
    """Return all parameters by part and name; a router or experts within attention are theirs."""
    modules = part_modules(subject)
    owner: dict[nn.Parameter, Part] = {}
    inner: tuple[Part, ...] = ("router", "experts", "attention")
    for part in inner:
        for module in modules[part]:
            for parameter in module.parameters():
                owner.setdefault(parameter, part)
    found: dict[Part, Named] = {part: {} for part in PARTS}
    for name, parameter in subject.model.named_parameters():
        found[owner.get(parameter, "rest")][name] = parameter
    return found


def matrices(named: Named) -> Named:
    """Return the weights that tokens are multiplied by: matrices, and experts' stacks of them.

    Norms and biases are left out; beside stacked experts, what has two axes is a bias.
    """
    stacked = any(p.ndim == STACK for p in named.values())
    return {
        name: p
        for name, p in named.items()
        if p.ndim >= MATRIX and "bias" not in name.rsplit(".", 1)[-1] and 1 not in p.shape
        and not (stacked and p.ndim == MATRIX and "expert" in name)
    }  # fmt: skip


def input_axis(subject: Subject, parameter: nn.Parameter) -> int:
    """Return the axis of a weight that is summed over: the last, or -2 in transposed experts."""
    for site in subject.sites:
        for module in expert_modules(site):
            if any(p is parameter for p in module.parameters()):
                return -2 if _is_transposed(module, subject) else -1
    return -1


def _is_transposed(experts: nn.Module, subject: Subject) -> bool:
    """Whether experts hold [E, in, out]; said by transformers, else seen from the widths."""
    said = getattr(attributes.inner(experts), "is_transposed", None)
    if isinstance(said, bool):
        return said
    first = next((p for p in experts.parameters() if p.ndim == STACK), None)
    width = inputs.width(subject.model)
    return first is not None and first.shape[-2] == width and first.shape[-1] != width


@contextmanager
def replaced(changes: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Give parameters other values until the block is left; their own tensors come back.

    Raises
    ------
    ConditionError
        If a weight is not in memory, as offloaded ones are not.
    """
    if any(parameter.device.type == "meta" for parameter in changes):
        raise ConditionError(
            "Weights in memory were expected, but some are offloaded. Load the model without a "
            "device map."
        )
    kept = {parameter: parameter.data for parameter in changes}
    try:
        for parameter, value in changes.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value
