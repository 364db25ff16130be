"""Metrics: worked by hand, against published figures, and against what must always hold."""

from itertools import pairwise
from math import ceil, comb, log, sqrt

import numpy as np
import pytest
from checks import dropped
from hypothesis import given, settings
from hypothesis import strategies as st
from published_counts import COUNTS, METRICS, N_TOKENS

from explorer.errors import MetricError, UnknownNameError
from explorer.metrics import capacity, load

LOADS = st.lists(st.integers(0, 10_000), min_size=1, max_size=40)
BUSY_LOADS = LOADS.filter(any)
SMALL_LOADS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)


def dropped_of(counts, factor):
    """Return the share of the assignments that a limit drops where one batch has this load."""
    ids = np.repeat(np.arange(len(counts)), counts)[:, None]
    return capacity.curve(ids, len(counts), [factor])[0].assignments


# ---- load, by hand


def test_metrics_of_a_load_worked_by_hand():
    # mean 2; deviations -2, -1, 0, 3
    counts = [0, 1, 2, 5]
    assert load.max_violation(counts) == pytest.approx(5 / 2 - 1)
    assert load.coefficient_of_variation(counts) == pytest.approx(sqrt((4 + 1 + 0 + 9) / 4) / 2)
    # 2 (1*0 + 2*1 + 3*2 + 4*5) / (4 * 8) - 5/4
    assert load.gini(counts) == pytest.approx(2 * 28 / 32 - 5 / 4)
    shares = [1 / 8, 2 / 8, 5 / 8]
    assert load.normalized_entropy(counts) == pytest.approx(
        -sum(p * log(p) for p in shares) / log(4)
    )
    assert load.dead_experts(counts) == 1
    # places for ceil(1 * 8 / 4) = 2 each: 5 - 2 are dropped
    assert dropped_of(counts, 1.0) == pytest.approx(3 / 8)
    # places for 3: 2 are dropped
    assert dropped_of(counts, 1.25) == pytest.approx(2 / 8)


def test_a_perfectly_even_load():
    assert load.max_violation([3, 3, 3]) == 0
    assert load.coefficient_of_variation([3, 3, 3]) == 0
    assert load.gini([3, 3, 3]) == 0
    assert load.normalized_entropy([3, 3, 3]) == 1
    assert load.dead_experts([3, 3, 3]) == 0
    assert dropped_of([3, 3, 3], 1.0) == 0


@pytest.mark.parametrize("n_experts", [2, 8, 64, 256])
def test_collapse_to_one_expert_reaches_the_upper_ends(n_experts):
    counts = [0] * (n_experts - 1) + [640]
    assert load.max_violation(counts) == pytest.approx(n_experts - 1)
    assert load.coefficient_of_variation(counts) == pytest.approx(sqrt(n_experts - 1))
    assert load.gini(counts) == pytest.approx(1 - 1 / n_experts)
    assert load.normalized_entropy(counts) == 0
    assert load.dead_experts(counts) == n_experts - 1
    places = ceil(640 / n_experts)
    assert dropped_of(counts, 1.0) == pytest.approx((640 - places) / 640)


def test_without_load_ratios_are_undefined_and_every_expert_is_dead():
    for metric in (
        load.max_violation,
        load.coefficient_of_variation,
        load.gini,
        load.normalized_entropy,
    ):
        assert np.isnan(metric([0, 0, 0]))
    assert np.isnan(dropped_of([0, 0, 0], 1.0))
    assert load.dead_experts([0, 0, 0]) == 3
    assert np.isnan(load.lorenz_curve([0, 0]).load).all()


def test_entropy_of_a_single_expert_is_undefined_since_it_has_no_choice():
    assert np.isnan(load.normalized_entropy([7]))
    assert load.max_violation([7]) == 0


@pytest.mark.parametrize("bad", [[], [[1, 2]], [1, -1], [1, float("nan")], 3])
@pytest.mark.parametrize("name", list(load.LOAD_METRICS))
def test_a_load_that_is_none_is_refused(name, bad):
    with pytest.raises(MetricError):
        load.LOAD_METRICS[name](bad)


def test_an_unknown_metric_is_refused_with_a_hint():
    with pytest.raises(UnknownNameError, match="Did you mean 'max_violation'"):
        load.sampling_floor("max_violations", n_tokens=1, n_experts=2, top_k=1)


# ---- load, against published figures


@pytest.mark.parametrize("case", list(METRICS), ids=str)
def test_metrics_of_published_counts(case):
    counts = COUNTS[case]
    top_k = 8 if case[0] == "olmoe" else 2
    assert sum(counts) == N_TOKENS * top_k
    spread, gini, violation, entropy, top_share = METRICS[case]
    # the table gives three digits, one entry four
    assert load.coefficient_of_variation(counts) == pytest.approx(spread, abs=5.1e-4)
    assert load.gini(counts) == pytest.approx(gini, abs=5.1e-4)
    assert load.max_violation(counts) == pytest.approx(violation, abs=5.1e-4)
    assert load.normalized_entropy(counts) == pytest.approx(entropy, abs=5.1e-4)
    assert max(counts) / N_TOKENS == pytest.approx(top_share, abs=5.1e-4)


# ---- load, what always holds


@given(BUSY_LOADS)
def test_bounds(counts):
    n = len(counts)
    slack = 1e-9
    assert -slack <= load.max_violation(counts) <= n - 1 + slack
    assert 0 <= load.coefficient_of_variation(counts) <= sqrt(n - 1) + slack
    assert 0 <= load.gini(counts) <= 1 - 1 / n + slack
    assert 0 <= load.dead_experts(counts) < n
    if n > 1:
        assert 0 <= load.normalized_entropy(counts) <= 1


@given(BUSY_LOADS, st.randoms(use_true_random=False), st.integers(2, 9))
def test_order_and_scale_do_not_matter(counts, random, factor):
    shuffled = list(counts)
    random.shuffle(shuffled)
    for name in load.LOAD_METRICS:
        value = load.LOAD_METRICS[name](counts)
        for other in (shuffled, [factor * count for count in counts]):
            assert load.LOAD_METRICS[name](other) == pytest.approx(value, nan_ok=True)


@given(BUSY_LOADS)
def test_lorenz_curve_is_convex_below_the_diagonal_and_spans_the_gini(counts):
    curve = load.lorenz_curve(counts)
    assert (curve.experts[0], curve.load[0]) == (0, 0)
    assert (curve.experts[-1], curve.load[-1]) == pytest.approx((1, 1))
    assert (curve.load <= curve.experts + 1e-9).all()
    assert (np.diff(curve.load, 2) >= -1e-9).all()
    area = np.trapezoid(curve.load, curve.experts)
    assert load.gini(counts) == pytest.approx(1 - 2 * area, abs=1e-9)


@given(SMALL_LOADS, st.floats(0.1, 5))
def test_nothing_is_dropped_exactly_from_one_plus_maxvio_on(counts, factor):
    # identity 11, up to the rounding of the capacity to whole places
    places = load.expert_capacity(sum(counts), len(counts), factor)
    assert 0 <= dropped_of(counts, factor) < 1 or places == 0
    assert (dropped_of(counts, factor) == 0) == (places >= max(counts))
    assert dropped_of(counts, 1 + load.max_violation(counts)) == 0


def test_capacity_is_not_rounded_up_by_floating_point():
    # 1.1 * 10 is 11.000000000000002
    assert load.expert_capacity(100, 10, 1.1) == 11
    assert load.expert_capacity(100, 10, 1.11) == 12
    with pytest.raises(MetricError):
        load.expert_capacity(10, 2, float("nan"))


# ---- sampling floor


def test_uniform_loads_are_those_of_distinct_choices():
    loads = load.uniform_loads(50, 6, 4)
    assert (loads.sum(axis=1) == 200).all()
    # without replacement no expert gets a token twice
    assert loads.max() <= 50 and loads.min() >= 0
    assert (load.uniform_loads(50, 6, 6) == 50).all()
    assert (load.uniform_loads(10, 4, 1.5).sum(axis=1) == 15).all()
    assert not loads.flags.writeable


def test_uniform_loads_match_drawing_token_by_token():
    random = np.random.default_rng(3)
    n, n_experts, k, draws = 40, 8, 3, 1500
    keys = random.random((draws, n, n_experts)).argsort(axis=2)[:, :, :k]
    direct = np.stack([np.bincount(draw.ravel(), minlength=n_experts) for draw in keys])
    fast = load.uniform_loads(n, n_experts, k, draws, seed=4)
    # means and variances of 1500 draws: within about four standard errors
    variance = n * (k / n_experts) * (1 - k / n_experts)
    assert np.allclose(fast.mean(axis=0), n * k / n_experts, atol=4 * sqrt(variance / draws))
    assert fast.var(axis=0).mean() == pytest.approx(variance, rel=0.06)
    covariance = -variance / (n_experts - 1)
    off = np.cov(fast.T)[~np.eye(n_experts, dtype=bool)]
    assert off.mean() == pytest.approx(covariance, rel=0.08)
    assert direct.max(axis=1).mean() == pytest.approx(fast.max(axis=1).mean(), rel=0.01)


def test_floor_of_maxvio_is_the_known_one():
    # top-6 of 64 over 8192 tokens; 0.076 was seen for such a layer
    floor = load.sampling_floor("max_violation", n_tokens=8192, n_experts=64, top_k=6)
    assert floor.low < 0.076 < floor.high
    # the largest of 64 normal variates is 2.35 standard deviations out on average
    spread = sqrt((1 - 6 / 64) / (8192 * 6 / 64))
    assert floor.mean == pytest.approx(2.35 * spread, rel=0.03)
    assert floor.low < floor.mean < floor.high


@pytest.mark.parametrize(("n", "n_experts", "k"), [(20, 16, 2), (500, 64, 8), (3, 8, 1)])
def test_floors_agree_with_the_analytic_values(n, n_experts, k):
    p = k / n_experts
    dead = load.sampling_floor("dead_experts", n_tokens=n, n_experts=n_experts, top_k=k)
    assert dead.mean == pytest.approx(n_experts * (1 - p) ** n, abs=0.2)

    def squared(counts):
        return load.coefficient_of_variation(counts) ** 2

    spread = load.sampling_floor(squared, n_tokens=n, n_experts=n_experts, top_k=k, n_draws=400)
    assert spread.mean == pytest.approx((1 - p) / (n * p), rel=0.06)


def test_floor_is_reproducible_and_undefined_without_tokens():
    first = load.sampling_floor("gini", n_tokens=100, n_experts=8, top_k=2, seed=1)
    assert first == load.sampling_floor("gini", n_tokens=100, n_experts=8, top_k=2, seed=1)
    assert np.isnan(load.sampling_floor("gini", n_tokens=0, n_experts=8, top_k=2)).all()
    with pytest.raises(MetricError):
        load.uniform_loads(10, 4, 5)


# ---- capacity


def test_both_drop_policies_worked_by_hand():
    # expert 0 is chosen by all four tokens; ceil(1 * 4 / 2) = 2 places
    ids = [[0], [0], [0], [0]]
    weights = [[0.1], [0.4], [0.3], [0.4]]
    first = dropped(ids, 2, 1.0, policy="position", weights=weights)
    assert first.mask[:, 0].tolist() == [False, False, True, True]
    assert first.weight == pytest.approx(0.7 / 1.2)
    heavy = dropped(ids, 2, 1.0, policy="probs", weights=weights)
    assert heavy.mask[:, 0].tolist() == [True, False, True, False]
    assert heavy.weight == pytest.approx(0.4 / 1.2)
    assert first.assignments == heavy.assignments == first.tokens == 0.5


def test_equal_weights_keep_the_earlier_token():
    drops = dropped([[0]] * 4, 2, 1.0, policy="probs", weights=np.full((4, 1), 0.5))
    assert drops.mask[:, 0].tolist() == [False, False, True, True]


def test_a_limit_acts_within_its_batch():
    ids = [[0], [1], [0], [0], [1], [1]]
    together = dropped(ids, 2, 1.0)
    apart = dropped(ids, 2, 1.0, batch=[7, 7, 7, 2, 2, 2])
    assert together.assignments == 0
    # both batches have 3 assignments, 2 places an expert: none of 2 + 1 is dropped
    assert apart.assignments == 0
    # interleaved batches: 0,0,1 and 1,0,1 have 2 places; 0 and 1 alone have one each
    split = dropped(ids, 2, 1.0, batch=[0, 1, 0, 0, 1, 1])
    assert split.mask[:, 0].tolist() == [False, False, False, True, False, True]


def test_empty_slots_are_neither_counted_nor_dropped():
    drops = dropped([[0, -1], [0, 1], [-1, -1]], 2, 0.5, weights=[[1, 0], [1, 1], [0, 0]])
    # three assignments: ceil(0.5 * 3 / 2) = 1 place
    assert drops.mask.tolist() == [[False, False], [True, False], [False, False]]
    assert drops.assignments == pytest.approx(1 / 3)
    # the token without any expert of its own lost none
    assert drops.tokens == 0
    assert dropped([[0], [0]], 2, 0).tokens == 1
    assert np.isnan(dropped(np.empty((0, 2)), 2, 1).assignments)


def slow_drops(ids, n_experts, factor, policy, weights, batch):
    """Return the mask, by serving one expert of one batch after another."""
    mask = np.zeros(ids.shape, dtype=bool)
    for number in set(batch.tolist()):
        rows = [t for t in range(len(ids)) if batch[t] == number]
        real = [(t, s) for t in rows for s in range(ids.shape[1]) if ids[t, s] >= 0]
        places = load.expert_capacity(len(real), n_experts, factor)
        for expert in range(n_experts):
            queue = [(t, s) for t, s in real if ids[t, s] == expert]
            if policy == "probs":
                queue.sort(key=lambda at: (-weights[at], at[0]))
            for at in queue[places:]:
                mask[at] = True
    return mask


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 9.0]),
    st.sampled_from(capacity.POLICIES),
)
def test_drops_equal_serving_the_queues(seed, n, n_experts, n_batches, factor, policy):
    random = np.random.default_rng(seed)
    k = int(random.integers(1, n_experts + 1))
    ids = np.stack([random.permutation(n_experts)[:k] for _ in range(n)])
    ids[random.random(ids.shape) < 0.1] = -1
    weights = random.integers(1, 5, size=ids.shape) / 4
    batch = random.integers(0, n_batches, size=n)
    drops = dropped(ids, n_experts, factor, policy=policy, weights=weights, batch=batch)
    expected = slow_drops(ids, n_experts, factor, policy, weights, batch)
    assert (drops.mask == expected).all()
    real = ids >= 0
    if real.any():
        assert drops.assignments == pytest.approx(expected.sum() / real.sum())
        assert drops.weight == pytest.approx(weights[expected].sum() / weights[real].sum())
        lost = [t for t in range(n) if real[t].any() and (expected[t] == real[t]).all()]
        assert drops.tokens == pytest.approx(len(lost) / real.any(axis=1).sum())
    # a curve counts ranks instead of making the mask of every factor
    given = {"policy": policy, "batch": batch}
    for values in (weights, weights.astype(np.float32)):
        (found,) = capacity.curve(ids, n_experts, [factor], weights=values, **given)
        assert found == pytest.approx(drops[1:], nan_ok=True)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_weights_of_either_sign_are_served_from_the_largest(kind):
    random = np.random.default_rng(0)
    weights = random.integers(-3, 4, size=(60, 1)).astype(kind) * kind(0.3)
    weights[::7] = -0.0
    batch = np.arange(60) % 3
    drops = dropped(np.zeros((60, 1), int), 1, 0.5, policy="probs", weights=weights, batch=batch)
    expected = slow_drops(np.zeros((60, 1), int), 1, 0.5, "probs", weights, batch)
    assert (drops.mask == expected).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 3))
def test_one_batch_drops_what_its_totals_say_whatever_the_policy(seed, factor):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 5, size=(40, 1))
    weights = random.random((40, 1))
    counts = np.bincount(ids.ravel(), minlength=5)
    for policy in capacity.POLICIES:
        drops = dropped(ids, 5, factor, policy=policy, weights=weights)
        places = load.expert_capacity(40, 5, factor)
        above = np.maximum(0, counts - places).sum() / 40
        assert drops.assignments == pytest.approx(above)


def binomial_overflow(n, n_experts, factor):
    """Return E[max(0, X - C)] over the mean, X binomial."""
    places = load.expert_capacity(n, n_experts, factor)
    p = 1 / n_experts
    fits = sum((places - x) * comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(places))
    return (n * p - places + fits) / (n * p)


@pytest.mark.parametrize(
    ("n", "n_experts", "factor", "percent"),
    [
        (1024, 8, 1.0, 3.296),
        (1024, 8, 1.1, 0.459),
        (4096, 64, 1.0, 4.941),
        (4096, 64, 1.1, 1.342),
        (1024, 64, 1.0, 9.844),
        (1024, 64, 1.25, 2.242),
        (256, 8, 1.0, 6.579),
        (256, 8, 1.1, 2.220),
    ],
)
def test_overflow_of_uniform_top_1_is_binomial(n, n_experts, factor, percent):
    # identity 10
    if n <= 1024:
        assert 100 * binomial_overflow(n, n_experts, factor) == pytest.approx(percent, abs=0.01)
    random = np.random.default_rng(0)
    batches = 400_000 // n
    ids = random.integers(0, n_experts, size=(batches * n, 1))
    drops = dropped(ids, n_experts, factor, batch=np.repeat(np.arange(batches), n))
    assert 100 * drops.assignments == pytest.approx(percent, rel=0.04, abs=0.03)


def test_a_curve_falls_and_equals_single_factors():
    random = np.random.default_rng(1)
    ids = np.stack([random.permutation(8)[:2] for _ in range(200)])
    weights = random.random(ids.shape)
    factors = [0.5, 1.0, 1.5, 2.0]
    curve = capacity.curve(ids, 8, factors, policy="probs", weights=weights)
    assert all(a.assignments >= b.assignments for a, b in pairwise(curve))
    single = dropped(ids, 8, 1.0, policy="probs", weights=weights)
    assert curve[1] == pytest.approx(single[1:])


def test_capacity_refuses_what_it_cannot_mean():
    with pytest.raises(MetricError, match="weights"):
        dropped([[0]], 2, 1.0, policy="probs")
    with pytest.raises(MetricError, match="policy"):
        dropped([[0]], 2, 1.0, policy="random")
    with pytest.raises(MetricError, match="expert ids"):
        dropped([[2]], 2, 1.0)
    with pytest.raises(MetricError, match="weights of shape"):
        dropped([[0]], 2, 1.0, weights=[[1, 2]])
    with pytest.raises(MetricError, match="one batch per token"):
        dropped([[0], [1]], 2, 1.0, batch=[0])
