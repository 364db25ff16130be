"""Hash layers: the token id alone decides."""

import torch

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.native import choose
from explorer.routers.scores import slots, target_scores, weigh
from explorer.routers.selectors import top_ids
from explorer.routers.sequences import mix, uniform


@registered("hash_random")
class HashRouter(RoutingRouter):
    """Send each token id to experts drawn once, with equal weights.

    Parameters
    ----------
    k : int, optional
        Experts per token; None = as many as the model takes.
    seed : int
        Draws the table; each layer has its own.

    Notes
    -----
    Differs from the source where the model takes several experts: they are drawn without
    replacement and weighted equally, with the sum that the model's weights would have.
    """

    k: int | None = None
    seed: int = 0

    def _route(self, inputs: RouterInputs) -> Routing:
        salt = (self.seed * 1009 + inputs.layer) * 101 + inputs.site
        offset = mix(torch.tensor([salt]))
        keys = mix(inputs.tensor("token_ids").long() + offset)
        scores = uniform(keys, inputs.n_experts).float()
        ids = top_ids(scores, inputs.top_k if self.k is None else self.k)
        weights = torch.full(ids.shape, inputs.scaling / ids.shape[-1], device=scores.device)
        return slots(scores, ids, weights)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: a table is read."""
        return 0.0


@registered("hash_fitted")
class FittedHashRouter(RoutingRouter):
    """Send each token id to the experts that its occurrences scored highest on average.

    Parameters
    ----------
    k : int, optional
        Experts per token; None = as many as the model takes.

    Notes
    -----
    Token ids that the fit split does not hold get the mean of all tokens. What this rule
    reproduces is the part of routing that context has no say in.
    """

    k: int | None = None

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        scores = target_scores(inputs, target).double()
        ids, row = torch.unique(inputs.tensor("token_ids").long(), return_inverse=True)
        sums = torch.zeros(len(ids), scores.shape[-1], dtype=torch.float64)
        sums.index_add_(0, row, scores)
        means = sums / row.bincount(minlength=len(ids)).unsqueeze(-1)
        self.known_ = ids
        self.table_ = torch.cat([means, scores.mean(dim=0, keepdim=True)]).float()

    def _route(self, inputs: RouterInputs) -> Routing:
        token_ids = inputs.tensor("token_ids").long().contiguous()
        at = torch.searchsorted(self.known_, token_ids).clamp_max(len(self.known_) - 1)
        scores = self.table_[at.where(self.known_[at] == token_ids, len(self.known_))]
        ids = choose(scores, inputs, k=self.k)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: a table is read."""
        return 0.0
