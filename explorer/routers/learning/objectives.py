"""Objectives of reinforcement learning, each a small function that ground truth can be held to."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from explorer.errors import RouterError
from explorer.routers.learning.actions import STATISTICS
from explorer.routers.learning.exploration import Log
from explorer.routers.learning.training import CURVE_POINTS

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.02
BATCH_TOKENS = 2048
APART = 5  # every n-th token of a log tells when to stop
CLIP = 3.0  # nats; the loss of a single token has a long tail


class StateNet(nn.Module):
    """From states to one number for each action: linear in hidden, a small network in the rest.

    A reward is noisy, ten times the effect of an expert. A network as wide as the hidden state
    would learn that noise by heart; what is linear in it has a parameter for each of its values.

    Parameters
    ----------
    states : Tensor [N, F]
        Their mean and spread standardise what comes in.
    n_actions, width : int
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, states: torch.Tensor, n_actions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", states.mean(dim=0))
        self.register_buffer("spread", states.std(dim=0, correction=0).clamp_min(1e-6))
        self.n_known = len(STATISTICS)
        n_hidden = states.shape[-1] - self.n_known
        self.linear = nn.Linear(n_hidden, n_actions, device=states.device) if n_hidden else None
        self.inner = nn.Linear(self.n_known, width, device=states.device)
        self.outer = nn.Linear(width, n_actions, device=states.device)
        # all actions start alike
        for layer in (self.linear, self.outer):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return numbers [T, A] of states [T, F]."""
        standard = (states - self.mean) / self.spread
        values: torch.Tensor = self.outer(self.inner(standard[:, -self.n_known :]).tanh())
        if self.linear is not None:
            values = values + self.linear(standard[:, : -self.n_known])
        return values


def log_policy(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of actions [..., A], ``-inf`` where an action is not allowed."""
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)


def policy_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each policy [...], nats."""
    # a finite stand-in, as 0 * inf would poison the gradient
    finite = log_probs.clamp_min(-1e4)
    return -(log_probs.exp() * finite).sum(dim=-1)


def ips_reward(
    log_probs: torch.Tensor,
    actions: torch.Tensor,
    propensity: torch.Tensor,
    rewards: torch.Tensor,
) -> torch.Tensor:
    """Return an unbiased estimate of a policy's mean reward from actions that others drew.

    Parameters
    ----------
    log_probs : Tensor [N, A]
        Of the policy that is estimated.
    actions, propensity, rewards : Tensor [P, N]
        What was drawn, with which probability, and what came of it.

    References
    ----------
    Horvitz and Thompson 1952; as for logged bandits in Bottou et al. 2013, arXiv:1209.2355.
    """
    chosen = log_probs.expand(len(actions), -1, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return (chosen.exp() / propensity * rewards).mean()


def score_function_loss(
    log_probs: torch.Tensor, actions: torch.Tensor, advantage: torch.Tensor
) -> torch.Tensor:
    """Return a loss whose gradient is minus the policy gradient from the policy's own actions [T].

    References
    ----------
    Williams 1992, "Simple statistical gradient-following algorithms", eq. 5 (REINFORCE).
    """
    chosen = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return -(chosen * advantage).mean()


def q_target(
    reward: torch.Tensor, next_values: torch.Tensor | None, next_allowed: torch.Tensor | None
) -> torch.Tensor:
    """Return what an action's value should be [T]: its reward, plus the best that can follow.

    Parameters
    ----------
    reward : Tensor [T]
    next_values, next_allowed : Tensor [T, A], or None at the end
        Of the target network in the next state. Nothing is discounted.
    """
    if next_values is None or next_allowed is None:
        return reward
    return reward + next_values.masked_fill(~next_allowed, -torch.inf).amax(dim=-1)


def q_loss(values: torch.Tensor, actions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the Huber loss between taken actions' values and their targets, [..., T]."""
    taken = values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return nn.functional.smooth_l1_loss(taken, target)


@dataclass(frozen=True, eq=False)
class EpisodeStep:
    """Transitions of ``T`` tokens at one layer.

    Attributes
    ----------
    states, allowed, actions, rewards : Tensor [T, F], [T, A], [T], [T]
    """

    states: torch.Tensor
    allowed: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor


class LayerQ:
    """Multi-step Q-learning over layers: one network each, and a copy that targets come from.

    Parameters
    ----------
    networks : sequence of Module
        In the order of the layers; states [T, F] to values [T, A].
    learning_rate : float

    References
    ----------
    Mnih et al. 2015, "Human-level control through deep reinforcement learning" (target network).
    """

    def __init__(self, networks: Sequence[nn.Module], *, learning_rate: float) -> None:
        self.networks = list(networks)
        parameters = [p for network in networks for p in network.parameters()]
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        self.sync()

    def sync(self) -> None:
        """Let targets come from the networks as they are now."""
        self._targets = [deepcopy(network) for network in self.networks]

    def update(self, steps: Sequence[EpisodeStep]) -> float:
        """Take one gradient step on the same tokens' transitions in all layers; return the loss."""
        losses = []
        for at, step in enumerate(steps):
            later = later_allowed = None
            if at + 1 < len(steps):
                with torch.no_grad():
                    later = self._targets[at + 1](steps[at + 1].states)
                later_allowed = steps[at + 1].allowed
            target = q_target(step.rewards, later, later_allowed)
            losses.append(q_loss(self.networks[at](step.states), step.actions, target))
        loss = torch.stack(losses).sum()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return float(loss.detach())


def is_point(step: int, steps: int) -> bool:
    """Whether a step of a training is a point of its curve; the first and the last are."""
    return step in (0, steps - 1) or step % max(1, steps // CURVE_POINTS) == 0


def learn_from_log(
    network: nn.Module,
    log: Log,
    states: torch.Tensor,
    loss_of: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor],
    rewards: torch.Tensor,
    *,
    steps: int,
    seed: int,
    watch: Callable[[int], None],
) -> None:
    """Minimise a loss over random tokens of a log by Adam, with a rate that falls to 0.

    A fifth of the tokens is kept apart; the network ends as it was where their loss was least.

    Parameters
    ----------
    network : Module
        States [B, F] to [B, A].
    log : Log
    states : Tensor [N, F]
        Of the log's tokens, as the network takes them.
    loss_of : callable
        Takes the network's output and a batch: ``allowed`` [B, A], ``actions``, ``propensity``
        and ``rewards`` [P, B], as whose mean it returns its loss.
    rewards : Tensor [P, N]
    steps, seed : int
    watch : callable
        Told the number of each step before it is taken.

    Raises
    ------
    RouterError
        If the loss leaves the finite numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    order = torch.randperm(len(states), generator=generator).to(states.device)
    apart, rest = order[: max(1, len(order) // APART)], order[len(order) // APART :]

    def loss_at(rows: torch.Tensor) -> torch.Tensor:
        batch = {
            "allowed": log.allowed[rows],
            "actions": log.actions[:, rows],
            "propensity": log.propensity[:, rows],
            "rewards": rewards[:, rows],
        }
        return loss_of(network(states[rows]), batch)

    least, kept = torch.inf, deepcopy(network.state_dict())
    for step in range(steps + 1):
        if is_point(step, steps) or step == steps:
            with torch.no_grad():
                now = float(loss_at(apart))
            if not math.isfinite(now):
                raise RouterError(
                    f"The loss became {now} after {step} steps. Lower the price, or explore more "
                    "tokens."
                )
            if now < least:
                least, kept = now, deepcopy(network.state_dict())
        if step == steps:
            break
        watch(step)
        picked = torch.randint(len(rest), (min(BATCH_TOKENS, len(rest)),), generator=generator)
        loss = loss_at(rest[picked.to(rest.device)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.load_state_dict(kept)
    network.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = None
