"""Recognise blocks that look routed by their parameters, whatever their parts are called."""

from collections.abc import Iterator, Set
from typing import NamedTuple

import torch
from torch import nn

STACK, MATRIX = 3, 2  # axes
# lists of layers are stacks too, but nothing chooses among them
LAYER_LISTS = ("layers", "layer", "blocks", "block", "h")


class Suspect(NamedTuple):
    """A block that has several parts of one shape, and what may choose among them.

    Attributes
    ----------
    module : str
    parts : str
        Name of the list or parameter that holds them.
    size : int
    gate : str
        Parameter with as many rows or columns; empty where only a name tells.
    """

    module: str
    parts: str
    size: int
    gate: str


class _Stack(NamedTuple):
    name: str
    size: int
    parameters: set[torch.Tensor]


def suspects(model: nn.Module, known: Set[nn.Module], blocks: Set[nn.Module]) -> Iterator[Suspect]:
    """Yield blocks that no site explains although they seem to route.

    Parameters
    ----------
    model : Module
    known : set of Module
        Routers and experts of the sites with all that is in them, and what does not run.
    blocks : set of Module
        The blocks that own those.
    """
    explained: set[torch.Tensor] = {p for module in known for p in module.parameters(recurse=False)}
    parents = {c: module for module in model.modules() for c in module.children()}
    for name, module in model.named_modules():
        if module in known:
            continue
        for stack in _stacks(module):
            if stack.parameters & explained:
                continue
            gate = _gate(module, parents.get(module), stack, explained)
            is_named = "expert" in f"{name}.{stack.name}".lower()
            if gate or (is_named and not _inside(module, blocks, parents)):
                yield Suspect(name, stack.name, stack.size, gate)


def _inside(module: nn.Module, blocks: Set[nn.Module], parents: dict[nn.Module, nn.Module]) -> bool:
    """Whether a module is one of the blocks or lies in one: shared experts, a second layer."""
    at: nn.Module | None = module
    while at is not None:
        if at in blocks:
            return True
        at = parents.get(at)
    return False


def _stacks(module: nn.Module) -> Iterator[_Stack]:
    """Yield what a module has several of in one shape: modules of a list, slices of a tensor."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and name not in LAYER_LISTS:
            shapes = [[p.shape for p in one.parameters()] for one in part.children()]
            alike = len(shapes) > 1 and all(shape == shapes[0] for shape in shapes)
            if alike and any(len(shape) >= MATRIX for shape in shapes[0]):
                yield _Stack(name, len(shapes), set(part.parameters()))
        elif not isinstance(part, nn.modules.conv._ConvNd):
            yield from _tensors(part, f"{name}.")
    yield from _tensors(module, "")


def _tensors(module: nn.Module, prefix: str) -> Iterator[_Stack]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == STACK and min(parameter.shape) > 1:
            yield _Stack(f"{prefix}{name}", parameter.shape[0], {parameter})


def _gate(
    module: nn.Module, parent: nn.Module | None, stack: _Stack, explained: set[torch.Tensor]
) -> str:
    """Return the matrix that has a row or column for every part, or nothing."""
    near: list[tuple[str, torch.Tensor]] = list(module.named_parameters())
    for name, beside in parent.named_children() if parent is not None else ():
        if isinstance(beside, nn.Linear):
            near += [(f"../{name}", beside.weight)]
    for name, parameter in near:
        is_own = parameter in stack.parameters or parameter in explained
        if not is_own and parameter.ndim == MATRIX and stack.size in parameter.shape:
            return name
    return ""
