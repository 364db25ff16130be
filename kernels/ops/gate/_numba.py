"""The gate on CPUs: one pass over each row of logits, and the call of its compiled loops.

Everything is passed as addresses and numbers, so that there is one signature and one compilation
for all types and options. All compiled code is in this file, because numba looks at this file
alone to see whether what it kept of ``serve`` is out of date.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kernels.ops.gate.reference import (
    NO_WEIGHT,
    SCORE_FUNCTIONS,
    WEIGHT_LARGEST_BITS,
    WEIGHT_OFFSET,
    WEIGHT_SHIFT,
    GateBatchOutput,
    GateInputs,
)

SOFTMAX, SIGMOID, SOFTMAX_TOPK, PROBABILITIES = range(4)
assert SCORE_FUNCTIONS == ("softmax", "sigmoid", "softmax_topk", "probabilities")
F = np.float32
INF = F(np.inf)
TINY = F(np.finfo(np.float32).tiny)
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


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile a function that only compiled code calls."""
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(error_model="numpy", **wrappers, **options)  # type: ignore[no-any-return]


def _compiled_and_kept(function: Any) -> Any:
    """Compile without the interpreter lock, and keep the result where there is a place for it."""
    options = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package nor the user's cache can be written
        return njit(**options)(function)


def _reader(kind: Any) -> Any:
    """Make the function that reads element ``i`` of the array of ``kind`` at an address."""

    @intrinsic
    def read(typing_context: Any, address: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return kind(types.int64, types.int64), generate

    return read


def _writer(kind: Any) -> Any:
    """Make the function that writes element ``i`` of the array of ``kind`` at an address."""

    @intrinsic
    def write(typing_context: Any, address: Any, i: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return write


_f32, _u16, _u8 = _reader(types.float32), _reader(types.uint16), _reader(types.uint8)
_i32, _i64 = _reader(types.int32), _reader(types.int64)
_put_f32, _put_u16 = _writer(types.float32), _writer(types.uint16)
_put_u8, _put_i32 = _writer(types.uint8), _writer(types.int32)


@intrinsic
def _float_of(typing_context, bits):
    """Read 32 bits as a float32."""
    return types.float32(
        types.int32
    ), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _bits_of(typing_context, value):
    """Read a float32 as 32 bits."""
    return types.int32(
        types.float32
    ), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@_compiled()
def _exp(x):
    """Return e**x for x <= 0, to 2e-7 relative; 0 below float32's normal range."""
    x = max(x, F(-88.0))
    n = np.floor(x * F(1.44269504) + F(0.5))
    r = (x - n * F(0.693359375)) + n * F(2.12194440e-4)
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = (p * r + F(8.3334519073e-3)) * r + F(4.1665795894e-2)
    p = (p * r + F(1.6666665459e-1)) * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1.0)
    scaled = p * _float_of((np.int32(n) + np.int32(127)) << np.int32(23))
    return scaled if x > F(-87.3) else F(0.0)


@_compiled()
def _log(x):
    """Return ln x for normal x > 0, to 1e-7 absolute near 1 (Cephes, logf)."""
    bits = _bits_of(x)
    n = F((bits >> np.int32(23)) - np.int32(126))
    m = _float_of((bits & np.int32(0x7FFFFF)) | np.int32(126 << 23))  # 1/2 to 1
    small = m < F(0.70710678)
    n = n - F(1.0) if small else n
    m = m + m - F(1.0) if small else m - F(1.0)
    p = F(7.0376836292e-2) * m - F(1.1514610310e-1)
    p = (p * m + F(1.1676998740e-1)) * m - F(1.2420140846e-1)
    p = (p * m + F(1.4249322787e-1)) * m - F(1.6668057665e-1)
    p = (p * m + F(2.0000714765e-1)) * m - F(2.4999993993e-1)
    p = (p * m + F(3.3333331174e-1)) * m * m * m
    p = p - F(0.5) * m * m + n * F(-2.12194440e-4)
    return m + p + n * F(0.693359375)


@_compiled()
def _from_half(bits):
    """Return the float32 that float16 bits stand for."""
    magnitude = np.int32(bits & 0x7FFF)
    special = np.int32(0x7F800000) if magnitude >= 0x7C00 else np.int32(0)
    value = _float_of(magnitude << np.int32(13)) * F(2.0**112)
    sign = np.int32(np.int32(bits & 0x8000) << np.int32(16))
    return _float_of(_bits_of(value) | special | sign)


@_compiled()
def _float_from(address, kind, i):
    """Read element i of an array of float32, bfloat16 or float16."""
    if kind == 0:
        return _f32(address, i)
    bits = _u16(address, i)
    return _float_of(np.int32(bits) << np.int32(16)) if kind == 1 else _from_half(bits)


@_compiled()
def _load_row(address, kind, first, x):
    """Read the logits of one token into ``x`` as float32."""
    if kind == 0:
        for e in range(len(x)):
            x[e] = _f32(address, first + e)
    elif kind == 1:
        for e in range(len(x)):
            x[e] = _float_of(np.int32(_u16(address, first + e)) << np.int32(16))
    else:
        for e in range(len(x)):
            x[e] = _from_half(_u16(address, first + e))


@_compiled(fastmath={"nnan", "nsz"})
def _max(x):
    best = -INF
    for e in range(len(x)):
        best = max(best, x[e])
    return best


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _softmax_row(x, top, p):
    """Put exp(x - top) into p; return its sum and the sum of p * (x - top)."""
    total, weighted = F(0.0), F(0.0)
    for e in range(len(x)):
        d = max(x[e] - top, F(-200.0))  # a barred expert would be 0 * -inf
        p[e] = _exp(d)
        total += p[e]
        weighted += p[e] * d
    return total, weighted


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _score_row(x, score, p):
    """Put the scores into p; return their sum and the sum of p ln p."""
    total, weighted = F(0.0), F(0.0)
    if score == SIGMOID:
        for e in range(len(x)):
            small = _exp(-abs(x[e]))
            p[e] = (F(1.0) if x[e] >= F(0.0) else small) / (F(1.0) + small)
    else:
        for e in range(len(x)):
            p[e] = x[e]
    for e in range(len(x)):
        total += p[e]
        weighted += p[e] * _log(max(p[e], TINY))
    return total, weighted


@_compiled()
def _bar_groups(rank, n_groups, top_groups, best_two, barred):
    """Set ``rank`` to -inf outside the best groups, and say which groups those are."""
    size = len(rank) // n_groups
    sums = np.empty(n_groups, np.float32)
    for g in range(n_groups):
        first, second = -INF, -INF
        for e in range(g * size, (g + 1) * size):
            if rank[e] > first:
                first, second = rank[e], first
            elif rank[e] > second:
                second = rank[e]
        sums[g] = first + second if best_two and size > 1 else first
        barred[g] = True
    for _ in range(top_groups):
        best = -1
        for g in range(n_groups):
            if barred[g] and (best < 0 or sums[g] > sums[best]):
                best = g
        barred[best] = False
    for g in range(n_groups):
        for e in range(g * size, (g + 1) * size):
            rank[e] = -INF if barred[g] else rank[e]


@_compiled()
def _insert(value, expert, values, experts, n):
    """Insert into n sorted slots, best first, equals by the lower id; the last may fall out."""
    j = n if n < len(values) else n - 1
    while j > 0 and (values[j - 1] < value or (values[j - 1] == value and experts[j - 1] > expert)):
        values[j], experts[j] = values[j - 1], experts[j - 1]
        j -= 1
    values[j], experts[j] = value, expert
    return min(n + 1, len(values))


@_compiled()
def _encode(weight):
    """Round a weight to its 16-bit code, ties to even."""
    bits = np.int64(_bits_of(weight + F(0.0)))
    if bits < 0 or bits > WEIGHT_LARGEST_BITS:
        return np.uint16(NO_WEIGHT)
    half = ((bits >> WEIGHT_SHIFT) & 1) + bits + ((1 << (WEIGHT_SHIFT - 1)) - 1)
    return np.uint16(max((half >> WEIGHT_SHIFT) - WEIGHT_OFFSET, 0))


@_compiled()
def _score_token(x, p, scores, rank, score, bias_at, n_groups, top_groups, barred, found):
    """Fill p, scores, rank and two statistics from logits x; return 1 / sum(p)."""
    n_experts = len(x)
    top = _max(x)
    total, weighted = _softmax_row(x, top, p)
    found[2] = top + np.log(total)
    if score in (SIGMOID, PROBABILITIES):
        total, weighted = _score_row(x, score, p)
    inverse = F(1.0) / max(total, TINY)
    found[0] = max(np.log(total) - weighted * inverse, F(0.0)) if total >= TINY else F(0.0)
    for e in range(n_experts):
        if score == SOFTMAX:
            scores[e] = p[e] * inverse
        else:
            scores[e] = p[e] if score == SIGMOID else x[e]
        if bias_at != 0:
            scores[e] += _f32(bias_at, e)
        # without a bias the logits rank the experts as the scores do, but before any rounding
        rank[e] = scores[e] if bias_at != 0 else x[e]
    if top_groups < n_groups:
        _bar_groups(rank, n_groups, top_groups, bias_at != 0, barred)
        for e in range(n_experts):
            if barred[e // (n_experts // n_groups)]:
                scores[e] = -INF
    return inverse


@_compiled()
def _given_slots(ids_at, ids_kind, weights_at, weights_kind, row, n_experts, values, experts):
    """Sort the slots of one row by weight; return how many are filled."""
    n = 0
    for i in range(row * len(values), (row + 1) * len(values)):
        expert = np.int64(_i32(ids_at, i)) if ids_kind == 0 else _i64(ids_at, i)
        if expert >= 0 and expert < n_experts:
            n = _insert(_float_from(weights_at, weights_kind, i), expert, values, experts, n)
    return n


@_compiled()
def _chosen_slots(x, p, rank, score, inverse, renormalize, values, experts):
    """Choose the best of ``rank`` and put their weights into values."""
    n = 0
    for e in range(len(x)):
        if n < len(values) or rank[e] > values[n - 1]:
            n = _insert(rank[e], e, values, experts, n)
    total, peak = F(0.0), -INF
    for j in range(n):
        peak = max(peak, x[experts[j]])
    for j in range(n):
        if score == SOFTMAX_TOPK:
            values[j] = _exp(x[experts[j]] - peak)
        else:
            values[j] = p[experts[j]] * (F(1.0) if score == SIGMOID else inverse)
        total += values[j]
    if renormalize or score == SOFTMAX_TOPK:
        for j in range(n):
            values[j] /= max(total, TINY)
    return n


@_compiled()
def _margin(scores, experts, n):
    """Return the last chosen score minus the best left out; the chosen are struck from scores."""
    last = INF
    for j in range(n):
        last = min(last, scores[experts[j]])
    for j in range(n):
        scores[experts[j]] = -INF
    if n == len(scores):
        return INF
    left_out = _max(scores)
    return F(0.0) if last == left_out else last - left_out


@_compiled()
def _store(t, at, out_kinds, values, experts, n):
    """Write the slots of output row t, the empty ones last."""
    ids_kind, packed = out_kinds
    for j in range(len(values)):
        i = t * len(values) + j
        expert = experts[j] if j < n else -1
        weight = values[j] if j < n else F(0.0)
        if ids_kind == 0:
            _put_i32(at[0], i, np.int32(expert))
        elif ids_kind == 1:
            _put_u16(at[0], i, np.uint16(expert & 0xFFFF))
        else:
            _put_u8(at[0], i, np.uint8(expert & 0xFF))
        if packed:
            _put_u16(at[1], i, _encode(weight))
        else:
            _put_f32(at[1], i, weight)


@_compiled_and_kept
def serve(table, tokens_at, out_at, kinds, out_kinds, rule, span, load, weight_sum, importance):
    """Serve tokens ``span`` of every site; the sums are this call's own, [S, G, E]."""
    rows_at, valid_at, segments_at = tokens_at
    logits_kind, ids_kind, weights_kind = kinds
    score, top_k, n_groups, top_groups, renormalize = rule
    start, stop, n_tokens = span
    n_sites, n_segments, n_experts = load.shape
    x, p = np.empty(n_experts, np.float32), np.empty(n_experts, np.float32)
    scores, rank = np.empty(n_experts, np.float32), np.empty(n_experts, np.float32)
    values, found = np.empty(top_k, np.float32), np.empty(4, np.float32)
    experts, barred = np.empty(top_k, np.int64), np.empty(n_groups, np.bool_)
    for site in range(n_sites):
        logits_at, given_ids_at, given_weights_at, bias_at = table[site]
        for t in range(start, stop):
            n, inverse = 0, F(0.0)
            for s in range(4):
                found[s] = 0.0
            valid = valid_at == 0 or _u8(valid_at, t) != 0
            if valid:
                row = t if rows_at == 0 else _i64(rows_at, t)
                if logits_at != 0:
                    _load_row(logits_at, logits_kind, row * n_experts, x)
                    inverse = _score_token(
                        x, p, scores, rank, score, bias_at, n_groups, top_groups, barred, found
                    )
                if given_ids_at != 0:
                    n = _given_slots(
                        given_ids_at, ids_kind, given_weights_at, weights_kind, row, n_experts,
                        values, experts,
                    )  # fmt: skip
                else:
                    n = _chosen_slots(x, p, rank, score, inverse, renormalize, values, experts)
                if logits_at != 0:
                    found[1] = _margin(scores, experts, n)
                    for j in range(n):
                        found[3] += p[experts[j]] * inverse
            i = site * n_tokens + t
            _store(i, out_at, out_kinds, values, experts, n)
            for s in range(4):
                if out_at[2 + s] != 0:
                    _put_f32(out_at[2 + s], i, found[s])
            segment = 0 if segments_at == 0 else np.int64(_i32(segments_at, t))
            if valid and segment >= 0 and segment < n_segments:
                for j in range(n):
                    load[site, segment, experts[j]] += 1
                    weight_sum[site, segment, experts[j]] += values[j]
                if importance.size:
                    for e in range(n_experts):
                        importance[site, segment, e] += p[e] * inverse


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
