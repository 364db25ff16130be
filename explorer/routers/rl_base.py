"""What all routers by reinforcement learning share: states in, the preferred action out."""

from dataclasses import replace

import torch
from torch import nn

from explorer.errors import RouterError
from explorer.routers.base import RouterInputs, Routing, RoutingRouter, Site
from explorer.routers.learning.actions import (
    STATISTICS,
    ActionKind,
    CostKind,
    StateKind,
    action_costs,
    make_actions,
    state_and_best,
)
from explorer.routers.learning.context import CurveRow, TrainedRouter, TrainingSession
from explorer.routers.learning.imitation import seeded
from explorer.routers.learning.objectives import StateNet


class ActionRouter(TrainedRouter, RoutingRouter):
    """What all routers of this family share: in each layer, a network prefers one action.

    Parameters
    ----------
    price : float, nats
        What one expert of one layer costs, the lambda of the reward
        ``-(change in loss) - price * cost``; at 0 compute is free.
    actions : {"count", "subset", "skip"}
        How many of the token's best experts run, which of them, or all or none.
    most : int, optional
        Experts that actions choose among; None = as many as the model takes.
    least : int, optional
        Actions with fewer experts do not exist; None = 1, or 0 for ``"skip"``. With 0, tokens
        without an expert spoil what others see, and learning the rest takes more exploration.
    state : {"full", "gate"}
        [hidden, p1, p2, p1 - p2, H(p)], or the last four only.
    cost : {"experts", "flops", "ms"}
        See :func:`explorer.routers.learning.actions.action_costs`.
    width : int
        Of the network's hidden layer.
    steps, seed : int
        Of the training.
    """

    def __init__(
        self,
        *,
        price: float = 0.02,
        actions: ActionKind = "count",
        most: int | None = None,
        least: int | None = None,
        state: StateKind = "full",
        cost: CostKind = "experts",
        width: int = 16,
        steps: int = 400,
        seed: int = 0,
    ) -> None:
        if price < 0 or state not in ("full", "gate"):
            raise RouterError(
                f"Expected price >= 0 and state 'full' or 'gate', got {price} and {state!r}."
            )
        self.price = price
        self.actions: ActionKind = actions
        self.most = most
        self.least = (0 if actions == "skip" else 1) if least is None else least
        self.state: StateKind = state
        self.cost: CostKind = cost
        self.width = width
        self.steps = steps
        self.seed = seed
        if state == "gate":
            self.info = replace(self.info, needs=frozenset({"logits"}))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the model's own gate and of the network.

        The network is linear in the hidden state; only the gate's statistics pass its width.
        """
        n_actions = len(make_actions(self.actions, top_k, most=self.most, least=self.least).used)
        linear = d * n_actions if self.state == "full" else 0
        network = linear + self.width * (len(STATISTICS) + n_actions)
        return 2.0 * (d * n_experts + network)

    def _prepare(self, session: TrainingSession) -> None:
        """Make the actions of all sites and find out what they cost."""
        self.actions_ = {
            (site.info.layer, site.info.site): make_actions(
                self.actions, site.info.top_k, most=self.most, least=self.least
            )
            for site in session.sites
        }
        self.costs_ = action_costs(session, self.actions_, self.cost)
        self.networks_: dict[Site, nn.Module] = {}
        self.curves_ = []

    def _network(self, place: Site, states: torch.Tensor) -> StateNet:
        """Make a layer's network, from the router's seed."""
        n_actions = len(self.actions_[place].used)
        seed = self.seed * 1009 + place[0] * 101 + place[1]
        return seeded(lambda: StateNet(states, n_actions, self.width), seed)

    def _seen(self, states: torch.Tensor) -> torch.Tensor:
        """Return the part of full states that this router looks at."""
        return states if self.state == "full" else states[:, -len(STATISTICS) :]

    def _preference(self, place: Site, values: torch.Tensor) -> torch.Tensor:
        """Return what the router maximises [T, A], from its network's output."""
        return values

    def _route(self, inputs: RouterInputs) -> Routing:
        if inputs.place not in self.networks_:
            raise RouterError(
                f"Router {self.info.name!r} was not trained on layer {inputs.layer}, site "
                f"{inputs.site}. Train it on the model that it routes."
            )
        own = self.actions_[inputs.place]
        states, scores, best = state_and_best(inputs, own, self.state)
        values = self._preference(inputs.place, self.networks_[inputs.place](states))
        taken = values.masked_fill(~own.allowed(best), -torch.inf).argmax(dim=-1)
        return own.routing(scores, best, taken, inputs)

    def _row(
        self, step: int, place: Site | None, reward: float, entropy: float, rate: float
    ) -> CurveRow:
        return {
            "router": self.info.name,
            "seed": self.seed,
            "lambda": self.price,
            "step": step,
            "layer": None if place is None else place[0],
            "reward": reward,
            "policy_entropy": entropy,
            "gate_rate": rate,
        }
