"""How far two routers agree about the same tokens.

Every metric compares token by token and returns an array [T], ``nan`` where it is not defined;
:func:`agreement` gives all of them. ``expected`` is the router compared with, usually the model's
own. High agreement need not mean low loss: a router that misses rarely but where it matters costs
more than one that misses often where it does not.
"""

from math import comb

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]
MEASURES = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap")
_ROWS = 16_384  # tokens at a time, so that what is compared stays in the caches


def overlap_at_k(expected: Ids, found: Ids) -> Floats:
    r"""Return the share of the expected experts that were found, ``|A and B| / |A|``.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, -1 in empty slots.

    Returns
    -------
    array [T], 0..1
        ``k / E`` on average for random sets; nan where nothing is expected.
    """
    both, size, _ = _counts(expected, found)
    return _ratio(both, size)


def jaccard(expected: Ids, found: Ids) -> Floats:
    """Return the size of the common set over that of the union.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, -1 in empty slots.

    Returns
    -------
    array [T], 0..1
        1 where both sets are empty. With equal sizes and overlap ``o`` it is ``o / (2 - o)``.
    """
    return _jaccard(*_counts(expected, found))


def exact_set(expected: Ids, found: Ids) -> Floats:
    """Return 1 where both sets are the same, in whatever order, else 0.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, -1 in empty slots.
    """
    both, size, other = _counts(expected, found)
    return np.asarray((both == size) & (both == other), dtype=np.float64)


def top_1(expected: Ids, found: Ids) -> Floats:
    """Return 1 where the heaviest expert is the same, else 0; nan where none is expected.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Expert ids, heaviest first, -1 in empty slots.
    """
    _check(expected, found)
    same = (expected[:, 0] == found[:, 0]).astype(np.float64)
    return np.asarray(np.where(expected[:, 0] >= 0, same, np.nan))


def weighted_overlap(
    expected: Ids, expected_weights: npt.ArrayLike, found: Ids, found_weights: npt.ArrayLike
) -> Floats:
    r"""Return how much combine weight two routings put on the same experts.

    .. math:: \sum_e \min(g_e, g'_e)

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, -1 in empty slots.
    expected_weights, found_weights : array, of the same shapes
        Divided by their sum here, so that models which do not renormalise can be compared.

    Returns
    -------
    array [T], 0..1
        1 minus the total variation distance; nan where a routing has no weight.
    """
    _check(expected, found)
    same = _same(expected, found)
    return _common_weight(same, _shares(expected, expected_weights), _shares(found, found_weights))


def weight_divergence(
    expected: Ids, expected_weights: npt.ArrayLike, found: Ids, found_weights: npt.ArrayLike
) -> Floats:
    """Return the Jensen-Shannon divergence of two routings' combine weights, nats.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, -1 in empty slots.
    expected_weights, found_weights : array, of the same shapes
        Divided by their sum here; an expert that is not in the set has weight 0.

    Returns
    -------
    array [T], 0..ln 2
        nan where a routing has no weight.
    """
    _check(expected, found)
    same = _same(expected, found)
    p, q = _shares(expected, expected_weights), _shares(found, found_weights)
    one = _entropy_terms(p, (p + np.einsum("tij,tj->ti", same, q)) / 2)
    two = _entropy_terms(q, (q + np.einsum("tij,ti->tj", same, p)) / 2)
    return np.asarray(np.clip((one + two) / 2, 0, None))


def agreement(
    expected: Ids, expected_weights: npt.ArrayLike, found: Ids, found_weights: npt.ArrayLike
) -> dict[str, Floats]:
    """Return all metrics on sets and weights, and how many experts were found, token by token.

    Parameters
    ----------
    expected, found : array [T, K], [T, K2]
        Distinct expert ids, heaviest first, -1 in empty slots.
    expected_weights, found_weights : array, of the same shapes

    Returns
    -------
    dict of str to array [T]
        ``experts_per_token``, ``agreement`` (:func:`overlap_at_k`), ``jaccard``, ``exact_set``,
        ``top_1`` and ``weighted_overlap``.
    """
    _check(expected, found)
    weights = np.asarray(expected_weights), np.asarray(found_weights)
    parts: list[tuple[Floats, ...]] = []
    # at least one part, which may be empty
    for start in range(0, max(1, len(expected)), _ROWS):
        rows = slice(start, start + _ROWS)
        a, b = expected[rows], found[rows]
        same = _same(a, b)
        both, size, other = _sizes(same, a, b)
        parts.append(
            (
                other,
                _ratio(both, size),
                _jaccard(both, size, other),
                ((both == size) & (both == other)).astype(np.float64),
                top_1(a, b),
                _common_weight(same, _shares(a, weights[0][rows]), _shares(b, weights[1][rows])),
            )
        )
    names = ("experts_per_token", *MEASURES)
    columns = (np.concatenate(part) for part in zip(*parts, strict=True))
    return dict(zip(names, columns, strict=True))


def mean_known(values: Floats) -> float:
    """Return the mean of what is defined, nan if that is nothing."""
    known = values[~np.isnan(values)]
    return float(known.sum()) / len(known) if len(known) else float("nan")


def chance_jaccard(n_experts: int, top_k: int) -> float:
    """Return the Jaccard index of random sets on average."""
    _check_sizes(n_experts, top_k)
    total = comb(n_experts, top_k)
    return sum(
        comb(top_k, both)
        * comb(n_experts - top_k, top_k - both)
        / total
        * both
        / (2 * top_k - both)
        for both in range(top_k + 1)
    )


def chance_any_repeat(n_experts: int, top_k: int) -> float:
    """Return the chance that two random sets have an expert in common."""
    _check_sizes(n_experts, top_k)
    return 1 - comb(n_experts - top_k, top_k) / comb(n_experts, top_k)


def _check(expected: Ids, found: Ids) -> None:
    shapes = np.shape(expected), np.shape(found)
    if any(len(shape) != 2 or shape[1] < 1 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise MetricError(
            f"Expected two arrays of expert ids [T, K] of the same tokens, got {shapes[0]} and "
            f"{shapes[1]}. Compare one layer at a time."
        )


def _check_sizes(n_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise MetricError(f"Expected 1 <= top_k <= n_experts, got {top_k} and {n_experts}.")


def _same(expected: Ids, found: Ids) -> npt.NDArray[np.bool_]:
    """Return which slots hold the same expert, [T, K, K2]."""
    narrow = expected.astype(np.int32), found.astype(np.int32)
    same = narrow[0][:, :, None] == narrow[1][:, None, :]
    return np.asarray(same & (expected >= 0)[:, :, None])


def _counts(expected: Ids, found: Ids) -> tuple[Floats, Floats, Floats]:
    """Return the sizes of the common set and of both sets, [T]."""
    _check(expected, found)
    return _sizes(_same(expected, found), expected, found)


def _sizes(same: npt.NDArray[np.bool_], expected: Ids, found: Ids) -> tuple[Floats, Floats, Floats]:
    both = np.count_nonzero(same, axis=(1, 2))
    sizes = np.count_nonzero(expected >= 0, axis=1), np.count_nonzero(found >= 0, axis=1)
    return both.astype(np.float64), sizes[0].astype(np.float64), sizes[1].astype(np.float64)


def _jaccard(both: Floats, size: Floats, other: Floats) -> Floats:
    union = size + other - both
    return np.asarray(np.where(union > 0, both / np.maximum(union, 1), 1.0))


def _common_weight(same: npt.NDArray[np.bool_], first: Floats, second: Floats) -> Floats:
    """Return the weight that both put on the same experts; ``nan`` where one puts none."""
    matched = np.einsum("tij,tj->ti", same, second)
    return np.asarray(np.minimum(first, matched).sum(axis=1) + 0 * second.sum(axis=1))


def _shares(ids: Ids, weights: npt.ArrayLike) -> Floats:
    values = np.where(ids >= 0, np.asarray(weights, dtype=np.float64), 0.0)
    return _ratio(values, values.sum(axis=1, keepdims=True))


def _entropy_terms(p: Floats, q: Floats) -> Floats:
    """Return sum p ln(p / q), a term being 0 where p is."""
    used = p > 0
    terms = np.where(used, p * np.log(np.where(used, p, 1.0) / np.where(used, q, 1.0)), 0.0)
    return np.asarray(terms.sum(axis=1) + 0 * p.sum(axis=1))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.asarray(np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan))
