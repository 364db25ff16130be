"""How parts are chosen once they have scores: the best k, all above a threshold, or the top p."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch

from explorer.errors import RouterError
from explorer.routers.scores import masked_ids

# why a rule with a selector does not repeat the model, for its card
SELECTOR_DECIDES = "The selector chooses in the place of the model's k."


def top_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ``k`` best columns of each row, best first, ties to the lower one: [T, k] int64.

    ``torch.topk`` breaks ties as it likes, and after quantisation exact ties are common; the few
    rows with a tie among their best are sorted again, stably.

    Of columns alone: the experts that a model itself would take are in
    :func:`explorer.routers.native.host_best`.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise RouterError(f"Expected 1 <= k <= {n} (the number of experts or parts), got k={k}.")
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)  # the first of equal ones
    wide = scores.topk(min(k + 1, n), dim=-1)
    ids = wide.indices[:, :k].clone()
    equal = wide.values[:, 1:] == wide.values[:, :-1]
    if bool(equal.any()):
        tied = equal.any(dim=-1)
        ids[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


class Selector(ABC):
    """Choose among scored parts, token by token.

    Attributes
    ----------
    variable : bool
        Whether the number of kept parts depends on the scores.
    """

    variable: bool

    @property
    def alone(self) -> bool:
        """Whether a part is kept by its own score, whatever the others have."""
        return False

    def within(self, n_parts: int) -> Self:
        """Return the selector for so few parts: it never asks for more than there are."""
        return self

    @abstractmethod
    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool, of scores [T, P]."""

    def among(self, scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool, where something else says which is better.

        Parameters
        ----------
        scores : Tensor [T, P]
            What thresholds and shares are held against.
        order : Tensor [T, P]
            What parts are sorted by, such as scores plus a model's selection bias; ``-inf`` = out
            of the question.
        """
        return self.mask(scores) & (order > -torch.inf)

    def ids(self, scores: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """Return the kept parts of each token, [T, K] int64, -1 where there are fewer."""
        return masked_ids(self.mask(scores) if order is None else self.among(scores, order))


def chosen_formula(formula: str, selector: Selector) -> str:
    """Return the formula of a rule with a selector in place of its own choice of the best."""
    scores = [step for step in formula.split(";  ") if "TopK(" not in step]
    return ";  ".join([*scores, f"S = {selector}"])


@dataclass(frozen=True)
class TopK(Selector):
    """Keep the ``k`` best parts of every token; ties go to the lower part."""

    k: int
    variable = False

    def within(self, n_parts: int) -> Self:
        """Return the selector of at most ``n_parts`` parts."""
        return replace(self, k=min(self.k, n_parts))

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool."""
        ids = top_ids(scores, self.k)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)

    def among(self, scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool: the first of the order."""
        return self.mask(order) & (order > -torch.inf)

    def ids(self, scores: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """Return the kept parts of each token, best first, [T, k] int64, -1 = out of question."""
        if order is None or order is scores:
            return top_ids(scores, self.k)
        ids = top_ids(order, self.k)
        return ids.where(order.gather(-1, ids) > -torch.inf, -1)


@dataclass(frozen=True)
class Threshold(Selector):
    """Keep every part that scores at least ``threshold``.

    Attributes
    ----------
    threshold : float
        On the scale of the scores; at or below their smallest value, everything is kept.
    at_least : int
        So many of the best are kept even if they score less.
    """

    threshold: float
    at_least: int = 0
    variable = True

    @property
    def alone(self) -> bool:
        """Whether no part is kept for being among the best."""
        return not self.at_least

    def within(self, n_parts: int) -> Self:
        """Return the selector that keeps at most ``n_parts`` parts for being among the best."""
        return replace(self, at_least=min(self.at_least, n_parts))

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool."""
        return self.among(scores, scores)

    def among(self, scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool: by their scores, the first of the order too."""
        kept = (scores >= self.threshold) & (order > -torch.inf)
        return kept | TopK(self.at_least).among(scores, order) if self.at_least else kept


@dataclass(frozen=True)
class TopP(Selector):
    """Keep the smallest number of best parts whose scores sum to at least ``p`` of the total.

    Attributes
    ----------
    p : float, 0..1
        0 keeps the best part alone, 1 keeps all.

    References
    ----------
    Huang et al. 2024, "Harder Tasks Need More Experts", arXiv:2403.07652; the published
    code's default is 0.4.
    """

    p: float
    variable = True

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.p <= 1:
            raise RouterError(f"Expected 0 <= p <= 1, got {self.p}; 0.4 is the published default.")

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool; scores must not be negative."""
        return self.among(scores, scores)

    def among(self, scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Return which parts are kept, [T, P] bool: the first that have the share in the order."""
        possible = order > -torch.inf
        if self.p >= 1:
            return possible
        best = order.sort(dim=-1, descending=True, stable=True)
        values = scores.where(possible, 0.0).gather(-1, best.indices)
        share = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        # a part is kept while those before it do not reach p
        before = torch.nn.functional.pad(share.cumsum(dim=-1)[:, :-1], (1, 0))
        kept = before < self.p
        kept[:, :1] = True
        return torch.zeros_like(kept).scatter(-1, best.indices, kept) & possible
