"""The result type shared by the implementations of coactivation, and how ids mark empty slots."""

from typing import NamedTuple

import torch

from kernels.errors import KernelError


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


# the largest value of the packed codes marks a slot that no expert took; signed ids use -1
EMPTY_CODES = {torch.uint8: 255, torch.uint16: 65535}
ID_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


def wrong_id(name: str, ids: torch.Tensor, at: tuple[int, ...], n_experts: int) -> KernelError:
    """Return the refusal of an id that names no expert, at [site, token, slot]."""
    return KernelError(
        f"{name} holds {int(ids[at])} at [site, token, slot] = {list(at)}, but there are "
        f"{n_experts} experts. Ids run from 0 to {n_experts - 1}; "
        f"{EMPTY_CODES.get(ids.dtype, -1)} marks an empty slot."
    )
