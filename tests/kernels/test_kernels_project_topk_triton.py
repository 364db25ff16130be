"""The Triton kernel of project_topk, interpreted, against the reference."""

import math

import pytest
import torch
from checks import assert_close

from kernels.dispatch import KernelError
from kernels.ops.project_topk import project_topk, project_topk_reference


def check(hidden, projections, top_k, bias=None):
    """Small integers are summed exactly in any order, so ids and values must be equal."""
    actual = project_topk(hidden, projections, top_k=top_k, bias=bias, backend="triton")
    expected = project_topk_reference(hidden, projections, top_k=top_k, bias=bias)
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    assert torch.equal(actual.values, expected.values)
    assert_close("logsumexp", actual.logsumexp, expected.logsumexp, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n_tokens", "width", "n_routers", "n_experts", "top_k"),
    [
        (1, 1, 1, 1, 1),
        (5, 3, 2, 8, 8),  # k = E
        (130, 70, 2, 61, 6),  # a prime, two blocks of tokens, a width that fills no block
        (33, 64, 1, 512, 16),
        (0, 4, 2, 8, 2),
    ],
)
def test_shapes(dtype, n_tokens, width, n_routers, n_experts, top_k):
    generator = torch.Generator().manual_seed(n_experts)
    hidden = torch.randint(-2, 3, (n_tokens, width), generator=generator).to(dtype)
    projections = torch.randint(-2, 3, (n_routers, n_experts, width), generator=generator)
    check(hidden, projections.to(dtype), top_k)
    bias = torch.randint(-3, 3, (n_routers, n_experts), generator=generator).float()
    check(hidden, projections.to(dtype), top_k, bias)


def test_many_experts_in_two_bytes_and_a_refusal_in_four():
    hidden, projections = torch.ones(2, 2).half(), torch.ones(1, 1000, 2).half()
    projections[0, 999, 0] = 3
    check(hidden, projections, 3)
    with pytest.raises(KernelError, match=r"at most 512 experts of torch.float32, there are 1000"):
        project_topk(hidden.float(), projections, top_k=3, backend="triton")


def test_ties_zeros_and_negative_zero_go_to_the_lower_id():
    hidden = torch.tensor([[1.0], [-1.0], [0.0]])
    projections = torch.zeros(1, 6, 1)
    projections[0, 4] = 1.0
    check(hidden, projections, 6)


def test_values_far_apart():
    """Differences that underflow in the softmax keep their order."""
    hidden = torch.tensor([[1.0], [-1.0]])
    projections = torch.tensor([[[0.0], [200.0], [-300.0], [201.0], [3e38]]])
    check(hidden, projections, 5)


@pytest.mark.parametrize("barred", [2, 5])
def test_barred_experts_come_last_by_id(barred):
    """Padding columns stay behind the barred experts, even where all are barred."""
    bias = torch.zeros(1, 5)
    bias[0, :barred] = -torch.inf
    out = project_topk(
        torch.zeros(2, 3), torch.zeros(1, 5, 3), top_k=5, bias=bias, backend="triton"
    )
    order = [*range(barred, 5), *range(barred)]
    assert out.expert_ids.tolist() == [[order]] * 2
    assert out.values.isinf().sum().item() == 2 * barred
    expected = -math.inf if barred == 5 else math.log(5 - barred)
    assert out.logsumexp.tolist() == [[pytest.approx(expected)]] * 2


def test_float32_in_any_order_of_sums():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 100, generator=generator)
    projections = torch.randn(2, 40, 100, generator=generator)
    actual = project_topk(hidden, projections, top_k=4, backend="triton")
    expected = project_topk_reference(hidden, projections, top_k=4)
    assert_close("values", actual.values, expected.values, atol=1e-4)
    assert_close("logsumexp", actual.logsumexp, expected.logsumexp, atol=1e-4)
