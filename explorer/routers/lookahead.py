"""Look-ahead routing: a layer's experts, chosen from what the layer before saw."""

from collections.abc import Mapping

import torch
from torch import nn

from explorer.errors import RouterError
from explorer.routers.base import (
    ROUTERS,
    Decision,
    RouterInfo,
    RouterInputs,
    Routing,
    RoutingRouter,
    Site,
)
from explorer.routers.layers import AcrossLayers
from explorer.routers.learning.imitation import (
    BATCH_TOKENS,
    DISTILLED,
    LEARNING_RATE,
    STEPS,
    distill,
    imitation_loss,
    seeded,
)
from explorer.routers.native import choose
from explorer.routers.scores import slots, student_scores, target_scores, weigh


@ROUTERS.add("look_ahead")
class LookAheadRouter(AcrossLayers, RoutingRouter):
    """Choose a layer's experts from the router input of the layer before it.

    Parameters
    ----------
    steps, seed : int
        Of the fit.

    Notes
    -----
    A linear gate for each layer, on the hidden state that the layer before handed on as its
    state. Where none was handed on, as in the first layer, a second linear gate that was fitted
    for that reads the layer's own input.
    """

    info = RouterInfo(
        name="look_ahead",
        family="literature",
        title="Look-ahead router",
        summary=(
            "Chooses a layer's experts from what the layer before saw, so that they can be fetched "
            "one layer early. The first layer reads its own input."
        ),
        formula="z_l = W_l h_{l-1} + b_l,  min KL(p_l || softmax(z_l))",
        paper="2312.17238",
        differs=(
            "The source reuses the next layer's own gate (see next_gate); here a gate for each "
            "layer learns to foresee it."
        ),
        needs=frozenset({"hidden"}),
        fits="distilled",
        across_layers=True,
        identity=DISTILLED,
    )

    def __init__(self, *, steps: int = STEPS, seed: int = 0) -> None:
        self.steps = steps
        self.seed = seed

    def fit_across(
        self, inputs: Mapping[Site, RouterInputs], targets: Mapping[Site, Decision]
    ) -> None:
        """Learn from the same tokens in several layers."""
        places = sorted(inputs)
        self.own_: dict[Site, nn.Module] = {}
        self.ahead_: dict[Site, nn.Module] = {}
        self.losses_: list[float] = []
        for at, place in enumerate(places):
            layer = inputs[place]
            wanted = target_scores(layer, targets.get(place))
            self.own_[place] = self._gate(layer, layer, wanted, 2 * at)
            if at:
                before = inputs[places[at - 1]]
                self.ahead_[place] = self._gate(before, layer, wanted, 2 * at + 1)

    def _gate(
        self, source: RouterInputs, layer: RouterInputs, wanted: torch.Tensor, number: int
    ) -> nn.Module:
        """Fit one linear gate from the hidden states of one layer to the scores of another."""
        hidden, seed = source.tensor("hidden").float(), self.seed + number
        gate = seeded(lambda: nn.Linear(hidden.shape[-1], layer.n_experts), seed)
        self.losses_ += distill(
            list(gate.parameters()),
            lambda rows: imitation_loss(gate(hidden[rows]), wanted[rows], layer),
            len(hidden),
            steps=self.steps,
            batch_tokens=BATCH_TOKENS,
            learning_rate=LEARNING_RATE,
            seed=seed,
        )
        return gate

    def _route(self, inputs: RouterInputs) -> Routing:
        if inputs.place not in self.own_:
            raise RouterError(
                f"Router {self.info.name!r} was not fitted on layer {inputs.layer}, site "
                f"{inputs.site}. Fit it on all layers with fit_layers."
            )
        hidden, before = inputs.tensor("hidden").float(), inputs.previous_state
        gate = self.ahead_.get(inputs.place)
        looks_ahead = before is not None and gate is not None
        logits = gate(before) if looks_ahead and gate else self.own_[inputs.place](hidden)
        scores = student_scores(logits, inputs)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs), hidden)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of one linear gate."""
        return 2.0 * d * n_experts


@ROUTERS.add("next_gate")
class NextGateRouter(AcrossLayers, RoutingRouter):
    """Choose a layer's experts by its own gate, applied to what the layer before saw.

    Notes
    -----
    What the layer before saw is handed on as its state; where none was, as in the first layer,
    the gate reads the layer's own input, as the model does.
    """

    info = RouterInfo(
        name="next_gate",
        family="literature",
        title="Next layer's own gate, one layer early",
        summary=(
            "A layer's own gate reads what the layer before saw, so that experts can be fetched "
            "one layer early. The first layer reads its own input."
        ),
        formula="z_l = W_l h_{l-1};  S = TopK(score(z_l), k)",
        paper="2312.17238, section 3.2",
        differs=(
            "The source fetches experts by this guess and lets the gate choose when its own input "
            "is there; here the guess decides."
        ),
        needs=frozenset({"hidden", "gate_weight"}),
        across_layers=True,
        identity="The gate reads another layer's input.",
    )

    def fit_across(
        self, inputs: Mapping[Site, RouterInputs], targets: Mapping[Site, Decision]
    ) -> None:
        """Learn nothing: the gates are the model's."""

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden, before = inputs.tensor("hidden").float(), inputs.previous_state
        weight, bias = inputs.tensor("gate_weight").float(), inputs.gate_bias
        seen = hidden if before is None else before
        logits = nn.functional.linear(seen, weight, None if bias is None else bias.float())
        scores = student_scores(logits, inputs)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs), hidden)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the model's own gate."""
        return 2.0 * d * n_experts
