"""Reinforcement learning from exploration of one layer at a time, and what its routers share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from capture.store.records import Place
from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.learning.actions import (
    STATISTICS,
    ActionKind,
    Actions,
    StateKind,
    make_actions,
    state_and_best,
)
from explorer.routers.learning.exploration import CostKind, Log, action_costs, explore
from explorer.routers.learning.imitation import seeded
from explorer.routers.learning.objectives import (
    CLIP,
    StateNet,
    ips_reward,
    is_point,
    learn_from_log,
    log_policy,
    policy_entropy,
    q_loss,
)
from explorer.routers.learning.training import CurveRow, TrainedRouter, TrainingSession


@dataclass(kw_only=True, eq=False)
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
        See :func:`explorer.routers.learning.exploration.action_costs`.
    width : int
        Of the network's hidden layer.
    steps, seed : int
        Of the training.
    """

    price: float = 0.02
    actions: ActionKind = "count"
    most: int | None = None
    least: int | None = None
    state: StateKind = "full"
    cost: CostKind = "experts"
    width: int = 16
    steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.price < 0 or self.state not in ("full", "gate"):
            raise RouterError(
                f"Expected price >= 0 and state 'full' or 'gate', got {self.price} and "
                f"{self.state!r}."
            )
        if self.state == "gate":
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
        self.actions_ = self._actions(session)
        self.costs_ = action_costs(session, self.actions_, self.cost)
        self.networks_: dict[Place, nn.Module] = {}
        self.curves_ = []

    def _actions(self, session: TrainingSession) -> dict[Place, Actions]:
        """Make the actions of all sites."""
        return {
            (site.info.layer, site.info.site): make_actions(
                self.actions, site.info.top_k, most=self.most, least=self.least
            )
            for site in session.sites
        }

    def _network(self, place: Place, states: torch.Tensor) -> StateNet:
        """Make a layer's network, from the router's seed."""
        n_actions = len(self.actions_[place].used)
        seed = self.seed * 1009 + place[0] * 101 + place[1]
        return seeded(lambda: StateNet(states, n_actions, self.width), seed)

    def _seen(self, states: torch.Tensor) -> torch.Tensor:
        """Return the part of full states that this router looks at."""
        return states if self.state == "full" else states[:, -len(STATISTICS) :]

    def _preference(self, place: Place, values: torch.Tensor) -> torch.Tensor:
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
        self, step: int, place: Place | None, reward: float, entropy: float, rate: float
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


TOKENS, PASSES, WATCHED = 120_000, 1, 8192
ENTROPY_BONUS = 0.002
DEAREST, HALVINGS = 16.0, 40  # nats an expert; halvings of the range in which a price is sought

Watch = Callable[[int], None]  # told the number of each step


@dataclass(kw_only=True, eq=False)
class _OfflineRouter(ActionRouter):
    """Learns each layer for itself from one log of explored actions.

    Parameters
    ----------
    tokens : int
        Of the fit split that are explored; a layer keeps 4 (D + 4) bytes of each.
    passes : int
        Random actions of each token and layer. More tokens teach more than more passes.
    """

    tokens: int = TOKENS
    passes: int = PASSES

    def _train(self, session: TrainingSession) -> None:
        self._prepare(session)
        for number, (place, log) in enumerate(self.explored(session).items()):
            states = self._seen(log.states)
            network = self._network(place, states)

            def watch(
                step: int,
                number: int = number,
                place: Place = place,
                log: Log = log,
                network: nn.Module = network,
            ) -> None:
                done = (number + step / self.steps) / len(self.actions_)
                session.report(done, f"learning layer {place[0]}")
                if is_point(step, self.steps):
                    self.curves_.append(self._measured(step, place, log, network))

            self._learn(place, network, log, states, watch)
            self.networks_[place] = network
        self._finish(session)

    def explored(self, session: TrainingSession) -> Mapping[Place, Log]:
        """Return the session's log of these actions, explored once a session and seed."""
        actions = self._actions(session)
        amount = {"n_tokens": self.tokens, "passes": self.passes, "seed": self.seed}
        key = ("explore", self.actions, self.most, self.least, *amount.values())
        return session.once(key, lambda: explore(session, actions, **amount))

    def _rewards(self, place: Place, log: Log) -> torch.Tensor:
        """Return what each logged action earned, [P, N], nats."""
        return -log.change - self.price * self.costs_[place].to(log.change.device)[log.actions]

    def _measured(self, step: int, place: Place, log: Log, network: nn.Module) -> CurveRow:
        """Return a point of the curve, estimated on the log's first tokens."""
        few = slice(0, WATCHED)
        with torch.no_grad():
            values = network(self._seen(log.states[few]))
            logs = self._log_policy(self._preference(place, values), log.allowed[few])
        reward = ips_reward(
            logs, log.actions[:, few], log.propensity[:, few], self._rewards(place, log)[:, few]
        )
        own = self.actions_[place]
        counts = own.n_experts.float().to(logs.device)
        rate = (logs.exp() @ counts).mean() / counts[own.native].clamp_min(1)
        return self._row(
            step, place, float(reward), float(policy_entropy(logs).mean()), float(rate)
        )

    @abstractmethod
    def _log_policy(self, preference: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities [T, A] of the policy that is being learned."""

    @abstractmethod
    def _learn(
        self, place: Place, network: nn.Module, log: Log, states: torch.Tensor, watch: Watch
    ) -> None:
        """Fit one layer's network to its log."""

    def _finish(self, session: TrainingSession) -> None:
        """Do what is left when all layers have learned."""


@registered("policy_gradient")
class PolicyGradientRouter(_OfflineRouter):
    """Policy gradient from logged exploration, against the model's own loss on the same token.

    Notes
    -----
    Differs from the source, which trains all layers' allocators at once by PPO: here each layer's
    actions are explored while the others do what the model does, so that every reward has one
    cause, and are weighed by inverse propensity. The source's reward is the likelihood with a
    penalty on activation; this one is the change against the model itself (the paired baseline),
    which takes away most of the variance. Advantages are clipped at 3 nats.
    """

    def _log_policy(self, preference: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return log_policy(preference, allowed)

    def _learn(
        self, place: Place, network: nn.Module, log: Log, states: torch.Tensor, watch: Watch
    ) -> None:
        rewards = self._rewards(place, log)
        # a constant leaves the gradient's mean as it is and takes from its variance
        advantage = (rewards - rewards.mean()).clamp(-CLIP, CLIP)

        def loss(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            logs = log_policy(logits, batch["allowed"])
            value = ips_reward(logs, batch["actions"], batch["propensity"], batch["rewards"])
            return -value - ENTROPY_BONUS * policy_entropy(logs).mean()

        learn_from_log(
            network, log, states, loss, advantage, steps=self.steps, seed=self.seed, watch=watch
        )


@registered("q_learning")
class QLearningRouter(_OfflineRouter):
    """One-step Q-learning fitted to logged exploration; actions are taken greedily.

    Parameters
    ----------
    experts_per_token : float, optional
        Mean over the fit split; sets the price in place of ``price``, one for all layers. Curves
        are drawn at ``price``.

    Notes
    -----
    Differs from the source, whose values reach over several layers; see ``q_multistep``. The
    value of an action is minus its change in loss; its price is taken off afterwards, so that one
    training serves every price.
    """

    experts_per_token: float | None = None

    def _preference(self, place: Place, values: torch.Tensor) -> torch.Tensor:
        price = getattr(self, "price_", self.price)
        return values - price * self.costs_[place].to(values.device)

    def _finish(self, session: TrainingSession) -> None:
        self.price_ = self.price
        if self.experts_per_token is not None:
            self.price_ = self._price_of(self.experts_per_token, self.explored(session))

    def _price_of(self, wanted: float, logs: Mapping[Place, Log]) -> float:
        """Return the price at which a mean of ``wanted`` experts a token run."""
        with torch.no_grad():
            known = {p: self.networks_[p](self._seen(log.states)) for p, log in logs.items()}
        low, high = -DEAREST, DEAREST
        for _ in range(HALVINGS):
            self.price_ = (low + high) / 2
            counts = []
            for place, values in known.items():
                preferred = self._preference(place, values)
                best = preferred.masked_fill(~logs[place].allowed, -torch.inf).argmax(dim=-1)
                n_experts = self.actions_[place].n_experts.to(best.device)
                counts.append(float(n_experts[best].double().mean()))
            low, high = (
                (self.price_, high) if sum(counts) / len(counts) > wanted else (low, self.price_)
            )
        return high

    def _log_policy(self, preference: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        best = preference.masked_fill(~allowed, -torch.inf).argmax(dim=-1)
        return nn.functional.one_hot(best, preference.shape[-1]).float().log()

    def _learn(
        self, place: Place, network: nn.Module, log: Log, states: torch.Tensor, watch: Watch
    ) -> None:
        def loss(values: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            wide = values.expand(len(batch["actions"]), -1, -1)
            return q_loss(wide, batch["actions"], batch["rewards"])

        learn_from_log(
            network, log, states, loss, -log.change, steps=self.steps, seed=self.seed, watch=watch
        )
