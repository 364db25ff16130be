"""Placement of experts: the published example, and what any placement must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explorer.errors import MetricError
from explorer.metrics import placement

# README of github.com/deepseek-ai/EPLB
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example():
    found = placement.rebalance(PUBLISHED, 16, 4, 2, 8)
    assert found.phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found.logcnt.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    loads = placement.gpu_load(PUBLISHED, found, 8)
    assert loads[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    np.testing.assert_allclose(placement.balancedness(loads), [0.8277, 0.8050], atol=5e-5)


def test_the_global_policy_and_placements_without_replicas():
    # 4 groups do not divide by 3 nodes
    spread = placement.rebalance(PUBLISHED, 16, 4, 3, 8)
    even = placement.balancedness(placement.gpu_load(PUBLISHED, spread, 8))
    np.testing.assert_allclose(even, [0.9323, 0.8401], atol=5e-5)
    for gpus, expected in ((4, [0.7826, 0.5601]), (12, [0.4704, 0.4890])):
        plain = placement.in_order(2, 12, gpus)
        even = placement.balancedness(placement.gpu_load(PUBLISHED, plain, gpus))
        np.testing.assert_allclose(even, expected, atol=5e-5)


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    nodes = draw(st.sampled_from([n for n in (1, 2, 4) if groups % n == 0]))
    gpus = nodes * draw(st.sampled_from([1, 2, 3]))
    experts = groups * draw(st.integers(1, 6))
    replicas = gpus * draw(st.integers(-(-experts // gpus), -(-experts // gpus) + 4))
    layers = draw(st.integers(1, 3))
    load = st.lists(st.integers(0, 500), min_size=experts, max_size=experts)
    weight = draw(st.lists(load, min_size=layers, max_size=layers))
    return np.array(weight), replicas, groups, nodes, gpus


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_placement_keeps_every_expert_and_all_load(problem):
    weight, replicas, groups, nodes, gpus = problem
    layers, experts = weight.shape
    found = placement.rebalance(*problem)
    assert found.phy2log.shape == (layers, replicas)
    for layer in range(layers):
        counted = np.bincount(found.phy2log[layer], minlength=experts)
        assert counted.tolist() == found.logcnt[layer].tolist() and counted.min() >= 1
        for expert in range(experts):
            copies = found.log2phy[layer, expert]
            assert (copies[counted[expert] :] == -1).all()
            assert (found.phy2log[layer, copies[: counted[expert]]] == expert).all()
        # a group stays on one node
        node = np.repeat(np.arange(nodes), replicas // nodes)
        for group in range(groups):
            inside = found.phy2log[layer] // (experts // groups) == group
            assert len(set(node[inside])) == 1
    loads = placement.gpu_load(weight, found, gpus)
    np.testing.assert_allclose(loads.sum(1), weight.sum(1))
    # the copy that would be made next is never lighter than one that was made
    if nodes == 1:
        share = weight / found.logcnt
        before = weight / np.maximum(found.logcnt - 1, 1)
        made = np.where(found.logcnt > 1, before, np.inf).min(1)
        assert (share.max(1) <= made * (1 + 1e-6)).all()


def test_balancedness_of_one_expert_a_rank_is_that_of_the_largest_load():
    loads = np.array([[1.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert placement.balancedness(loads)[0] == 2 / 4
    assert np.isnan(placement.balancedness(loads)[1])
    assert placement.overall_balancedness([[1, 3], [5, 1]]) == (2 + 3) / (3 + 5)
    assert np.isnan(placement.overall_balancedness(loads[1:]))


def test_distinct_experts_of_batches():
    ids = [[0, 1], [1, 2], [3, -1], [3, -1], [0, 5]]
    assert placement.distinct_experts(ids, 2).tolist() == [3, 1]
    assert placement.distinct_experts(ids, 1).tolist() == [2, 2, 1, 1, 2]
    assert placement.distinct_experts(ids, 6).tolist() == []
    # E = 64, k = 8, published in many accounts of decode traffic
    expected = placement.expected_distinct(64, 8, [1, 4, 16, 32])
    np.testing.assert_allclose(expected, [8, 26.5, 56.4, 63.1], atol=0.06)


def test_coverage_counts_tokens_until_each_further_expert():
    assert placement.coverage([[0, 1], [1, 0], [-1, 2], [2, 4]], 6).tolist() == [1, 1, 3, 4]
    assert placement.coverage(np.empty((0, 2), int), 4).tolist() == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 5, 1, 8), "groups that divide 12 experts"),
        ((16, 4, 2, 5), "divides by 2 nodes"),
        ((15, 4, 2, 8), "replicas that divides by 8 GPUs"),
        ((8, 4, 2, 8), "at least 12 replicas"),
        ((16, 0, 2, 8), "sizes of at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, expected):
    with pytest.raises(MetricError, match=expected):
        placement.rebalance(PUBLISHED, *sizes)


def test_loads_that_are_none_are_refused():
    with pytest.raises(MetricError, match="loads of 0 or more"):
        placement.rebalance([[1.0, -1.0]], 2, 1, 1, 2)
    with pytest.raises(MetricError, match="divides 12 experts"):
        placement.in_order(1, 12, 5)
