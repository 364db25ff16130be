"""Rules that look at a batch: against enumeration, published numbers and their own limits."""

from itertools import product
from math import ceil, log2

import numpy as np
import pytest
import torch
from causality_probe import probe
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explorer_routers_rules import inputs_from, random_inputs, sets, toy, violation

from explorer.errors import RouterError
from explorer.metrics.load import max_violation
from explorer.routers import ROUTERS
from explorer.routers.assignment import balanced_assignment, log_sinkhorn
from explorer.routers.contract import dense


def loads(routing):
    n_experts = routing.scores.shape[-1]
    return routing.expert_ids[routing.expert_ids >= 0].bincount(minlength=n_experts)


# expert choice


def test_experts_that_choose_have_exactly_equal_loads():
    inputs = random_inputs(n_tokens=400, n_experts=16, top_k=2)
    routing = ROUTERS["expert_choice"]().route(inputs)
    assert loads(routing).tolist() == [400 * 2 // 16] * 16
    probs = inputs.logits.softmax(-1)
    for expert in range(16):
        taken = [row for row, chosen in enumerate(sets(routing)) if expert in chosen]
        assert set(taken) == set(probs[:, expert].topk(50).indices.tolist())


def test_experts_that_choose_leave_tokens_out():
    """Independent scores leave (1 - c/E)^E of the tokens without an expert, 0.131 at E=64, c=2."""
    generator = torch.Generator().manual_seed(0)
    independent = torch.rand(4096, 64, generator=generator)
    inputs = inputs_from(independent, score_function="probabilities")
    routing = ROUTERS["expert_choice"]().route(inputs)
    unrouted = float((routing.expert_ids < 0).all(-1).float().mean())
    assert pytest.approx(0.1311, abs=1e-4) == (1 - 2 / 64) ** 64
    assert unrouted == pytest.approx(0.1311, abs=0.015)


def test_windows_of_expert_choice_are_routed_apart():
    inputs = random_inputs(n_tokens=96)
    whole = ROUTERS["expert_choice"](window=32).route(inputs)
    parts = [inputs.take(torch.arange(at, at + 32)) for at in (0, 32, 64)]
    apart = torch.cat([dense(ROUTERS["expert_choice"]().route(part)) for part in parts])
    assert torch.equal(dense(whole), apart)


def test_the_published_leak_of_expert_choice():
    """2202.09368: 2 log2((1 - R) / R) bits a layer make 50 bits in 9 layers at R=1/8."""
    ratio = 2 / 16
    assert 9 * 2 * log2((1 - ratio) / ratio) == pytest.approx(50.53, abs=0.01)


# BASE


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**31))
def test_assignment_against_enumeration(n_tokens, n_experts, seed):
    profit = np.random.default_rng(seed).normal(size=(n_tokens, n_experts))
    chosen = balanced_assignment(profit, 1)[:, 0]
    low = n_tokens // n_experts
    best = -np.inf
    for candidate in product(range(n_experts), repeat=n_tokens):
        counts = np.bincount(candidate, minlength=n_experts)
        if counts.min() >= low and counts.max() <= low + (n_tokens % n_experts > 0):
            best = max(best, profit[np.arange(n_tokens), candidate].sum())
    counts = np.bincount(chosen, minlength=n_experts)
    assert counts.min() >= low and counts.max() <= low + 1
    assert profit[np.arange(n_tokens), chosen].sum() == pytest.approx(best)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_tokens", [1, 3, 64, 100])
def test_assignment_is_balanced_and_repeats_no_expert(n_tokens, k):
    inputs = random_inputs(n_tokens=n_tokens, top_k=k)
    routing = ROUTERS["base"]().route(inputs)
    assert all(len(chosen) == k for chosen in sets(routing))
    assert max(loads(routing)) - min(loads(routing)) <= k
    if n_tokens % 8 == 0:
        assert violation(routing, 8) == 0


def test_assignment_costs_score():
    """Equal loads cost about 9% of the greedy score on these skewed random scores."""
    costs = []
    for seed in range(5):
        random = np.random.default_rng(seed)
        profit = random.random((256, 8)) + np.linspace(0, 0.6, 8)
        chosen = balanced_assignment(profit, 1)[:, 0]
        costs.append(1 - profit[np.arange(256), chosen].sum() / profit.max(1).sum())
    assert min(costs) > 0.08 and max(costs) < 0.1


def test_a_window_has_a_limit():
    with pytest.raises(RouterError, match="2048"):
        ROUTERS["base"](window=4096)
    with pytest.raises(RouterError, match="k=9"):
        balanced_assignment(np.zeros((4, 8)), 9)


# Sinkhorn


def test_sinkhorn_margins():
    logits = random_inputs(n_tokens=300, n_experts=16).logits
    plan = log_sinkhorn(logits, max_iterations=2000, tolerance=1e-4).exp()
    assert_close("columns", plan.sum(0), torch.full((16,), 1 / 16, dtype=torch.float64), atol=1e-12)
    assert_close("rows", plan.sum(1) * 300, torch.ones(300, dtype=torch.float64), atol=1e-4)


def test_sinkhorn_ignores_constants_per_row_and_column():
    logits = random_inputs(n_tokens=100).logits.double()
    generator = torch.Generator().manual_seed(1)
    row, column = torch.randn(100, 1, generator=generator), torch.randn(1, 8, generator=generator)
    plan = log_sinkhorn(logits, max_iterations=3000, tolerance=1e-9)
    shifted = log_sinkhorn(logits + 5 * row + 3 * column, max_iterations=3000, tolerance=1e-9)
    assert_close("plan", plan.exp() * 800, shifted.exp() * 800, atol=1e-6)


@pytest.mark.slow
def test_sinkhorn_becomes_the_optimal_assignment_as_the_temperature_falls():
    logits = random_inputs(n_tokens=32, top_k=1).logits
    plan = log_sinkhorn(logits / 0.01, max_iterations=20_000, tolerance=1e-6)
    assert plan.argmax(-1).tolist() == balanced_assignment(logits.numpy(), 1)[:, 0].tolist()


def test_sinkhorn_bears_logits_that_overflow_and_ends():
    """Megatron-Core's loop overflows float32 above 88, and need not end at a spread of 6."""
    logits = random_inputs(n_tokens=200).logits * 60 + 500
    plan = log_sinkhorn(logits, max_iterations=50)
    assert bool(plan.isfinite().all())
    assert_close("columns", plan.exp().sum(0), torch.full((8,), 0.125).double(), atol=1e-9)


def test_sinkhorn_evens_out_the_load():
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_from(torch.randn(2000, 8, generator=generator) + torch.linspace(-2, 2, 8))
    before = violation(ROUTERS["top_k"]().route(inputs), 8)
    after = violation(ROUTERS["sinkhorn"]().route(inputs), 8)
    assert before > 1 and after < 0.25


# capacity


@pytest.mark.parametrize("name", ["capacity_probs", "capacity_position"])
def test_capacity_on_paper(name):
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.2, 0.1, 0.7]])
    inputs = inputs_from(probs, score_function="probabilities", top_k=1, renormalize=False)
    # 4 assignments, 3 experts: ceil(4/3) = 2 places; expert 0 is wanted three times
    routing = ROUTERS[name](capacity_factor=1.0).route(inputs)
    dropped = {"capacity_probs": 0, "capacity_position": 2}[name]
    assert [row for row, chosen in enumerate(sets(routing)) if not chosen] == [dropped]
    kept = [row for row in range(4) if row != dropped]
    assert_close("w", routing.weights[kept, 0], probs.max(-1).values[kept], atol=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_both_policies_drop_as_many_but_not_the_same(factor):
    inputs = toy()
    native = inputs.native
    places = ceil(factor * 192 * 2 / 8)
    expected = int((loads(native) - places).clamp_min(0).sum())
    by_probs = ROUTERS["capacity_probs"](capacity_factor=factor).route(inputs)
    by_position = ROUTERS["capacity_position"](capacity_factor=factor).route(inputs)
    for routing in (by_probs, by_position):
        assert 192 * 2 - int((routing.expert_ids >= 0).sum()) == expected
        assert int(loads(routing).max()) <= places
    if expected > 0:
        assert not torch.equal(dense(by_probs), dense(by_position))
        assert float(dense(by_probs).sum()) > float(dense(by_position).sum())


def test_nothing_is_dropped_from_one_plus_the_violation_on():
    inputs = random_inputs(n_tokens=400)
    native = ROUTERS["top_k"]().route(inputs)
    enough = 1 + max_violation(loads(native).numpy())
    kept = ROUTERS["capacity_probs"](capacity_factor=enough).route(inputs)
    assert torch.equal(dense(kept), dense(native))
    fewer = ROUTERS["capacity_probs"](capacity_factor=enough - 0.03).route(inputs)
    assert int((fewer.expert_ids >= 0).sum()) < 800


# causality


@pytest.mark.parametrize(
    ("name", "causal", "batch_dependent"),
    [
        ("top_k", True, False),
        ("hash_fitted", True, False),
        ("random", True, False),
        ("expert_choice", False, True),
        ("base", False, True),
        ("sinkhorn", False, True),
        ("capacity_probs", False, True),
        ("capacity_position", False, True),
    ],
)
def test_the_probe_finds_what_looks_ahead(name, causal, batch_dependent):
    verdict = probe(ROUTERS[name]())
    assert verdict == (causal, batch_dependent)
