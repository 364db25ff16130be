"""The gate for CPUs: compiled loops over chunks of tokens, on Python's own threads.

The compiled code holds no interpreter lock. Numba's own threading layers are left alone: they must
not be entered from two threads at once.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from kernels.gate._numba_loops import serve
from kernels.gate.types import SCORE_FUNCTIONS, GateBatchOutput, GateInputs

# how the loops are told the type of an array
KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int32: 0,
    torch.int64: 1,
    torch.uint8: 2,
    torch.uint16: 1,
}
CHUNK = 1 << 16  # logits that are worth a thread


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process: a forked child must not wait for its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gate")


def gate_numba(inputs: GateInputs) -> GateBatchOutput:
    """Run the compiled loops; inputs were checked and are contiguous CPU tensors."""
    n_sites, n_tokens, n_experts = inputs.n_sites, inputs.n_tokens, inputs.n_experts
    slots = (n_sites, n_tokens, inputs.top_k)
    expert_ids = torch.empty(slots, dtype=inputs.id_dtype)
    weights = torch.empty(slots, dtype=inputs.weight_dtype)
    statistics = torch.empty((4 if inputs.logits else 0, n_sites, n_tokens))
    n_threads = max(1, min(torch.get_num_threads(), n_sites * n_tokens * n_experts // CHUNK))
    cells = (n_threads, n_sites, inputs.n_segments, n_experts)
    load = np.zeros(cells, np.int64)
    weight_sum = np.zeros(cells)
    importance = np.zeros(cells if inputs.importance and inputs.logits else (n_threads, 0, 0, 0))
    table = _table(inputs)
    tokens_at = tuple(
        0 if v is None else v.data_ptr() for v in (inputs.rows, inputs.valid, inputs.segments)
    )
    out_at = (
        expert_ids.data_ptr(),
        weights.data_ptr(),
        *(s.data_ptr() for s in statistics),
        *(0,) * (4 - len(statistics)),
    )
    kinds = tuple(
        KINDS[values[0].dtype] if values else 0
        for values in (inputs.logits, inputs.expert_ids, inputs.weights)
    )
    rule = (
        SCORE_FUNCTIONS.index(inputs.score_function),
        inputs.top_k,
        inputs.n_groups,
        inputs.top_groups,
        int(inputs.renormalize),
    )

    def run(part: int) -> None:
        span = (n_tokens * part // n_threads, n_tokens * (part + 1) // n_threads, n_tokens)
        serve(
            table, tokens_at, out_at, kinds, (KINDS[expert_ids.dtype], int(inputs.packed)), rule,
            span, load[part], weight_sum[part], importance[part],
        )  # fmt: skip

    others = [_pool(os.getpid()).submit(run, part) for part in range(1, n_threads)]
    run(0)
    for other in others:
        other.result()
    return _output(inputs, expert_ids, weights, statistics, load, weight_sum, importance)


def _table(inputs: GateInputs) -> Any:
    """Return the addresses of each site's logits, ids, weights and bias, 0 = none, [S, 4]."""
    table = np.zeros((inputs.n_sites, 4), np.int64)
    columns = (inputs.logits, inputs.expert_ids, inputs.weights, inputs.selection_bias)
    for column, values in enumerate(columns):
        for site, value in enumerate(values or ()):
            table[site, column] = 0 if value is None else value.data_ptr()
    return table


def _output(
    inputs: GateInputs,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    statistics: torch.Tensor,
    *sums: Any,
) -> GateBatchOutput:
    """Add the threads' sums up and name everything."""
    per_site = (inputs.n_segments,) if inputs.segments is not None else ()
    shape = (inputs.n_sites, *per_site, inputs.n_experts)
    load, weight_sum = (torch.from_numpy(each.sum(axis=0)).view(shape) for each in sums[:2])
    importance = torch.from_numpy(sums[2].sum(axis=0)) if sums[2].size else None
    entropy, margin, logsumexp, topk_mass = (
        statistics.to(inputs.statistic_dtype) if inputs.logits else (None,) * 4
    )
    return GateBatchOutput(
        expert_ids=expert_ids,
        weights=weights,
        entropy=entropy,
        margin=margin,
        logsumexp=logsumexp,
        topk_mass=topk_mass,
        load=load,
        importance=None if importance is None else importance.view(shape).float(),
        weight_sum=weight_sum.float(),
    )
