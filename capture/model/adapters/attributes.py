"""Reading counts and buffers off modules whose attribute names differ by family."""

from collections.abc import Iterable

import torch
from torch import nn

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "total_experts")
TOP_KS = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k", "moe_topk")
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
GROUP_COUNTS = ("num_group", "n_group", "n_groups")
KEPT_GROUPS = ("topk_group", "top_group")


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
