"""Agreement of two routers: cases on paper, identities, and what chance gives."""

from itertools import combinations
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from explorer.comparison.replay import divergence
from explorer.errors import MetricError
from explorer.metrics import agreement as metrics

A = np.array([[0, 1], [2, 3], [4, -1], [-1, -1], [5, 0]])
B = np.array([[1, 0, -1], [3, 7, 1], [-1, -1, -1], [-1, -1, -1], [0, 5, 2]])


def test_sets_on_paper():
    nan = np.nan
    np.testing.assert_array_equal(metrics.overlap_at_k(A, B), [1, 0.5, 0, nan, 1])
    np.testing.assert_allclose(metrics.jaccard(A, B), [1, 1 / 4, 0, 1, 2 / 3])
    np.testing.assert_array_equal(metrics.exact_set(A, B), [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(metrics.top_1(A, B), [0, 0, 0, nan, 0])
    np.testing.assert_array_equal(metrics.top_1(A, A), [1, 1, 1, nan, 1])


def test_weights_on_paper():
    first = np.array([[0.7, 0.3], [0.6, 0.6], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    second = np.array([[0.6, 0.4, 9], [1, 2, 1], [0, 0, 0], [0, 0, 0], [0.2, 0.2, 0.6]])
    found = metrics.weighted_overlap(A, first, B, second)
    np.testing.assert_allclose(found, [0.7, 0.25, np.nan, np.nan, 0.4])
    # the last: 0.2 + 0.2, and the first: min(0.7, 0.4) + min(0.3, 0.6)
    np.testing.assert_allclose(found[0], min(0.7, 0.4) + min(0.3, 0.6))


def means(*routings):
    return {k: metrics.mean_known(each) for k, each in metrics.agreement(*routings).items()}


def test_means_leave_out_what_is_not_defined():
    weights = np.ones(A.shape) / 2
    found = means(A, weights, A, weights)
    assert found == pytest.approx({**dict.fromkeys(metrics.MEASURES, 1), "experts_per_token": 1.4})
    nothing = np.full((2, 1), -1)
    empty = means(nothing, nothing * 0.0, nothing, nothing * 0.0)
    assert np.isnan(empty["agreement"]) and np.isnan(empty["weighted_overlap"])
    assert empty["experts_per_token"] == 0
    none = np.zeros((0, 2), dtype=int)
    assert np.isnan(means(none, none, none, none)["jaccard"])


def scores_divergence(p, q):
    """Return the Jensen-Shannon divergence of each row's scores, as replay reports it."""
    rows = (torch.from_numpy(np.asarray(side, dtype=np.float64)) for side in (p, q))
    return np.array([divergence(a[None], b[None])[0] for a, b in zip(*rows, strict=True)])


def test_divergences_on_paper():
    p, q = np.array([[1.0, 0], [0.5, 0.5], [2, 2]]), np.array([[0.0, 1], [0.5, 0.5], [3, 1]])
    js = scores_divergence(p, q)
    assert js[0] == pytest.approx(log(2)) and js[1] == 0
    middle = np.array([0.625, 0.375])
    expected = sum(0.5 * np.sum(d * np.log(d / middle)) for d in ([0.5, 0.5], [0.75, 0.25]))
    assert js[2] == pytest.approx(expected, rel=1e-5)  # of float32 scores
    assert np.isnan(scores_divergence(np.zeros((1, 2)), q[:1]))[0]
    ids, none = np.array([[0, -1]]), np.array([[-1, -1]])
    apart = metrics.weight_divergence(ids, ids + 1.0, np.array([[3]]), np.array([[2.0]]))
    assert apart[0] == pytest.approx(log(2))
    assert np.isnan(metrics.weight_divergence(ids, ids + 1.0, none, none * 0.0))[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.data())
def test_identities(n_experts, seed, data):
    k = data.draw(st.integers(1, n_experts))
    random = np.random.default_rng(seed)
    first = np.stack([random.permutation(n_experts)[:k] for _ in range(30)])
    second = np.stack([random.permutation(n_experts)[:k] for _ in range(30)])
    weights = random.random((30, k)), random.random((30, k))
    overlap = metrics.overlap_at_k(first, second)
    np.testing.assert_allclose(metrics.jaccard(first, second), overlap / (2 - overlap))
    np.testing.assert_array_equal(metrics.exact_set(first, second), overlap == 1)
    np.testing.assert_allclose(overlap, metrics.overlap_at_k(second, first))
    dense = np.zeros((2, 30, n_experts))
    for side, (ids, values) in enumerate(zip((first, second), weights, strict=True)):
        np.put_along_axis(dense[side], ids, values / values.sum(1, keepdims=True), axis=1)
    total_variation = np.abs(dense[0] - dense[1]).sum(1) / 2
    found = metrics.weighted_overlap(first, weights[0], second, weights[1])
    np.testing.assert_allclose(found, 1 - total_variation, atol=1e-12)
    np.testing.assert_allclose(
        metrics.weight_divergence(first, weights[0], second, weights[1]),
        jensenshannon(dense[0], dense[1], axis=1) ** 2,
        atol=1e-12,
    )
    dense += 0.1
    js = scores_divergence(*dense)
    assert (js >= 0).all() and (js <= log(2) + 1e-6).all()
    np.testing.assert_allclose(js, jensenshannon(*dense, axis=1) ** 2, atol=1e-6)


@pytest.mark.parametrize(
    ("n_experts", "top_k", "jaccard", "repeat"),
    [(8, 2, 0.1786, 0.4643), (64, 8, 0.0705, 0.6791), (128, 8, 0.0343, 0.4123)],
)
def test_published_anchors_of_chance(n_experts, top_k, jaccard, repeat):
    assert metrics.chance_jaccard(n_experts, top_k) == pytest.approx(jaccard, abs=5e-5)
    assert metrics.chance_any_repeat(n_experts, top_k) == pytest.approx(repeat, abs=5e-5)


def test_chance_by_enumeration():
    sets = np.array(list(combinations(range(6), 3)))
    left, right = (each.ravel() for each in np.meshgrid(np.arange(20), np.arange(20)))
    overlap = metrics.overlap_at_k(sets[left], sets[right])
    assert overlap.mean() == pytest.approx(3 / 6)
    jaccard = metrics.jaccard(sets[left], sets[right])
    assert jaccard.mean() == pytest.approx(metrics.chance_jaccard(6, 3))
    assert (overlap > 0).mean() == pytest.approx(metrics.chance_any_repeat(6, 3))


def test_what_cannot_be_compared():
    with pytest.raises(MetricError, match="same tokens"):
        metrics.jaccard(A, B[:2])
    with pytest.raises(MetricError, match="top_k"):
        metrics.chance_jaccard(4, 5)
