"""Two tokenizations of one text: which stretches they share, and whether two models route alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Segments(NamedTuple):
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


def align(first: Sequence[str], second: Sequence[str]) -> Segments:
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
    return Segments(start, end, _segment_of(first, ends_a, end), _segment_of(second, ends_b, end))


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
    random = np.random.default_rng(seed)
    pairs = [np.triu_indices(len(np.asarray(one)), 1) for one in first]

    def joined(shuffled: bool) -> tuple[Floats, Floats]:
        sides: tuple[list[Floats], list[Floats]] = ([], [])
        for one, other, upper in zip(first, second, pairs, strict=True):
            a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
            if shuffled:
                order = random.permutation(len(b))
                sides[1].append(b[order[upper[0]], order[upper[1]]])
            else:
                sides[1].append(b[upper])
            sides[0].append(a[upper])
        empty = [np.empty(0)]
        return np.concatenate(sides[0] or empty), np.concatenate(sides[1] or empty)

    a, b = joined(False)
    value = _correlation(a, b)
    chance = [_correlation(*joined(True)) for _ in range(draws)] if np.isfinite(value) else [np.nan]
    low, high = np.quantile(chance, [0.05, 0.95])
    return CoRouting(value, float(low), float(high), len(a))


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 3 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
