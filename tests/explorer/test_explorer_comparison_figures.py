"""Figures of a comparison say what its rows hold."""

import numpy as np
import pandas as pd
import pytest

from explorer.pages.compare import figures as comparison


def results(**columns):
    n = len(next(iter(columns.values())))
    base = {
        "router": [f"r{i}" for i in range(n)],
        "family": ["literature"] * n,
        "seed": [pd.NA] * n,
        "loss_se": [0.01] * n,
        "experts_per_token": [2.0] * n,
        "latency_ratio": [np.nan] * n,
        "agreement": [1.0] * n,
        "max_violation": [0.1] * n,
        "control": [None] * n,
        "control_of": [None] * n,
        "causal": [True] * n,
        "batch_dependent": [False] * n,
        "simulated": [False] * n,
    }
    return pd.DataFrame({**base, **columns})


def test_the_front_leaves_out_what_is_beaten_what_is_chance_and_what_peeks():
    table = results(
        flops_ratio=[1.0, 0.8, 0.9, 0.7, 0.6],
        loss_change=[0.0, 0.1, 0.2, 0.05, -1.0],
        family=["literature", "rl", "rl", "control", "literature"],
        causal=[True, True, True, True, False],
    )
    assert comparison.pareto(table, "flops_ratio")["router"].tolist() == ["r1", "r0"]


def test_chance_does_not_stretch_the_axis_and_is_counted():
    table = results(
        flops_ratio=[1.0, 0.8], loss_change=[0.1, 6.0], family=["literature", "control"]
    )
    figure = comparison.front(table, cost="flops_ratio", native_loss=3.0, tokens=10)
    assert figure.layout.yaxis.range[1] < 0.5
    assert "1 point lies above" in figure.layout.title.subtitle.text
    trace = next(trace for trace in figure.data if trace.name == "literature")
    assert trace.error_y.array[0] == pytest.approx(0.02) and trace.customdata[0][0] == 0


@pytest.mark.parametrize("asked_for", [True, False])
def test_the_models_own_router_is_a_point_of_the_front(asked_for):
    """At its cost, or where that is no share of itself, where it was measured."""
    table = results(
        router=["worse and dearer", "cheaper", "native"],
        flops_ratio=[1.2, 0.8, 1.0],
        loss_change=[0.05, 0.1, 0.0],
    )
    table = table if asked_for else table[:2]
    figure = comparison.front(table, cost="flops_ratio", native_loss=3.0, tokens=10)
    traces = {trace.name: trace for trace in figure.data}
    own = traces["the model's own router"]
    assert (own.x[0], own.y[0]) == (1.0, 0.0) and own.customdata[0][0] == (2 if asked_for else -1)
    assert list(traces["literature"].x) == [1.2, 0.8]  # not drawn twice
    assert list(traces["front"].x) == [0.8, 1.0]
    figure = comparison.front(table, cost="max_violation", native_loss=3.0, tokens=10)
    drawn = [trace.x[0] for trace in figure.data if trace.name == own.name]
    assert drawn == ([pytest.approx(1.1)] if asked_for else [])


def test_badges():
    table = results(
        flops_ratio=[1.0] * 3,
        loss_change=[0.0] * 3,
        causal=[False, None, True],
        batch_dependent=[True, None, False],
        simulated=[False, None, True],
    )
    found = [comparison.badges(row) for _, row in table.iterrows()]
    assert found == [["not causal", "depends on the batch"], [], ["simulated"]]


def test_a_price_that_moves_is_one_curve_and_lambdas_are_several():
    steps = np.arange(20)
    price = pd.DataFrame({"router": "gate", "seed": 0, "lambda": steps / 7, "step": steps})
    policy = pd.concat(
        pd.DataFrame({"router": "pg", "seed": seed, "lambda": weight, "step": steps})
        for weight in (0.1, 0.2)
        for seed in (0, 1)
    )
    rows = pd.concat([price, policy], ignore_index=True).assign(reward=1.0)
    figure = comparison.curves(rows, "reward")
    assert [trace.name for trace in figure.data] == ["gate"] + ["pg, λ = 0.1"] * 2 + [
        "pg, λ = 0.2"
    ] * 2
    assert all(len(trace.x) == 20 for trace in figure.data)
