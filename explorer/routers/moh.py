"""Mixture-of-Head attention: some heads are always on, a gate chooses among the others."""

from math import ceil

import torch
from torch import nn

from explorer.routers.base import (
    ROUTERS,
    Decision,
    Part,
    PartMask,
    PartRouter,
    RouterInfo,
    RouterInputs,
)
from explorer.routers.learning.imitation import STEPS, learn_shares, seeded
from explorer.routers.parts import check_keep
from explorer.routers.scores import target_importance
from explorer.routers.selectors import TopK


@ROUTERS.add("moh_heads")
class MoHRouter(PartRouter):
    """Keep the first heads of every layer on, and choose among the others by a linear gate.

    Parameters
    ----------
    keep : float
        Share of the heads that each token uses, the shared ones among them, rounded up.
    shared : float
        Share of the heads that every token uses: the first ones, as the source takes them in a
        model that was trained without.
    steps, seed : int
        Of the fit, whose target is each routed head's share of the routed heads' output norms.
    """

    part: Part = "head"
    info = RouterInfo(
        name="moh_heads",
        family="attention",
        title="Mixture of heads with shared heads (MoH)",
        summary=(
            "The first heads of a layer are on for every token, and a linear gate chooses among "
            "the others. It is learned from how much each of them contributes."
        ),
        formula="a = softmax(W_r h);  heads = the first m and TopK(a, n - m)",
        paper="2410.11842, section 3.2",
        differs=(
            "The source trains the gate with the model and weighs heads in two stages, shared "
            "against routed; here the model is frozen, and a head that is on counts in full."
        ),
        needs=frozenset({"hidden"}),
        fits="distilled",
        identity={"keep": 1.0},
    )

    def __init__(
        self, *, keep: float = 0.75, shared: float = 0.5, steps: int = STEPS, seed: int = 0
    ) -> None:
        self.keep = check_keep(keep)
        self.shared = check_keep(shared)
        self.steps = steps
        self.seed = seed

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").float()
        importance = target_importance(target, self.part)
        heads = importance.shape[-1]
        # at least one head is routed, or there is nothing to choose
        self.always_ = min(round(self.shared * heads), heads - 1)
        routed = importance[:, self.always_ :]
        width, n_routed = hidden.shape[-1], heads - self.always_
        gate = seeded(lambda: nn.Linear(width, n_routed, bias=False), self.seed)
        self.losses_ = learn_shares(gate, hidden, routed, steps=self.steps, seed=self.seed)
        self.gate_ = gate

    def _route(self, inputs: RouterInputs) -> PartMask:
        scores = self.gate_(inputs.tensor("hidden").float()).softmax(dim=-1)
        heads = self.always_ + scores.shape[-1]
        routed = max(ceil(self.keep * heads - 1e-9), self.always_, 1) - self.always_
        chosen = TopK(routed).mask(scores) if routed else torch.zeros_like(scores)
        always = torch.ones(len(scores), self.always_, device=scores.device)
        return PartMask(self.part, torch.cat((always, chosen.float()), dim=-1))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the linear gate; two routed heads before the fit."""
        return 2.0 * d * (self.gate_.out_features if self.fitted else 2)
