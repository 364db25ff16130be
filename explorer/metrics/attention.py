"""Attention and routing: what heads show by chance, and whether tokens that attend route together.

A pair is a query and a key that it attends to. It *routes together* when the two tokens share at
least one expert in a layer. Neighbouring tokens share experts anyway, so the share of such pairs
says nothing without its chance level: the same pairs with the key drawn from the same prompt,
either at the same distance from another query, or anywhere before the same query.

Left out on both sides: the query itself, which shares all its experts, and the first token, which
many heads attend to whatever it is (the attention sink).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

# as kernels.attention counts them; tests hold them equal
RECENT = 16  # keys, the query itself among them
QUERY_BLOCK = 64  # queries; every n-th block is used


class HeadBaseline(NamedTuple):
    """Means over the used queries of uniform attention to all keys up to the query.

    Attributes
    ----------
    entropy : float, nats
    sink_mass, window_mass : float, 0..1
    mean_distance : float, tokens
    """

    entropy: float
    sink_mass: float
    mean_distance: float
    window_mass: float


def uniform_head(prompts: Iterable[tuple[int, int]]) -> HeadBaseline:
    """Return what uniform attention over a set of prompts gives.

    Parameters
    ----------
    prompts : iterable of (tokens, every)
        Length of each prompt, and that every n-th block of its queries is used.

    Returns
    -------
    HeadBaseline
        All nan without a query. A layer with a sliding window sees fewer keys than this.
    """
    parts = [used_queries(tokens, every) for tokens, every in prompts]
    keys = np.concatenate(parts) + 1.0 if parts else np.zeros(0)
    if not len(keys):
        return HeadBaseline(*(float("nan"),) * 4)
    return HeadBaseline(
        entropy=float(np.log(keys).mean()),
        sink_mass=float((1 / keys).mean()),
        mean_distance=float(((keys - 1) / 2).mean()),
        window_mass=float((np.minimum(keys, RECENT) / keys).mean()),
    )


def used_queries(tokens: int, every: int) -> npt.NDArray[np.int64]:
    """Return the positions of the queries that were used."""
    position = np.arange(tokens, dtype=np.int64)
    used = (position // QUERY_BLOCK) % max(1, every) == 0
    return np.asarray(position[used])


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# queries whose keys are compared at a time; bounds memory at this many x T
_BLOCK = 512
# pairs whose slots are compared at a time
_PAIRS = 200_000
# fewer prompts than this are too few to draw from
MIN_PROMPTS = 5
_LOW, _HIGH = 5.0, 95.0  # percentiles


class AttendedPairs(NamedTuple):
    """Sums over the pairs of one prompt, for each head.

    Attributes
    ----------
    pairs : array [G]
    weight : array [G]
        Attention on the keys of the pairs.
    shared : array [G]
        The part of ``weight`` on keys that share an expert with their query.
    at_distance, at_random : array [G]
        The same, expected for a key drawn at equal distance, and for any earlier key.
    """

    pairs: Floats
    weight: Floats
    shared: Floats
    at_distance: Floats
    at_random: Floats


class Together(NamedTuple):
    """How often attended keys share an expert with their query, weighted by attention.

    Attributes
    ----------
    share : float, 0..1
    share_low, share_high : float
        5th and 95th percentile over prompts drawn with replacement; nan for few prompts.
    chance_distance, chance_random : float, 0..1
        The share for keys of the same prompt at equal distance, and for any earlier key.
    lift, lift_low, lift_high : float
        share / chance_distance, with the percentiles of the same draws.
    pairs, prompts : int
        That have any weight.
    """

    share: float
    share_low: float
    share_high: float
    chance_distance: float
    chance_random: float
    lift: float
    lift_low: float
    lift_high: float
    pairs: int
    prompts: int


def share_expert(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return whether two tokens have an expert in common.

    Parameters
    ----------
    first, second : arrays [P, K]
        Expert ids, -1 = empty slot.

    Returns
    -------
    array [P]
    """
    a, b = np.asarray(first), np.asarray(second)
    parts = [
        (
            (a[start : start + _PAIRS, :, None] == b[start : start + _PAIRS, None, :])
            & (a[start : start + _PAIRS, :, None] >= 0)
        ).any(axis=(1, 2))
        for start in range(0, len(a), _PAIRS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def chance_levels(expert_ids: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return how often tokens of one prompt share an expert, attention left aside.

    Parameters
    ----------
    expert_ids : array [T, K]
        -1 = empty slot.

    Returns
    -------
    by_distance : array [T]
        Over all pairs of a query and the key so many tokens before it; nan without such a pair.
    by_query : array [T]
        Over all keys before a query; nan without one.
    """
    ids = np.asarray(expert_ids)
    n_tokens = len(ids)
    chosen = np.zeros((n_tokens, int(ids.max(initial=0)) + 1), dtype=np.float32)
    rows, slots = np.nonzero(ids >= 0)
    chosen[rows, ids[rows, slots]] = 1
    found, possible = np.zeros(n_tokens), np.zeros(n_tokens)
    by_query = np.full(n_tokens, np.nan)
    for start in range(0, n_tokens, _BLOCK):
        stop = min(n_tokens, start + _BLOCK)
        shared = chosen[start:stop] @ chosen[1:stop].T > 0
        distance = np.arange(start, stop)[:, None] - np.arange(1, stop)[None, :]
        earlier = distance > 0
        found += np.bincount(distance[earlier & shared], minlength=n_tokens)
        possible += np.bincount(distance[earlier], minlength=n_tokens)
        counts = earlier.sum(axis=1)
        np.divide(
            (shared & earlier).sum(axis=1), counts, out=by_query[start:stop], where=counts > 0
        )
    by_distance = np.full(n_tokens, np.nan)
    np.divide(found, possible, out=by_distance, where=possible > 0)
    return by_distance, by_query


def pair_totals(
    expert_ids: npt.ArrayLike,
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    weight: npt.ArrayLike,
    head: npt.ArrayLike,
    *,
    n_heads: int,
) -> AttendedPairs:
    """Add up the pairs of one prompt.

    Parameters
    ----------
    expert_ids : array [T, K]
        Of the prompt's tokens in one layer; -1 = empty slot.
    query, key : arrays [P], positions in the prompt
        A query before its key is refused.
    weight : array [P]
        Attention of the query on the key.
    head : array [P]
        0 .. n_heads - 1.

    Raises
    ------
    MetricError
        For positions outside the prompt, or a key after its query.
    """
    ids = np.asarray(expert_ids)
    queries, keys = np.asarray(query, dtype=np.int64), np.asarray(key, dtype=np.int64)
    if queries.size and (keys.min() < 0 or queries.max() >= len(ids) or (keys > queries).any()):
        raise MetricError(
            f"Expected keys at or before their query, within {len(ids)} tokens, got queries up to "
            f"{queries.max()} and keys from {keys.min()} to {keys.max()}. Give positions in the "
            "prompt."
        )
    counted = (keys > 0) & (keys < queries)
    queries, keys = queries[counted], keys[counted]
    weights = np.asarray(weight, dtype=np.float64)[counted]
    heads = np.asarray(head, dtype=np.int64)[counted]
    by_distance, by_query = chance_levels(ids)
    together = share_expert(ids[queries], ids[keys])

    def sums(values: Floats) -> Floats:
        return np.bincount(heads, weights=values, minlength=n_heads).astype(np.float64)

    return AttendedPairs(
        sums(np.ones(len(heads))),
        sums(weights),
        sums(weights * together),
        sums(weights * by_distance[queries - keys]),
        sums(weights * by_query[queries]),
    )


def together(
    prompts: Sequence[AttendedPairs], *, n_draws: int = 1000, seed: int = 0
) -> list[Together]:
    """Answer the question of this module for each head.

    Tokens of a prompt are not independent, so the intervals draw whole prompts with replacement.

    Parameters
    ----------
    prompts : sequence of AttendedPairs
        One per prompt.
    n_draws, seed : int

    Returns
    -------
    list of Together
        One per head; all nan for a head without a pair.
    """
    if not prompts:
        return []
    stacked = np.array([list(part) for part in prompts])  # [P, 5, G]
    draws = np.random.default_rng(seed).integers(0, len(prompts), (n_draws, len(prompts)))
    times = np.zeros((n_draws, len(prompts)))
    np.add.at(times, (np.arange(n_draws)[:, None], draws), 1)
    return [_together(stacked[:, :, head], times) for head in range(stacked.shape[2])]


def _together(sums: Floats, times: Floats) -> Together:
    """Summarise one head; ``sums`` [P, 5], ``times`` [N, P] how often a draw has a prompt."""
    pairs, weight, shared, at_distance, at_random = sums.sum(axis=0)
    used = int((sums[:, 1] > 0).sum())
    drawn = times @ sums if used >= MIN_PROMPTS else np.zeros((0, 5))
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    share_low, share_high = _interval(drawn[:, 2] / drawn[:, 1])
    lift_low, lift_high = _interval(drawn[:, 2] / drawn[:, 3])
    return Together(
        share=_over(shared, weight),
        share_low=share_low,
        share_high=share_high,
        chance_distance=_over(at_distance, weight),
        chance_random=_over(at_random, weight),
        lift=_over(shared, at_distance),
        lift_low=lift_low,
        lift_high=lift_high,
        pairs=int(pairs),
        prompts=used,
    )


def _interval(values: Floats) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [_LOW, _HIGH])
    return float(low), float(high)


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
