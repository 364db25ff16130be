"""Which experts tokens choose together, and which they choose next."""

import math
from typing import NamedTuple

import torch

from kernels.dispatch import BACKENDS, KernelError, implementation, resolve_backend

# the largest value of the packed codes marks a slot that no expert took; signed ids use -1
EMPTY_CODES = {torch.uint8: 255, torch.uint16: 65535}
ID_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
# float32 sums of 0 and 1 are exact up to 2**24 tokens
CHUNK = 2**16


class CoactivationOutput(NamedTuple):
    """Which experts tokens chose together, for ``E`` experts, and next for ``E2`` of a later site.

    Leading axes are those of the ids. Each entry counts tokens; an expert that a token names
    twice counts once.

    Attributes
    ----------
    pairs : Tensor [..., E, E], int64, tokens
        Tokens that chose both experts; symmetric. The diagonal is the load.
    transitions : Tensor [..., E, E2], int64, tokens, or None
        Tokens that chose the row's expert here and the column's expert at the next site; None
        when no next ids were given.
    """

    pairs: torch.Tensor
    transitions: torch.Tensor | None


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


def wrong_id(name: str, ids: torch.Tensor, at: tuple[int, ...], n_experts: int) -> KernelError:
    """Return the refusal of an id that names no expert, at [site, token, slot]."""
    return KernelError(
        f"{name} holds {int(ids[at])} at [site, token, slot] = {list(at)}, but there are "
        f"{n_experts} experts. Ids run from 0 to {n_experts - 1}; "
        f"{EMPTY_CODES.get(ids.dtype, -1)} marks an empty slot."
    )


def coactivation_reference(
    expert_ids: torch.Tensor,
    next_expert_ids: torch.Tensor | None = None,
    *,
    n_experts: int,
    n_next_experts: int,
    valid: torch.Tensor | None = None,
) -> CoactivationOutput:
    """Compute what :func:`kernels.coactivation` computes, readably.

    Ids are [S, T, K] and [S, T, K2]; they were checked there.
    """
    n_sites, n_tokens, _ = expert_ids.shape
    new = expert_ids.new_zeros
    pairs = new((n_sites, n_experts, n_experts), dtype=torch.int64)
    transitions = new((n_sites, n_experts, n_next_experts), dtype=torch.int64)
    for start in range(0, n_tokens, CHUNK):
        tokens = slice(start, start + CHUNK)
        counted = None if valid is None else valid[tokens]
        chosen = _multi_hot(expert_ids[:, tokens], n_experts, counted)
        pairs += (chosen.mT @ chosen).long()
        if next_expert_ids is not None:
            following = _multi_hot(next_expert_ids[:, tokens], n_next_experts, counted)
            transitions += (chosen.mT @ following).long()
    return CoactivationOutput(pairs, None if next_expert_ids is None else transitions)


def _multi_hot(ids: torch.Tensor, n_experts: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Return 1 where a token chose an expert, [S, T, E] float32."""
    slots = ids.long()
    empty = slots == EMPTY_CODES.get(ids.dtype, -1)
    if valid is not None:
        empty = empty | ~valid.unsqueeze(-1)
    # empty slots write into a column of their own, which is cut off
    slots = slots.masked_fill(empty, n_experts)
    chosen = torch.zeros(*ids.shape[:2], n_experts + 1, device=ids.device)
    return chosen.scatter_(-1, slots, 1.0)[..., :n_experts]
