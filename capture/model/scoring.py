"""Find out which rule turned a router's scores into its choice and its weights."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch

from kernels.ops.gate import ScoreFunction, gate

# Llama 4 and Kolibri take the sigmoid of each chosen logit; a rule that nobody knows is measured by
# the softmax of its scores, which is defined for any finite scores
_STAND_IN = {"sigmoid_topk": "sigmoid", "other": "softmax"}

# what some routers choose by, where that is neither their scores nor what their weights are made of
RANKINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scores": lambda scores: scores,  # Kolibri: logits plus bias
    "sqrtsoftplus": lambda scores: torch.nn.functional.softplus(scores).sqrt(),  # DeepSeek-V4
}
# the gate takes these as they are
RANKED: ScoreFunction = "probabilities"
NO_GROUPS = (None, None)

# relative error of a weight: rounding to 8 (bfloat16) or 11 bits and the router's own arithmetic
HALF_TOLERANCE = 2e-2
TOLERANCE = 1e-3
# below this, float16 runs out of bits
HALF_SMALLEST = 1e-3
# what a row of probabilities may be off 1, in the router's own dtype
SUM_TOLERANCE = 1e-2
# scores this close, relative to the best, are ordered by rounding and not by the rule
TIE, HALF_TIE = 1e-6, 2e-2
# of the pairs of numbers that are seen, how many have to be seen again
MOSTLY = 0.5
# how many tokens may be decided by rounding
DECIDED_BY_ROUNDING = 0.05


def score_function_of(
    scores: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, *, half: bool
) -> str:
    """Name the rule that explains the weights by the scores.

    Parameters
    ----------
    scores : Tensor [T, E], float32
        As the router put them out.
    expert_ids, weights : Tensor [T, K]
        What the experts were told.
    half : bool
        Whether the weights were rounded to 16 bits.

    Returns
    -------
    str
        "probabilities" when every row of scores is a distribution, else "softmax" or "sigmoid"
        when the weights are that function of the scores up to a factor per token or per site,
        else "other".
    """
    sums = scores.sum(dim=-1)
    if bool((scores >= 0).all()) and bool(((sums - 1).abs() < SUM_TOLERANCE).all()):
        return "probabilities"
    slots = expert_ids.clamp_min(0)
    used = (expert_ids >= 0) & (weights > (HALF_SMALLEST if half else 0.0))
    errors = {
        name: _misfit(values.gather(-1, slots), weights, used)
        for name, values in (("softmax", scores.softmax(-1)), ("sigmoid", scores.sigmoid()))
    }
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < (HALF_TOLERANCE if half else TOLERANCE) else "other"


def statistics_by(score_function: str) -> ScoreFunction:
    """Name the function by which the statistics of a site with this label are taken."""
    return cast(ScoreFunction, _STAND_IN.get(score_function, score_function))


def explains_choice(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    score_function: str,
    *,
    selection_bias: torch.Tensor | None,
    groups: tuple[int | None, int | None],
    half: bool = False,
) -> bool:
    """Whether choosing by scores, bias and groups (count, kept) gives the ids [T, K] seen.

    The test is the margin itself, as it will be recorded: it is negative where a chosen expert
    scores below one left out. A router that works in 16 bits (``half``) may order near equals
    otherwise than the margin does, for a few tokens.
    """
    if bool((expert_ids < 0).all()):
        return False
    out = gate(
        scores,
        top_k=expert_ids.shape[-1],
        score_function=statistics_by(score_function),
        selection_bias=None if selection_bias is None else selection_bias.float().cpu(),
        n_groups=groups[0],
        top_groups=groups[1],
        expert_ids=expert_ids,
        weights=torch.ones_like(expert_ids, dtype=torch.float32),
    )
    best = out.weights.new_ones(()) if selection_bias is None else 1 + selection_bias.abs().max()
    close = out.margin >= -(HALF_TIE if half else TIE) * best.float().cpu()
    rounded = (out.margin < -TIE).float().mean()
    return bool(close.all()) and float(rounded) <= (DECIDED_BY_ROUNDING if half else 0.0)


class ExplainedRule(NamedTuple):
    """What explains every choice: bias and groups, beside a score function or a ranking.

    Attributes
    ----------
    score_function : str
    selection_bias : Tensor [E] or None
    groups : tuple of int, or of None
        How many there are, and how many of them are kept.
    ranking : str or None
        Of ``RANKINGS``.
    """

    score_function: str
    selection_bias: torch.Tensor | None
    groups: tuple[int | None, int | None]
    ranking: str | None = None


def rule_of(
    scores: torch.Tensor,
    expert_ids: torch.Tensor,
    score_functions: Sequence[str],
    *,
    selection_bias: torch.Tensor | None,
    groups: tuple[int | None, int | None],
    half: bool,
) -> ExplainedRule | None:
    """Return the first rule that explains the ids [T, K] by the scores [T, E], if one does.

    Parameters are those of :func:`explains_choice`; a router may carry a bias or groups that its
    configuration switches off.
    """
    tried = [(selection_bias, groups), (selection_bias, NO_GROUPS), (None, NO_GROUPS)]
    if selection_bias is None and groups != NO_GROUPS:
        # groups count by their best two, as they do beside a bias, and there is none (Mistral 4)
        tried.insert(1, (scores.new_zeros(scores.shape[-1]), groups))
    rules = [ExplainedRule(name, *one) for one, name in product(tried, score_functions)]
    rules += [
        ExplainedRule(score_functions[0], *one, name) for one, name in product(tried, RANKINGS)
    ]
    for rule in rules:
        if explains_choice(
            scores if rule.ranking is None else RANKINGS[rule.ranking](scores),
            expert_ids,
            rule.score_function if rule.ranking is None else RANKED,
            selection_bias=rule.selection_bias,
            groups=rule.groups,
            half=half,
        ):
            return rule
    return None


def are_weights(scores: torch.Tensor, expert_ids: torch.Tensor) -> bool:
    """Whether scores [T, E] are what was applied: 0 wherever an expert was not chosen [T, K]."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, expert_ids.clamp_min(0), True)
    return not bool(chosen.all()) and not bool(scores[~chosen].any())


def are_all_one(weights: torch.Tensor) -> bool:
    """Whether weights [T, 1] are the same number, as shares of the only expert are."""
    return weights.shape[-1] == 1 and _spread(weights.flatten(), dim=0) < TOLERANCE


def n_renumbered(scores: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> int:
    """Return how many experts have another number where they are told than in the scores, or 0.

    A server that places experts tells them physical ids. Then the best by score [T, E] and the
    heaviest of those told [T, K] go together one to one, in every token, under other numbers.
    """
    best = scores.topk(expert_ids.shape[-1]).indices
    told = expert_ids.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))
    pairs = torch.stack([best.flatten(), told.flatten().long()])
    kinds, counts = torch.unique(pairs, dim=-1, return_counts=True)
    one_to_one = all(len(torch.unique(row)) == len(row) for row in kinds)
    # seen once, a pair says nothing
    is_known = bool((counts > 1).float().mean() > MOSTLY)
    return int((kinds[0] != kinds[1]).sum()) if one_to_one and is_known else 0


def _misfit(values: torch.Tensor, weights: torch.Tensor, used: torch.Tensor) -> float:
    """Return the largest relative error of values [T, K] against weights, best of both factors."""
    ratio = torch.where(used, weights / values, torch.nan)
    per_token = _spread(ratio, dim=-1) if weights.shape[-1] > 1 else torch.inf
    return min(per_token, _spread(ratio.flatten(), dim=0))


def _spread(ratio: torch.Tensor, dim: int) -> float:
    """Return how far the ratios along ``dim`` are from one common factor, relative."""
    center = ratio.nanmedian(dim=dim, keepdim=True).values
    error = ((ratio / center) - 1).abs()
    return float(error.nan_to_num(0.0).max())
