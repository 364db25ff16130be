"""One fit loop for every router that learns by imitation: small, seeded, on the CPU."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from capture.swap.rules import Decision, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import RoutingRouter
from explorer.routers.native import choose
from explorer.routers.scores import slots, student_scores, target_scores, weigh
from explorer.routers.selectors import Selector, chosen_formula

Loss = Callable[[torch.Tensor], torch.Tensor]
Network = TypeVar("Network", bound=nn.Module)

STEPS, BATCH_TOKENS, LEARNING_RATE = 400, 1024, 3e-2


def seeded(make: Callable[[], Network], seed: int) -> Network:
    """Make a module from a seed, leaving the global one as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def distill(
    parameters: Sequence[nn.Parameter],
    loss_of: Loss,
    n_tokens: int,
    *,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Minimise a loss over random batches of tokens by Adam, with a rate that falls to 0.

    Parameters
    ----------
    parameters : sequence of Parameter
    loss_of : callable
        Takes row numbers [B] and returns the mean loss of these tokens.
    n_tokens : int
        How many rows there are.
    steps, batch_tokens : int
    learning_rate : float
        At the start; it falls to 0 along a half cosine.
    seed : int
        Draws the batches.

    Returns
    -------
    list of float
        The loss of each step.

    Raises
    ------
    RouterError
        If there is no token, or the loss leaves the finite numbers.
    """
    if not n_tokens:
        raise RouterError("There is no token to learn from. Fit on a run with sampled tokens.")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(n_tokens, (min(batch_tokens, n_tokens),), generator=generator)
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if losses[-1] != losses[-1]:
                raise RouterError(
                    f"The loss became nan after {len(losses)} steps. Lower the learning rate."
                )
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def learn_shares(
    network: nn.Module,
    hidden: torch.Tensor,
    importance: torch.Tensor,
    *,
    steps: int,
    seed: int,
) -> list[float]:
    """Teach a network what share of a token's importance each part has.

    Parameters
    ----------
    network : Module
        From ``hidden`` to one logit per part; its softmax comes close to the shares.
    hidden : Tensor [T, D]
    importance : Tensor [T, P], at least 0
    steps, seed : int

    Returns
    -------
    list of float, nats a token
        Kullback-Leibler divergence from the shares at each step.
    """
    share = importance / importance.sum(-1, keepdim=True).clamp_min(1e-12)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logs = network(hidden[rows]).log_softmax(dim=-1)
        return nn.functional.kl_div(logs, share[rows], reduction="batchmean")

    return distill(
        list(network.parameters()),
        loss,
        len(hidden),
        steps=steps,
        batch_tokens=BATCH_TOKENS,
        learning_rate=LEARNING_RATE,
        seed=seed,
    )


def imitation_loss(
    logits: torch.Tensor, scores: torch.Tensor, inputs: RouterInputs
) -> torch.Tensor:
    """Return how far a student's logits are from a teacher's scores, nats a token.

    KL(teacher || student) for a softmax. For a sigmoid, the sum over experts of the same between
    each expert's Bernoulli distributions.
    """
    if inputs.score_function.startswith("sigmoid"):
        loss = nn.functional.binary_cross_entropy_with_logits(logits, scores, reduction="none")
        own = nn.functional.binary_cross_entropy(scores, scores, reduction="none")
        return (loss - own).sum(dim=-1).mean()
    teacher = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    logs = logits.log_softmax(dim=-1)
    return nn.functional.kl_div(logs, teacher, reduction="batchmean")


@dataclass(kw_only=True, eq=False)
class Student(RoutingRouter):
    """A router with a small network from hidden states to logits, distilled from the model's gate.

    Parameters
    ----------
    steps, batch_tokens : int
    learning_rate : float
    seed : int
        Seeds the first weights and the batches.
    selector : Selector, optional
        How experts are chosen; None = the model's own way.
    """

    rows = 65_536  # tokens scored at a time, which bounds memory

    steps: int = STEPS
    batch_tokens: int = BATCH_TOKENS
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    selector: Selector | None = None

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.selector is not None:
            formula = chosen_formula(self.info.formula, self.selector)
            self.info = replace(self.info, variable_k=self.selector.variable, formula=formula)

    @abstractmethod
    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make the network: [T, D] float32 to logits [T, E]."""

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").float()
        scores = target_scores(inputs, target)
        width = hidden.shape[-1]
        network = seeded(lambda: self.make(width, inputs.n_experts), self.seed)
        self.losses_ = distill(
            list(network.parameters()),
            lambda rows: imitation_loss(network(hidden[rows]), scores[rows], inputs),
            len(hidden),
            **self._options(),
        )
        self.network_ = network

    def _options(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "batch_tokens": self.batch_tokens,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden = inputs.tensor("hidden").float()
        logits = torch.cat([self.network_(part) for part in torch.split(hidden, self.rows)])
        scores = student_scores(logits, inputs)
        ids = choose(scores, inputs, selector=self.selector)
        return slots(scores, ids, weigh(scores, ids, inputs))
