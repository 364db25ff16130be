"""Triton kernels of attention: one pass over the keys once each row's denominator is known.

A program has ``BLOCK_M`` query positions of one head and walks over blocks of keys. With the log
of the denominators no running maximum, no rescaling and no values are needed: weights are
``exp2(score - denominator)`` and every statistic is a sum. Blocks that all rows see whole run in a
loop without masks. Launches are in :mod:`kernels.attention._launch`.
"""

import triton
import triton.language as tl

from kernels.attention.types import RECENT

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# score of a key that a query does not see; finite, since weight x score must be 0 then, not nan
HIDDEN = tl.constexpr(-1.0e30)
RECENT_KEYS = tl.constexpr(RECENT)


@triton.jit
def _bend(scores, softcap, scaling, SOFTCAP: tl.constexpr):
    """Turn products into scores of base 2: softcap x tanh(scaling x product / softcap)."""
    if SOFTCAP:
        ratio = scores * (scaling / softcap)
        small = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
        bent = (1.0 - small) / (1.0 + small)
        return tl.where(ratio < 0, -bent, bent) * (softcap * LOG2E)
    return scores * (scaling * LOG2E)


@triton.jit
def _visible(
    positions, own, keys, sequences_ptr, n_keys, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Return which keys of a block the rows see, [BLOCK_M, BLOCK_N]."""
    distance = positions[:, None] - keys[None, :]
    visible = (keys < n_keys)[None, :]
    if CAUSAL:
        visible = visible & (distance >= 0)
    if WINDOW:
        visible = visible & (distance < window)
        if not CAUSAL:
            visible = visible & (distance > -window)
    if SEQUENCES:
        theirs = tl.load(sequences_ptr + keys, mask=keys < n_keys, other=0)
        visible = visible & (theirs[None, :] == own[:, None]) & (own > 0)[:, None]
    return visible


@triton.jit
def _scores(
    query, key_ptr, start, stride_key, n_keys, scaling, softcap,
    SIZE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return scores of base 2 of a block of keys, [BLOCK_M, BLOCK_N]."""
    column, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # int64 before the product: keys x stride passes 2**31 in a long context
    rows = key_ptr + tl.cast(start, tl.int64) * stride_key
    rows = rows + column[None, :] * stride_key + dim[:, None]
    if MASKED:
        inside = (start + column < n_keys)[None, :] & (dim < SIZE)[:, None]
        key = tl.load(rows, mask=inside, other=0.0)
    elif SIZE < BLOCK_D:
        key = tl.load(rows, mask=(dim < SIZE)[:, None], other=0.0)
    else:
        key = tl.load(rows)
    return _bend(tl.dot(query, key, input_precision="ieee"), softcap, scaling, SOFTCAP)


@triton.jit
def _denominator_step(
    top, total, query, key_ptr, start, positions, own, sequences_ptr,
    stride_key, n_keys, window, scaling, softcap,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SEQUENCES: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the running maximum and sum of exponentials."""
    scores = _scores(
        query, key_ptr, start, stride_key, n_keys, scaling, softcap,
        SIZE, SOFTCAP, MASKED, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if MASKED:
        keys = start + tl.arange(0, BLOCK_N)
        visible = _visible(
            positions, own, keys, sequences_ptr, n_keys, window, CAUSAL, WINDOW, SEQUENCES
        )
        scores = tl.where(visible, scores, HIDDEN)
    higher = tl.maximum(top, tl.max(scores, 1))
    total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
    return higher, total


@triton.jit
def _parts(weights, COUNT: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sum weights over neighbouring keys, [BLOCK_M, COUNT]."""
    if KEYS == 1:
        return weights
    if COUNT == 1:
        return tl.sum(weights, 1)[:, None]
    return tl.sum(tl.reshape(weights, [BLOCK_M, COUNT, KEYS]), 2)


@triton.jit
def _statistics_step(
    weighted, distance, recent, query, denominator, part_ptr, key_ptr, start, positions,
    own, sequences_ptr, stride_key, stride_part, n_keys, window, scaling, softcap,
    SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SEQUENCES: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PART_M: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to a row's sums; store its share of the map."""
    column = tl.arange(0, BLOCK_N)
    scores = _scores(
        query, key_ptr, start, stride_key, n_keys, scaling, softcap,
        SIZE, SOFTCAP, MASKED, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    scores = scores - denominator[:, None]  # log2 of the weights
    if MASKED:
        visible = _visible(
            positions, own, start + column, sequences_ptr, n_keys, window,
            CAUSAL, WINDOW, SEQUENCES,
        )  # fmt: skip
        scores = tl.where(visible, scores, HIDDEN)
    weights = tl.exp2(scores)
    weighted += tl.sum(weights * scores, 1)
    parts = _parts(weights, BLOCK_N // PART_N, PART_N, BLOCK_M)
    mass = tl.sum(parts, 1)
    # distances from the block's first key, so that no long product is subtracted
    ahead = (positions - start).to(tl.float32)
    distance += mass * ahead - tl.sum(weights * column.to(tl.float32)[None, :], 1)
    if MASKED:
        back = positions[:, None] - (start + column)[None, :]
        recent += tl.sum(tl.where((back >= 0) & (back < RECENT_KEYS), weights, 0.0), 1)
    if PART_M == BLOCK_M:
        parts = tl.sum(parts, 0)[None, :]
    elif PART_M > 1:
        parts = tl.sum(tl.reshape(parts, [BLOCK_M // PART_M, PART_M, BLOCK_N // PART_N]), 1)
    row = tl.arange(0, BLOCK_M // PART_M).to(tl.int64)
    at = part_ptr + row[:, None] * stride_part + start // PART_N
    tl.store(at + tl.arange(0, BLOCK_N // PART_N)[None, :], parts)
    return weighted, distance, recent


@triton.jit
def _first_key(
    key_ptr, first, real, stride_key,
    SIZE: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the first key of each row's sequence, [BLOCK_M, BLOCK_D], or of all, [1, BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)
    if SEQUENCES:
        at = key_ptr + first.to(tl.int64)[:, None] * stride_key + dim[None, :]
        key = tl.load(at, mask=real[:, None] & (dim < SIZE)[None, :], other=0.0)
    else:
        key = tl.load(key_ptr + dim, mask=dim < SIZE, other=0.0)[None, :]
    return key.to(tl.float32)


@triton.jit
def _rows(
    sequences_ptr, first_ptr, first_row, n_queries, n_keys,
    SEQUENCES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return a block's positions, query indices, which are queries, which of these are real, ...

    ... and each one's sequence number and the position of that sequence's first key.
    """
    positions = first_row + tl.arange(0, BLOCK_M)
    index = positions - (n_keys - n_queries)
    is_row = (index >= 0) & (positions < n_keys)
    if SEQUENCES:
        own = tl.load(sequences_ptr + positions, mask=is_row, other=0)
        real = is_row & (own > 0)
        first = tl.load(first_ptr + positions, mask=real, other=n_keys)
    else:
        own, real, first = positions, is_row, tl.zeros([BLOCK_M], tl.int32)
    return positions, index, is_row, real, own, first


@triton.jit
def _span(
    first, first_row, n_keys, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where the keys begin that a block may see, where masks begin, and where all end."""
    lowest = tl.min(first, 0)
    highest = n_keys
    if CAUSAL:
        highest = tl.minimum(n_keys, first_row + BLOCK_M)
    if WINDOW:
        lowest = tl.maximum(lowest, first_row - window + 1)
        highest = tl.minimum(highest, first_row + BLOCK_M - 1 + window)
    lowest = lowest // BLOCK_N * BLOCK_N
    whole = lowest
    if CAUSAL and not WINDOW and not SEQUENCES:
        # every row sees the blocks before this one whole, and none of their keys is recent
        whole = tl.maximum(0, first_row - RECENT_KEYS + 1) // BLOCK_N * BLOCK_N
    return lowest, whole, highest


@triton.jit
def denominator_kernel(
    query_ptr, key_ptr, sinks_ptr, sequences_ptr, first_ptr, total_ptr,
    query_batch, query_head, stride_query, key_batch, key_head, stride_key,
    n_queries, n_keys, n_used, base, step, lead, window, scaling, softcap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # the last blocks see the most keys: first come, first served
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first_row = base + tile * step
    sequences_ptr += batch * n_keys
    positions, index, is_row, real, own, first = _rows(
        sequences_ptr, first_ptr + batch * n_keys, first_row, n_queries, n_keys,
        SEQUENCES, BLOCK_M,
    )  # fmt: skip
    lowest, whole, highest = _span(
        first, first_row, n_keys, window, CAUSAL, WINDOW, SEQUENCES, BLOCK_M, BLOCK_N
    )
    key_ptr += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    query_ptr += batch * query_batch + head.to(tl.int64) * query_head
    dim = tl.arange(0, BLOCK_D)
    rows = query_ptr + index.to(tl.int64)[:, None] * stride_query + dim[None, :]
    query = tl.load(rows, mask=is_row[:, None] & (dim < SIZE)[None, :], other=0.0)

    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(lowest, whole, BLOCK_N):
        top, total = _denominator_step(
            top, total, query, key_ptr, start, positions, own, sequences_ptr,
            stride_key, n_keys, window, scaling, softcap,
            SIZE, CAUSAL, WINDOW, SOFTCAP, SEQUENCES, False, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    for start in range(whole, highest, BLOCK_N):
        top, total = _denominator_step(
            top, total, query, key_ptr, start, positions, own, sequences_ptr,
            stride_key, n_keys, window, scaling, softcap,
            SIZE, CAUSAL, WINDOW, SOFTCAP, SEQUENCES, True, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    denominator = top + tl.log2(total)
    if SINKS:
        sink = tl.load(sinks_ptr + head) * LOG2E
        top = tl.maximum(denominator, sink)
        denominator = top + tl.log2(tl.exp2(denominator - top) + tl.exp2(sink - top))
    used = (batch * tl.num_programs(1) + head) * n_used + positions - first_row
    used += tile * BLOCK_M - lead
    tl.store(total_ptr + used, tl.where(real, denominator * LN2, 0.0), mask=is_row)


@triton.jit
def statistics_kernel(
    query_ptr, key_ptr, total_ptr, sequences_ptr, first_ptr, stats_ptr, part_ptr,
    query_batch, query_head, stride_query, key_batch, key_head, stride_key,
    n_queries, n_keys, n_used, base, step, lead, stride_part, window, scaling, softcap,
    GROUP: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PART_M: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    plane = batch * tl.num_programs(1) + head
    first_row = base + tile * step
    sequences_ptr += batch * n_keys
    positions, index, is_row, real, own, first = _rows(
        sequences_ptr, first_ptr + batch * n_keys, first_row, n_queries, n_keys,
        SEQUENCES, BLOCK_M,
    )  # fmt: skip
    lowest, whole, highest = _span(
        first, first_row, n_keys, window, CAUSAL, WINDOW, SEQUENCES, BLOCK_M, BLOCK_N
    )
    key_ptr += batch * key_batch + (head // GROUP).to(tl.int64) * key_head
    query_ptr += batch * query_batch + head.to(tl.int64) * query_head
    dim = tl.arange(0, BLOCK_D)
    rows = query_ptr + index.to(tl.int64)[:, None] * stride_query + dim[None, :]
    query = tl.load(rows, mask=is_row[:, None] & (dim < SIZE)[None, :], other=0.0)

    # a program's rows in the output; the statistics lie `size` apart
    used = plane * n_used + tile * BLOCK_M + positions - first_row - lead
    size = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * n_used
    denominator = tl.load(total_ptr + used, mask=is_row, other=0.0) * LOG2E
    # rows of padding weigh nothing: exp2(score - 1e30) is 0
    denominator = tl.where(real, denominator, -HIDDEN)

    # the first key's weight, one product a row: stored before the loops, so that nothing of it
    # stays in registers during them
    sink_key = _first_key(key_ptr, first, real, stride_key, SIZE, SEQUENCES, BLOCK_D)
    score = _bend(tl.sum(query.to(tl.float32) * sink_key, 1), softcap, scaling, SOFTCAP)
    sees_sink = real & (positions - first < window) if WINDOW else real
    score = tl.where(sees_sink, score - denominator, HIDDEN)
    tl.store(stats_ptr + size + used, tl.exp2(score), mask=is_row)

    weighted = tl.zeros([BLOCK_M], tl.float32)
    distance = tl.zeros([BLOCK_M], tl.float32)
    recent = tl.zeros([BLOCK_M], tl.float32)
    part_ptr += (plane * tl.num_programs(0) + tile) * (BLOCK_M // PART_M) * stride_part
    for start in range(lowest, whole, BLOCK_N):
        weighted, distance, recent = _statistics_step(
            weighted, distance, recent, query, denominator, part_ptr, key_ptr, start, positions,
            own, sequences_ptr, stride_key, stride_part, n_keys, window, scaling, softcap,
            SIZE, CAUSAL, WINDOW, SOFTCAP, SEQUENCES, False, BLOCK_D, BLOCK_M, BLOCK_N,
            PART_M, PART_N,
        )  # fmt: skip
    for start in range(whole, highest, BLOCK_N):
        weighted, distance, recent = _statistics_step(
            weighted, distance, recent, query, denominator, part_ptr, key_ptr, start, positions,
            own, sequences_ptr, stride_key, stride_part, n_keys, window, scaling, softcap,
            SIZE, CAUSAL, WINDOW, SOFTCAP, SEQUENCES, True, BLOCK_D, BLOCK_M, BLOCK_N,
            PART_M, PART_N,
        )  # fmt: skip

    stats_ptr += used
    tl.store(stats_ptr, weighted * -LN2, mask=is_row)
    tl.store(stats_ptr + 2 * size, distance, mask=is_row)
    tl.store(stats_ptr + 3 * size, recent, mask=is_row)
