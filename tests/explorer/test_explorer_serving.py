"""Serving: GPUs under placements, decode batches and coverage, by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from synthetic import SITES, write_run

from explorer.engine_files import PLACEMENT_FORMATS
from explorer.errors import RunError
from explorer.metrics import cache, placement, traffic
from explorer.pages.load_balance import data, figures
from explorer.queries.load import calibration, window_loads
from explorer.queries.lookups import cache_lookups
from explorer.run import open_run
from explorer.ui.wording import Scope


def load(counts):
    layers, experts = np.shape(counts)
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), experts),
            "site": 0,
            "expert_id": np.tile(np.arange(experts), layers),
            "assignments": np.ravel(counts),
        }
    )


def test_gpus_under_every_placement():
    table = data.gpu_table(load([[6, 2, 1, 1], [1, 1, 1, 1]]), gpus=2, nodes=2, groups=2,
                              replicas=6)  # fmt: skip
    assert list(dict.fromkeys(table["policy"])) == ["in order", "EPLB, by node", "EPLB, global"]
    plain = table[table["policy"] == "in order"]
    assert plain["load"].tolist() == [8, 2, 2, 2]
    assert plain["ratio"].tolist() == [1.6, 0.4, 1, 1]
    balance = data.balance_of_gpus(table).set_index(["policy", "layer"])
    assert balance.loc[("in order", 0), "balancedness"] == pytest.approx(10 / 16)
    assert balance.loc[("in order", 0), "straggler"] == pytest.approx(1.6)
    # the group of the hot expert cannot leave its node
    assert balance.loc[("EPLB, by node", 0), "straggler"] == pytest.approx(1.6)
    # 6 = 2 + 2 + 2 copies; 2; 1; 1 on two GPUs of three
    assert balance.loc[("EPLB, global", 0), "balancedness"] == pytest.approx(1.0)
    assert data.overall(table)["in order"] == pytest.approx((5 + 2) / (8 + 2))
    bars = figures.gpu_bars(table[table["layer"] == 0], layer="0", scope=Scope(10))
    assert list(bars.data[0].y) == [1.6, 0.4]


def test_decode_batches_and_coverage():
    ids = np.array([[0, 1], [0, 1], [2, 3], [0, -1]])
    table = data.decode_reads(ids, 4, sizes=(1, 2, 4, 8))
    assert table["batch"].tolist() == [1, 2, 4]
    assert table["measured"].tolist() == [1.75, 2.5, 4]
    assert table["batches"].tolist() == [4, 2, 1]
    assert table["uniform"].iloc[0] == pytest.approx(1.75)
    curve = data.coverage_curve(ids, 4)
    assert curve["tokens"].tolist() == [1, 1, 3, 3, 4]
    assert curve["share"].tolist() == [0.25, 0.5, 0.75, 1, 1]
    assert data.coverage_curve(np.empty((0, 2), int), 4).empty
    figure = figures.coverage(curve, layer="0", scope=Scope(4))
    assert list(figure.data[1].y) == [0.25, 0.5, 0.75, 1, 1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "served.duckdb"
    known = write_run(path, sites=SITES[:2])
    with open_run(path) as run:
        yield known, run


SIZES = {"gpus": 2, "nodes": 1, "groups": 1, "replicas": 8}


def test_placements_are_judged_on_windows_that_were_held_out(served):
    run = served[1]
    found = data.judged(run, by="domains", windows=8, n_experts=6, **SIZES)
    table = found.table.set_index("policy")
    loads = window_loads(run).loads
    assert list(table.index) == ["in order", "EPLB, global", "across windows", data.CHOSEN]
    each = {}
    for policy in list(table.index)[:3]:
        row, one = table.loc[policy], traffic.held_out(loads, policy, **SIZES)
        each[policy] = one
        assert (row["own"], row["held_out"], row["worst"]) == pytest.approx(
            (one.own.mean(), one.held_out.mean(), one.held_out.min())
        )
        assert row["low"] <= row["held_out"] <= row["high"]
    choice = traffic.choose(each)
    assert table.loc[data.CHOSEN, "held_out"] == pytest.approx(choice.held_out.mean())
    assert found.windows == 4 and found.ages.empty and found.renewals.empty
    assert found.best == table["held_out"][:3].idxmax()
    at = found.stragglers[found.stragglers["policy"] == "in order"]
    assert at["straggler"].tolist() == each["in order"].stragglers.tolist()
    figure = figures.balancedness_lines(found.stragglers, scope=Scope(10), held_out=True)
    assert list(figure.data[0].y) == at["straggler"].tolist()

    timed = data.judged(run, by="time", windows=3, n_experts=6, phase="prompt", **SIZES)
    loads = window_loads(run, "time", 3, phase="prompt").loads
    later = traffic.rebalanced_later(loads, timed.best, **SIZES)
    assert timed.ages["balancedness"].tolist() == pytest.approx(
        [np.nanmean(np.diagonal(later, age)) for age in range(3)]
    )
    assert timed.renewals["every"].tolist() == [1, pd.NA]


def test_a_placement_leaves_as_files_and_says_what_travels(served):
    run = served[1]
    made = data.placed(run, policy="EPLB, global", by="domains", windows=8, n_experts=6, **SIZES)
    rows = json.loads(made.files["eplb-json"])["phy2log"]
    expected = placement.rebalance(window_loads(run).loads.sum(0), 8, 1, 1, 2)
    assert rows == expected.phy2log.tolist() and not made.refused
    assert list(made.files) == list(PLACEMENT_FORMATS)
    width = 2 * run.info["hidden_size"]
    # each of two layers sends a token to one or both GPUs
    assert made.dispatch.sent.sum() == pytest.approx(2 * made.dispatch.gpus * width)


def test_caches_drafts_and_pins_of_a_run(served):
    run = served[1]
    found = data.cached(run)
    layers = cache_lookups(run)
    rates = found.rates.set_index(["cache", "slots"])["hit_rate"]
    expected = np.mean([cache.hit_rate(one.judged, slots=3, policy="lfu") for one in layers])
    assert rates["lfu", 3] == pytest.approx(expected)
    for policy in ("lru", "lfu"):  # pins do not start empty, and may hit more in a few tokens
        assert (rates["belady"] >= rates[policy]).all()
    reads = [placement.draft_reads(one.judged, one.prompt_id, 6).one_request for one in layers]
    assert found.drafts["one_request"].tolist() == pytest.approx(np.mean(reads, axis=0).tolist())
    assert json.loads(found.pins[6]["json"])["budget"] == 6
    assert data.cached(run, requests="recorded").drafts.empty


def test_drafts_are_windows_within_one_request():
    ids = np.array([[0, 1], [0, 1], [2, 3], [4, -1], [0, 1], [5, 0]])
    of = [7, 7, 7, 8, 8, 8]
    assert placement.draft_windows(ids, of, 2).tolist() == [2, 3]
    assert placement.draft_windows(ids, of, 3).tolist() == [4, 4]
    assert placement.draft_windows(ids, of, 4).tolist() == []
    found = placement.draft_reads(ids, of, 6, sizes=(1, 2, 9))
    assert found.tokens.tolist() == [1, 2] and found.windows.tolist() == [6, 2]
    assert found.one_request.tolist() == [11 / 6, 2.5]


def test_experts_that_too_few_tokens_reach(served):
    known, run = served
    table = calibration(run, 12)
    for (domain, layer), rows in table.groupby(["domain", "layer"], dropna=False):
        whole = domain is None or domain != domain
        hits = known.assignments(layer, 0, domain=None if whole else domain)
        counts = np.bincount([expert for _, _, expert, _ in hits], minlength=6)
        assert rows["tokens"].tolist() == counts.tolist()
    one = table[table["tokens"].between(1, 11)].iloc[0]
    assert one["missing"] == 12 - one["tokens"] and not one["unseen"]
    assert one["more_texts"] == math.ceil(one["missing"] / (one["tokens"] / one["texts"]))
    never = table[table["unseen"]].iloc[0]
    assert never["more_texts"] == math.ceil(12 * never["texts"] / 3)
    assert (table.loc[table["tokens"] >= 12, "more_texts"] == 0).all()
    with pytest.raises(RunError, match="1 or more, got 0"):
        calibration(run, 0)


def test_capacity_factors_end_at_the_first_that_drops_nothing():
    assert data.factors_to(2.126)[-2:] == [2.1, 2.13]
    assert data.factors_to(1.0)[-1] == 1.5
    assert data.factors_to(17.5)[-2:] == [16.0, 17.5] and len(data.factors_to(200.0)) < 170
    assert data.factors_to(float("nan"))[-1] == 4.0
