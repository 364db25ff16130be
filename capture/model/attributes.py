"""Counts, buffers and children of modules, whatever a family calls them.

Looks through the wrappers that adapters (PEFT) put around modules.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "total_experts")
TOP_KS = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k", "moe_topk")
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
GROUP_COUNTS = ("num_group", "n_group", "n_groups")
SCORED = re.compile(r"scor|select|router|gate|expert")
KEPT_GROUPS = ("topk_group", "top_group")
# names of a wrapper's children: the module inside, and trained copies that run in its place
INNER = "base_layer"
ORIGINAL, SAVED = "original_module", "modules_to_save"


def first_int(owners: Iterable[object], names: Iterable[str]) -> int | None:
    """Return the first positive integer that an owner holds under one of the names."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def weight_rows(router: nn.Module) -> int | None:
    """Return the number of rows of the router's only matrix, or None when it has several."""
    matrices = [p for p in router.parameters() if p.ndim == 2]
    return int(matrices[0].shape[0]) if len(matrices) == 1 else None


def selection_bias(block: nn.Module, router: nn.Module, n_experts: int) -> torch.Tensor | None:
    """Return the bias [E] that is added to the scores for the choice only, if there is one."""
    for owner in (router, block, getattr(router, "moe_statics", None)):
        for name in BIASES:
            value = getattr(owner, name, None)
            if not isinstance(value, torch.Tensor) or value.is_meta:
                # an offloaded tensor has no values to read: the choice then counts as unexplained
                continue
            if value.numel() == n_experts:
                return value.detach().reshape(-1)
    return None


def said_of_scores(owners: Iterable[nn.Module]) -> str:
    """Return what modules and their configurations say of how they score, as one text."""
    texts = []
    for owner in owners:
        for holder in (inner(owner), getattr(inner(owner), "config", None)):
            values = vars(holder).items() if hasattr(holder, "__dict__") else ()
            texts += [str(v) for name, v in values if SCORED.search(name) and isinstance(v, str)]
    return " ".join(texts).lower()


def groups(router: nn.Module, n_experts: int) -> tuple[int, int] | None:
    """Return (groups, kept groups) where the router chooses within some groups only."""
    count = first_int([router], GROUP_COUNTS)
    kept = first_int([router], KEPT_GROUPS)
    if count is None or kept is None or kept >= count or n_experts % count:
        return None
    return count, kept


def flat_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` [..., N] as [R, N]."""
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return a module's own child, where a trained copy replaces it that copy.

    Wrappers hand on attributes of what they wrap, so ``getattr`` would find a child of a child.
    """
    found = module._modules.get(name)
    return None if found is None else running(found)


def running(module: nn.Module) -> nn.Module:
    """Return the copy that runs in place of ``module``, or the module itself."""
    copies = module._modules.get(SAVED)
    original = module._modules.get(ORIGINAL)
    if original is None or not isinstance(copies, nn.ModuleDict):
        return module
    active = getattr(module, "active_adapters", [])
    if getattr(module, "disable_adapters", False) or not active or active[0] not in copies:
        return original
    return copies[active[0]]


def inner(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers: its counts and buffers are the model's own."""
    while True:
        following = module._modules.get(INNER)
        if following is None:
            following = running(module)
            if following is module:
                return module
        module = following


def idle(model: nn.Module) -> set[nn.Module]:
    """Return the modules that do not run, as a copy of them runs in their place."""
    found: set[nn.Module] = set()
    for module in model.modules():
        chosen = running(module)
        if chosen is not module:
            copies = [module._modules[ORIGINAL], *module._modules[SAVED].children()]  # type: ignore[union-attr]
            found.update(m for c in copies if c and c is not chosen for m in c.modules())
    return found


def scores_of(output: Any, n_experts: int) -> torch.Tensor | None:
    """Return the first floating tensor [..., E] of a router's output, or None."""
    for value in output if isinstance(output, tuple | list) else (output,):
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape[-1] == n_experts
        ):
            return value
    return None


def gate_matrix(
    router: nn.Module, n_experts: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return weight [E, D] and bias [E] of a router that is one matrix, else None."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor):
        linear = [m for m in router.modules() if isinstance(m, nn.Linear)]
        weight = linear[0].weight if len(linear) == 1 else None
    if weight_rows(router) != n_experts or weight is None or weight.ndim != 2:
        return None, None
    bias = getattr(router, "bias", None)
    is_bias = isinstance(bias, torch.Tensor) and bias.shape == (n_experts,)
    return weight, bias if is_bias else None


def n_computing(experts: nn.Module, n_experts: int) -> int:
    """Return how many of the experts have weights: the others pass a token on or skip it."""
    return n_experts - len(odd_experts(experts, n_experts))


def odd_experts(experts: nn.Module, n_experts: int) -> list[int]:
    """Return the experts that have not the parameters of the others, ascending."""
    held = inner(experts)
    if isinstance(held, nn.ModuleList | nn.ModuleDict):
        parts = [one for one in held.children() if not isinstance(one, nn.Dropout)]
        shapes = [tuple(p.shape for p in one.parameters()) for one in parts]
        usual = max(shapes, key=lambda one: sum(shape.numel() for shape in one), default=())
        return [number for number, one in enumerate(shapes) if one != usual]
    stacks = [p.shape[0] for p in experts.parameters() if p.ndim == len(("E", "out", "in"))]
    return list(range(min([n_experts, *stacks]), n_experts))
