"""What an expert is for: which domains and which vocabulary it takes, and what chance would show.

Definitions are those of OLMoE (arXiv:2409.02060, section 5): the specialisation of expert e for a
domain or a vocabulary entry is the share of its tokens that choose e; uniform routing gives k / E.
Few tokens make any expert look specialised, so that every number here has an interval or a floor.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError
from explorer.metrics.load import Floor

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# a bootstrap of fewer prompts says more of them than of all others
MIN_PROMPTS = 8
# a vocabulary entry that occurs once goes to its experts in full, always
MIN_COUNT = 10
_Z90 = 1.6448536269514722
_DRAWS = 400
# weights of resampled prompts that are held at once
_CELLS = 4_000_000


class Interval(NamedTuple):
    """The middle 90% of where a share may lie.

    Attributes
    ----------
    low, high : float or array
    """

    low: Floats
    high: Floats


def wilson(hits: npt.ArrayLike, n: npt.ArrayLike) -> Interval:
    """Return Wilson's 90% interval of a share, for tokens taken as independent.

    Parameters
    ----------
    hits, n : arrays
        ``hits`` of ``n``; nan comes back where n is 0.

    References
    ----------
    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    k, total = np.broadcast_arrays(np.asarray(hits, float), np.asarray(n, float))
    if (k < 0).any() or (k > total).any():
        raise MetricError("Expected 0 <= hits <= n, got more hits than tokens. Count tokens once.")
    with np.errstate(invalid="ignore", divide="ignore"):
        share, z2 = k / total, _Z90**2
        middle = (share + z2 / (2 * total)) / (1 + z2 / total)
        half = _Z90 * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Interval(np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1))


def by_prompt(hits: npt.ArrayLike, tokens: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """Return the 90% interval of a share, from prompts drawn again and again.

    Tokens of a prompt are alike, so that an interval from single tokens is too narrow.

    Parameters
    ----------
    hits, tokens : arrays [P]
        Of each prompt.

    Returns
    -------
    Interval of floats
        Wilson's where there are fewer than ``MIN_PROMPTS`` prompts with a token.
    """
    k, total = np.asarray(hits, float), np.asarray(tokens, float)
    k, total = k[total > 0], total[total > 0]
    if len(k) < MIN_PROMPTS:
        return wilson(k.sum(), total.sum())
    random = np.random.default_rng(seed)
    shares: list[Floats] = []
    size = max(1, min(_DRAWS, _CELLS // len(k)))
    for start in range(0, _DRAWS, size):
        rows = min(size, _DRAWS - start)
        times = random.multinomial(len(k), np.full(len(k), 1 / len(k)), size=rows)
        shares.append((times @ k) / (times @ total))
    low, high = np.quantile(np.concatenate(shares), [0.05, 0.95])
    return Interval(np.asarray(low), np.asarray(high))


def divergence(counts: npt.ArrayLike) -> Floats:
    r"""Return how far the domains of each expert's tokens are from those of all tokens.

    .. math:: \mathrm{KL}_e = \sum_D P(D|e) \ln \frac{P(D|e)}{P(D)}

    Parameters
    ----------
    counts : array [D, E]
        Assignments.

    Returns
    -------
    array [E], nats
        0 = the same mix; at most the entropy of the rarest domain alone, ``-ln min P(D)``; nan
        for an idle expert. The mean, weighted by load, is the ``information``.
    """
    table = _counts(counts)
    loads = table.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        given = table / loads
        every = table.sum(axis=1, keepdims=True) / table.sum()
        terms = np.where(given > 0, given * np.log(given / every), 0.0)
    return np.where(loads > 0, terms.sum(axis=0), np.nan)


def information(counts: npt.ArrayLike) -> float:
    """Return the mutual information of domain and expert over assignments.

    Parameters
    ----------
    counts : array [D, E]

    Returns
    -------
    float, nats
        0 when experts know nothing of domains; nan without a load. Chance alone lifts it: compare
        it with ``shuffled_information``.
    """
    table = _counts(counts)
    if not table.sum():
        return float("nan")
    weights = table.sum(axis=0) / table.sum()
    return float(max(0.0, np.nansum(weights * np.nan_to_num(divergence(table)))))


def shuffled_information(
    counts: npt.ArrayLike, labels: npt.ArrayLike, *, draws: int = 20, seed: int = 0
) -> Floor:
    """Return the information that is left when prompts swap their domains.

    Parameters
    ----------
    counts : array [P, E]
        Assignments of each prompt.
    labels : array [P] of int
        Domain of each prompt, from 0.
    """
    table, domains = _counts(counts), np.asarray(labels, dtype=np.int64)
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        mixed = random.permutation(domains)
        grouped = np.zeros((int(domains.max(initial=0)) + 1, table.shape[1]))
        np.add.at(grouped, mixed, table)
        found.append(information(grouped))
    return _floor(found)


def favourite_share(
    entry: npt.ArrayLike,
    expert: npt.ArrayLike,
    occurrences: npt.ArrayLike,
    n_experts: int,
    *,
    min_count: int = MIN_COUNT,
) -> float:
    """Return the vocabulary specialisation of a layer, as OLMoE averages it.

    Parameters
    ----------
    entry, expert : arrays [A] of int
        Of each assignment: the vocabulary entry, from 0, and the expert.
    occurrences : array [V]
        Tokens of each entry.
    min_count : int
        Entries with fewer are left out.

    Returns
    -------
    float, 0..1
        Mean over entries of the share of their tokens that go to their favourite expert. nan when
        no entry occurs often enough.
    """
    often = np.asarray(occurrences, dtype=np.int64)
    rows, columns = np.asarray(entry, dtype=np.int64), np.asarray(expert, dtype=np.int64)
    kept = often >= min_count
    if not kept.any():
        return float("nan")
    number = np.cumsum(kept) - 1
    mine = kept[rows]
    cells = number[rows[mine]] * n_experts + columns[mine]
    counts = np.bincount(cells, minlength=int(kept.sum()) * n_experts).reshape(-1, n_experts)
    return float((counts.max(axis=1) / often[kept]).mean())


def shuffled_favourite(
    token: npt.ArrayLike,
    expert: npt.ArrayLike,
    entry_of: npt.ArrayLike,
    n_experts: int,
    *,
    min_count: int = MIN_COUNT,
    draws: int = 3,
    seed: int = 0,
) -> Floor:
    """Return the vocabulary specialisation that is left when tokens swap their entries.

    Parameters
    ----------
    token, expert : arrays [A] of int
        Of each assignment: the row of its token, and the expert.
    entry_of : array [T] of int
        Vocabulary entry of each token, from 0.
    """
    entries, rows = np.asarray(entry_of, dtype=np.int64), np.asarray(token, dtype=np.int64)
    occurrences = np.bincount(entries) if len(entries) else np.zeros(0, np.int64)
    random = np.random.default_rng(seed)
    found = [
        favourite_share(
            random.permutation(entries)[rows], expert, occurrences, n_experts, min_count=min_count
        )
        for _ in range(draws)
    ]
    return _floor(found)


def shuffled_top(
    occurrences: npt.ArrayLike, hits: int, *, draws: int = 200, seed: int = 0
) -> Floor:
    """Return the largest share of any entry when an expert's tokens are drawn at random.

    Parameters
    ----------
    occurrences : array [V]
        Tokens of every entry that is compared, and, as the last element, of all others together.
    hits : int
        Tokens that the expert took of them all.
    """
    often = np.asarray(occurrences, dtype=np.int64)
    compared = often[:-1] > 0
    if not compared.any():
        return Floor(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    drawn = random.multivariate_hypergeometric(often, hits, size=draws, method="marginals")
    return _floor((drawn[:, :-1][:, compared] / often[:-1][compared]).max(axis=1).tolist())


def _floor(values: list[float]) -> Floor:
    low, high = np.quantile(values, [0.05, 0.95])
    return Floor(float(np.mean(values)), float(low), float(high))


def _counts(counts: npt.ArrayLike) -> Floats:
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all() or (table < 0).any():
        raise MetricError(
            f"Expected a table of counts >= 0, got shape {table.shape}, or one of them negative or "
            "missing. An expert that a domain never chose has the count 0."
        )
    return table


MIN_WHOLE = 20  # of a row in the whole; below, a ratio is mostly luck
_LIFT_DRAWS = 200


class Lift(NamedTuple):
    """How much more often things occur in a part than in the whole.

    Attributes
    ----------
    lift, low, high : array [M]
        Share in the part over share in the whole, and its 90% interval; nan where the whole has
        fewer than ``MIN_WHOLE``.
    part, whole : array [M], counts
    """

    lift: Floats
    low: Floats
    high: Floats
    part: Floats
    whole: Floats


def lift(part: npt.ArrayLike, whole: npt.ArrayLike, *, seed: int = 0) -> Lift:
    """Compare shares in a part with shares in the whole that it is of.

    The interval comes from drawing the part's prompts anew with replacement: tokens of a prompt
    are alike, so that counting them as independent would make it far too narrow.

    Parameters
    ----------
    part : array [P, M], counts
        One row per prompt of the part, one column per thing, such as an expert.
    whole : array [M], counts
        Of everything, the part included.
    seed : int
    """
    rows = np.asarray(part, dtype=np.float64)
    total = np.asarray(whole, dtype=np.float64)
    counts = rows.sum(axis=0)
    expected = total / max(total.sum(), 1.0)
    known = (total >= MIN_WHOLE) & (counts.sum() > 0)

    def ratio(found: Floats) -> Floats:
        share = found / np.maximum(found.sum(axis=-1, keepdims=True), 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(known, share / expected, np.nan))

    if not len(rows) or not known.any():
        nothing = np.full(len(total), np.nan)
        return Lift(nothing, nothing, nothing, counts, total)
    random = np.random.default_rng(seed)
    times = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_LIFT_DRAWS)
    low, high = np.percentile(ratio(times @ rows), [5, 95], axis=0)
    return Lift(ratio(counts), low, high, counts, total)
