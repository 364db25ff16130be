"""The gate on a GPU: one launch for all sites, over a table of pointers."""

import torch
import triton
import triton.language as tl

from kernels.ops.gate._triton_kernels import (
    MERGE,
    NETWORKS,
    gate_rows,
    observe_tokens,
    select_tokens,
)
from kernels.ops.gate.reference import SCORE_FUNCTIONS, GateBatchOutput, GateInputs

BLOCK = 128  # tokens of a program that has a thread per token
WARPS = 4
MOST_SLOTS = 8  # of a thread per token
MOST_EXPERTS = 512  # of a thread per token: one bit each in its registers
TILE = 512  # experts of all tokens of a program of the general kernel
REPLICAS = 32  # of the sums, see sums_of_program
REGISTERS = 128  # of a thread at most: four programs share a multiprocessor
COLUMNS = 16  # experts whose probabilities are added up together
# experts of a round by bytes of a logit: their loads are in flight together, in registers
WORDS = {2: (32, 16, 8), 4: (16, 8)}
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


def gate_triton(inputs: GateInputs) -> GateBatchOutput:
    """Launch the kernel that fits; inputs were checked and are contiguous."""
    n_sites, n_tokens, n_experts = inputs.n_sites, inputs.n_tokens, inputs.n_experts
    device = inputs.device
    slots = (n_sites, n_tokens, inputs.top_k)
    expert_ids = torch.empty(slots, dtype=inputs.id_dtype, device=device)
    weights = torch.empty(slots, dtype=inputs.weight_dtype, device=device)
    statistics = importance = None
    if inputs.logits is not None:
        shape = (4, n_sites, n_tokens)
        statistics = torch.empty(shape, dtype=inputs.statistic_dtype, device=device)
    per_thread = _thread_per_token(inputs)
    block = BLOCK if per_thread else _rows_of_a_block(inputs)
    blocks = triton.cdiv(n_tokens, block)
    replicas = max(1, min(REPLICAS, blocks))
    n_sums = 3 if inputs.importance and inputs.logits is not None else 2
    # one piece of zeros: integers for the load, floats for the others
    sums = torch.zeros(
        (n_sums, n_sites, replicas, inputs.n_segments, n_experts), dtype=torch.int32, device=device
    )
    load, weight_sum = sums[0], sums[1].view(torch.float32)
    if n_sums == 3:
        importance = sums[2].view(torch.float32)
    if n_tokens:
        table = _table(inputs)
        arguments = (
            expert_ids, weights, statistics, load, weight_sum, importance,
            n_tokens, inputs.n_segments, replicas,
        )  # fmt: skip
        launch = _launch_rows
        if per_thread:
            launch = _launch_select if inputs.expert_ids is None else _launch_observe
        launch(inputs, table, arguments, block, (blocks, n_sites))
    per_segment = (inputs.n_segments,) if inputs.segments is not None else ()
    shape = (n_sites, *per_segment, n_experts)
    found = (None,) * 4 if statistics is None else tuple(statistics)
    return GateBatchOutput(
        expert_ids=expert_ids,
        weights=weights,
        entropy=found[0],
        margin=found[1],
        logsumexp=found[2],
        topk_mass=found[3],
        load=load.sum(dim=1, dtype=torch.int64).view(shape),
        importance=None if importance is None else importance.sum(dim=1).view(shape),
        weight_sum=weight_sum.sum(dim=1).view(shape),
    )


def _thread_per_token(inputs: GateInputs) -> bool:
    """Whether the kernels with a thread per token serve these inputs."""
    if inputs.logits is None or inputs.biased or inputs.top_groups < inputs.n_groups:
        return False
    if inputs.score_function not in ("softmax", "softmax_topk"):
        return False
    # their loads are 16 bytes wide, so that rows begin at multiples of 16 bytes
    aligned = all(value.data_ptr() % 16 == 0 for value in inputs.logits)
    fits = inputs.n_experts % 8 == 0 and inputs.n_experts <= MOST_EXPERTS
    if inputs.expert_ids is None:
        aligned = aligned and inputs.logits[0].dtype != torch.float32
    return aligned and fits and inputs.top_k <= MOST_SLOTS


def _launch_observe(inputs, table, arguments, block, grid):
    slots = triton.next_power_of_2(inputs.top_k)
    words = WORDS[inputs.logits[0].element_size()]
    word = next(bits for bits in words if inputs.n_experts % bits == 0)
    observe_tokens[grid](
        table,
        inputs.rows,
        _bytes(inputs.valid),
        inputs.segments,
        *arguments,
        LOGITS=TYPES[inputs.logits[0].dtype],
        IDS=TYPES[inputs.expert_ids[0].dtype],
        WEIGHTS=TYPES[inputs.weights[0].dtype],
        EXPERTS=inputs.n_experts,
        TOP_K=inputs.top_k,
        LOG_SLOTS=slots.bit_length() - 1,
        NETWORK=NETWORKS[slots],
        CHUNK=16 // inputs.logits[0].element_size(),
        WORD=word,
        COLUMNS=COLUMNS,
        ON_LOGITS=inputs.score_function == "softmax_topk",
        PACKED=inputs.packed,
        BLOCK=block,
        num_warps=WARPS,
        **_limits(arguments),
    )


def _launch_select(inputs, table, arguments, block, grid):
    select_tokens[grid](
        table,
        _bytes(inputs.valid),
        inputs.segments,
        *arguments,
        LOGITS=TYPES[inputs.logits[0].dtype],
        EXPERTS=inputs.n_experts,
        TOP_K=inputs.top_k,
        NETWORK=NETWORKS[8],
        MERGE=MERGE,
        COLUMNS=COLUMNS,
        ON_LOGITS=inputs.score_function == "softmax_topk",
        RENORMALIZE=inputs.renormalize,
        PACKED=inputs.packed,
        BLOCK=block,
        num_warps=WARPS,
        **_limits(arguments),
    )


def _launch_rows(inputs, table, arguments, block, grid):
    size = inputs.n_experts // inputs.n_groups
    gate_rows[grid](
        table,
        inputs.rows,
        _bytes(inputs.valid),
        inputs.segments,
        *arguments,
        LOGITS=None if inputs.logits is None else TYPES[inputs.logits[0].dtype],
        IDS=None if inputs.expert_ids is None else TYPES[inputs.expert_ids[0].dtype],
        WEIGHTS=None if inputs.weights is None else TYPES[inputs.weights[0].dtype],
        BIASED=inputs.biased,
        EXPERTS=inputs.n_experts,
        GROUPS=inputs.n_groups,
        TOP_GROUPS=inputs.top_groups,
        TOP_K=inputs.top_k,
        SLOTS=triton.next_power_of_2(inputs.top_k),
        RULE=SCORE_FUNCTIONS.index(inputs.score_function),
        RENORMALIZE=inputs.renormalize,
        PACKED=inputs.packed,
        GROUPS_PADDED=triton.next_power_of_2(inputs.n_groups),
        SIZE_PADDED=triton.next_power_of_2(size),
        BLOCK=block,
        num_warps=WARPS,
        **_limits(arguments),
    )


def _limits(arguments: tuple) -> dict[str, int]:
    """Return the registers of a thread where importance is summed: ptxas spills to use fewer."""
    importance = arguments[5]
    return {} if importance is None or torch.version.hip else {"maxnreg": REGISTERS}


def _rows_of_a_block(inputs: GateInputs) -> int:
    """Return how many tokens a program of the general kernel serves."""
    groups = triton.next_power_of_2(inputs.n_groups)
    size = groups * triton.next_power_of_2(inputs.n_experts // inputs.n_groups)
    return max(1, min(64, TILE // size))


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _table(inputs: GateInputs) -> torch.Tensor:
    """Return the addresses of each site's logits, ids, weights and bias, 0 = none, [S, 4] int64."""
    columns = (inputs.logits, inputs.expert_ids, inputs.weights, inputs.selection_bias)
    addresses = [
        [
            0 if values is None or values[site] is None else values[site].data_ptr()
            for values in columns
        ]
        for site in range(inputs.n_sites)
    ]
    if inputs.device.type == "cpu":
        return torch.tensor(addresses)
    # from pinned memory the copy does not wait for the device
    return torch.tensor(addresses, pin_memory=True).to(inputs.device, non_blocking=True)
