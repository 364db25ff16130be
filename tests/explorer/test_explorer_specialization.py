"""Specialisation by hand, its bounds, and its floors."""

from math import log

import numpy as np
import pytest

from explorer.errors import MetricError
from explorer.metrics import specialization as spec


def test_wilson_by_hand():
    # z^2 = 2.70554: middle (0.5 + z2/20)/(1 + z2/10), half z*sqrt(0.025 + z2/400)/(1 + z2/10)
    low, high = spec.wilson(5, 10)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(
        2 * 1.64485 * (0.025 + 2.70554 / 400) ** 0.5 / 1.270554, 1e-4
    )
    low, high = spec.wilson([0, 10], [10, 10])
    assert (
        low[0] == 0 and high[1] == 1 and 0 < high[0] < 0.25 and high[0] == pytest.approx(1 - low[1])
    )
    assert np.isnan(spec.wilson(0, 0).low)
    with pytest.raises(MetricError, match="more hits"):
        spec.wilson(3, 2)


def test_wilson_covers_nine_in_ten():
    random = np.random.default_rng(0)
    hits = random.binomial(200, 0.1, size=4000)
    low, high = spec.wilson(hits, 200)
    assert 0.87 < ((low <= 0.1) & (high >= 0.1)).mean() < 0.93


def test_prompts_that_differ_widen_the_interval():
    # ten prompts, each all or nothing: tokens are worth ten observations, not a thousand
    hits, tokens = np.repeat([0, 100], 5), np.full(10, 100)
    low, high = spec.by_prompt(hits, tokens)
    narrow = spec.wilson(500, 1000)
    assert high - low > 4 * (narrow.high - narrow.low)
    assert low < 0.5 < high
    alike = spec.by_prompt(np.full(10, 30), tokens)
    assert alike.low == alike.high == pytest.approx(0.3)


def test_few_prompts_fall_back_to_wilson():
    few = spec.by_prompt([1, 2, 0], [10, 10, 0])
    assert few == spec.wilson(3, 20)


def test_by_prompt_in_blocks_is_the_bootstrap(monkeypatch):
    random = np.random.default_rng(1)
    tokens = random.integers(1, 50, size=60)
    hits = random.binomial(tokens, 0.2)
    whole = spec.by_prompt(hits, tokens)
    monkeypatch.setattr(spec, "_CELLS", 600)
    assert spec.by_prompt(hits, tokens).low == pytest.approx(whole.low, abs=0.02)


def test_divergence_by_hand():
    # two domains of equal size; expert 0 serves the first only, expert 1 the second, 2 both
    counts = [[4, 0, 2], [0, 4, 2]]
    assert spec.divergence(counts).tolist() == pytest.approx([log(2), log(2), 0])
    assert spec.information(counts) == pytest.approx(8 / 12 * log(2))
    assert np.isnan(spec.divergence([[1, 0], [1, 0]])[1])
    assert spec.information([[1, 0], [1, 0]]) == 0
    assert np.isnan(spec.information([[0, 0]]))
    with pytest.raises(MetricError):
        spec.information([[-1]])


def test_information_is_that_of_the_joint_distribution():
    counts = np.random.default_rng(0).integers(0, 30, size=(4, 6))
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    expected = (joint[seen] * np.log(joint[seen] / apart[seen])).sum()
    assert spec.information(counts) == pytest.approx(expected)


def test_shuffled_information_keeps_what_prompts_share():
    # every prompt has an expert of its own, whatever its domain
    counts = np.eye(12) * 50
    labels = np.repeat([0, 1, 2], 4)
    grouped = np.zeros((3, 12))
    np.add.at(grouped, labels, counts)
    floor = spec.shuffled_information(counts, labels)
    # tokens look specialised by domain, and shuffled prompts say that this is nothing
    assert spec.information(grouped) == pytest.approx(log(3)) == floor.mean
    # experts that are the domains: shuffled, most of it goes
    sorted_counts = np.eye(3)[labels] * 50
    grouped = np.zeros((3, 3))
    np.add.at(grouped, labels, sorted_counts)
    assert spec.information(grouped) == pytest.approx(log(3))
    assert spec.shuffled_information(sorted_counts, labels).high < log(3)


def test_favourite_share_by_hand():
    # entry 0 four times (3 of them to expert 1), entry 1 twice (left out), entry 2 three times
    entry = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    expert = [1, 1, 1, 0, 0, 0, 2, 2, 2]
    often = np.bincount(entry)
    assert spec.favourite_share(entry, expert, often, 3, min_count=3) == pytest.approx(0.875)
    assert spec.favourite_share(entry, expert, often, 3, min_count=2) == pytest.approx(2.75 / 3)
    assert np.isnan(spec.favourite_share(entry, expert, often, 3, min_count=5))
    # two experts per token: the favourite may have every token, and is counted once
    both = spec.favourite_share([0, 0, 0, 0], [0, 1, 0, 2], np.array([2]), 3, min_count=2)
    assert both == 1


def test_shuffled_favourite_is_what_the_loads_alone_give():
    random = np.random.default_rng(0)
    entry_of = random.integers(0, 20, size=20_000)
    token = np.arange(20_000)
    expert = entry_of % 4
    often = np.bincount(entry_of)
    measured = spec.favourite_share(entry_of[token], expert, often, 4)
    floor = spec.shuffled_favourite(token, expert, entry_of, 4)
    assert measured == 1
    assert 0.25 < floor.mean < 0.29
    unrelated = random.permutation(expert)
    value = spec.favourite_share(entry_of[token], unrelated, often, 4)
    assert value == pytest.approx(floor.mean, abs=0.01)


def test_rare_entries_look_special_by_chance():
    often = [10] * 50 + [10_000]
    floor = spec.shuffled_top(often, 1_050)
    # the expected share is a tenth; the luckiest of fifty entries has three or four of ten
    assert 0.3 < floor.mean < 0.45 and floor.low >= 0.2
    assert spec.shuffled_top([1000, 9000], 1000).mean == pytest.approx(0.1, abs=0.01)
    assert np.isnan(spec.shuffled_top([5], 2).mean)
