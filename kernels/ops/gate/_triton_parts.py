"""What the gate's Triton kernels share: sorting slots, storing rows, adding to the sums.

A token's slots are a tuple of vectors, one element a token, so that sorting them is a fixed network
of minima and maxima in registers. A slot is one int64: the order of its weight above the order of
its expert id, so that the larger number is the better slot and equal weights go to the lower id.
"""

import triton
import triton.language as tl

from kernels.ops.gate.types import NO_WEIGHT as _NO_WEIGHT
from kernels.ops.gate.types import WEIGHT_LARGEST_BITS as _WEIGHT_LARGEST_BITS
from kernels.ops.gate.types import WEIGHT_OFFSET as _WEIGHT_OFFSET
from kernels.ops.gate.types import WEIGHT_SHIFT as _WEIGHT_SHIFT

# compare-exchange networks that sort descending, by number of slots (Knuth, TAOCP 3, 5.3.4)
NETWORKS = {
    1: (),
    2: ((0, 1),),
    4: ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)),
    8: (
        (0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6),
        (0, 4), (1, 5), (2, 6), (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6),
    ),
}  # fmt: skip
# sorts eight numbers that are the maxima of two sorted eights
MERGE = (
    (0, 4), (1, 5), (2, 6), (3, 7), (0, 2), (1, 3), (4, 6), (5, 7), (0, 1), (2, 3), (4, 5), (6, 7),
)  # fmt: skip
NO_SLOT = tl.constexpr(-(2**63))
NO_WEIGHT = tl.constexpr(_NO_WEIGHT)
LARGEST = tl.constexpr(_WEIGHT_LARGEST_BITS)
OFFSET = tl.constexpr(_WEIGHT_OFFSET)
SHIFT = tl.constexpr(_WEIGHT_SHIFT)
ALMOST_HALF = tl.constexpr((1 << (_WEIGHT_SHIFT - 1)) - 1)


@triton.jit
def sorted_by(values, NETWORK: tl.constexpr):
    """Sort a tuple of vectors with a network of compare-exchanges."""
    for step in tl.static_range(len(NETWORK)):
        high = tl.maximum(values[NETWORK[step][0]], values[NETWORK[step][1]])
        low = tl.minimum(values[NETWORK[step][0]], values[NETWORK[step][1]])
        exchanged = ()
        for i in tl.static_range(len(values)):
            if i == NETWORK[step][0]:
                exchanged = exchanged + (high,)
            elif i == NETWORK[step][1]:
                exchanged = exchanged + (low,)
            else:
                exchanged = exchanged + (values[i],)
        values = exchanged
    return values


@triton.jit
def as_tile(values, LOG_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Join a tuple of 2**LOG_SLOTS vectors into a tile [BLOCK, slots], all in registers."""
    for level in tl.static_range(LOG_SLOTS):
        joined = ()
        for i in tl.static_range(1 << (LOG_SLOTS - level - 1)):
            joined = joined + (tl.join(values[i], values[i + (1 << (LOG_SLOTS - level - 1))]),)
        values = joined
    return tl.reshape(values[0], [BLOCK, 1 << LOG_SLOTS])


@triton.jit
def in_order(bits):
    """Map the bits of float32 to integers of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def slot_key(weight, expert, filled):
    """Make the number that a slot is sorted by."""
    order = in_order((weight + 0.0).to(tl.int32, bitcast=True)).to(tl.int64)  # -0 becomes 0
    return tl.where(filled, (order << 32) | (0x7FFFFFFF - expert).to(tl.int64), NO_SLOT)


@triton.jit
def slot_expert(key):
    """Return the expert of a slot, -1 where it is empty."""
    return tl.where(key == NO_SLOT, -1, 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32))


@triton.jit
def slot_weight(key):
    """Return the weight of a slot, 0 where it is empty."""
    weight = in_order((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(key == NO_SLOT, 0.0, weight)


@triton.jit
def difference(a, b):
    """Return a - b, 0 for equal infinities."""
    return tl.where(a == b, 0.0, a - tl.where(a == b, 0.0, b))


@triton.jit
def encoded(weight):
    """Round weights to their 16-bit codes, ties to even."""
    bits = (weight + 0.0).to(tl.int32, bitcast=True)
    half = (bits + ((bits >> SHIFT) & 1) + ALMOST_HALF) >> SHIFT
    code = tl.maximum(half - OFFSET, 0)
    return tl.where((bits < 0) | (bits > LARGEST), NO_WEIGHT, code).to(tl.uint16)


@triton.jit
def store_slots(ids_out, weights_out, at, experts, weights, stored, PACKED: tl.constexpr):
    """Write expert ids and weights where ``at`` says, in the types of a run file if packed."""
    # -1 becomes all ones
    tl.store(ids_out + at, experts.to(ids_out.dtype.element_ty), mask=stored)
    if PACKED:
        tl.store(weights_out + at, encoded(weights), mask=stored)
    else:
        tl.store(weights_out + at, weights, mask=stored)


@triton.jit
def store_statistics(out, token, n_tokens, stored, counted, entropy, margin, logsumexp, mass):
    """Write the four statistics [4, S, T] of this site's tokens; 0 for padding."""
    site = tl.program_id(1).to(tl.int64)
    step = tl.num_programs(1).to(tl.int64) * n_tokens
    at = out + site * n_tokens + token
    kind = out.dtype.element_ty
    tl.store(at, tl.where(counted, entropy, 0.0).to(kind), mask=stored)
    tl.store(at + step, tl.where(counted, margin, 0.0).to(kind), mask=stored)
    tl.store(at + 2 * step, tl.where(counted, logsumexp, 0.0).to(kind), mask=stored)
    tl.store(at + 3 * step, tl.where(counted, mass, 0.0).to(kind), mask=stored)


@triton.jit
def tokens_here(rows, valid, segments, n_tokens, n_segments, BLOCK: tl.constexpr):
    """Return this program's tokens: index, whether there is one, whether it counts, row, segment.

    The segment is -1 where the token counts in no sum.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < n_tokens
    counted = exists
    if valid is not None:
        counted = exists & (tl.load(valid + token, mask=exists, other=0) != 0)
    row = token
    if rows is not None:
        row = tl.load(rows + token, mask=exists, other=0)
    segment = tl.zeros([BLOCK], tl.int32)
    if segments is not None:
        segment = tl.load(segments + token, mask=exists, other=-1)
    segment = tl.where(counted & (segment >= 0) & (segment < n_segments), segment, -1)
    return token, exists, counted, row, segment


@triton.jit
def sums_of_program(n_segments, replicas, EXPERTS: tl.constexpr):
    """Return where this program's sums [n_segments, EXPERTS] begin.

    Programs take turns over replicas of the sums, so that not all of them add to the same place.
    """
    site = tl.program_id(1).to(tl.int64)
    return (site * replicas + tl.program_id(0) % replicas) * n_segments * EXPERTS


@triton.jit
def add_slots(load, weight_sum, sums, segment, experts, weights, EXPERTS: tl.constexpr):
    """Count assignments and add weights up, per segment and expert."""
    counts = (experts >= 0) & (segment >= 0)
    at = sums + segment * EXPERTS + experts
    tl.atomic_add(load + at, counts.to(tl.int32), mask=counts, sem="relaxed")
    tl.atomic_add(weight_sum + at, weights, mask=counts, sem="relaxed")
