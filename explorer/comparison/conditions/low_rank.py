"""Matrix factorisation: every expert's matrices as products of two thin ones."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from capture.model.flops import expert_parameters
from explorer.comparison.conditions.base import (
    CONDITIONS,
    Applied,
    Condition,
    ConditionInfo,
    Subject,
)
from explorer.comparison.conditions.weights import STACK, replaced
from explorer.errors import ConditionError


@CONDITIONS.add("low_rank")
class LowRankExperts(Condition):
    """Replace each expert's matrices by their best approximation of a rank.

    Parameters
    ----------
    share : float
        Of the full rank, the smaller side of a matrix; rounded, at least 1.
    """

    info = ConditionInfo(
        name="low_rank",
        kind="factorisation",
        title="Low-rank experts (SVD)",
        summary=(
            "Every matrix of every expert becomes the nearest one of a lower rank, by its singular "
            "values. Two thin factors would hold it; here their product is computed with."
        ),
        formula="W ~ U_r S_r V_r^T,  r (out + in) weights instead of out * in",
        paper="",
    )

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ConditionError(f"0 < share <= 1 of the full rank was expected, got {share}.")
        self.share = share

    @property
    def label(self) -> str:
        """Name and share, such as ``low_rank 0.5``."""
        return f"{self.info.name} {self.share:.3g}"

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        changes = {}
        for site in subject.sites:
            for parameter in expert_parameters(site):
                if parameter.ndim != STACK:
                    raise ConditionError(
                        f"{site.info.module}: experts in stacks [E, out, in] were expected, got "
                        f"{list(parameter.shape)}. This family cannot be factorised."
                    )
                n, rows, columns = parameter.shape
                rank = max(round(self.share * min(rows, columns)), 1)
                changes[parameter] = truncated(parameter.data, rank)
                # where factors would be larger than the matrix, the matrix is kept
                fewer = rows * columns - min(rank * (rows + columns), rows * columns)
                applied.weight_bytes -= n * fewer * parameter.element_size()
                name = f"{rows} x {columns}"
                applied.chosen[name] = rank
        return replaced(changes)


def truncated(stack: torch.Tensor, rank: int) -> torch.Tensor:
    """Return matrices [E, out, in] with all but their largest ``rank`` singular values at 0."""
    u, s, v = torch.linalg.svd(stack.float(), full_matrices=False)
    product: torch.Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return product.to(stack.dtype)
