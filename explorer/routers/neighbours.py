"""The router without a model: look up what similar recorded inputs did."""

import torch

from explorer.routers.base import (
    ROUTERS,
    Decision,
    RouterInfo,
    RouterInputs,
    Routing,
    RoutingRouter,
)
from explorer.routers.clusters import sample_rows
from explorer.routers.native import choose
from explorer.routers.scores import slots, target_scores, weigh


@ROUTERS.add("nearest_neighbours")
class NeighbourRouter(RoutingRouter):
    """Average the expert scores of the most similar recorded tokens.

    Parameters
    ----------
    neighbours : int
    max_points : int
        Recorded tokens that are kept; a larger fit split is sampled.
    seed : int
    """

    info = RouterInfo(
        name="nearest_neighbours",
        family="clustering",
        title="Nearest recorded inputs (kNN)",
        summary=(
            "Looks up the recorded router inputs most similar to the token and averages what "
            "they scored. No training, but every recorded input is compared."
        ),
        formula="p = mean of p_n over the m recorded inputs nearest to h;  S = TopK(p, k)",
        paper="2601.02144",
        differs=(
            "The source remembers logits that were optimised on the loss, and mixes them with the "
            "model's gate by how near they are; here the model's own scores are remembered and "
            "always decide."
        ),
        needs=frozenset({"hidden"}),
        fits="statistics",
        identity="Other tokens' scores stand for the token's.",
    )
    _rows = 2048  # tokens compared at a time, which bounds memory

    def __init__(self, *, neighbours: int = 8, max_points: int = 8192, seed: int = 0) -> None:
        self.neighbours = neighbours
        self.max_points = max_points
        self.seed = seed

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        rows = sample_rows(inputs.n_tokens, self.max_points, self.seed)
        self.points_ = inputs.tensor("hidden")[rows].float().clone()
        self.scores_ = target_scores(inputs, target)[rows].clone()

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden = inputs.tensor("hidden").float()
        scores = torch.zeros(len(hidden), self.scores_.shape[-1], device=hidden.device)
        count = min(self.neighbours, len(self.points_))
        for start in range(0, len(hidden), self._rows):
            here = slice(start, start + self._rows)
            nearest = torch.cdist(hidden[here], self.points_).topk(count, largest=False).indices
            scores[here] = self.scores_[nearest].mean(dim=1)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the distances to all kept inputs, and of the mean."""
        n_points = len(self.points_) if self.fitted else self.max_points
        return 2.0 * d * n_points + float(min(self.neighbours, n_points) * n_experts)
