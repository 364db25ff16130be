"""CPU implementation of attention: one product per block of queries, then one pass over it.

A block of queries times the keys they may see is a matrix product and goes to PyTorch; everything
else happens in one compiled function while the block is in the cache. Blocks are cut so that a
product has about ``BLOCK_SCORES`` elements, whatever the number of keys.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit

from kernels.ops.attention import (
    LEAST_ROW,
    QUERY_BLOCK,
    RECENT,
    AttentionInputs,
    AttentionOutput,
    bin_width,
    n_bins,
    used_queries,
)

BLOCK_SCORES = 1 << 18  # 1 MiB of float32: half of a usual second-level cache
BLOCK_QUERIES = 128

# sums may be reordered and products fused; nan and infinity keep their meaning
FAST = {"reassoc", "nsz", "contract", "arcp"}
F32 = np.float32
LANES = 16  # floats of the widest vector register
LOG2E = F32(1.4426950408889634)
HIDDEN = F32(-1e30)  # score of a key that the query does not see: its weight is 0


@njit(cache=True, nogil=True, fastmath=FAST, inline="always")
def _exp(x):
    """Return e**x to about 1e-6 of its value, 0 below 2**-126; unlike libm's it vectorises."""
    power = x * LOG2E
    clamped = max(power, F32(-126.0))
    whole = np.floor(clamped + F32(0.5))
    rest = clamped - whole
    # 2**rest on [-1/2, 1/2], Taylor's coefficients ln(2)**n / n!
    value = F32(1.5403530e-4)
    value = value * rest + F32(1.3333558e-3)
    value = value * rest + F32(9.6181291e-3)
    value = value * rest + F32(5.5504109e-2)
    value = value * rest + F32(2.4022651e-1)
    value = value * rest + F32(6.9314718e-1)
    value = value * rest + F32(1.0)
    exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return value * np.int32(exponent).view(np.float32) if power >= F32(-126.0) else F32(0.0)


@njit(cache=True, nogil=True, fastmath=FAST, inline="always")
def _tanh(x):
    """Return tanh x; a polynomial near 0 (Cephes, tanhf), where the quotient would cancel."""
    square = x * x
    near = F32(-5.70498872745e-3)
    near = near * square + F32(2.06390887954e-2)
    near = near * square - F32(5.37397155531e-2)
    near = near * square + F32(1.33314422036e-1)
    near = near * square - F32(3.33332819422e-1)
    near = near * square * x + x
    far = F32(1.0) - F32(2.0) / (F32(1.0) + _exp(min(abs(x), F32(20.0)) * F32(2.0)))
    return near if abs(x) < F32(0.625) else np.copysign(far, x)


@njit(cache=True, nogil=True)
def _spans(sequences, first, last, holes):
    """Find each sequence's first and last key, and whether other keys lie between them."""
    for b in range(len(sequences)):
        order = np.argsort(sequences[b], kind="mergesort")
        start = 0
        for end in range(1, len(order) + 1):
            if end < len(order) and sequences[b, order[end]] == sequences[b, order[start]]:
                continue
            low, high = order[start], order[end - 1]
            for i in range(start, end):
                first[b, order[i]], last[b, order[i]] = low, high
                holes[b, order[i]] = high - low + 1 != end - start
            start = end


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _scale(row, scaling, softcap):
    """Turn products of queries and keys into scores, in place."""
    if softcap > 0:
        for j in range(len(row)):
            row[j] = _tanh(row[j] * (scaling / softcap)) * softcap
    else:
        for j in range(len(row)):
            row[j] *= scaling


@njit(cache=True, nogil=True, fastmath=FAST)
def _greatest(row, lanes):
    """Return the greatest score; ``lanes`` hold maxima side by side: one alone is not a vector."""
    lanes[:] = row[0]
    whole = len(row) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] = max(lanes[lane], row[start + lane])
    top = row[0]
    for lane in range(LANES):
        top = max(top, lanes[lane])
    for j in range(whole, len(row)):
        top = max(top, row[j])
    return top


@njit(cache=True, nogil=True, fastmath=FAST)
def _exponentials(row, top, ramp):
    """Replace scores by exp(score - top); return what the statistics need of them.

    That is their sum, the sum of each times its (score - top), and the sum of each times its
    ``ramp``.
    """
    total = weighted = distance = F32(0.0)
    for j in range(len(row)):
        shifted = row[j] - top
        value = _exp(shifted)
        row[j] = value
        total += value
        weighted += value * shifted
        distance += value * ramp[j]
    return total, weighted, distance


@njit(cache=True, nogil=True, fastmath=FAST)
def _sum(row, start, end):
    total = F32(0.0)
    for j in range(start, end):
        total += row[j]
    return total


@njit(cache=True, nogil=True, fastmath=FAST)
def _add(row, share, sums):
    for j in range(len(row)):
        sums[j] += row[j] * share


@njit(cache=True, nogil=True)
def _pool(sums, start, shift, pooled):
    """Add sums over keys, the first of them key ``start``, to bins of ``2**shift``; clear them."""
    j = 0
    while j < len(sums):
        key_bin = (start + j) >> shift
        end = min(len(sums), ((key_bin + 1) << shift) - start)
        pooled[key_bin] += _sum(sums, j, end)
        j = end
    sums[:] = F32(0.0)


@njit(cache=True, nogil=True)
def _heaviest(row, start, share, ids, weights):
    """List the heaviest keys of a row that begins at key ``start``, by insertion."""
    least = F32(0.0)
    for j in range(len(row)):
        weight = row[j] * share
        if weight <= least:
            continue
        slot = len(ids) - 1
        while slot > 0 and weights[slot - 1] < weight:
            weights[slot], ids[slot] = weights[slot - 1], ids[slot - 1]
            slot -= 1
        weights[slot], ids[slot] = weight, start + j
        least = weights[-1]


@njit(cache=True, nogil=True, error_model="numpy")
def _block(
    scores, place, sequences, first, last, holes, lse, sinks, ramp,
    scaling, softcap, causal, window, shift, stats, pooled, top_ids, top_weights,
):  # fmt: skip
    """Summarise the scores [heads, queries, keys] of a block of one batch row.

    ``place`` is the batch row, the first head, the first query, that query's position and its row
    in the output, and the first key. Empty arrays stand for what was not given or not asked for:
    ``sequences`` (and their spans), ``lse``, ``sinks``, ``top_ids``.
    """
    b, first_head, query, position, out, key_start = place
    lanes = np.empty(LANES, np.float32)
    # what the keys get from the queries of one bin: pooled once a bin, not once a query
    sums = np.zeros(scores.shape[2], np.float32)
    for head in range(scores.shape[0]):
        h = first_head + head
        for i in range(scores.shape[1]):
            here, q = position + i, out + i
            if i and here & ((1 << shift) - 1) == 0:
                _pool(sums, key_start, shift, pooled[b, h, (here >> shift) - 1])
            begin, end = 0, key_start + scores.shape[2]
            if sequences.size:
                if sequences[b, here] <= 0:
                    stats[:, b, h, q] = F32(0.0)
                    continue
                begin, end = first[b, here], last[b, here] + 1
            sink = begin
            if causal:
                end = here + 1
            if window > 0:
                begin, end = max(begin, here - window + 1), min(end, here + window)
            row = scores[head, i, begin - key_start : end - key_start]
            _scale(row, scaling, softcap)
            if sequences.size and holes[b, here]:
                for j in range(len(row)):
                    if sequences[b, begin + j] != sequences[b, here]:
                        row[j] = HIDDEN

            # from here on a weight is share x value
            share = F32(1.0)
            if lse.size:
                top = lse[b, h, query + i]
                if sinks.size:
                    top = max(top, sinks[h]) + F32(np.log1p(np.exp(-abs(top - sinks[h]))))
            else:
                top = _greatest(row, lanes)
                if sinks.size:
                    top = max(top, sinks[h])
            # the ramp holds every distance from the greatest to its negative
            total, weighted, distance = _exponentials(
                row, top, ramp[len(ramp) // 2 - here + begin :]
            )
            if not lse.size:
                whole = total + F32(np.exp(sinks[h] - top)) if sinks.size else total
                share = F32(1.0) / whole
                weighted -= total * F32(np.log(whole))
            recent = min(end, here + 1) - begin
            stats[0, b, h, q] = -weighted * share
            stats[1, b, h, q] = row[sink - begin] * share if sink >= begin else F32(0.0)
            stats[2, b, h, q] = distance * share
            stats[3, b, h, q] = _sum(row, max(0, recent - RECENT), recent) * share
            _add(row, share, sums[begin - key_start :])
            if top_ids.size:
                _heaviest(row, begin, share, top_ids[b, h, q], top_weights[b, h, q])
        _pool(sums, key_start, shift, pooled[b, h, (position + scores.shape[1] - 1) >> shift])


@njit(cache=True, nogil=True, error_model="numpy")
def _finish(pooled, received):
    """Sum the weights that keys receive, then divide each row of the map by its sum."""
    received[:] = F32(0.0)
    for b in range(pooled.shape[0]):
        for h in range(pooled.shape[1]):
            for i in range(pooled.shape[2]):
                row = pooled[b, h, i]
                total = F32(0.0)
                for j in range(len(row)):
                    total += row[j]
                    received[b, h, j] += row[j]
                share = F32(1.0) / total if total >= F32(LEAST_ROW) else F32(np.nan)
                for j in range(len(row)):
                    row[j] *= share


def attention_numba(inputs: AttentionInputs) -> AttentionOutput:
    """Run the compiled loops."""
    query, key = inputs.query.detach().float(), inputs.key.detach().float()
    window, every = inputs.window, inputs.every
    batch, heads, n_queries, _ = query.shape
    key_heads, n_keys = key.shape[1:3]
    queries = used_queries(n_queries, n_keys, every)
    count = n_bins(n_keys, inputs.bins)
    stats = query.new_empty(4, batch, heads, len(queries))
    pooled = query.new_zeros(batch, heads, count, count)
    received = query.new_empty(batch, heads, count)
    top_ids = torch.full((batch, heads, len(queries), inputs.top_keys), -1, dtype=torch.int32)
    top_weights = query.new_zeros(top_ids.shape)

    arguments = (
        *_sequence_spans(inputs.valid),
        _floats(inputs.lse, 3),
        _floats(inputs.sinks, 1),
        np.arange(n_keys - 1, -n_keys, -1, dtype=np.float32),
        F32(inputs.scaling),
        F32(inputs.softcap or 0.0),
        inputs.causal,
        window or 0,
        bin_width(n_keys, inputs.bins).bit_length() - 1,
        *(value.numpy() for value in (stats, pooled, top_ids, top_weights)),
    )
    group = heads // key_heads
    for b in range(batch):
        for start, position, length in _blocks(n_queries, n_keys, every):
            low, high = _key_range(position, length, n_keys, inputs.causal, window)
            width = high - low
            at_once = max(1, BLOCK_SCORES // (length * group * width))  # key heads
            first_query = position - n_keys + n_queries
            rows = query[b, :, first_query : first_query + length]
            for kv in range(0, key_heads, at_once):
                keys = key[b, kv : kv + at_once, low:high].transpose(-1, -2)
                some = rows[kv * group : (kv + at_once) * group]
                scores = some.reshape(len(keys), group * length, -1) @ keys
                _block(
                    scores.view(-1, length, width).numpy(),
                    (b, kv * group, first_query, position, start, low),
                    *arguments,
                )
    _finish(pooled.numpy(), received.numpy())
    return AttentionOutput(*stats.unbind(), pooled, received, top_ids, top_weights, queries)


def _sequence_spans(valid: torch.Tensor | None) -> tuple[np.ndarray, ...]:
    """Return sequence numbers, first and last key, holes, [B, S] each; empty without ``valid``."""
    shape = (0, 0) if valid is None else tuple(valid.shape)
    sequences = np.empty(shape, np.int64)
    if valid is not None:
        sequences[:] = valid.numpy()
    first, last = np.empty(shape, np.int64), np.empty(shape, np.int64)
    holes = np.empty(shape, np.bool_)
    if valid is not None:
        _spans(sequences, first, last, holes)
    return sequences, first, last, holes


def _floats(value: torch.Tensor | None, ndim: int) -> np.ndarray:
    """Return an optional tensor as a contiguous array, empty where there is none."""
    if value is None:
        return np.empty((0,) * ndim, np.float32)
    return value.detach().float().contiguous().numpy()


def _blocks(n_queries: int, n_keys: int, every: int) -> Iterator[tuple[int, int, int]]:
    """Yield where blocks of used queries begin in the output, their position and their length."""
    first = n_keys - n_queries
    stride = QUERY_BLOCK * every if every > 1 else BLOCK_QUERIES
    length = QUERY_BLOCK if every > 1 else BLOCK_QUERIES
    start = 0
    for block in range(first // stride * stride, n_keys, stride):
        low, high = max(first, block), min(n_keys, block + length)
        if low < high:
            yield start, low, high - low
            start += high - low


def _key_range(
    position: int, length: int, n_keys: int, causal: bool, window: int | None
) -> tuple[int, int]:
    """Return the first key that a block of queries may see, and the one after the last."""
    low, high = 0, position + length if causal else n_keys
    if window is not None:
        low, high = max(0, position - window + 1), min(high, position + length - 1 + window)
    return low, high
