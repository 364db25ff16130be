"""Students of the model's gate that the literature proposes as gates: linear and cosine."""

from math import log
from typing import Any

import torch
from torch import nn

from explorer.routers.base import ROUTERS, RouterInfo
from explorer.routers.learning.imitation import DISTILLED, Student


@ROUTERS.add("distilled_linear")
class LinearStudent(Student):
    """Learn a linear gate from the model's own linear gate: the sanity check of distillation."""

    info = RouterInfo(
        name="distilled_linear",
        family="control",
        title="Distilled linear gate",
        summary=(
            "A new linear gate that learned to imitate the model's own. It should agree almost "
            "always; what it misses is what the fit loop misses."
        ),
        formula="z = W' h + b,  min KL(p || softmax(z))",
        paper="",
        needs=frozenset({"hidden"}),
        fits="distilled",
        identity=DISTILLED,
    )

    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make one linear map."""
        return nn.Linear(d, n_experts)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of a linear gate."""
        return 2.0 * d * n_experts


class CosineGate(nn.Module):
    """Cosines of a projected token with expert vectors, times a learned scale.

    Parameters
    ----------
    d, n_experts, width : int
        ``width`` is that of the projection.
    """

    def __init__(self, d: int, n_experts: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(d, width)
        self.experts = nn.Parameter(torch.randn(n_experts, width) / width**0.5)
        self.log_scale = nn.Parameter(torch.tensor(log(2.0)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [T, E]."""
        token = nn.functional.normalize(self.project(hidden), dim=-1)
        expert = nn.functional.normalize(self.experts, dim=-1)
        # the source clamps the scale at 100
        logits: torch.Tensor = token @ expert.T * self.log_scale.clamp_max(log(100.0)).exp()
        return logits


@ROUTERS.add("cosine")
class CosineRouter(Student):
    """Route by the cosine between a projection of the token and a vector of each expert.

    Parameters
    ----------
    width : int
        Of the projection.
    **options
        Of :class:`Student`.

    Notes
    -----
    As in tutel's code: tokens and experts are both normalised (torchscale's leaves the token as
    it is), and the scale starts at 2 and ends at 100. Distilled, where the source trains it with
    the model.
    """

    info = RouterInfo(
        name="cosine",
        family="literature",
        title="Cosine router (X-MoE)",
        summary=(
            "Compares the direction of a projected token with a vector of each expert. Length "
            "plays no part, which keeps experts from collapsing in training."
        ),
        formula="z_e = s cos(P h, v_e),  s <= 100;  S = TopK(z, k)",
        paper="2204.09179",
        differs=(
            "It imitates the gate of a trained model, where the source trains it with the model."
        ),
        needs=frozenset({"hidden"}),
        fits="distilled",
        identity=DISTILLED,
    )

    def __init__(self, *, width: int = 32, **options: Any) -> None:
        super().__init__(**options)
        self.width = width

    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make the projection, the expert vectors and the scale."""
        return CosineGate(d, n_experts, self.width)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection and of the cosines."""
        return 2.0 * self.width * (d + n_experts)
