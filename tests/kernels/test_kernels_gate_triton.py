"""The gate's Triton kernels in Triton's interpreter, against the reference (tests/conftest.py)."""

import gate_cases
import pytest
import torch
from gate_cases import Case, choices, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops.gate import _triton, gate
from kernels.ops.gate.reference import GateInputs


@pytest.mark.parametrize("cases", ["select_cases", "group_cases", "observe_cases", "edge_cases"])
def test_the_kernels_agree_with_the_reference(cases):
    for case in getattr(gate_cases, cases)():
        gate_cases.check(case, "triton")


@given(st.integers(0, 40), st.integers(1, 20), st.data())
@settings(deadline=None, max_examples=15)
def test_the_kernels_agree_with_the_reference_on_any_shape(n_tokens, n_experts, data):
    n_experts *= data.draw(st.sampled_from([1, 8]))
    top_k = data.draw(st.integers(1, min(n_experts, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = data.draw(st.integers(0, 2**16))
    options = {
        "top_k": top_k,
        "score_function": data.draw(st.sampled_from(gate_cases.RULES[:3])),
        "packed": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        ids, weights = choices(n_tokens, n_experts, top_k, seed=seed, dtype=dtype)
        options |= {"expert_ids": ids, "weights": weights}
    logits = random_logits(n_tokens, n_experts, dtype=dtype, seed=seed)
    gate_cases.check(Case(logits, options), "triton")


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("n_tokens", [127, 128, 257])
def test_blocks_meet_without_a_gap(n_tokens, observed):
    logits = random_logits(n_tokens, 8, dtype=torch.bfloat16)
    options = {
        "top_k": 2,
        "score_function": "softmax",
        "segments": torch.arange(n_tokens) * 3 // n_tokens,
        "n_segments": 3,
        "valid": torch.arange(n_tokens) % 5 != 4,
    }
    if observed:
        ids, weights = choices(n_tokens, 8, 2, dtype=torch.bfloat16)
        options |= {"expert_ids": ids, "weights": weights}
    gate_cases.check(Case(logits, options), "triton")


def test_the_sums_of_many_blocks_come_together(monkeypatch):
    monkeypatch.setattr(_triton, "REPLICAS", 2)
    ids, weights = choices(700, 8, 1)
    options = {"top_k": 1, "score_function": "softmax", "expert_ids": ids, "weights": weights}
    gate_cases.check(Case(random_logits(700, 8), options), "triton")


def inputs(n_experts, top_k, *, dtype=torch.bfloat16, observed=True, rule="softmax", **options):
    """Arguments of one call, as the launcher gets them."""
    ids = weights = None
    if observed:
        ids, weights = ((value,) for value in choices(4, n_experts, top_k))
    return GateInputs(
        n_tokens=4,
        n_experts=n_experts,
        top_k=top_k,
        score_function=rule,
        logits=(random_logits(4, n_experts, dtype=dtype),),
        expert_ids=ids,
        weights=weights,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (inputs(128, 8), True),
        (inputs(512, 8, dtype=torch.float32, rule="softmax_topk"), True),
        (inputs(8, 2, observed=False), True),
        (inputs(8, 2, observed=False, dtype=torch.float32), False),  # no room for the id in a key
        (inputs(60, 4), False),  # rows of 120 bytes
        (inputs(128, 9), False),
        (inputs(128, 8, rule="sigmoid"), False),
        (inputs(128, 8, n_groups=8, top_groups=4), False),
        (inputs(128, 8, selection_bias=(torch.zeros(128),)), False),
    ],
)
def test_a_thread_serves_a_token_where_it_can(arguments, expected):
    assert _triton._thread_per_token(arguments) is expected


def test_logits_that_do_not_begin_at_16_bytes_are_served_too():
    memory = random_logits(1, 17 * 8, dtype=torch.bfloat16)[0]
    logits = memory[1 : 1 + 16 * 8].view(16, 8)
    assert logits.data_ptr() % 16
    gate_cases.check(Case(logits, {"top_k": 2, "score_function": "softmax"}), "triton")


def test_biases_of_some_sites_only():
    chosen = [choices(6, 12, 3, seed=site) for site in range(3)]
    options = {
        "expert_ids": [ids for ids, _ in chosen],
        "weights": [weights for _, weights in chosen],
        "rows": None,
        "n_experts": 12,
        "top_k": 3,
        "score_function": "sigmoid",
        "selection_bias": [None, random_logits(1, 12, seed=9)[0], None],
        "n_groups": 4,
        "top_groups": 2,
    }
    logits = [random_logits(6, 12, seed=site) for site in range(3)]
    gate_cases.check(Case(logits, options), "triton")


def test_more_experts_than_a_program_holds_are_refused():
    with pytest.raises(ValueError, match="at most 4096 experts, got 5000"):
        gate(torch.zeros(1, 5000), top_k=1, score_function="softmax", backend="triton")
