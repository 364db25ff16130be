"""Which experts tokens choose together, and which they choose next."""

import math

import torch

from kernels.dispatch import BACKENDS, implementation, resolve_backend
from kernels.errors import KernelError
from kernels.ops.coactivation.reference import (
    EMPTY_CODES,
    ID_DTYPES,
    CoactivationOutput,
    coactivation_reference,
    wrong_id,
)

__all__ = ["BACKENDS", "CoactivationOutput", "coactivation", "coactivation_reference"]


def coactivation(
    expert_ids: torch.Tensor,
    next_expert_ids: torch.Tensor | None = None,
    *,
    n_experts: int,
    n_next_experts: int | None = None,
    valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> CoactivationOutput:
    """Count for every two experts the tokens that chose both, and where those tokens went next.

    An expert that a token names twice counts once. Counts are exact whatever the backend.

    Parameters
    ----------
    expert_ids : Tensor [..., T, K], integer
        Experts of each token; leading axes are sites, counted apart in one launch. -1 marks an
        empty slot; in uint8 and uint16 (:func:`kernels.gate`'s packed ids) 255 and 65535 do.
        Other ids outside 0 to ``n_experts - 1`` are refused on a CPU; on CUDA, where looking
        would wait for the device, they are undefined.
    next_expert_ids : Tensor [..., T, K2], integer, optional
        Experts of the same tokens at a later site, with the same leading axes.
    n_experts : int
        Experts of the site.
    n_next_experts : int, optional
        Experts of the later site; as many as ``n_experts`` when left out.
    valid : Tensor [T], bool, optional
        False for padding, which counts nowhere.
    backend : {"auto", "triton", "numba", "torch"}
        A backend asked for by name is used or refused, never replaced.

    Raises
    ------
    KernelError
        If a shape, a dtype, an id or the backend is not supported.
    """
    n_next = n_experts if n_next_experts is None else n_next_experts
    _check(expert_ids, "expert_ids", n_experts)
    if next_expert_ids is not None:
        _check(next_expert_ids, "next_expert_ids", n_next)
        if next_expert_ids.shape[:-1] != expert_ids.shape[:-1]:
            raise KernelError(
                f"next_expert_ids must hold the tokens of expert_ids, "
                f"{list(expert_ids.shape[:-1])}, got {list(next_expert_ids.shape[:-1])}."
            )
        if next_expert_ids.device != expert_ids.device:
            raise KernelError(
                f"expert_ids are on {expert_ids.device}, next_expert_ids on "
                f"{next_expert_ids.device}. Move one of them."
            )
    n_tokens = expert_ids.shape[-2]
    if valid is not None and (valid.shape != (n_tokens,) or valid.dtype != torch.bool):
        raise KernelError(
            f"valid must be a boolean tensor of shape [{n_tokens}], "
            f"got {valid.dtype} of shape {list(valid.shape)}."
        )
    name = resolve_backend(backend, device=expert_ids.device, refusals=dict.fromkeys(BACKENDS))
    ids = _as_sites(expert_ids)
    following = None if next_expert_ids is None else _as_sites(next_expert_ids)
    if ids.device.type == "cpu" and name != "numba":  # numba looks while it counts
        _check_values(ids, "expert_ids", n_experts)
        if following is not None:
            _check_values(following, "next_expert_ids", n_next)
    out = implementation("coactivation", name)(
        ids,
        following,
        n_experts=n_experts,
        n_next_experts=n_next,
        valid=None if valid is None else valid.contiguous(),
    )
    return CoactivationOutput(
        _with_axes(out.pairs, expert_ids.shape[:-2]),
        None if out.transitions is None else _with_axes(out.transitions, expert_ids.shape[:-2]),
    )


def _with_axes(counts: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    return counts.reshape(*leading, *counts.shape[1:])


def _as_sites(ids: torch.Tensor) -> torch.Tensor:
    """Return the ids as contiguous [S, T, K]."""
    # sites are named by their number: -1 cannot be inferred where there are no tokens
    return ids.reshape(math.prod(ids.shape[:-2]), *ids.shape[-2:]).contiguous()


def _check_values(ids: torch.Tensor, name: str, n_experts: int) -> None:
    slots = ids.long()
    empty = slots == EMPTY_CODES.get(ids.dtype, -1)
    wrong = ((slots < 0) | (slots >= n_experts)) & ~empty
    if wrong.any():
        raise wrong_id(name, ids, tuple(wrong.nonzero()[0].tolist()), n_experts)


def _check(ids: torch.Tensor, name: str, n_experts: int) -> None:
    if ids.ndim < 2:
        raise KernelError(
            f"{name} must have shape [tokens, slots] or [sites, tokens, slots], "
            f"got {list(ids.shape)}."
        )
    if ids.dtype not in ID_DTYPES:
        raise KernelError(f"{name} must hold integers, got {ids.dtype}. Cast it: ids.int().")
    if ids.shape[-1] < 1:
        raise KernelError(f"{name} has no slots, shape {list(ids.shape)}. Pass at least one.")
    most = EMPTY_CODES.get(ids.dtype, 2**31 - 1)
    if not 1 <= n_experts <= most:
        raise KernelError(
            f"{name} in {ids.dtype} can name 1 to {most} experts, got {n_experts}. "
            "Pass a wider integer."
        )
