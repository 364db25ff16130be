"""Watch a model run with another rule: what it chose, and how far the model itself would agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capture.swap.rules import Choice, RouteInputs, Rule, reads_of
from explorer.metrics import agreement as agree

Key = tuple[int, int]  # layer, site
Floats = npt.NDArray[np.float64]
MEASURES = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap", "entropy")


@dataclass
class Chosen:
    """What one site chose in one forward pass, heaviest expert first.

    Attributes
    ----------
    expert_ids : array [T, K], int16
        -1 in empty slots.
    weights : array [T, K], float32
    sequences, positions : array [T]
        Number of the sequence, and the token's place in it.
    """

    expert_ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    sequences: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@dataclass
class SiteSums:
    """Sums over the tokens of each of ``N`` sequences at one site.

    Attributes
    ----------
    tokens : array [N]
    experts : array [N]
        Assignments.
    measures : dict of str to array [N]
        By the names in ``MEASURES``, of the tokens for which they are defined.
    defined : dict of str to array [N]
        How many tokens those are: a token without an expert has no
        weights to overlap, one without scores no entropy.
    counts : array [K + 1], int64
        Tokens with 0, 1, 2, ... experts.
    """

    tokens: Floats
    experts: Floats
    measures: dict[str, Floats]
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    defined: dict[str, Floats] = field(default_factory=dict)

    def mean(self, name: str, here: Any = slice(None)) -> float:
        """Return a measure's mean over the tokens that have it, nan where none has.

        Parameters
        ----------
        name : str
        here : array of bool [N], optional
            Sequences that count.
        """
        if name not in self.measures:
            return float("nan")
        tokens = float(self.defined[name][here].sum())
        return float(self.measures[name][here].sum()) / tokens if tokens else float("nan")


class Watcher:
    """Follows the choices of a swap: give ``before_batch`` and ``on_choice`` to the run.

    Parameters
    ----------
    n_sequences : int
    native : mapping of (layer, site) to list of Chosen, optional
        The unchanged model's choices in the same batches, to agree with.
    keep : collection of int
        Sequences whose choices are kept; None = all.
    spanning : bool
        Also note which tokens lie between the clusters of a rule that has clusters.
    """

    def __init__(
        self,
        n_sequences: int,
        native: Mapping[Key, Sequence[Chosen]] | None = None,
        *,
        keep: Sequence[int] | None = None,
        spanning: bool = False,
    ) -> None:
        self.n_sequences = n_sequences
        self.native = native
        self.keep = None if keep is None else np.array(sorted(keep), dtype=np.int64)
        self.sums: dict[Key, SiteSums] = {}
        self.chosen: dict[Key, list[Chosen]] = {}
        self.spies: dict[Key, Spy] = {}
        self.between: dict[Key, dict[int, npt.NDArray[np.bool_]]] = {}
        self._spanning = spanning
        self._batch: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._passes: dict[Key, int] = {}

    def before_batch(self, numbers: npt.NDArray[np.int64]) -> None:
        """Take note of which sequences come next."""
        self._batch = numbers

    def spy(self, key: Key, rule: Rule) -> "Spy":
        """Return the rule, so that its scores can be read too."""
        self.spies[key] = Spy(rule, spanning=self._spanning)
        return self.spies[key]

    def on_choice(self, inputs: RouteInputs, choice: Choice) -> None:
        """Count what one site chose."""
        key = (inputs.layer, inputs.site)
        found = _sorted(choice, self._batch[inputs.sequences.cpu().numpy()], inputs)
        number = self._passes.get(key, 0)
        self._passes[key] = number + 1
        sums = self.sums.setdefault(key, self._empty())
        self._add(sums, found, None if self.native is None else self.native[key][number])
        if key in self.spies and self.spies[key].entropy is not None:
            self._sum(sums, "entropy", found.sequences, self.spies[key].entropy)
        if key in self.spies and self.spies[key].between is not None:
            self._note_between(key, found, self.spies[key].between)
        self.chosen.setdefault(key, []).append(self._kept(found))

    def _note_between(self, key: Key, found: Chosen, between: Any) -> None:
        """Keep the flags of each sequence, in the order of its tokens."""
        for number in np.unique(found.sequences).tolist():
            rows = np.flatnonzero(found.sequences == number)
            rows = rows[found.positions[rows].argsort(kind="stable")]
            self.between.setdefault(key, {})[number] = between[rows]

    def _empty(self) -> SiteSums:
        zeros = np.zeros(self.n_sequences)
        return SiteSums(zeros, zeros.copy(), {})

    def _sum(self, sums: SiteSums, name: str, sequences: Any, values: Any) -> None:
        known = ~np.isnan(values)
        for sums_of, weights in ((sums.measures, values[known]), (sums.defined, None)):
            total = sums_of.setdefault(name, np.zeros(self.n_sequences))
            total += np.bincount(sequences[known], weights, minlength=self.n_sequences)

    def _add(self, sums: SiteSums, found: Chosen, native: Chosen | None) -> None:
        filled = (found.expert_ids >= 0).sum(axis=1)
        sums.tokens += np.bincount(found.sequences, minlength=self.n_sequences)
        sums.experts += np.bincount(found.sequences, filled, minlength=self.n_sequences)
        counts = np.bincount(filled)
        longer = max(len(counts), len(sums.counts))
        sums.counts = np.pad(sums.counts, (0, longer - len(sums.counts))) + np.pad(
            counts, (0, longer - len(counts))
        )
        if native is None:
            return
        expected, ids = native.expert_ids, found.expert_ids
        values = {
            "agreement": agree.overlap_at_k(expected, ids),
            "jaccard": agree.jaccard(expected, ids),
            "exact_set": agree.exact_set(expected, ids),
            "top_1": agree.top_1(expected, ids),
            "weighted_overlap": agree.weighted_overlap(
                expected, native.weights, ids, found.weights
            ),
        }
        for name, one in values.items():
            self._sum(sums, name, found.sequences, one)

    def _kept(self, found: Chosen) -> Chosen:
        if self.keep is None:
            return found
        rows = np.isin(found.sequences, self.keep)
        return Chosen(
            found.expert_ids[rows],
            found.weights[rows],
            found.sequences[rows],
            found.positions[rows],
        )


class Spy:
    """Passes a rule's answer on and looks at its scores.

    Attributes
    ----------
    entropy : array [T] or None, nats
        Of the scores of the last pass, as shares of their sum.
    between : array [T] or None, bool
        Tokens of the last pass that lie between clusters, where that is asked.
    """

    def __init__(self, rule: Rule, *, spanning: bool = False) -> None:
        self.rule = rule
        self.entropy: Floats | None = None
        self.between: npt.NDArray[np.bool_] | None = None
        self._spanning = getattr(rule, "spanning", None) if spanning else None
        self.gates: list[torch.Tensor] = []

    @property
    def reads(self) -> frozenset[str]:
        """What the rule reads of the model's own router."""
        return reads_of(self.rule)

    def route(self, inputs: RouteInputs, /) -> Any:
        """Answer as the rule does."""
        answer = self.rule.route(inputs)
        scores = getattr(answer, "scores", None)
        self.entropy = None if scores is None else entropy_of(scores)
        found = None if self._spanning is None else self._spanning(inputs)
        self.between = None if found is None else found.cpu().numpy()
        if getattr(answer, "gate", None) is not None:
            self.gates.append(answer.gate.detach().float().cpu())
        return answer


def mean_of_known(values: Sequence[float | None]) -> float:
    """Return the mean of what is known, nan of nothing: a layer without a choice has no balance."""
    known = [value for value in values if value is not None and value == value]
    return float(np.mean(known)) if known else float("nan")


def entropy_of(scores: torch.Tensor) -> Floats:
    """Return the entropy of scores [T, E] as shares of their sum, nats; nan without any score."""
    return np.asarray(entropy_of_shares(shares_of(scores)).cpu().numpy(), dtype=np.float64)


def shares_of(scores: torch.Tensor) -> torch.Tensor:
    """Return scores [T, E] as shares of their sum, none below 0; nan for tokens without any."""
    positive = scores.detach().float().clamp_min(0)
    total = positive.sum(-1, keepdim=True)
    return positive / total.where(total > 0, torch.nan)


def entropy_of_shares(shares: torch.Tensor) -> torch.Tensor:
    """Return the entropy of shares [T, E], [T], nats."""
    entropy: torch.Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def _sorted(choice: Choice, sequences: npt.NDArray[np.int64], inputs: RouteInputs) -> Chosen:
    """Return a choice heaviest expert first, empty slots last."""
    ids = choice.expert_ids
    weights = choice.weights.detach().float()
    order = weights.masked_fill(ids < 0, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return Chosen(
        ids.gather(-1, order).to(torch.int16).cpu().numpy(),
        weights.gather(-1, order).cpu().numpy(),
        sequences,
        inputs.positions.cpu().numpy(),
    )
