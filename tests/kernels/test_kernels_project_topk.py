"""project_topk against plain Python, a case on paper, and its invariants."""

import math

import pytest
import torch
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import project_topk
from kernels.dispatch import BACKENDS, KernelError
from kernels.ops.project_topk import _numba

CPU_BACKENDS = [name for name in BACKENDS if name != "triton"]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_routers_on_paper(backend):
    """Logits ln 1, ln 2, ln 5 and, by the other router's bias, 0, 9, 0 for one token."""
    hidden = torch.tensor([[1.0, 2.0]])
    projections = torch.tensor(
        [
            [[math.log(1), 0], [math.log(2), 0], [0, math.log(5) / 2]],
            [[0, 0], [1, 1], [2, -1]],
        ]
    )
    bias = torch.tensor([[0.0, 0, 0], [0, 6, 0]])

    out = project_topk(hidden, projections, top_k=2, bias=bias, backend=backend)

    assert out.expert_ids.tolist() == [[[2, 1], [1, 0]]]  # 0 before 2: equal logits
    assert out.expert_ids.dtype == torch.int32
    expected = torch.tensor([[[math.log(5), math.log(2)], [9, 0]]])
    assert_close("values", out.values, expected, atol=1e-6)
    sums = torch.tensor([[math.log(8), math.log(math.exp(9) + 2)]])
    assert_close("logsumexp", out.logsumexp, sums, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_small_integers_equal_plain_python(backend, data):
    """Integers are summed exactly, so that ids must be equal, ties included."""
    n_tokens, n_routers = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
    n_experts, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    top_k = data.draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    hidden = torch.randint(-2, 3, (n_tokens, width), generator=generator)
    projections = torch.randint(-2, 3, (n_routers, n_experts, width), generator=generator)

    out = project_topk(hidden.float(), projections.half(), top_k=top_k, backend=backend)

    for token, router in [(t, r) for t in range(n_tokens) for r in range(n_routers)]:
        logits = [
            sum(a * b for a, b in zip(hidden[token].tolist(), row, strict=True))
            for row in projections[router].tolist()
        ]
        best = sorted(range(n_experts), key=lambda e: (-logits[e], e))[:top_k]
        assert out.expert_ids[token, router].tolist() == best
        assert out.values[token, router].tolist() == [logits[e] for e in best]
        total = math.log(sum(math.exp(x) for x in logits))
        assert out.logsumexp[token, router].item() == pytest.approx(total, abs=1e-5)
    assert out.expert_ids.shape == out.values.shape == (n_tokens, n_routers, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numba_equals_the_reference_over_several_chunks(dtype, monkeypatch):
    """The largest sum is of 96 products below 16; float32 sums of either order agree to 1e-4."""
    monkeypatch.setattr(_numba, "CHUNK_BYTES", 4 * 3 * 61 * 20)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 96, generator=generator).to(dtype)
    projections = torch.randn(3, 61, 96, generator=generator).to(dtype)
    bias = torch.randn(3, 61, generator=generator)
    options = {"top_k": 17, "bias": bias}
    actual = project_topk(hidden, projections, **options, backend="numba")
    expected = project_topk(hidden, projections, **options, backend="torch")
    assert_close("values", actual.values, expected.values, atol=1e-4)
    assert_close("logsumexp", actual.logsumexp, expected.logsumexp, atol=1e-4)
    assert (actual.expert_ids == expected.expert_ids).float().mean() > 0.999


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_all_experts_and_shifted_logits(backend):
    generator = torch.Generator().manual_seed(1)
    hidden, projections = torch.randn(9, 4, generator=generator), torch.randn(2, 7, 4)
    out = project_topk(hidden, projections, top_k=7, backend=backend)
    assert out.expert_ids.sort(-1).values.tolist() == [[list(range(7))] * 2] * 9
    assert bool((out.values.diff(dim=-1) <= 0).all())
    shifted = project_topk(hidden, projections, top_k=7, bias=torch.full((2, 7), 3.0))
    assert_close("shift", shifted.logsumexp, out.logsumexp + 3.0, atol=1e-5)
    probabilities = (out.values - out.logsumexp.unsqueeze(-1)).exp().sum(-1)
    assert_close("all of the mass", probabilities, torch.ones(9, 2), atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_barred_experts_come_last_by_id(backend):
    bias = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]])
    out = project_topk(torch.zeros(1, 2), torch.zeros(1, 4, 2), top_k=4, bias=bias, backend=backend)
    assert out.expert_ids.tolist() == [[[3, 1, 0, 2]]]
    assert out.values.tolist() == [[[1.0, 0.0, -math.inf, -math.inf]]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_inputs(backend):
    generator = torch.Generator().manual_seed(2)
    hidden, projections = torch.randn(6, 8, generator=generator), torch.randn(5, 4, 3)
    out = project_topk(hidden[::2, ::2], projections.permute(2, 0, 1), top_k=2, backend=backend)
    packed = project_topk(
        hidden[::2, ::2].clone(), projections.permute(2, 0, 1).contiguous(), top_k=2
    )
    assert torch.equal(out.expert_ids, packed.expert_ids)


@pytest.mark.parametrize(
    ("hidden", "projections", "options", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(1, 5, 4), {}, r"got \[2, 3, 4\].*flatten"),
        (torch.zeros(3, 4), torch.zeros(5, 4), {}, r"\[routers, experts, 4\].*unsqueeze\(0\)"),
        (torch.zeros(3, 4), torch.zeros(1, 5, 3), {}, r"got \[1, 5, 3\]"),
        (torch.zeros(3, 4).double(), torch.zeros(1, 5, 4), {}, r"hidden .* got torch.float64"),
        (torch.zeros(3, 4), torch.zeros(1, 5, 4).long(), {}, r"projections .* got torch.int64"),
        (torch.zeros(3, 4), torch.zeros(1, 5, 4), {"top_k": 6}, r"1 and 5 .* got 6"),
        (torch.zeros(3, 4), torch.zeros(1, 5, 4), {"bias": torch.zeros(5)}, r"\[1, 5\].*\[5\]"),
        (torch.zeros(3, 4), torch.zeros(1, 5, 4), {"backend": "triton"}, r"needs CUDA tensors"),
    ],
)
def test_errors_say_what_came(hidden, projections, options, message):
    with pytest.raises(KernelError, match=message):
        project_topk(hidden, projections, **{"top_k": 1, **options})
