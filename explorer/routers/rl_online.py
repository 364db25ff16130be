"""Routers by reinforcement learning on the run: all layers act at once and share one reward.

These are the honest comparison to learning from one layer at a time. A token's reward depends on
its actions in every layer, so that a single action's part drowns in the rest.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from capture.store.records import Place
from explorer.routers.contract import registered
from explorer.routers.learning.exploration import Acting, TextPasses
from explorer.routers.learning.objectives import (
    EpisodeStep,
    LayerQ,
    is_point,
    log_policy,
    policy_entropy,
    score_function_loss,
)
from explorer.routers.learning.training import TrainingSession
from explorer.routers.rl import ENTROPY_BONUS, ActionRouter

LEARNING_RATE = 3e-3
KEPT_BATCHES = 24  # of the replay memory
UPDATES, SAMPLE, SYNC = 4, 1024, 10
FIRST_EPSILON, LAST_EPSILON = 1.0, 0.1

ActedSites = Mapping[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(kw_only=True, eq=False)
class _OnlineRouter(ActionRouter):
    """Acts in all layers, batch after batch, and learns from each.

    Parameters
    ----------
    batch_tokens : int
        Of a forward pass; a step is one pass.
    """

    steps: int = 200
    batch_tokens: int = 1024

    def _train(self, session: TrainingSession) -> None:
        self._prepare(session)
        generator = torch.Generator().manual_seed(self.seed)

        def pick(place: Place, states: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
            probs = self._log_policy(place, self._seen(states), allowed).exp()
            # drawn on the CPU, so that every device draws the same
            drawn = torch.multinomial(probs.cpu(), 1, generator=generator)
            return drawn.squeeze(-1).to(states.device)

        rule = Acting(self.actions_, pick)
        runs = TextPasses(session, n_tokens=None, batch_tokens=self.batch_tokens)
        order = np.random.default_rng(self.seed).permutation(len(runs.batches))
        with runs.open(rule):
            for step in range(self.steps):
                session.report(step / self.steps, "learning in all layers at once")
                numbers = runs.batches[order[step % len(order)]]
                rule.only, keep = (), runs.kept(numbers)
                native = session.once(
                    ("native", self.batch_tokens, *numbers.tolist()),
                    lambda numbers=numbers: runs.losses(numbers),  # type: ignore[misc]
                )
                if not self.networks_:
                    self._start(session, rule, runs, numbers)
                self._on_step(step)
                rule.only = None
                change = runs.losses(numbers) - native
                seen = {
                    place: tuple(each[keep.to(each.device)] for each in found)
                    for place, found in rule.seen.items()
                }
                self._note(step, seen, change)  # type: ignore[arg-type]
                with torch.enable_grad():
                    self._learn(step, seen, change)  # type: ignore[arg-type]
        for network in self.networks_.values():
            network.requires_grad_(False)
            for parameter in network.parameters():
                parameter.grad = None
        self._end()

    def _start(
        self,
        session: TrainingSession,
        rule: Acting,
        runs: TextPasses,
        numbers: npt.NDArray[np.int64],
    ) -> None:
        """Make the networks; states are standardised by those of a first batch."""
        if not rule.seen:
            runs.losses(numbers)
        self.networks_ = {
            place: self._network(place, self._seen(found[0])) for place, found in rule.seen.items()
        }
        self._begin()

    def _costs(self, seen: ActedSites) -> dict[Place, torch.Tensor]:
        """Return what each token's action costs in each layer, [T] nats."""
        return {
            place: self.price * self.costs_[place].to(taken.device)[taken]
            for place, (_, _, taken) in seen.items()
        }

    def _note(self, step: int, seen: ActedSites, change: torch.Tensor) -> None:
        """Keep a point of the curves: one of all layers, and the layers' policies."""
        if not is_point(step, self.steps):
            return
        total = torch.stack(list(self._costs(seen).values())).sum(dim=0)
        reward = float((-change - total.to(change.device)).mean())
        entropies, rates = [], []
        for place, (states, allowed, taken) in seen.items():
            own = self.actions_[place]
            logs = self._log_policy(place, self._seen(states), allowed)
            entropies.append(float(policy_entropy(logs).mean()))
            ran = own.n_experts.to(taken.device)[taken].double().mean()
            rates.append(float(ran / max(1, int(own.n_experts[own.native]))))
            self.curves_.append(self._row(step, place, reward, entropies[-1], rates[-1]))
        mean_entropy, mean_rate = float(np.mean(entropies)), float(np.mean(rates))
        self.curves_.append(self._row(step, None, reward, mean_entropy, mean_rate))

    @abstractmethod
    def _log_policy(
        self, place: Place, states: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """Return the log-probabilities [T, A] with which actions are drawn in training."""

    @abstractmethod
    def _begin(self) -> None:
        """Make what learning needs, once the networks are there."""

    def _on_step(self, step: int) -> None:
        """Do what comes before a step."""

    @abstractmethod
    def _learn(self, step: int, seen: ActedSites, change: torch.Tensor) -> None:
        """Learn from what one pass did."""

    @abstractmethod
    def _end(self) -> None:
        """Drop what only learning needs."""


@registered("reinforce")
class ReinforceRouter(_OnlineRouter):
    """Plain on-policy REINFORCE in all layers at once.

    Notes
    -----
    Every layer's action is credited with the token's whole reward: minus the change in loss
    against the model itself, minus the price of what ran in all layers. A running mean is the
    baseline. Differs from the source, which starts from gates trained with the loss and adds
    their gradient.
    """

    def _begin(self) -> None:
        parameters = [p for network in self.networks_.values() for p in network.parameters()]
        self._optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        self._baseline: torch.Tensor | None = None

    def _log_policy(
        self, place: Place, states: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        return log_policy(self.networks_[place](states), allowed)

    def _learn(self, step: int, seen: ActedSites, change: torch.Tensor) -> None:
        total = torch.stack(list(self._costs(seen).values())).sum(dim=0)
        reward = -change - total.to(change.device)
        if self._baseline is None:
            self._baseline = reward.mean()
        advantage = reward - self._baseline
        losses = []
        for place, (states, allowed, taken) in seen.items():
            logs = self._log_policy(place, self._seen(states), allowed)
            losses.append(score_function_loss(logs, taken, advantage.to(logs.device)))
            losses.append(-ENTROPY_BONUS * policy_entropy(logs).mean())
        self._optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._baseline = 0.9 * self._baseline + 0.1 * reward.mean()

    def _end(self) -> None:
        del self._optimizer, self._baseline


@registered("q_multistep")
class MultiStepQRouter(_OnlineRouter):
    """Q-learning over the layers as steps of one episode, with a target network.

    Notes
    -----
    A token's episode runs through the layers: the price of what ran is paid at each, the change
    in loss at the last. Nothing is discounted. Actions are drawn evenly with a probability that
    falls from 1 to 0.1 over the first half of the training, else the best; afterwards always the
    best. Differs from the source's code, whose rewards of single actions are subtracted.
    """

    def _begin(self) -> None:
        ordered = [self.networks_[place] for place in sorted(self.networks_)]
        self._learner = LayerQ(ordered, learning_rate=LEARNING_RATE)
        self._memory: deque[list[EpisodeStep]] = deque(maxlen=KEPT_BATCHES)
        self._sampler = torch.Generator().manual_seed(self.seed + 1)
        self._epsilon = FIRST_EPSILON

    def _on_step(self, step: int) -> None:
        share = min(1.0, step / max(1, self.steps // 2))
        self._epsilon = FIRST_EPSILON + share * (LAST_EPSILON - FIRST_EPSILON)

    def _log_policy(
        self, place: Place, states: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            values = self.networks_[place](states).masked_fill(~allowed, -torch.inf)
        even = allowed.float() / allowed.sum(dim=-1, keepdim=True)
        best = torch.nn.functional.one_hot(values.argmax(dim=-1), values.shape[-1]).float()
        return (self._epsilon * even + (1 - self._epsilon) * best).log()

    def _learn(self, step: int, seen: ActedSites, change: torch.Tensor) -> None:
        costs, places = self._costs(seen), sorted(seen)
        episode = []
        for place in places:
            states, allowed, taken = seen[place]
            reward = -costs[place]
            if place == places[-1]:
                reward = reward - change.to(reward.device)
            episode.append(EpisodeStep(self._seen(states), allowed, taken, reward))
        self._memory.append(episode)
        for _ in range(UPDATES):
            at = int(torch.randint(len(self._memory), (1,), generator=self._sampler))
            old = self._memory[at]
            n_tokens = len(old[0].rewards)
            rows = torch.randint(n_tokens, (min(SAMPLE, n_tokens),), generator=self._sampler)
            self._learner.update([_some(each, rows) for each in old])
        if step % SYNC == 0:
            self._learner.sync()

    def _end(self) -> None:
        del self._learner, self._memory, self._sampler, self._epsilon


def _some(step: EpisodeStep, rows: torch.Tensor) -> EpisodeStep:
    rows = rows.to(step.states.device)
    return EpisodeStep(
        step.states[rows], step.allowed[rows], step.actions[rows], step.rewards[rows]
    )
