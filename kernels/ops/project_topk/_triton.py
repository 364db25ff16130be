"""Triton implementation of project_topk: a matrix product whose logits never leave registers."""

import torch
import triton
import triton.language as tl

from kernels.dispatch import interpreting
from kernels.ops.project_topk import ProjectTopkOutput

MIN_BLOCK = 16  # a side of the smallest matrix product
REMOVED = tl.constexpr(-(2**31))  # below the key of any float, -inf included


@triton.jit
def _order(value):
    """Return int32 keys in the order of float32 values; its own inverse on the bits."""
    return value ^ ((value >> 31) & 0x7FFFFFFF)


@triton.jit
def _project_topk_kernel(
    hidden_ptr, projections_ptr, bias_ptr, ids_ptr, values_ptr, logsumexp_ptr,
    n_tokens, n_routers, n_experts, width,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # routers vary fastest: programs that run together read the same tokens
    router = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    is_token, is_expert = token < n_tokens, expert < n_experts
    rows = hidden_ptr + token.to(tl.int64)[:, None] * width
    columns = projections_ptr + (router * n_experts + expert)[None, :] * width
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = start + d < width
        x = tl.load(
            rows + (start + d)[None, :], mask=is_token[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            columns + (start + d)[:, None], mask=inside[:, None] & is_expert[None, :], other=0.0
        )
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        logits = tl.dot(x, w, logits, input_precision=PRECISION)
    if HAS_BIAS:
        offsets = tl.load(bias_ptr + router * n_experts + expert, mask=is_expert, other=0.0)
        logits += offsets.to(tl.float32)[None, :]
    logits = tl.where(is_expert[None, :], logits, -float("inf"))

    top = tl.max(logits, axis=1)
    barred = top == -float("inf")  # every expert is: nothing to subtract, nothing to sum
    total = tl.sum(tl.exp(logits - tl.where(barred, 0.0, top)[:, None]), axis=1)
    at = token.to(tl.int64) * n_routers + router
    # a sum that holds the highest logit is at least 1
    tl.store(logsumexp_ptr + at, top + tl.log(tl.maximum(total, 1.0)), mask=is_token)

    keys = tl.where(is_expert[None, :], _order(logits.to(tl.int32, bitcast=True)), REMOVED)
    slot = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    best_keys = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(TOP_K):
        best = tl.max(keys, axis=1)
        # the lowest id of those that are equal
        chosen = tl.min(tl.where(keys == best[:, None], expert[None, :], BLOCK_E), axis=1)
        keys = tl.where(expert[None, :] == chosen[:, None], REMOVED, keys)
        ids = tl.where(slot[None, :] == k, chosen[:, None], ids)
        best_keys = tl.where(slot[None, :] == k, best[:, None], best_keys)
    out = at[:, None] * TOP_K + slot[None, :]
    is_slot = is_token[:, None] & (slot < TOP_K)[None, :]
    tl.store(ids_ptr + out, ids, mask=is_slot)
    tl.store(values_ptr + out, _order(best_keys).to(tl.float32, bitcast=True), mask=is_slot)


def tile(n_experts: int, itemsize: int) -> dict[str, int]:
    """Return the block sizes whose logits, and copies of float32 operands, fit the registers."""
    block_e = max(MIN_BLOCK, triton.next_power_of_2(n_experts))
    logits = 2**14 if itemsize == 2 else 2**13
    block_t = max(MIN_BLOCK, min(128, logits // block_e))
    wide = 32 if itemsize == 2 else 16
    return {
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "BLOCK_D": wide if block_e > (256 if itemsize == 2 else 128) else 2 * wide,
        "num_warps": 8 if block_t * block_e >= 2**13 else 4,
        "num_stages": 3 if block_e <= 256 else 2,
    }


def project_topk_triton(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
) -> ProjectTopkOutput:
    """Launch the kernel; inputs are contiguous, of one dtype, and were checked by the op."""
    n_tokens, (n_routers, n_experts, width) = len(hidden), projections.shape
    new = hidden.new_empty
    out = ProjectTopkOutput(
        expert_ids=new((n_tokens, n_routers, top_k), dtype=torch.int32),
        values=new((n_tokens, n_routers, top_k), dtype=torch.float32),
        logsumexp=new((n_tokens, n_routers), dtype=torch.float32),
    )
    if not (n_tokens and n_routers):
        return out
    block = tile(n_experts, hidden.element_size())
    _project_topk_kernel[(n_routers, triton.cdiv(n_tokens, block["BLOCK_T"]))](
        hidden, projections, projections if bias is None else bias, *out,
        n_tokens, n_routers, n_experts, width,
        TOP_K=top_k, HAS_BIAS=bias is not None,
        # float32 inputs: three products of tf32 keep float32's precision, and its tensor cores
        PRECISION="tf32x3" if hidden.dtype == torch.float32 and not torch.version.hip else "ieee",
        UPCAST=interpreting(), BLOCK_K=triton.next_power_of_2(top_k), **block,
    )  # fmt: skip
    return out
