"""Which experts meet more often than by chance: in a layer, in the next one, at the next token.

``tokens`` in a table of pairs are counted once per pair: a token that chose K experts here and K2
in the next layer counts in K x K2 cells.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Floats = npt.NDArray[np.float64]

# the usual rule for contingency tables (Cochran 1954): below it, chance alone moves a ratio far
MIN_EXPECTED = 5.0
_ROUNDS = 500
_TOLERANCE = 1e-9


class Uplift(NamedTuple):
    """Pairs of experts against what their loads alone would give.

    Attributes
    ----------
    ratio : array [A, B]
        Measured / expected: 1 = as often as chance has it, 0 = never met. nan where fewer than
        the minimum were expected, and on the diagonal of a table of pairs.
    expected : array [A, B], tokens
        By chance; nan on the diagonal of a table of pairs.
    """

    ratio: Floats
    expected: Floats


def transition_uplift(tokens: npt.ArrayLike, *, min_expected: float = MIN_EXPECTED) -> Uplift:
    r"""Return how much more often a token goes from one expert to another than by chance.

    .. math:: \mathrm{uplift}_{ab} = \frac{n_{ab}\, n}{n_{a\cdot}\, n_{\cdot b}}

    Parameters
    ----------
    tokens : array [A, B]
        Tokens that chose expert a in one layer and expert b in the next.
    min_expected : float, tokens
        Cells where chance gives fewer have no ratio, however many were counted.

    Raises
    ------
    MetricError
        For counts that are negative, missing or not in a table.
    """
    counts = _table(tokens)
    total = counts.sum()
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    expected = np.outer(rows, columns) / total if total else np.zeros_like(counts)
    return Uplift(_ratio(counts, expected, min_expected), expected)


def pair_uplift(tokens: npt.ArrayLike, *, min_expected: float = MIN_EXPECTED) -> Uplift:
    """Return how much more often two experts of one layer serve the same token than by chance.

    Parameters
    ----------
    tokens : array [E, E], symmetric
        Tokens that chose both experts; the diagonal is not read.
    min_expected : float, tokens

    Raises
    ------
    MetricError
        For counts that are negative or missing, or a table that is not symmetric.

    Notes
    -----
    A token cannot choose an expert twice, so the product of the loads is no fair chance level: it
    expects meetings on the diagonal, and every other cell looks rarer than it is. Expected here is
    quasi-independence, ``f_a f_b`` off the diagonal with the sums of the rows as measured.

    References
    ----------
    Goodman 1968, "The analysis of cross-classified data: independence, quasi-independence, and
    interactions in contingency tables", JASA 63.
    """
    counts = _table(tokens)
    if counts.shape[0] != counts.shape[1] or not np.array_equal(counts, counts.T):
        raise MetricError(
            f"Expected a symmetric table [E, E] of pairs, got shape {counts.shape}. "
            "Count each pair in both orders."
        )
    off = counts.copy()
    np.fill_diagonal(off, 0)
    factors = _factors(off.sum(axis=1))
    expected = np.outer(factors, factors)
    np.fill_diagonal(expected, np.nan)
    np.fill_diagonal(off, np.nan)
    return Uplift(_ratio(off, expected, min_expected), expected)


def _factors(sums: Floats) -> Floats:
    """Return f with ``f_a (sum(f) - f_a) = sums_a``, by damped fixed-point rounds."""
    total = sums.sum()
    if not total:
        return np.zeros_like(sums)
    factors = sums / np.sqrt(total)
    for _ in range(_ROUNDS):
        others = factors.sum() - factors
        goal = np.divide(sums, others, out=np.zeros_like(sums), where=others > 0)
        following = np.sqrt(factors * goal)
        done = np.abs(following - factors).max() <= _TOLERANCE * factors.max()
        factors = following
        if done:
            break
    return np.asarray(factors)


def routing_change(expert_ids: npt.ArrayLike) -> Floats:
    """Return how much of its experts each token changes against the token before it.

    Parameters
    ----------
    expert_ids : array [T, K]
        -1 = empty slot.

    Returns
    -------
    array [T], 0..1
        1 - Jaccard similarity of the two sets of experts: 0 = the same experts, 1 = no expert in
        common. nan for the first token and where neither of the two chose an expert.
    """
    ids = np.asarray(expert_ids)
    if ids.ndim != 2:
        raise MetricError(
            f"Expected expert ids [T, K], got shape {ids.shape}. Fill empty slots with -1."
        )
    change = np.full(len(ids), np.nan)
    if len(ids) < 2:
        return change
    filled = ids >= 0
    same = (ids[1:, :, None] == ids[:-1, None, :]) & filled[1:, :, None]
    both = same.any(axis=2).sum(axis=1)
    either = filled[1:].sum(axis=1) + filled[:-1].sum(axis=1) - both
    np.divide(either - both, either, out=change[1:], where=either > 0)
    return change


def _table(tokens: npt.ArrayLike) -> Floats:
    counts = np.asarray(tokens, dtype=np.float64)
    if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
        raise MetricError(
            f"Expected a table of counts >= 0, got shape {counts.shape}, or one of them negative "
            "or missing. A pair that never met has the count 0."
        )
    return counts


def _ratio(counts: Floats, expected: Floats, least: float) -> Floats:
    known = np.nan_to_num(expected) >= max(least, np.finfo(np.float64).tiny)
    return np.divide(counts, expected, out=np.full_like(counts, np.nan), where=known)


Ids = npt.NDArray[np.integer]


class Repetition(NamedTuple):
    """How often a token shares experts with the token before it.

    Attributes
    ----------
    first, first_chance : float, 0..1
        Share of tokens whose heaviest expert is that of the token before, and the same for two
        tokens drawn at random: the sum of the squared shares of the experts, which is above
        ``1 / E`` where some are used more.
    any, any_chance : float, 0..1
        Share of tokens that have any expert in common with the token before, and with a token
        drawn at random.
    pairs : int
        Neighbouring tokens that were looked at.
    """

    first: float
    first_chance: float
    any: float
    any_chance: float
    pairs: int


def repetition(expert_ids: Ids, sequence: Ids, *, seed: int = 0) -> Repetition:
    """Measure how often experts repeat from one token to the next.

    Parameters
    ----------
    expert_ids : array [T, K]
        Chosen experts of tokens in the order of the text, heaviest first; -1 = an empty slot.
    sequence : array [T]
        Which text each token belongs to; neighbours of different texts are no pair.
    seed : int
        Draws the random partners.

    Returns
    -------
    Repetition
        nan where there is no pair.

    References
    ----------
    Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088, table 5, which takes ``1 / E`` and
    ``1 - C(E - K, K) / C(E, K)`` for chance: what equal loads would give.
    """
    neighbours = sequence[1:] == sequence[:-1]
    pairs = int(neighbours.sum())
    if not pairs:
        return Repetition(*(float("nan"),) * 4, 0)
    before, after = expert_ids[:-1][neighbours], expert_ids[1:][neighbours]
    partner = np.random.default_rng(seed).permutation(len(before))
    heaviest = after[:, 0][after[:, 0] >= 0]
    share = np.bincount(heaviest) / max(1, len(heaviest))
    return Repetition(
        float(((before[:, 0] == after[:, 0]) & (after[:, 0] >= 0)).mean()),
        float((share**2).sum()),
        float(_common(before, after).mean()),
        float(_common(before[partner], after).mean()),
        pairs,
    )


def _common(first: Ids, second: Ids) -> npt.NDArray[np.bool_]:
    """Return which rows have an expert in common, [T]."""
    same = (first[:, :, None] == second[:, None, :]) & (first[:, :, None] >= 0)
    common: npt.NDArray[np.bool_] = same.any(axis=(1, 2))
    return common
