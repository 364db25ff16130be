"""Solvers given too little: equal vectors, one dimension, few points, columns that do not vary.

Each shape stands just below and just above the threshold that decides what is done with it.
"""

import numpy as np
import pytest

from explorer.maps.data import FEWEST_MEASURED, NOISE
from explorer.maps.make import project
from explorer.maps.map_cache import MapOptions
from explorer.maps.pca import FEWEST, distinct, has_umap, pca
from explorer.maps.point_clusters import cluster, trustworthiness
from explorer.metrics.alignment import co_routing_agreement
from explorer.survey.distil import correlation

FAST = MapOptions(n_landmarks=40, n_epochs=20)
METHODS = ("kmeans", "gmm", "hdbscan")
FEW = (1, 2, 3, 4, 5, 6, 10)


def normal(n, dims, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dims)).astype(np.float32)


@pytest.mark.parametrize("n", [2, 4, FEWEST - 1, FEWEST, 60])
@pytest.mark.parametrize("dims", [1, 2, 3, 70])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e30, 1e-30, 0.1])
def test_equal_vectors_are_one_point(n, dims, value):
    values = np.full((n, dims), value, np.float32)
    assert not pca(values).any()
    assert not has_umap(values) and not project(values, FAST).any()
    assert np.isnan(trustworthiness(values, pca(values)))


def test_what_rounding_leaves_is_no_distance():
    """Equal but for the last digit, as the same sums in another order are."""
    values = np.ones((50, 8), np.float32)
    values[::2] = np.nextafter(np.float32(1), np.float32(2))
    assert not pca(values).any() and not project(values, FAST).any()
    # and a small real spread on large numbers is one
    values = np.float32(1000) + np.float32(0.5) * normal(50, 8)
    assert np.ptp(pca(values)[:, 1]) > 0.5


@pytest.mark.parametrize("n", [2, 3, FEWEST - 1, FEWEST, 60])
def test_one_dimension_is_a_line(n):
    values = normal(n, 1)
    xy = project(values, FAST)
    assert not xy[:, 1].any()
    assert np.allclose(np.diff(np.sort(xy[:, 0])), np.diff(np.sort(values[:, 0])), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3, 70])
def test_vectors_on_a_line_have_no_second_component(dims):
    values = normal(40, 1) @ np.abs(normal(1, dims, seed=1)) + 5
    xy = pca(values)
    assert np.ptp(xy[:, 0]) > 1 and not xy[:, 1].any()


@pytest.mark.parametrize(
    "different",
    # the first map of a process takes over five seconds, to compile UMAP
    [2, FEWEST - 1, *(pytest.param(n, marks=pytest.mark.slow(seconds=5)) for n in (FEWEST, 30))],
)
def test_equal_vectors_among_others_are_one_point_each(different):
    values = np.repeat(normal(different, 5), 20, axis=0)
    first, which = distinct(values)
    assert first.tolist() == list(range(0, 20 * different, 20))
    assert which.tolist() == np.repeat(np.arange(different), 20).tolist()
    assert has_umap(values) == (different >= FEWEST)
    for xy in (pca(values), project(values, FAST)):
        assert np.isfinite(xy).all()
        places = xy.reshape(different, 20, 2)
        assert not np.ptp(places, axis=1).any()
        assert len(np.unique(places[:, 0], axis=0)) == different


def test_zero_has_one_sign():
    assert len(distinct(np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32))[0]) == 1


@pytest.mark.parametrize("size", [1e-30, 1e18])
def test_a_map_does_not_depend_on_the_unit(size):
    values = np.repeat(normal(5, 4) * 20, 12, axis=0) + normal(60, 4, seed=1)
    for xy in (pca(values * np.float32(size)), project(values * np.float32(size), FAST)):
        assert np.isfinite(xy).all() and len(np.unique(xy, axis=0)) == 60
    # the same neighbours: only the last digits of a power of ten differ
    plain = project(values, FAST._replace(n_landmarks=30))
    other = project(values * np.float32(2.0**40), FAST._replace(n_landmarks=30))
    assert np.array_equal(plain, other)


@pytest.mark.parametrize("different", [FEWEST_MEASURED - 1, FEWEST_MEASURED])
def test_trustworthiness_counts_equal_vectors_once(different):
    values = np.repeat(normal(different, 2), 30, axis=0)
    found = trustworthiness(values, values)
    if different < FEWEST_MEASURED:
        assert np.isnan(found)
    else:
        # the picture is the vectors
        assert found == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [*FEW, 200])
def test_equal_vectors_are_one_cluster(method, n):
    found = cluster(np.full((n, 3), 0.1, np.float32), method, n_clusters=12)
    assert found.n_clusters == 1 and not found.labels.any() and len(found.labels) == n


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", FEW)
@pytest.mark.parametrize("dims", [1, 3])
def test_few_points_have_clusters(method, n, dims):
    found = cluster(normal(n, dims), method, n_clusters=12)
    assert len(found.labels) == n
    assert found.labels.min() >= NOISE and found.labels.max() < max(1, n)


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
@pytest.mark.parametrize("different", [2, 3, 11, 12, 13])
def test_there_are_no_more_clusters_than_different_vectors(method, different):
    values = np.repeat(normal(different, 6) * 9, 10, axis=0)
    found = cluster(values, method, n_clusters=12)
    assert 2 <= found.n_clusters <= different
    # equal vectors are never divided
    groups = found.labels.reshape(different, 10)
    assert (groups == groups[:, :1]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [0.0, 30.0, 3000.0])
def test_one_large_dimension_that_hardly_varies_changes_no_cluster(method, offset):
    """As massive activations are; in float32 and float64 alike."""
    centres = normal(4, 24) * 6
    values = (centres[np.arange(400) % 4] + normal(400, 24, seed=1)).astype(np.float64)
    values[:, 7] = offset + 0.05 * normal(400, 1, seed=2)[:, 0]
    for dtype in (np.float32, np.float64):
        found = cluster(values.astype(dtype), method, n_clusters=4)
        assert found.n_clusters == 4
        groups = found.labels.reshape(100, 4)
        assert (groups == groups[:1]).mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_column_changes_no_cluster(method):
    values = np.concatenate([normal(60, 4) + 9, normal(60, 4, seed=1) - 9])
    wide = np.concatenate([values, np.full((120, 3), 7e5, np.float32)], axis=1)
    assert np.array_equal(cluster(wide, method).labels, cluster(values, method).labels)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("n", [3, 10, 1000])
def test_what_does_not_vary_has_no_correlation(value, n):
    """The mean of equal numbers is rounded, so that their standard deviation is hardly ever 0."""
    same, other = np.full(n, value), normal(n, 1)[:, 0].astype(np.float64)
    assert np.isnan(correlation(same, other)) and np.isnan(correlation(other, same))
    assert correlation(other, 1e-6 * other + 3) == pytest.approx(1.0, abs=1e-6)
    table = np.full((12, 12), value)
    varied = normal(12, 12) + normal(12, 12).T
    found = co_routing_agreement([table], [varied])
    assert np.isnan([found.correlation, found.low, found.high]).all() and found.pairs == 66
    assert co_routing_agreement([varied], [varied]).correlation == pytest.approx(1.0)
