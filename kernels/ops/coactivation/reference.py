"""The definition of :func:`kernels.coactivation` in plain PyTorch, its result, and empty slots."""

from typing import NamedTuple

import torch

from kernels.errors import KernelError

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
