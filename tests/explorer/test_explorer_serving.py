"""Serving: GPUs under placements, decode batches and coverage, by hand."""

import numpy as np
import pandas as pd
import pytest
from synthetic import SITES, write_run

from explorer.metrics import traffic
from explorer.pages.load_balance import data, figures
from explorer.queries.load import window_loads
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


def test_placements_are_judged_on_domains_that_were_held_out(tmp_path):
    write_run(tmp_path / "served.duckdb", sites=SITES[:2])
    sizes = {"gpus": 2, "nodes": 1, "groups": 1, "replicas": 8}
    with open_run(tmp_path / "served.duckdb") as run:
        table = data.held_out_table(run, n_experts=6, **sizes).set_index("policy")
        loads = window_loads(run).loads
    assert list(table.index) == ["in order", "EPLB, global", "across windows"]
    for policy, row in table.iterrows():
        found = traffic.held_out(loads, policy, **sizes)
        assert (row["own"], row["held_out"], row["worst"]) == pytest.approx(
            (found.own.mean(), found.held_out.mean(), found.held_out.min())
        )
        assert row["low"] <= row["held_out"] <= row["high"]
