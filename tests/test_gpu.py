"""The kernels compiled and run on a CUDA device: the grids that the interpreter runs elsewhere.

What only a GPU can show comes on top: the order of ties in a compiled sort, sizes past 2**31
elements, sums of many programs, and memory that grows with the number of keys only.
"""

import importlib

import gate_cases
import pytest
import torch
from attention_checks import assert_same, call, logsumexp
from checks import assert_close

import kernels
from kernels.bench import cases as bench
from kernels.dispatch import backend_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


def on_gpu(value):
    """The same value with its tensors on the GPU; strides stay."""
    if isinstance(value, torch.Tensor):
        return value.to(CUDA)
    if isinstance(value, dict):
        return {name: on_gpu(item) for name, item in value.items()}
    return [on_gpu(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("op", kernels.__all__)
def test_triton_is_what_runs(op):
    assert backend_for(op, CUDA) == "triton"


@pytest.mark.parametrize("cases", ["select_cases", "group_cases", "observe_cases", "edge_cases"])
def test_gate(cases):
    for case in getattr(gate_cases, cases)():
        moved = gate_cases.Case(on_gpu(case.logits), on_gpu(case.options))
        gate_cases.check(moved, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_experts", [8, 128, 131, 512])
def test_ties_of_the_gate_go_to_the_lower_id(dtype, n_experts):
    """An unstable sort shows only when it is compiled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (3000, n_experts), generator=generator).to(dtype)
    options = {"top_k": 6, "score_function": "softmax"}
    gate_cases.check(gate_cases.Case(on_gpu(logits), options), "triton")


def test_many_programs_add_to_the_same_sums():
    logits = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0)).to(CUDA)
    weights, ids = logits.softmax(-1).topk(8)
    options = {"top_k": 8, "score_function": "softmax", "expert_ids": ids, "weights": weights}
    gate_cases.check(gate_cases.Case(logits, options), "triton")


def attention_names():
    """Names of the interpreter's cases; without triton its file cannot be imported."""
    if not torch.cuda.is_available():
        return ["every case"]
    return list(importlib.import_module("test_kernels_attention_triton").CASES)


@pytest.mark.parametrize("name", attention_names())
def test_attention(name):
    shape, options = importlib.import_module("test_kernels_attention_triton").CASES[name]
    query, key, options = on_gpu(list(call(**shape, **options)))
    expected = kernels.attention(query, key, **options, backend="torch")
    for lse in (None, logsumexp(query, key, **options)):
        actual = kernels.attention(query, key, **options, lse=lse, backend="triton")
        assert_same(actual, expected)


def test_attention_memory_is_linear_in_the_keys():
    """Twice the tokens need no more than twice the memory and a bit; a map of all needs four."""
    peaks = []
    for n_tokens in (8192, 16384):
        query = torch.randn(1, 8, n_tokens, 64, device=CUDA, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels.attention(query, query[:, :2], scaling=0.125, backend="triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 8 * 16384**2 / 64 * 4


@pytest.mark.parametrize(
    ("n_experts", "k", "n_next", "next_k", "n_tokens"),
    [(1, 1, 1, 1, 5), (8, 8, 33, 1, 70), (61, 6, 8, 2, 0), (129, 8, 130, 3, 40_000),
     (512, 10, 40, 2, 33_000)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint16])
def test_coactivation(n_experts, k, n_next, next_k, n_tokens, dtype):
    generator = torch.Generator().manual_seed(n_experts)
    ids = torch.rand(2, n_tokens, n_experts, generator=generator).topk(k).indices
    following = torch.rand(2, n_tokens, n_next, generator=generator).topk(next_k).indices
    empty = 65535 if dtype == torch.uint16 else -1
    following[1, ::3, 0] = empty
    valid = torch.rand(n_tokens, generator=generator) > 0.3
    inputs = (ids.to(dtype), following.to(dtype))
    options = {"n_experts": n_experts, "n_next_experts": n_next}
    expected = kernels.coactivation(*inputs, **options, valid=valid, backend="torch")
    actual = kernels.coactivation(
        *map(on_gpu, inputs), **options, valid=on_gpu(valid), backend="triton"
    )
    assert torch.equal(actual.pairs.cpu(), expected.pairs)
    assert torch.equal(actual.transitions.cpu(), expected.transitions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n_tokens", "width", "n_routers", "n_experts", "top_k"),
    [(1, 1, 1, 1, 1), (5, 3, 2, 8, 8), (130, 70, 2, 61, 6), (333, 64, 3, 512, 16),
     (700, 256, 2, 128, 8), (0, 4, 2, 8, 2)],
)  # fmt: skip
def test_project_topk(dtype, n_tokens, width, n_routers, n_experts, top_k):
    """Small integers are summed exactly, in tensor cores too: ids and values must be equal."""
    generator = torch.Generator().manual_seed(n_experts)
    hidden = torch.randint(-2, 3, (n_tokens, width), generator=generator).to(CUDA, dtype)
    weights = torch.randint(-2, 3, (n_routers, n_experts, width), generator=generator)
    weights = weights.to(CUDA, dtype)
    actual = kernels.project_topk(hidden, weights, top_k=top_k, backend="triton")
    expected = kernels.project_topk(hidden, weights, top_k=top_k, backend="torch")
    assert torch.equal(actual.expert_ids, expected.expert_ids)
    assert torch.equal(actual.values, expected.values)
    assert_close("logsumexp", actual.logsumexp, expected.logsumexp, atol=1e-4)


def test_project_topk_in_float32_keeps_its_precision():
    """Three products of tf32 err by 1e-6 of the largest sums; a single one by 1e-3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 1024, generator=generator).to(CUDA)
    weights = torch.randn(2, 64, 1024, generator=generator).to(CUDA) / 32
    actual = kernels.project_topk(hidden, weights, top_k=4, backend="triton")
    exact = torch.einsum("td,red->tre", hidden.double(), weights.double()).topk(4).values
    assert_close("values", actual.values, exact.float(), atol=3e-5)


@pytest.mark.parametrize("op", kernels.__all__)
def test_the_benchmarks_would_time_it(op):
    """The large inputs of `python -m kernels.bench` agree with the reference."""
    for problem in bench.problems(op, bench.CUDA, CUDA):
        problem.refuse_what_disagrees()
