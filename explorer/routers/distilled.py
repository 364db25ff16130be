"""Students of the model's gate: linear, cosine, and those that look one layer ahead."""

from collections.abc import Mapping
from math import log

import torch
from torch import nn

from capture.store.records import Place
from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import AcrossLayers, RoutingRouter, registered
from explorer.routers.learning.imitation import (
    BATCH_TOKENS,
    LEARNING_RATE,
    STEPS,
    Student,
    distill,
    imitation_loss,
    seeded,
)
from explorer.routers.native import choose
from explorer.routers.scores import slots, student_scores, target_scores, weigh


@registered("distilled_linear")
class LinearStudent(Student):
    """Learn a linear gate from the model's own linear gate: the sanity check of distillation."""

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


@registered("cosine")
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

    width: int = 32

    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make the projection, the expert vectors and the scale."""
        return CosineGate(d, n_experts, self.width)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection and of the cosines."""
        return 2.0 * self.width * (d + n_experts)


@registered("look_ahead")
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

    steps: int = STEPS
    seed: int = 0

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Learn from the same tokens in several layers."""
        places = sorted(inputs)
        self.own_: dict[Place, nn.Module] = {}
        self.ahead_: dict[Place, nn.Module] = {}
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


@registered("next_gate")
class NextGateRouter(AcrossLayers, RoutingRouter):
    """Choose a layer's experts by its own gate, applied to what the layer before saw.

    Notes
    -----
    What the layer before saw is handed on as its state; where none was, as in the first layer,
    the gate reads the layer's own input, as the model does.
    """

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
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
