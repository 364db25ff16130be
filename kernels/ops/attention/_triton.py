"""The Triton path of attention: kernels, their launch, and what is left to PyTorch.

PyTorch finds where sequences begin, sums bins and lists top keys.
"""

import torch
import triton
import triton.language as tl

from kernels.ops.attention import (
    QUERY_BLOCK,
    RECENT,
    AttentionInputs,
    AttentionOutput,
    bin_width,
    n_bins,
    row_shares,
    used_queries,
    visible_keys,
)

TOP_SCORES = 1 << 24  # scores the pass for the top keys holds at once, 64 MiB
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# score of a key that a query does not see; finite, since weight x score must be 0 then, not nan
HIDDEN = tl.constexpr(-1.0e30)
RECENT_KEYS = tl.constexpr(RECENT)


def first_keys(sequences: torch.Tensor) -> torch.Tensor:
    """Return the position of the first key of each key's sequence, [B, S] int32."""
    ordered, order = sequences.sort(dim=-1, stable=True)
    place = torch.arange(sequences.shape[-1], device=sequences.device).expand_as(order)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = torch.where(begins, place, 0).cummax(dim=-1).values
    # a stable sort leaves each sequence's first key at its start
    first = order.gather(-1, start)
    return torch.empty_like(sequences).scatter_(-1, order, first.to(sequences.dtype))


def pool(
    parts: torch.Tensor,
    base: int,
    step: int,
    block_m: int,
    part_m: int,
    part_n: int,
    width: int,
    count: int,
) -> torch.Tensor:
    """Sum the kernel's parts to bins, [B, H, n, n]."""
    batch, heads, rows, columns = parts.shape
    per_bin = width // part_n
    # blocks of keys may end before the last bin does, or reach past it, with nothing there
    padded = torch.nn.functional.pad(parts, (0, count * per_bin - columns))
    keys = padded.view(batch, heads, rows, count, per_bin).sum(dim=-1)
    per_tile = block_m // part_m
    row = torch.arange(rows, device=parts.device)
    tile = torch.div(row, per_tile, rounding_mode="floor")
    place = base + tile * step + (row - tile * per_tile) * part_m
    query_bin = torch.div(place, width, rounding_mode="floor").clamp_max(count)
    # the last block may reach past the last bin; its rows there are zero
    pooled = parts.new_zeros(batch, heads, count + 1, count)
    return pooled.index_add_(2, query_bin, keys)[:, :, :count]


def top_keys_of(
    inputs: AttentionInputs,
    totals: torch.Tensor,
    positions: torch.Tensor,
    sequences: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """List the heaviest keys of each used query: rows of scores, a chunk of queries at a time."""
    query, key, top_keys, softcap = inputs.query, inputs.key, inputs.top_keys, inputs.softcap
    batch, heads, n_queries, _ = query.shape
    key_heads, n_keys = key.shape[1:3]
    shape = (batch, heads, len(positions), top_keys)
    ids = torch.full(shape, -1, dtype=torch.int32, device=query.device)
    weights = query.new_zeros(shape, dtype=torch.float32)
    kept = min(top_keys, n_keys)
    if not (kept and ids.numel()):
        return ids, weights
    if sequences is None:
        sequences = torch.ones((batch, n_keys), dtype=torch.int32, device=query.device)
    keys = key.float().transpose(-1, -2)
    chunk = max(1, TOP_SCORES // (batch * heads * n_keys))
    for low in range(0, len(positions), chunk):
        here = positions[low : low + chunk]
        rows = query[:, :, here - (n_keys - n_queries)].float()
        rows = rows.reshape(batch, key_heads, -1, rows.shape[-1])  # a key head's queries together
        scores = (rows @ keys * inputs.scaling).view(batch, heads, len(here), n_keys)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        visible = visible_keys(here, sequences, causal=inputs.causal, window=inputs.window)
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
        best, best_ids = scores.topk(kept, dim=-1)
        weight = (best - totals[:, :, low : low + chunk].unsqueeze(-1)).exp()
        weight = weight.masked_fill(best == -torch.inf, 0.0)  # totals of padding may be -inf too
        weights[:, :, low : low + chunk, :kept] = weight
        ids[:, :, low : low + chunk, :kept] = best_ids.int().masked_fill(weight == 0, -1)
    return ids, weights


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


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability to choose block sizes for; an H100's without a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def config(
    size: int, itemsize: int, every: int, width: int, version: tuple[int, int]
) -> dict[str, int]:
    """Return block sizes, warps and stages for a head size, a bin width and a compute capability.

    Queries and staged keys share a program's shared memory: 227 KiB on 9.0 and 10.0, 163 KiB on
    8.0, 99 KiB on 8.6, 8.9 and 12, 64 KiB on AMD's GPUs. Blocks of 128 keys spill registers
    except on 9.0, whose tensor cores read queries from shared memory. float32 has no tensor cores
    of its own precision: its operands are in registers, which small blocks over many warps leave.
    """
    block_d = max(16, triton.next_power_of_2(size))
    row_bytes = block_d * itemsize
    single, amd = itemsize == 4, torch.version.hip is not None
    block_m = QUERY_BLOCK if every > 1 or row_bytes > 256 or single else 128
    block_n = (64 if row_bytes <= 256 else 32) // (2 if single else 1)
    hopper = version == (9, 0) and not amd and not single
    if hopper and row_bytes <= 512 and block_m == 128:
        # narrow bins are many sums a block, which need the registers of half of it
        block_n *= 2 if width >= 16 else 1
    blocks = {
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_m == 128 or single else 4,
        "num_stages": 3 if hopper and row_bytes <= 256 else 2,
    }
    # AMD's compiler has no such option
    return blocks if amd else {**blocks, "maxnreg": 255}


def attention_triton(inputs: AttentionInputs) -> AttentionOutput:
    """Launch the kernels."""
    query, key = (
        value if value.stride(-1) == 1 else value.contiguous()
        for value in (inputs.query, inputs.key)
    )
    lse, every, bins = inputs.lse, inputs.every, inputs.bins
    batch, heads, n_queries, size = query.shape
    key_heads, n_keys = key.shape[1:3]
    queries = used_queries(n_queries, n_keys, every, query.device)
    sequences = starts = None
    if inputs.valid is not None:
        sequences = inputs.valid.to(torch.int32).contiguous()
        starts = first_keys(sequences)
    sinks = None if inputs.sinks is None else inputs.sinks.float().contiguous()

    width = bin_width(n_keys, bins)
    blocks = config(size, query.itemsize, every, width, capability(query.device))
    block_m, block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    part_m, part_n = min(width, block_m), min(width, block_n)
    first, step = n_keys - n_queries, block_m * every
    base = triton.cdiv(first // block_m, every) * step  # where the first block used begins
    tiles = max(0, triton.cdiv(n_keys - base, step))
    columns = triton.cdiv(n_keys, block_n) * (block_n // part_n)

    stats = query.new_empty((4, batch, heads, len(queries)), dtype=torch.float32)
    totals = query.new_empty((batch, heads, len(queries)), dtype=torch.float32)
    # keys that no row of a block sees are never written
    rows = tiles * (block_m // part_m)
    parts = query.new_zeros((batch, heads, rows, columns), dtype=torch.float32)
    if stats.numel():
        grid = (tiles, heads, batch)
        numbers = (
            *query.stride()[:3], *key.stride()[:3],
            n_queries, n_keys, len(queries), base, step, max(0, first - base),
        )  # fmt: skip
        options = {
            "GROUP": heads // key_heads, "SIZE": size, "CAUSAL": inputs.causal,
            "WINDOW": inputs.window is not None, "SOFTCAP": inputs.softcap is not None,
            "SEQUENCES": sequences is not None, **blocks,
        }  # fmt: skip
        # a pointer that a kernel does not follow may be any
        given = [query if value is None else value for value in (sinks, sequences, starts)]
        scores = (inputs.window or 0, float(inputs.scaling), float(inputs.softcap or 0.0))
        if lse is None:
            denominator_kernel[grid](
                query, key, *given, totals, *numbers, *scores, SINKS=sinks is not None, **options
            )
        else:
            totals = lse[:, :, queries].float()
            if sinks is not None:
                totals = torch.logaddexp(totals, sinks.view(1, -1, 1))
        statistics_kernel[grid](
            query, key, totals, *given[1:], stats, parts, *numbers, columns, *scores,
            PART_M=part_m, PART_N=part_n, **options,
        )  # fmt: skip
    pooled = pool(parts, base, step, block_m, part_m, part_n, width, n_bins(n_keys, bins))
    top_ids, top_weights = top_keys_of(inputs, totals, queries + first, sequences)
    entropy, sink_mass, mean_distance, window_mass = stats.unbind()
    return AttentionOutput(
        entropy=entropy,
        sink_mass=sink_mass,
        mean_distance=mean_distance,
        window_mass=window_mass,
        map=row_shares(pooled),
        received=pooled.sum(dim=-2),
        top_ids=top_ids,
        top_weights=top_weights,
        queries=queries,
    )
