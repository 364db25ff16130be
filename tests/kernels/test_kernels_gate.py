"""The gate: cases on paper, invariants, and numba against the reference."""

import functools
import math
import re

import gate_cases
import numpy as np
import pytest
import torch
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.store.codec import encode_weights
from kernels.dispatch import KernelError
from kernels.ops.gate import _numba, gate_batch
from kernels.ops.gate import gate as gate_of_any_backend
from kernels.ops.gate.reference import NO_WEIGHT


@pytest.fixture(params=["torch", "numba"])
def gate(request):
    """The op with each backend that runs on a CPU."""
    return functools.partial(gate_of_any_backend, backend=request.param)


def test_softmax_on_paper(gate):
    """Probabilities 1/8, 2/8, 5/8, worked out by hand."""
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5)]])

    out = gate(logits, top_k=2, score_function="softmax")

    assert out.expert_ids.tolist() == [[2, 1]]
    assert out.load.tolist() == [0, 1, 1]
    assert_close("weights", out.weights, torch.tensor([[5 / 7, 2 / 7]]), atol=1e-6)
    assert_close("entropy", out.entropy, torch.tensor([0.9002560]), atol=1e-6)
    assert_close("margin", out.margin, torch.tensor([1 / 8]), atol=1e-6)
    assert_close("logsumexp", out.logsumexp, torch.tensor([math.log(8)]), atol=1e-6)
    assert_close("topk_mass", out.topk_mass, torch.tensor([7 / 8]), atol=1e-6)
    assert_close("importance", out.importance, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=1e-6)


def test_sigmoid_with_bias_chooses_by_bias_and_weighs_without(gate):
    """Sigmoids 0.5, 0.75, 0.25; the bias lifts expert 2 to 1.25 but not its weight."""
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    bias = torch.tensor([0.0, 0.0, 1.0])

    out = gate(logits, top_k=2, score_function="sigmoid", selection_bias=bias)

    assert out.expert_ids.tolist() == [[2, 1]]
    assert_close("weights", out.weights, torch.tensor([[0.25, 0.75]]), atol=1e-6)
    assert_close("margin", out.margin, torch.tensor([0.25]), atol=1e-6)
    assert_close("topk_mass", out.topk_mass, torch.tensor([1.0 / 1.5]), atol=1e-6)


def test_softmax_over_the_chosen_equals_renormalised_softmax(gate):
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    chosen = gate(logits, top_k=3, score_function="softmax_topk")
    renormalised = gate(logits, top_k=3, score_function="softmax")
    assert torch.equal(chosen.expert_ids, renormalised.expert_ids)
    assert_close("weights", chosen.weights, renormalised.weights, atol=1e-6)


def test_groups_bar_experts_outside_the_best_groups(gate):
    """Groups [0.9, 0], [0.5, 0.6], [0.1, 0.8]: the best wins, or the best two."""
    probs = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.8]])
    options = {"top_k": 2, "score_function": "probabilities", "n_groups": 3, "top_groups": 1}
    assert gate(probs, **options).expert_ids.tolist() == [[0, 1]]
    biased = gate(probs, **options, selection_bias=torch.zeros(6))
    assert biased.expert_ids.tolist() == [[3, 2]]


def test_observing_keeps_the_models_choice(gate):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    ids, weights = torch.tensor([[3, 0]]), torch.tensor([[0.7, 0.1]])

    out = gate(logits, top_k=2, score_function="softmax", expert_ids=ids, weights=weights)

    probs = [math.exp(x) / sum(math.exp(y) for y in (3, 2, 1, 0)) for x in (3, 2, 1, 0)]
    assert out.expert_ids.tolist() == [[3, 0]]
    assert_close("weights", out.weights, torch.tensor([[0.7, 0.1]]), atol=0)
    assert_close("mass", out.topk_mass, torch.tensor([probs[0] + probs[3]]), atol=1e-6)
    assert_close("margin", out.margin, torch.tensor([probs[3] - probs[1]]), atol=1e-6)


def test_an_empty_slot_counts_nowhere(gate):
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]])
    out = gate(logits, top_k=2, score_function="softmax", expert_ids=ids, weights=weights)
    probs = logits.softmax(-1)[0]
    assert out.load.tolist() == [0, 1, 0]
    assert_close("mass", out.topk_mass, probs[1:2], atol=1e-6)
    assert_close("margin", out.margin, (probs[1] - probs[2])[None], atol=1e-6)


def test_an_empty_slot_leaves_expert_0_in_the_running(gate):
    logits = torch.tensor([[9.0, 2.0, 3.0]])
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]])
    out = gate(logits, top_k=2, score_function="softmax_topk", expert_ids=ids, weights=weights)
    assert_close("margin", out.margin, torch.tensor([2.0 - 9.0]), atol=1e-6)


def test_sigmoid_weights_without_renormalising_are_the_sigmoids(gate):
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    out = gate(logits, top_k=2, score_function="sigmoid", renormalize=False)
    assert_close("weights", out.weights, torch.tensor([[0.75, 0.5]]), atol=1e-6)


def test_padding_may_hold_nan_and_counts_nowhere(gate):
    logits = torch.tensor([[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]])
    valid = torch.tensor([True, False])
    out = gate(logits, top_k=1, score_function="softmax", valid=valid)
    alone = gate(logits[:1], top_k=1, score_function="softmax")
    assert out.expert_ids.tolist() == [[2], [-1]]
    assert out.load.tolist() == [0, 0, 1]
    assert_close("importance", out.importance, alone.importance, atol=0)
    for name in ("weights", "entropy", "margin", "logsumexp", "topk_mass"):
        assert_close(name, getattr(out, name)[1:], torch.zeros_like(getattr(alone, name)), atol=0)


def test_ties_go_to_the_lower_expert_id(gate):
    out = gate(torch.zeros(2, 6), top_k=3, score_function="softmax")
    assert out.expert_ids.tolist() == [[0, 1, 2]] * 2
    assert out.margin.tolist() == [0.0, 0.0]


def test_a_probability_that_underflows_is_not_nan(gate):
    out = gate(torch.tensor([[0.0, -200.0, -math.inf]]), top_k=2, score_function="softmax")
    assert out.expert_ids.tolist() == [[0, 1]]
    assert out.entropy.item() == 0.0


def test_nobody_left_out_means_an_infinite_margin(gate):
    assert gate(torch.zeros(1, 2), top_k=2, score_function="softmax").margin.item() == math.inf


def test_no_tokens(gate):
    out = gate(torch.zeros(0, 4), top_k=2, score_function="softmax")
    assert out.expert_ids.shape == (0, 2)
    assert out.load.tolist() == [0, 0, 0, 0]


def test_observed_slots_come_best_first_ties_by_the_lower_id_and_empty_last(gate):
    logits = torch.zeros(1, 6)
    ids, weights = torch.tensor([[5, -1, 3, 0, 2]]), torch.tensor([[0.2, 0.9, 0.3, 0.2, 0.3]])
    out = gate(logits, top_k=5, score_function="softmax", expert_ids=ids, weights=weights)
    assert out.expert_ids.tolist() == [[2, 3, 0, 5, -1]]
    assert_close("weights", out.weights, torch.tensor([[0.3, 0.3, 0.2, 0.2, 0.0]]), atol=0)


def test_segments_keep_the_sums_apart(gate):
    """Two tokens in segment 1, one in 0, one in none; probabilities 3/4 and 1/4."""
    logits = torch.tensor([[math.log(3), 0.0]]).repeat(4, 1)
    ids, weights = torch.tensor([[0], [1], [0], [0]]), torch.tensor([[0.5], [0.25], [2.0], [9.0]])
    out = gate(
        logits,
        top_k=1,
        score_function="softmax",
        expert_ids=ids,
        weights=weights,
        segments=torch.tensor([1, 1, 0, 3]),
        n_segments=3,
    )
    assert out.load.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert out.weight_sum.tolist() == [[2.0, 0.0], [0.5, 0.25], [0.0, 0.0]]
    expected = torch.tensor([[0.75, 0.25], [1.5, 0.5], [0.0, 0.0]])
    assert_close("importance", out.importance, expected, atol=1e-6)


def test_packed_weights_have_the_codes_of_the_run_file(gate):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 4, generator=generator).sort(dim=-1, descending=True).values
    weights[:100] *= 2.0**-40  # where codes are coarse
    weights[0] = torch.tensor([511.0, 2.0**-55, 2.0**-57, 0.0])
    weights[1] = 1 + torch.tensor([7, 5, 3, 1]) * 2.0**-11  # halfway between two codes
    ids = torch.arange(4).repeat(500, 1)
    out = gate(
        torch.zeros(500, 4),
        top_k=4,
        score_function="softmax",
        expert_ids=ids,
        weights=weights,
        packed=True,
    )
    assert out.weights.dtype == torch.uint16
    assert np.array_equal(out.weights.numpy(), encode_weights(weights.numpy()))


def test_a_packed_weight_without_a_code_is_marked(gate):
    weights = torch.tensor([[math.nan], [-0.5], [math.inf], [600.0], [0.5]])
    out = gate(
        torch.zeros(5, 3),
        top_k=1,
        score_function="softmax",
        expert_ids=torch.zeros(5, 1, dtype=torch.long),
        weights=weights,
        packed=True,
    )
    half = int(encode_weights(np.float32([0.5]))[0])
    assert out.weights.flatten().tolist() == [NO_WEIGHT] * 4 + [half]


@pytest.mark.parametrize(
    ("n_experts", "dtype", "empty"), [(255, "uint8", 255), (256, "uint16", 65535)]
)
def test_packed_ids_take_the_narrowest_type_that_leaves_room_for_empty(
    gate, n_experts, dtype, empty
):
    ids = torch.tensor([[n_experts - 1, -1]])
    out = gate(
        torch.zeros(1, n_experts),
        top_k=2,
        score_function="softmax",
        expert_ids=ids,
        weights=torch.ones(1, 2),
        packed=True,
    )
    assert out.expert_ids.dtype == getattr(torch, dtype)
    assert out.expert_ids.tolist() == [[n_experts - 1, empty]]
    assert out.entropy.dtype == torch.float16
    assert out.load.dtype == torch.int64


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_batch_is_each_router_by_itself(backend):
    logits = [gate_cases.random_logits(9, 8, seed=site) for site in range(3)]
    biases = [None, torch.arange(8) / 9, None]
    chosen = [gate_cases.choices(9, 8, 3, seed=site) for site in range(3)]
    rows = torch.tensor([8, 0, 3, 3])
    batch = gate_batch(
        logits,
        expert_ids=[ids for ids, _ in chosen],
        weights=[weights for _, weights in chosen],
        rows=rows,
        n_experts=8,
        top_k=3,
        score_function="sigmoid",
        selection_bias=biases,
        backend=backend,
    )
    for site in range(3):
        alone = gate_of_any_backend(
            logits[site][rows],
            top_k=3,
            score_function="sigmoid",
            selection_bias=biases[site],
            expert_ids=chosen[site][0][rows],
            weights=chosen[site][1][rows],
            backend=backend,
        )
        for name, value in alone._asdict().items():
            assert_close(name, getattr(batch, name)[site], value, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_without_logits_there_are_slots_and_sums_only(backend):
    out = gate_batch(
        None,
        expert_ids=[torch.tensor([[1, 0]])],
        weights=[torch.tensor([[0.25, 0.75]])],
        rows=None,
        n_experts=3,
        top_k=2,
        score_function="softmax",
        backend=backend,
    )
    assert out.expert_ids.tolist() == [[[0, 1]]]
    assert out.load.tolist() == [[1, 1, 0]]
    assert out.weight_sum.tolist() == [[0.75, 0.25, 0.0]]
    assert [out.entropy, out.margin, out.logsumexp, out.topk_mass, out.importance] == [None] * 5


@pytest.mark.parametrize("cases", ["select_cases", "group_cases", "observe_cases", "edge_cases"])
@pytest.mark.usefixtures("poisoned_memory")
def test_numba_agrees_with_the_reference(cases):
    for case in getattr(gate_cases, cases)():
        gate_cases.check(case, "numba")


@pytest.mark.usefixtures("poisoned_memory")
def test_numba_agrees_with_the_reference_on_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(_numba, "CHUNK", 64)
    for case in gate_cases.observe_cases():
        gate_cases.check(case, "numba")


@given(st.integers(0, 70), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_numba_agrees_with_the_reference_on_any_shape(n_tokens, n_experts, data):
    top_k = data.draw(st.integers(1, n_experts))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = data.draw(st.integers(0, 2**16))
    options = {
        "top_k": top_k,
        "score_function": data.draw(st.sampled_from(gate_cases.RULES[:3])),
        "packed": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        ids, weights = gate_cases.choices(n_tokens, n_experts, top_k, seed=seed, dtype=dtype)
        options |= {"expert_ids": ids, "weights": weights}
    logits = gate_cases.random_logits(n_tokens, n_experts, dtype=dtype, seed=seed)
    gate_cases.check(gate_cases.Case(logits, options), "numba")


def test_numba_takes_no_part_in_a_backward_pass():
    logits = torch.zeros(2, 4, requires_grad=True)
    options = {"top_k": 1, "score_function": "softmax"}
    out = gate_of_any_backend(logits, **options, renormalize=False)
    out.weights.sum().backward()
    assert logits.grad is not None
    with pytest.raises(KernelError, match="requires a gradient"):
        gate_of_any_backend(logits, **options, backend="numba")
    with torch.no_grad():
        gate_of_any_backend(logits, **options, backend="numba")


def test_compiled_loops_need_no_place_to_keep_them(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: options

    monkeypatch.setattr(_numba, "njit", njit)
    assert _numba._compiled_and_kept(lambda: None)["nogil"] is True


@pytest.mark.parametrize("backend", ["torch", "numba"])
@given(st.integers(1, 9), st.integers(1, 20), st.data())
@settings(deadline=None, max_examples=60)
def test_invariants(backend, n_tokens, n_experts, data):
    gate = functools.partial(gate_of_any_backend, backend=backend)
    top_k = data.draw(st.integers(1, n_experts))
    score_function = data.draw(st.sampled_from(["softmax", "sigmoid", "softmax_topk"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(n_tokens, n_experts, generator=generator)

    out = gate(logits, top_k=top_k, score_function=score_function)
    observed = gate(
        logits,
        top_k=top_k,
        score_function=score_function,
        expert_ids=out.expert_ids,
        weights=out.weights,
    )

    assert int(out.load.sum()) == n_tokens * top_k
    assert all(len(set(row)) == top_k for row in out.expert_ids.tolist())
    assert_close("row sums", out.weights.sum(-1), torch.ones(n_tokens), atol=1e-5)
    assert bool((out.entropy <= math.log(n_experts) + 1e-5).all())
    assert bool((out.margin >= 0).all())
    assert bool((out.topk_mass <= 1 + 1e-5).all())
    assert_close("importance", out.importance.sum()[None], torch.tensor([n_tokens]), atol=1e-4)
    assert_close("weight_sum", out.weight_sum.sum()[None], torch.tensor([n_tokens]), atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(out, observed, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"got \[2, 3, 4\].*flatten\(0, -2\)"),
        ({"top_k": 5}, r"between 1 and 4 \(the experts\), got 5"),
        ({"score_function": "relu"}, r"'relu'.*softmax"),
        ({"selection_bias": torch.zeros(3)}, r"shape \[4\].*got \[3\]"),
        ({"n_groups": 2}, "both or neither"),
        ({"n_groups": 3, "top_groups": 1}, "equal groups"),
        ({"top_k": 3, "n_groups": 2, "top_groups": 1}, "do not fit"),
        ({"expert_ids": torch.zeros(2, 1, dtype=torch.long)}, "both or neither"),
        ({"valid": torch.zeros(2)}, "boolean tensor"),
        ({"segments": torch.zeros(3, dtype=torch.int32)}, r"integer tensor of shape \[2\]"),
        ({"segments": torch.zeros(2)}, "integer tensor"),
        ({"n_segments": 2}, "needs segments"),
        ({"n_segments": 0}, "at least 1, got 0"),
        ({"expert_ids": torch.zeros(2, 1), "weights": torch.zeros(2, 1)}, "must be integers"),
        (
            {"expert_ids": torch.zeros(2, 1).int(), "weights": torch.zeros(2)},
            r"weights must .*\[2\]",
        ),
        ({"logits": torch.zeros(2, 4).double(), "backend": "numba"}, "float32, got torch.float64"),
        ({"backend": "cuda"}, re.escape("backend='cuda' is not one of this op's backends")),
    ],
)
def test_errors_name_the_fix(arguments, message):
    options = {"logits": torch.zeros(2, 4), "top_k": 1, "score_function": "softmax"} | arguments
    with pytest.raises(KernelError, match=message):
        gate_of_any_backend(options.pop("logits"), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": []}, "as many logits"),
        ({"logits": [torch.zeros(2, 4)] * 2}, "as many logits"),
        ({"logits": [torch.zeros(2, 5)]}, r"logits must have shape \[2, 4\].*got \[2, 5\]"),
        ({"rows": torch.tensor([0, 2])}, "rows must be from 0 to 1.*got 0 to 2"),
        ({"rows": torch.tensor([-1])}, "got -1 to -1"),
        ({"rows": torch.tensor([0.5])}, "rows must be an int64 tensor"),
        ({"rows": torch.tensor([1]), "valid": torch.ones(2) > 0}, r"of shape \[1\]"),
        ({"selection_bias": [torch.zeros(3)]}, r"shape \[4\]"),
        ({"weights": [torch.zeros(2, 1, device="meta")]}, "one device"),
    ],
)
def test_errors_of_a_batch_name_the_fix(arguments, message):
    options = {
        "logits": [torch.zeros(2, 4)],
        "expert_ids": [torch.zeros(2, 1, dtype=torch.long)],
        "weights": [torch.zeros(2, 1)],
        "rows": None,
        "n_experts": 4,
        "top_k": 1,
        "score_function": "softmax",
    } | arguments
    with pytest.raises(KernelError, match=message):
        gate_batch(options.pop("logits"), **options)


def test_sites_of_a_batch_have_one_type():
    with pytest.raises(KernelError, match="logits of one type"):
        gate_batch(
            [torch.zeros(1, 2), torch.zeros(1, 2).half()],
            expert_ids=[torch.zeros(1, 1, dtype=torch.long)] * 2,
            weights=[torch.zeros(1, 1)] * 2,
            rows=None,
            n_experts=2,
            top_k=1,
            score_function="softmax",
        )
