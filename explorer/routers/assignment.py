"""Rules that look at a batch: expert choice, balanced assignment, Sinkhorn, capacity."""

from collections.abc import Iterator
from dataclasses import replace
from math import log
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment

from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.metrics.load import expert_capacity
from explorer.routers.contract import registered
from explorer.routers.native import GateRouter, TopKRouter, host_choice
from explorer.routers.scores import host_logits, host_scores, masked_ids, slots, weigh
from explorer.routers.selectors import top_ids

MAX_WINDOW = 2048  # the assignment's time grows with the cube of the window


def windows(n_tokens: int, size: int | None) -> Iterator[slice]:
    """Yield consecutive windows of at most ``size`` tokens; None = one window of all."""
    step = size or max(1, n_tokens)
    for start in range(0, n_tokens, step):
        yield slice(start, min(n_tokens, start + step))


def best_tokens(scores: torch.Tensor, places: int) -> torch.Tensor:
    """Return which tokens are among the best of each expert, [T, E] bool, ties to the earlier."""
    # one expert's tokens side by side in memory: several times quicker to sort
    by_expert = scores.T.contiguous()
    rows = by_expert.sort(dim=-1, descending=True, stable=True).indices[:, :places]
    return torch.zeros_like(by_expert, dtype=torch.bool).scatter(-1, rows, True).T


@registered("expert_choice")
class ExpertChoiceRouter(GateRouter):
    """Let every expert take the tokens that score highest with it.

    Parameters
    ----------
    experts_per_token : float, optional
        Mean over tokens (the source's capacity factor); None = as many as the model takes.
    window : int, optional
        Tokens among which the experts choose; None = the whole batch.
    raw : bool
        Weigh as the source does: with each expert's softmax score, whatever the others of the
        token have, where the model's convention may divide them by their sum.

    Notes
    -----
    Not usable for generating text: whether a token is taken depends on later tokens, and a model
    trained so learns to read the future from it (up to 50 bits a token in the source).
    """

    experts_per_token: float | None = None
    window: int | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.raw:
            formula = f"{self.info.formula};  w_e = p_te"
            self.info = replace(self.info, formula=formula, weighing="own", differs="")

    def _route(self, inputs: RouterInputs) -> Routing:
        scores = host_scores(inputs.tensor("logits"), inputs)
        wanted = inputs.top_k if self.experts_per_token is None else self.experts_per_token
        taken = torch.zeros_like(scores, dtype=torch.bool)
        for window in windows(len(scores), self.window):
            here = scores[window]
            places = min(len(here), max(1, int(len(here) * wanted / inputs.n_experts)))
            taken[window] = best_tokens(here, places)
        ids = masked_ids(taken)
        if self.raw:
            return slots(scores, ids, scores.gather(-1, ids.clamp_min(0)) * inputs.scaling)
        return slots(scores, ids, weigh(scores, ids, inputs))


@registered("base")
class BaseRouter(GateRouter):
    """Assign tokens to experts so that loads are equal and the sum of log scores is largest.

    Parameters
    ----------
    window : int
        Tokens assigned together, at most 2,048; the exact assignment is cubic in it.

    Notes
    -----
    Differs from the source: exact (``scipy.optimize.linear_sum_assignment``) instead of an
    auction; for more than one expert per token the assignment is repeated without the pairs
    already made. The source assigns in training only and is greedy afterwards: balance measured
    here is that of training. Its gate ``sigmoid(h w)`` gives way to the model's own weights. On a
    model with a selection bias or groups, what it sorts its experts by stands for the logits.
    """

    window: int = 512

    def __post_init__(self) -> None:
        """Check what was given."""
        if not 1 <= self.window <= MAX_WINDOW:
            raise RouterError(f"Expected a window of 1 to {MAX_WINDOW} tokens, got {self.window}.")

    def _route(self, inputs: RouterInputs) -> Routing:
        worth = self._worth(inputs)
        ids = torch.full((len(worth), inputs.top_k), -1)
        for window in windows(len(worth), self.window):
            profit = worth[window].double().cpu().numpy()
            chosen = balanced_assignment(profit, inputs.top_k)
            ids[window] = torch.from_numpy(chosen)
        scores = host_scores(inputs.tensor("logits"), inputs)
        ids = ids.to(scores.device)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def _worth(self, inputs: RouterInputs) -> torch.Tensor:
        """Return what an expert is worth to a token, [T, E]."""
        if inputs.selection_bias is None and inputs.n_groups is None:
            return host_logits(inputs)
        choice = host_choice(inputs)[1]
        possible = choice > -torch.inf
        # experts outside the model's groups are the worst, yet there to even out the load
        worst = choice.where(possible, 0.0).amin(dim=-1, keepdim=True) - 1.0
        return choice.where(possible, worst)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the gate's operations and, roughly, the assignment's: window squared a token."""
        return 2.0 * d * n_experts + float(top_k) * self.window**2


def balanced_assignment(profit: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    """Assign every token to ``k`` distinct experts with equal loads and the largest total profit.

    Parameters
    ----------
    profit : array [T, E]
    k : int

    Returns
    -------
    array [T, k], int64
        Experts. In each of the ``k`` rounds every expert gets ``T // E`` tokens or one more; a
        round is optimal given those before it.
    """
    n_tokens, n_experts = profit.shape
    if k > n_experts:
        raise RouterError(f"Expected at most {n_experts} experts per token, got k={k}.")
    chosen = np.full((n_tokens, k), -1, dtype=np.int64)
    sure = n_tokens // n_experts
    columns = np.repeat(np.arange(n_experts), sure + 1)
    # the last copy of each expert is only for the tokens that are left over
    extra = np.tile(np.arange(sure + 1) == sure, n_experts)
    span = float(np.ptp(profit)) + 1.0 if profit.size else 1.0
    bonus = np.where(extra, 0.0, 2 * span * n_tokens)
    value = profit.copy()
    for slot in range(k):
        rows, picked = linear_sum_assignment(value[:, columns] + bonus, maximize=True)
        chosen[rows, slot] = columns[picked]
        value[rows, columns[picked]] -= 8 * span * n_tokens * (n_tokens + 1)
    return chosen


@registered("sinkhorn")
class SinkhornRouter(GateRouter):
    """Balance the logits by Sinkhorn's iteration, then take each token's best experts.

    Parameters
    ----------
    temperature : float
        Of the transport; towards 0 it becomes the optimal assignment.
    max_iterations : int
        The iteration stops here if it has not converged.
    tolerance : float
        On the experts' shares, relative.
    window : int, optional
        Tokens balanced together; None = the whole batch.

    Notes
    -----
    Differs from Megatron-Core's code: in the log domain, since ``exp`` of a float32 logit above 88
    overflows, and with a cap on the iterations, since that loop need not end. As there, the plan
    decides about the choice only, and only in training.
    """

    temperature: float = 1.0
    max_iterations: int = 200
    tolerance: float = 0.0001
    window: int | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.max_iterations < 1:
            raise RouterError(f"Expected at least one iteration, got {self.max_iterations}.")

    def _route(self, inputs: RouterInputs) -> Routing:
        logits = host_logits(inputs)
        plan = torch.zeros_like(logits)
        for window in windows(len(logits), self.window):
            plan[window] = log_sinkhorn(
                logits[window] / self.temperature,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
            ).float()
        ids = top_ids(plan, inputs.top_k)
        scores = host_scores(inputs.tensor("logits"), inputs)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the gate's operations and those of the iterations, at most."""
        return 2.0 * d * n_experts + 8.0 * n_experts * self.max_iterations


def log_sinkhorn(
    logits: torch.Tensor, *, max_iterations: int = 200, tolerance: float = 1e-4
) -> torch.Tensor:
    """Return the logarithm of the plan nearest to ``exp(logits)`` with equal margins.

    Parameters
    ----------
    logits : Tensor [T, E]
    max_iterations : int
    tolerance : float
        Largest relative error of a row's sum at which it stops.

    Returns
    -------
    Tensor [T, E], float64
        Columns sum to ``1/E`` exactly, rows to ``1/T`` up to the tolerance or the cap. A constant
        added to a row or a column of the logits changes nothing.
    """
    plan = logits.double()
    n_tokens, n_experts = plan.shape
    if not n_tokens:
        return plan
    for _ in range(max_iterations):
        plan = plan - plan.logsumexp(dim=1, keepdim=True) - log(n_tokens)
        plan = plan - plan.logsumexp(dim=0, keepdim=True) - log(n_experts)
        error = (plan.logsumexp(dim=1) + log(n_tokens)).exp() - 1
        if float(error.abs().max()) < tolerance:
            break
    return plan


@registered("capacity_probs")
class CapacityRouter(GateRouter):
    """Take the model's own choice, and drop what exceeds each expert's capacity.

    Parameters
    ----------
    capacity_factor : float
        1 leaves exactly as many places as there are assignments.
    window : int, optional
        Tokens that share the places, as those of one call do; None = the whole batch.

    Notes
    -----
    As in Megatron-Core, the weights of what is left do not change.
    """

    policy: ClassVar[Literal["probs", "position"]] = "probs"
    capacity_factor: float = 1.25
    window: int | None = None

    def _route(self, inputs: RouterInputs) -> Routing:
        native = TopKRouter()._route(inputs)  # with gradients, where a model learns with it
        chosen, weights = native.expert_ids >= 0, native.weights
        dense = torch.full_like(native.scores, -1.0)
        dense.scatter_(-1, native.expert_ids.clamp_min(0), weights.where(chosen, -1.0))
        kept = torch.zeros_like(dense, dtype=torch.bool)
        for window in windows(len(dense), self.window):
            n_assignments = int((dense[window] >= 0).sum())
            places = expert_capacity(n_assignments, inputs.n_experts, self.capacity_factor)
            kept[window] = self._keep(dense[window], places)
        ids = native.expert_ids.where(chosen & kept.gather(-1, native.expert_ids.clamp_min(0)), -1)
        return slots(native.scores, ids, weights)

    def _keep(self, weights: torch.Tensor, places: int) -> torch.Tensor:
        """Return which assignments stay, of weights [T, E] that are -1 where there is none."""
        taken = weights >= 0
        if self.policy == "position":
            return taken & (taken.cumsum(dim=0) <= places)
        return taken & best_tokens(weights, places)


@registered("capacity_position")
class CapacityByPositionRouter(CapacityRouter):
    """Take the model's own choice; each expert takes the first assignments of the batch only."""

    policy = "position"
