"""Two tokenizations of one text: which stretches they share, and whether two models route alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class AlignedSegments(NamedTuple):
    """Shortest stretches of a text that end at a token of both models.

    Attributes
    ----------
    start, end : array [S], int64
        Characters; a stretch is ``text[start:end]``.
    first, second : array [T1], [T2], int64
        The segment of each token; -1 for a token without characters of its own.
    """

    start: Ints
    end: Ints
    first: Ints
    second: Ints


def align(first: Sequence[str], second: Sequence[str]) -> AlignedSegments:
    """Align two tokenizations by the characters of the text.

    Parameters
    ----------
    first, second : sequences of str
        Texts of the tokens, which join to the same text; special tokens have ``""``.

    Raises
    ------
    MetricError
        If the two do not join to the same text.
    """
    if "".join(first) != "".join(second):
        raise MetricError(
            "Expected tokens that join to the same text, got two texts that differ. Record the "
            "same prompts with both models."
        )
    ends_a, ends_b = _ends(first), _ends(second)
    common = np.intersect1d(ends_a, ends_b)
    end = common[common > 0]
    start = np.concatenate([[0], end[:-1]]).astype(np.int64) if len(end) else end
    return AlignedSegments(
        start, end, _segment_of(first, ends_a, end), _segment_of(second, ends_b, end)
    )


def _ends(texts: Sequence[str]) -> Ints:
    return np.cumsum([len(text) for text in texts], dtype=np.int64)


def _segment_of(texts: Sequence[str], ends: Ints, segment_ends: Ints) -> Ints:
    """Return the segment in which each token ends, -1 for tokens without characters."""
    empty = np.array([not text for text in texts], dtype=bool)
    return np.where(empty, -1, np.searchsorted(segment_ends, ends)).astype(np.int64)


def segment_means(values: npt.ArrayLike, segment: Ints, n_segments: int) -> Floats:
    """Return the mean of tokens' values in each segment, [S]; nan where none is known."""
    numbers = np.asarray(values, dtype=np.float64)
    known = (segment >= 0) & np.isfinite(numbers)
    total = np.bincount(segment[known], numbers[known], minlength=n_segments)
    count = np.bincount(segment[known], minlength=n_segments)
    return np.asarray(np.divide(total, count, out=np.full(n_segments, np.nan), where=count > 0))


def co_routing(expert_ids: npt.ArrayLike) -> Floats:
    """Return how alike each pair of items is routed, [S, S], 0..1.

    Parameters
    ----------
    expert_ids : array [L, S, K], int
        Chosen experts in every layer, -1 in empty slots.

    Returns
    -------
    array [S, S]
        Mean over layers of the share of experts that two items have in common, over the larger of
        the two sets. It says nothing of which experts these are, so that it can be compared
        between models.
    """
    ids = np.asarray(expert_ids)
    layers, items, _ = ids.shape
    total = np.zeros((items, items))
    for layer in ids:
        width = int(layer.max(initial=-1)) + 1
        chosen = np.zeros((items, width + 1), np.float32)  # counts of at most K are exact
        np.put_along_axis(chosen, np.where(layer >= 0, layer, width), 1.0, axis=1)
        chosen = chosen[:, :width]
        size = chosen.sum(1)
        larger = np.maximum(np.maximum(size[:, None], size[None]), 1)
        total += (chosen @ chosen.T) / larger
    return np.asarray(total / max(layers, 1))


class CoRouting(NamedTuple):
    """Whether two models route the same pairs of stretches together.

    Attributes
    ----------
    correlation : float, -1..1
        Of the two models' co-routing over pairs; nan where it is undefined.
    low, high : float
        5th and 95th percentile of the same where one model's stretches are shuffled: chance.
    pairs : int
    """

    correlation: float
    low: float
    high: float
    pairs: int


def co_routing_agreement(
    first: Sequence[npt.ArrayLike],
    second: Sequence[npt.ArrayLike],
    *,
    draws: int = 100,
    seed: int = 0,
) -> CoRouting:
    """Correlate the co-routing of two models over pairs of stretches of the same texts.

    Parameters
    ----------
    first, second : sequences of array [S, S]
        From :func:`co_routing`, one a text and model, of the same stretches.
    """
    a, b = _pairs_of(first), _pairs_of(second)
    # a standard deviation is hardly ever exactly 0: the mean of equal numbers is rounded
    if len(a) < 3 or any(np.ptp(one) <= 1e-9 * np.abs(one).max() for one in (a, b)):
        return CoRouting(float("nan"), float("nan"), float("nan"), len(a))
    spread = float(np.std(a) * np.std(b))
    # shuffling moves the pairs about: means and spreads stay, only the sum of products changes
    sides = [(_centred(x, a.mean()), _centred(y, b.mean()))
             for x, y in zip(first, second, strict=True)]  # fmt: skip
    random = np.random.default_rng(seed)
    chance = []
    for _ in range(draws):
        total = 0.0
        for one, other in sides:
            order = random.permutation(len(other))
            total += float(np.vdot(one, other[order[:, None], order]))
        chance.append(total / 2 / len(a) / spread)
    low, high = np.quantile(chance, [0.05, 0.95])
    return CoRouting(float(np.corrcoef(a, b)[0, 1]), float(low), float(high), len(a))


def _pairs_of(tables: Sequence[npt.ArrayLike]) -> Floats:
    """Return the values of all pairs of stretches of each text, one text after the other."""
    square = [np.asarray(table, dtype=np.float64) for table in tables]
    return np.concatenate([np.empty(0), *(one[np.triu_indices(len(one), 1)] for one in square)])


def _centred(table: npt.ArrayLike, mean: float) -> Floats:
    """Return a table less its mean, and 0 for a stretch with itself."""
    centred: Floats = np.asarray(table, dtype=np.float64) - mean
    np.fill_diagonal(centred, 0.0)
    return centred
