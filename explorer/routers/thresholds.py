"""Published rules with as many experts as a token needs: top-p, skipping, ReLU."""

from dataclasses import field, replace
from typing import Literal

import torch

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import registered
from explorer.routers.native import GateRouter, TopKRouter
from explorer.routers.scores import host_logits, host_scores, masked_ids, slots, weigh
from explorer.routers.selectors import Selector, TopP


@registered("top_p")
class TopPRouter(TopKRouter):
    """Take the fewest best experts whose probabilities reach ``p``.

    Parameters
    ----------
    p : float, 0..1

    Notes
    -----
    Differs from the source, whose weights are the raw probabilities: a swapped router keeps the
    convention of the model it is put into.
    """

    p: float = 0.4
    k: int | None = field(default=None, init=False)
    selector: Selector | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Choose by the share; the card stays as it is."""
        self.selector = TopP(self.p)
        super().__post_init__()
        self.info = replace(self.info, identity=type(self).info.identity)


@registered("expert_skipping")
class ExpertSkippingRouter(GateRouter):
    """Leave out chosen experts whose weight is small beside the first one's.

    Parameters
    ----------
    quantile : float, 0..1
        Share of the fit split's tokens that leave out a slot's expert; 0.5 is the source's
        median.

    Notes
    -----
    Differs from the source, which has two experts per token: with more, every slot has a
    threshold of its own, and a slot is used only if the one before it is.
    """

    quantile: float = 0.5

    def __post_init__(self) -> None:
        """Check what was given."""
        if not 0 <= self.quantile <= 1:
            raise RouterError(
                f"Expected 0 <= quantile <= 1, got {self.quantile}; 0.5 is the median."
            )

    def _ratios(self, inputs: RouterInputs) -> tuple[Routing, torch.Tensor]:
        native = TopKRouter().route(inputs)
        return native, native.weights / native.weights[:, :1].clamp_min(1e-20)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        _, ratios = self._ratios(inputs)
        ordered = ratios.sort(dim=0).values
        at = min(len(ordered) - 1, round(self.quantile * len(ordered)))
        # nobody leaves out an expert at 0, nor does a token that the fit split did not foresee
        self.beta_ = ordered[at].clone() if self.quantile else torch.zeros_like(ordered[0])

    def _route(self, inputs: RouterInputs) -> Routing:
        native, ratios = self._ratios(inputs)
        used = (ratios >= self.beta_).int()
        used[:, :1] = 1
        kept = used.cumprod(dim=-1).bool()
        ids = native.expert_ids.where(kept, -1)
        return slots(native.scores, ids, weigh(native.scores, ids, inputs))


@registered("relu_threshold")
class ReluRouter(GateRouter):
    """Use every expert whose logit exceeds a threshold fitted to a mean number of experts.

    Parameters
    ----------
    experts_per_token : float, optional
        Mean over the fit split; None = as many as the model takes.
    per_expert : bool
        Whether every expert has a threshold of its own, which evens out the load.
    weights : {"host", "relu"}
        The model's own weights of the experts that are on, or the source's ``ReLU`` outputs, which
        shrink to 0 at the threshold.

    Notes
    -----
    Differs from the source, where the model learns to be sparse; a token may have no expert. The
    logits alone are held against the threshold: a model's selection bias and groups, which even
    out what its own rule does, have no part in it.
    """

    experts_per_token: float | None = None
    per_expert: bool = False
    weights: Literal["host", "relu"] = "host"

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.weights == "relu":
            self.info = replace(self.info, weighing="own")

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        logits = host_logits(inputs)
        wanted = inputs.top_k if self.experts_per_token is None else self.experts_per_token
        if not 0 < wanted <= inputs.n_experts:
            raise RouterError(
                f"Expected 0 < experts_per_token <= {inputs.n_experts}, got {wanted}."
            )
        pool = logits if self.per_expert else logits.flatten().unsqueeze(-1)
        above = min(round(len(pool) * wanted / inputs.n_experts), len(pool))
        ordered = pool.sort(dim=0, descending=True).values
        floor = ordered[-1] - 1
        self.threshold_ = (ordered[above] if above < len(pool) else floor).clone()

    def _route(self, inputs: RouterInputs) -> Routing:
        active = (host_logits(inputs) - self.threshold_).relu()
        ids = masked_ids(active > 0)
        scores = host_scores(inputs.tensor("logits"), inputs)
        weights = weigh(scores if self.weights == "host" else active, ids, inputs)
        return slots(scores, ids, weights)
