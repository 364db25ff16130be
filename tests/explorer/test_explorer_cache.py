"""Hit rates of expert caches against plain implementations, laws, and numbers by hand."""

import numpy as np
import pytest

from explorer.errors import MetricError
from explorer.metrics.cache import POLICIES, hit_rate


def plain(ids, slots, policy):
    """The same rules over Python's dictionaries."""
    lookups = [int(expert) for token in ids for expert in token if expert >= 0]
    cache, counts, hits = {}, {}, 0  # expert -> when it was looked up last
    for at, expert in enumerate(lookups):
        hits += expert in cache
        if expert not in cache and len(cache) == slots:
            if policy == "belady":
                rest = lookups[at + 1 :]
                away = {e: rest.index(e) if e in rest else len(rest) for e in cache}
                del cache[max(cache, key=away.get)]
            elif policy == "lfu":
                del cache[min(cache, key=lambda e: (counts[e], cache[e]))]
            else:
                del cache[min(cache, key=cache.get)]
        cache[expert] = at
        counts[expert] = counts.get(expert, 0) + 1
    return hits / len(lookups)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 8, 40])
def test_hits_are_those_of_a_plain_implementation(policy, slots):
    random = np.random.default_rng(slots)
    for skew in (0.3, 2.0):
        shares = random.dirichlet(np.full(16, skew))
        ids = np.array([random.choice(16, 3, replace=False, p=shares) for _ in range(150)])
        ids[::7, 2] = -1
        assert hit_rate(ids, slots=slots, policy=policy) == plain(ids, slots, policy)


def test_numbers_by_hand():
    ids = [[0], [1], [2], [0], [1], [2]]
    assert hit_rate(ids, slots=2, policy="lru") == 0.0  # each was evicted just before
    assert hit_rate(ids, slots=2, policy="belady") == pytest.approx(2 / 6)
    # 0 has two lookups and stays, although 1 came later
    assert hit_rate([[0], [0], [1], [2], [0]], slots=2, policy="lfu") == pytest.approx(2 / 5)
    # counts are those since the start: 0 was evicted and is loaded again with its old count
    ids = [[0], [0], [0], [1], [1], [1], [1], [2], [2], [2], [2], [0], [3], [0]]
    assert hit_rate(ids, slots=2, policy="lfu") == plain(ids, 2, "lfu")


def test_belady_is_a_bound_and_more_slots_hit_more():
    ids = np.random.default_rng(0).integers(0, 32, (400, 4))
    for slots in (2, 8, 20):
        bound = hit_rate(ids, slots=slots, policy="belady")
        assert all(hit_rate(ids, slots=slots, policy=policy) <= bound for policy in POLICIES)
    for policy in ("lru", "belady"):  # both are stack algorithms
        rates = [hit_rate(ids, slots=slots, policy=policy) for slots in range(1, 33)]
        assert rates == sorted(rates)
    # with room for all, only the first lookup of each misses
    assert hit_rate(ids, slots=32) == pytest.approx(1 - 32 / ids.size)


def test_nothing_to_look_up_is_not_a_rate():
    assert np.isnan(hit_rate(np.empty((0, 2), np.int64), slots=4))
    assert np.isnan(hit_rate([[-1, -1]], slots=4))


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[0]], {"slots": 1, "policy": "fifo"}, "one of lru, lfu, belady, got 'fifo'"),
        ([[0]], {"slots": 0}, "at least 1, got 0"),
        ([[0]], {"slots": 1.5}, "at least 1, got 1.5"),
        ([0, 1], {"slots": 1}, r"shape \(2,\)"),
        ([[0.5]], {"slots": 1}, "float64"),
        ([[-2]], {"slots": 1}, "got -2"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(ids, options, words):
    with pytest.raises(MetricError, match=words):
        hit_rate(ids, **options)
