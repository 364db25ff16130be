"""Recurrent gating across layers: a state that each layer reads and hands to the next."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from capture.store.records import Place
from capture.swap.rules import Decision, PartMask, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import AcrossLayers, PartRouter, RoutingRouter, registered
from explorer.routers.heads_and_layers import check_keep, quantile_threshold
from explorer.routers.learning.imitation import (
    BATCH_TOKENS,
    LEARNING_RATE,
    STEPS,
    distill,
    imitation_loss,
    seeded,
)
from explorer.routers.native import choose
from explorer.routers.scores import slots, student_scores, target_importance, target_scores, weigh


class GTrXLGate(nn.Module):
    """The gate of GTrXL: a GRU's update of a stream ``x`` by a layer's output ``y``.

    Parameters
    ----------
    width : int
    bias : float
        Of the update; at the source's 2 the gate starts near the identity, ``z = 0.12``.

    References
    ----------
    Parisotto et al. 2019, arXiv:1910.06764, section 3.2.
    """

    def __init__(self, width: int, bias: float = 2.0) -> None:
        super().__init__()
        self.from_y = nn.Linear(width, 3 * width, bias=False)
        self.from_x = nn.Linear(width, 2 * width, bias=False)
        self.from_reset = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.full((width,), bias))

    def update(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how much of the stream is replaced, 0..1, and by what."""
        reset_y, update_y, new_y = self.from_y(y).chunk(3, dim=-1)
        reset_x, update_x = self.from_x(x).chunk(2, dim=-1)
        reset = (reset_y + reset_x).sigmoid()
        update = (update_y + update_x - self.bias).sigmoid()
        return update, (new_y + self.from_reset(reset * x)).tanh()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the next stream, of the shape of ``x``."""
        update, new = self.update(x, y)
        result: torch.Tensor = (1 - update) * x + update * new
        return result


class Recurrence(nn.Module):
    """A cell that all layers share, with a projection and a readout of each layer.

    Parameters
    ----------
    d : int
        Width of the token.
    outputs : sequence of int
        How many logits each layer has.
    cell : GRUCell or GTrXLGate
        Takes and returns a state of ``width``.
    width : int
    """

    def __init__(
        self, d: int, outputs: Sequence[int], cell: nn.GRUCell | GTrXLGate, width: int
    ) -> None:
        super().__init__()
        self.cell = cell
        self.project = nn.ModuleList(nn.Linear(d, width) for _ in outputs)
        self.readout = nn.ModuleList(nn.Linear(width, n) for n in outputs)

    def forward(
        self, hidden: torch.Tensor, state: torch.Tensor | None, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's logits [T, P] and the state after it [T, W]."""
        projected = self.project[layer](hidden)
        state = torch.zeros_like(projected) if state is None else state
        # a GRU cell takes (input, state), GTrXL's gate (stream, output)
        gated = isinstance(self.cell, GTrXLGate)
        state = self.cell(state, projected) if gated else self.cell(projected, state)
        return self.readout[layer](state), state

    def unroll(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the logits of all layers, the state running through them."""
        state, found = None, []
        for layer, tokens in enumerate(hidden):
            logits, state = self(tokens, state, layer)
            found.append(logits)
        return found


@dataclass(kw_only=True, eq=False)
class _RecurrentRouter(AcrossLayers):
    """What both recurrent routers share: one network for all layers, run in their order.

    Parameters
    ----------
    width : int
        Of the state.
    steps, seed : int
        Of the fit.
    """

    width: int = 32
    steps: int = STEPS
    seed: int = 0

    @abstractmethod
    def _cell(self) -> nn.GRUCell | GTrXLGate:
        """Make the cell that hands the state on."""

    def _learn(
        self,
        inputs: Mapping[Place, RouterInputs],
        wanted: Sequence[torch.Tensor],
        loss_of: Callable[[torch.Tensor, torch.Tensor, RouterInputs], torch.Tensor],
    ) -> list[torch.Tensor]:
        """Fit the network to a target [T, P] of each layer; return its logits on the fit split."""
        self.places_ = sorted(inputs)
        layers = [inputs[place] for place in self.places_]
        hidden = [layer.tensor("hidden").float() for layer in layers]
        outputs = [target.shape[-1] for target in wanted]
        d = hidden[0].shape[-1]
        network = seeded(lambda: Recurrence(d, outputs, self._cell(), self.width), self.seed)

        def loss(rows: torch.Tensor) -> torch.Tensor:
            found = network.unroll([tokens[rows] for tokens in hidden])
            losses = [
                loss_of(logits, target[rows], layer)
                for logits, target, layer in zip(found, wanted, layers, strict=True)
            ]
            return torch.stack(losses).mean()

        self.losses_ = distill(
            list(network.parameters()),
            loss,
            len(hidden[0]),
            steps=self.steps,
            batch_tokens=BATCH_TOKENS,
            learning_rate=LEARNING_RATE,
            seed=self.seed,
        )
        self.network_ = network
        with torch.no_grad():
            return network.unroll(hidden)

    def _logits(self, inputs: RouterInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and the new state of the layer's tokens."""
        if inputs.place not in self.places_:
            raise RouterError(
                f"Router {self.info.name!r} was not fitted on layer {inputs.layer}, site "
                f"{inputs.site}. Fit it on all layers with fit_layers."
            )
        layer = self.places_.index(inputs.place)
        hidden = inputs.tensor("hidden").float()
        logits, state = self.network_(hidden, inputs.previous_state, layer)
        return logits, state


@registered("gru_recurrent")
class GRURouter(_RecurrentRouter, RoutingRouter):
    """Route by a state that a GRU carries from layer to layer, for each token by itself.

    Parameters
    ----------
    width : int
        Of the state; the source's is 128 for a larger model.
    steps, seed : int
        Of the fit.

    Notes
    -----
    As in the source: a projection and a gate of each layer, one GRU cell for all. Distilled
    from the model's own gates, where the source trains it with the model.
    """

    def _cell(self) -> nn.GRUCell:
        return nn.GRUCell(self.width, self.width)

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Learn from the same tokens in several layers."""
        places = sorted(inputs)
        wanted = [target_scores(inputs[place], targets.get(place)) for place in places]
        self._learn(inputs, wanted, imitation_loss)

    def _route(self, inputs: RouterInputs) -> Routing:
        logits, state = self._logits(inputs)
        scores = student_scores(logits, inputs)
        ids = choose(scores, inputs)
        return slots(scores, ids, weigh(scores, ids, inputs), state)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection, the cell and the readout."""
        return 2.0 * self.width * (d + 6 * self.width + n_experts)


@registered("gtrxl_layer_gate")
class GTrXLLayerRouter(PartRouter, _RecurrentRouter):
    """Decide whether a layer runs, from a stream that GTrXL's gate updates layer by layer.

    Parameters
    ----------
    keep : float
        Share of (token, layer) pairs of the fit split that run, over all layers together.
    width : int
        Of the stream.
    steps, seed : int
        Of the fit, whose target is each layer's importance for the token.

    Notes
    -----
    Differs from the source, where the gate stands in for the residual connection of a model
    trained with it: here it updates a small stream beside the frozen model.
    """

    part = "layer"
    keep: float = 0.75

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = check_keep(self.keep)

    def _cell(self) -> GTrXLGate:
        return GTrXLGate(self.width)

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Learn from the same tokens in several layers."""
        places = sorted(inputs)
        wanted = [target_importance(targets.get(place), self.part) for place in places]

        def loss(logits: torch.Tensor, importance: torch.Tensor, _: RouterInputs) -> torch.Tensor:
            return nn.functional.binary_cross_entropy_with_logits(logits, importance)

        logits = torch.cat(self._learn(inputs, wanted, loss))
        self.threshold_ = quantile_threshold(logits, self.keep)

    def _route(self, inputs: RouterInputs) -> PartMask:
        logits, state = self._logits(inputs)
        return PartMask(self.part, (logits >= self.threshold_).float(), state)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projection, the gate and the readout."""
        return 2.0 * self.width * (d + 6 * self.width + 1)
