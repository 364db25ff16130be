"""The gate against cases on paper, plain Python, and its invariants."""

import math
import re

import pytest
import torch
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import KernelError
from kernels.gate import gate


def test_softmax_on_paper():
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


def test_sigmoid_with_bias_chooses_by_bias_and_weighs_without():
    """Sigmoids 0.5, 0.75, 0.25; the bias lifts expert 2 to 1.25 but not its weight."""
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    bias = torch.tensor([0.0, 0.0, 1.0])

    out = gate(logits, top_k=2, score_function="sigmoid", selection_bias=bias)

    assert out.expert_ids.tolist() == [[2, 1]]
    assert_close("weights", out.weights, torch.tensor([[0.25, 0.75]]), atol=1e-6)
    assert_close("margin", out.margin, torch.tensor([0.25]), atol=1e-6)
    assert_close("topk_mass", out.topk_mass, torch.tensor([1.0 / 1.5]), atol=1e-6)


def test_softmax_over_the_chosen_equals_renormalised_softmax():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    chosen = gate(logits, top_k=3, score_function="softmax_topk")
    renormalised = gate(logits, top_k=3, score_function="softmax")
    assert torch.equal(chosen.expert_ids, renormalised.expert_ids)
    assert_close("weights", chosen.weights, renormalised.weights, atol=1e-6)


def test_groups_bar_experts_outside_the_best_groups():
    """Groups [0.9, 0], [0.5, 0.6], [0.1, 0.8]: the best wins, or the best two."""
    probs = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.8]])
    options = {"top_k": 2, "score_function": "probabilities", "n_groups": 3, "top_groups": 1}
    assert gate(probs, **options).expert_ids.tolist() == [[0, 1]]
    biased = gate(probs, **options, selection_bias=torch.zeros(6))
    assert biased.expert_ids.tolist() == [[3, 2]]


def test_observing_keeps_the_models_choice():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    ids, weights = torch.tensor([[3, 0]]), torch.tensor([[0.7, 0.1]])

    out = gate(logits, top_k=2, score_function="softmax", expert_ids=ids, weights=weights)

    probs = [math.exp(x) / sum(math.exp(y) for y in (3, 2, 1, 0)) for x in (3, 2, 1, 0)]
    assert out.expert_ids.tolist() == [[3, 0]]
    assert_close("weights", out.weights, torch.tensor([[0.7, 0.1]]), atol=0)
    assert_close("mass", out.topk_mass, torch.tensor([probs[0] + probs[3]]), atol=1e-6)
    assert_close("margin", out.margin, torch.tensor([probs[3] - probs[1]]), atol=1e-6)


def test_an_empty_slot_counts_nowhere():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]])
    out = gate(logits, top_k=2, score_function="softmax", expert_ids=ids, weights=weights)
    probs = logits.softmax(-1)[0]
    assert out.load.tolist() == [0, 1, 0]
    assert_close("mass", out.topk_mass, probs[1:2], atol=1e-6)
    assert_close("margin", out.margin, (probs[1] - probs[2])[None], atol=1e-6)


def test_an_empty_slot_leaves_expert_0_in_the_running():
    logits = torch.tensor([[9.0, 2.0, 3.0]])
    ids, weights = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]])
    out = gate(logits, top_k=2, score_function="softmax_topk", expert_ids=ids, weights=weights)
    assert_close("margin", out.margin, torch.tensor([2.0 - 9.0]), atol=1e-6)


def test_sigmoid_weights_without_renormalising_are_the_sigmoids():
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    out = gate(logits, top_k=2, score_function="sigmoid", renormalize=False)
    assert_close("weights", out.weights, torch.tensor([[0.75, 0.5]]), atol=1e-6)


def test_padding_may_hold_nan_and_counts_nowhere():
    logits = torch.tensor([[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]])
    valid = torch.tensor([True, False])
    out = gate(logits, top_k=1, score_function="softmax", valid=valid)
    alone = gate(logits[:1], top_k=1, score_function="softmax")
    assert out.expert_ids.tolist() == [[2], [-1]]
    assert out.load.tolist() == [0, 0, 1]
    assert_close("importance", out.importance, alone.importance, atol=0)
    for name in ("weights", "entropy", "margin", "logsumexp", "topk_mass"):
        assert_close(name, getattr(out, name)[1:], torch.zeros_like(getattr(alone, name)), atol=0)


def test_ties_go_to_the_lower_expert_id():
    out = gate(torch.zeros(2, 6), top_k=3, score_function="softmax")
    assert out.expert_ids.tolist() == [[0, 1, 2]] * 2
    assert out.margin.tolist() == [0.0, 0.0]


def test_a_probability_that_underflows_is_not_nan():
    out = gate(torch.tensor([[0.0, -200.0, -math.inf]]), top_k=2, score_function="softmax")
    assert out.expert_ids.tolist() == [[0, 1]]
    assert out.entropy.item() == 0.0


def test_nobody_left_out_means_an_infinite_margin():
    assert gate(torch.zeros(1, 2), top_k=2, score_function="softmax").margin.item() == math.inf


def test_no_tokens():
    out = gate(torch.zeros(0, 4), top_k=2, score_function="softmax")
    assert out.expert_ids.shape == (0, 2)
    assert out.load.tolist() == [0, 0, 0, 0]


@given(st.integers(1, 9), st.integers(1, 20), st.data())
@settings(deadline=None, max_examples=60)
def test_invariants(n_tokens, n_experts, data):
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
        ({"backend": "cuda"}, re.escape("backend='cuda' is none of this op's backends")),
    ],
)
def test_errors_name_the_fix(arguments, message):
    options = {"logits": torch.zeros(2, 4), "top_k": 1, "score_function": "softmax"} | arguments
    with pytest.raises(KernelError, match=message):
        gate(options.pop("logits"), **options)
