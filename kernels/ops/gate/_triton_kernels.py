"""The gate's Triton kernels: a thread per token for the common case, a tile for every case.

A token's slots are a tuple of vectors, one element a token, so that sorting them is a fixed network
of minima and maxima in registers. A slot is one int64: the order of its weight above the order of
its expert id, so that the larger number is the better slot and equal weights go to the lower id.

``observe_tokens`` and ``select_tokens`` have a thread per token; no data crosses a thread until the
sums. A tile [BLOCK, CHUNK] of logits is 16 bytes a row, which Triton gives to one lane and loads at
once, so that maxima, sums and sorting networks over the experts are plain register arithmetic. The
softmax runs along (m = maximum so far, s = sum of 2**(x - m), h = sum of 2**(x - m) * (x - m)), in
powers of two. Probabilities are summed per expert in a second look at the tile, from the cache.

``gate_rows`` serves every case: a few tokens at a time, all their experts in one tile [BLOCK,
groups, experts of a group], each rounded up to a power of two (without groups there is one). Slots
are found in ``TOP_K`` rounds of "the best that is left": of the experts, or of the given slots.
"""

import triton
import triton.language as tl

from kernels.ops.gate import reference

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
NO_WEIGHT = tl.constexpr(reference.NO_WEIGHT)
LARGEST = tl.constexpr(reference.WEIGHT_LARGEST_BITS)
OFFSET = tl.constexpr(reference.WEIGHT_OFFSET)
SHIFT = tl.constexpr(reference.WEIGHT_SHIFT)
ALMOST_HALF = tl.constexpr((1 << (reference.WEIGHT_SHIFT - 1)) - 1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
# 2**FLUSHED is 0 in float32: what a barred expert adds, instead of 0 * -inf
FLUSHED = tl.constexpr(-200.0)
# a selection key keeps the 19 highest bits of float32, all that bfloat16 and float16 fill
ID_MASK = tl.constexpr(0x1FFF)
NO_KEY = tl.constexpr(-(2**31))
SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SOFTMAX_TOPK = tl.constexpr(2)
PROBABILITIES = tl.constexpr(3)
TINY = tl.constexpr(1.1754943508222875e-38)
NO_EXPERT = tl.constexpr(2147483647)


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


@triton.jit
def _advance(x2, m, s, h):
    """Add a tile of logits, in powers of two, to the running softmax; return its terms, too."""
    new = tl.maximum(m, tl.max(x2, 1))
    scale = tl.exp2(m - new)
    d = tl.maximum(x2 - new[:, None], FLUSHED)
    terms = tl.exp2(d)
    h = (h + s * (m - new)) * scale + tl.sum(terms * d, 1)
    s = s * scale + tl.sum(terms, 1)
    return new, s, h, scale, terms


@triton.jit
def _add_importance(
    importance, logits, row, counted, segment, lse2, sums,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add each expert's probability up over the tokens of each segment."""
    lse2 = tl.where(counted, lse2, float("inf"))[:, None]  # 2**(x - inf) is 0
    first = tl.min(tl.where(segment >= 0, segment, 2147483647), 0)
    last = tl.max(segment, 0)
    for c in range(0, EXPERTS, COLUMNS):
        column = tl.multiple_of(c, COLUMNS) + tl.arange(0, COLUMNS)
        inside = counted[:, None] & (column < EXPERTS)[None, :]
        x = tl.load(logits + row[:, None] * EXPERTS + column[None, :], mask=inside, other=0.0)
        probs = tl.exp2(x.to(tl.float32) * LOG2E - lse2)
        for s in range(first, last + 1):
            total = tl.sum(tl.where((segment == s)[:, None], probs, 0.0), 0)
            at = importance + sums + s * EXPERTS + column
            tl.atomic_add(at, total, mask=column < EXPERTS, sem="relaxed")


@triton.jit
def observe_tokens(
    table, rows, valid, segments,
    ids_out, weights_out, statistics, load, weight_sum, importance,
    n_tokens, n_segments, replicas,
    LOGITS: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, LOG_SLOTS: tl.constexpr, NETWORK: tl.constexpr,
    CHUNK: tl.constexpr, WORD: tl.constexpr, COLUMNS: tl.constexpr,
    ON_LOGITS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Observe a block of tokens of one site; ``ON_LOGITS`` says that the margin is of logits."""
    entry = table + tl.program_id(1) * 4
    logits = tl.multiple_of(tl.load(entry).to(tl.pointer_type(LOGITS)), 16)
    ids = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(IDS)), 16)
    weights = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(WEIGHTS)), 16)
    token, exists, counted, row, segment = tokens_here(
        rows, valid, segments, n_tokens, n_segments, BLOCK
    )

    # a bit per expert for those who are chosen
    words = ()
    for _ in tl.static_range(EXPERTS // WORD):
        words = words + (tl.zeros([BLOCK], tl.int32),)
    n_chosen = tl.zeros([BLOCK], tl.int32)
    for j in tl.static_range(TOP_K):
        given = tl.load(ids + row * TOP_K + j, mask=counted, other=-1)
        filled = (given >= 0) & (given < EXPERTS)
        expert = given.to(tl.int32)
        n_chosen += filled.to(tl.int32)
        bit = tl.where(filled, 1 << (expert % WORD), 0)
        marked = ()
        for w in tl.static_range(EXPERTS // WORD):
            marked = marked + (words[w] | tl.where(expert // WORD == w, bit, 0),)
        words = marked

    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    chosen_s = tl.zeros([BLOCK], tl.float32)
    last = tl.full([BLOCK], float("inf"), tl.float32)
    left_out = tl.full([BLOCK], float("-inf"), tl.float32)
    lane = tl.arange(0, CHUNK)
    for w in range(EXPERTS // WORD):
        word = words[0]
        for i in tl.static_range(1, EXPERTS // WORD):
            word = tl.where(w == i, words[i], word)
        for q in tl.static_range(0, WORD, CHUNK):
            at = row[:, None] * EXPERTS + (w * WORD + q + lane)[None, :]
            x2 = tl.load(logits + at, mask=counted[:, None], other=0.0).to(tl.float32) * LOG2E
            chosen = (word[:, None] & (1 << (q + lane))[None, :]) != 0
            m, s, h, scale, terms = _advance(x2, m, s, h)
            chosen_s = chosen_s * scale + tl.sum(tl.where(chosen, terms, 0.0), 1)
            last = tl.minimum(last, tl.min(tl.where(chosen, x2, float("inf")), 1))
            left_out = tl.maximum(left_out, tl.max(tl.where(chosen, float("-inf"), x2), 1))

    lse2 = m + tl.log2(s)
    if ON_LOGITS:
        margin = difference(last, left_out) * LN2
    else:
        margin = tl.exp2(last - lse2) - tl.exp2(left_out - lse2)
    margin = tl.where((n_chosen == EXPERTS) | (n_chosen == 0), float("inf"), margin)
    entropy = tl.maximum((tl.log2(s) - h / s) * LN2, 0.0)
    store_statistics(
        statistics, token, n_tokens, exists, counted, entropy, margin, lse2 * LN2, chosen_s / s
    )

    # read again, so that the loop above has their registers
    slots = ()
    for j in tl.static_range(1 << LOG_SLOTS):
        if j < TOP_K:
            given = tl.load(ids + row * TOP_K + j, mask=counted, other=-1)
            filled = (given >= 0) & (given < EXPERTS)
            weight = tl.load(weights + row * TOP_K + j, mask=filled, other=0.0).to(tl.float32)
            slots = slots + (slot_key(weight, given.to(tl.int32), filled),)
        else:
            slots = slots + (tl.full([BLOCK], NO_SLOT, tl.int64),)
    slots = sorted_by(slots, NETWORK)
    experts = ()
    values = ()
    sums = sums_of_program(n_segments, replicas, EXPERTS)
    for j in tl.static_range(1 << LOG_SLOTS):
        experts = experts + (slot_expert(slots[j]),)
        values = values + (slot_weight(slots[j]),)
        if j < TOP_K:
            add_slots(load, weight_sum, sums, segment, experts[j], values[j], EXPERTS)
    slot = tl.arange(0, 1 << LOG_SLOTS)
    out = (tl.program_id(1).to(tl.int64) * n_tokens + token)[:, None] * TOP_K + slot[None, :]
    store_slots(
        ids_out, weights_out, out,
        as_tile(experts, LOG_SLOTS, BLOCK), as_tile(values, LOG_SLOTS, BLOCK),
        exists[:, None] & (slot < TOP_K)[None, :], PACKED,
    )  # fmt: skip
    if importance is not None:
        _add_importance(
            importance, logits, row, counted, segment, lse2, sums, EXPERTS, COLUMNS
        )  # fmt: skip


@triton.jit
def _logit_of(key):
    """Return the logit that a selection key holds."""
    return (in_order(key & ~ID_MASK) & ~ID_MASK).to(tl.float32, bitcast=True)


@triton.jit
def _columns(tile, BLOCK: tl.constexpr):
    """Take a tile [BLOCK, 8] apart into its eight columns."""
    even, odd = tl.split(tl.reshape(tile, [BLOCK, 4, 2]))
    even_low, even_high = tl.split(tl.reshape(even, [BLOCK, 2, 2]))
    odd_low, odd_high = tl.split(tl.reshape(odd, [BLOCK, 2, 2]))
    c0, c4 = tl.split(even_low)
    c2, c6 = tl.split(even_high)
    c1, c5 = tl.split(odd_low)
    c3, c7 = tl.split(odd_high)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def select_tokens(
    table, valid, segments,
    ids_out, weights_out, statistics, load, weight_sum, importance,
    n_tokens, n_segments, replicas,
    LOGITS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    NETWORK: tl.constexpr, MERGE: tl.constexpr, COLUMNS: tl.constexpr,
    ON_LOGITS: tl.constexpr, RENORMALIZE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose up to eight experts for a block of tokens of one site, from 16-bit logits.

    Eight logits at a time are sorted and merged into the eight best so far. A key is the order of
    the logit above the order of the id, so that ties go to the lower id.
    """
    logits = tl.load(table + tl.program_id(1) * 4).to(tl.pointer_type(LOGITS))
    logits = tl.multiple_of(logits, 16)
    token, exists, counted, row, segment = tokens_here(
        None, valid, segments, n_tokens, n_segments, BLOCK
    )
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    h = tl.zeros([BLOCK], tl.float32)
    rejected = tl.full([BLOCK], NO_KEY, tl.int32)
    best = (rejected, rejected, rejected, rejected, rejected, rejected, rejected, rejected)
    lane = tl.arange(0, 8)
    for c in range(0, EXPERTS, 8):
        at = row[:, None] * EXPERTS + (tl.multiple_of(c, 8) + lane)[None, :]
        x = tl.load(logits + at, mask=counted[:, None], other=0.0).to(tl.float32)
        m, s, h, _, _ = _advance(x * LOG2E, m, s, h)
        order = in_order((x + 0.0).to(tl.int32, bitcast=True))  # -0 becomes 0
        keys = sorted_by(
            _columns((order & ~ID_MASK) | ((c + lane) ^ ID_MASK)[None, :], BLOCK), NETWORK
        )
        # of two sorted eights, the larger of i and 7 - i are the eight best of all
        merged = ()
        for i in tl.static_range(8):
            merged = merged + (tl.maximum(best[i], keys[7 - i]),)
            rejected = tl.maximum(rejected, tl.minimum(best[i], keys[7 - i]))
        best = sorted_by(merged, MERGE)

    lse2 = m + tl.log2(s)
    scores = ()
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        x = _logit_of(best[j])
        scores = scores + (tl.exp2(x * LOG2E - lse2),)
        total += scores[j]
    following = rejected
    if TOP_K < 8:
        following = best[TOP_K]
    last = _logit_of(best[TOP_K - 1])
    left_out = _logit_of(following)
    if EXPERTS == TOP_K:
        margin = tl.full([BLOCK], float("inf"), tl.float32)
    elif ON_LOGITS:
        margin = difference(last, left_out)
    else:
        margin = scores[TOP_K - 1] - tl.exp2(left_out * LOG2E - lse2)
    entropy = tl.maximum((tl.log2(s) - h / s) * LN2, 0.0)
    store_statistics(
        statistics, token, n_tokens, exists, counted, entropy, margin, lse2 * LN2, total
    )
    sums = sums_of_program(n_segments, replicas, EXPERTS)
    site = tl.program_id(1).to(tl.int64)
    for j in tl.static_range(TOP_K):
        expert = tl.where(counted, (best[j] & ID_MASK) ^ ID_MASK, -1)
        weight = scores[j]
        if RENORMALIZE or ON_LOGITS:
            weight = weight / tl.maximum(total, TINY)
        weight = tl.where(counted, weight, 0.0)
        add_slots(load, weight_sum, sums, segment, expert, weight, EXPERTS)
        out = (site * n_tokens + token) * TOP_K + j
        store_slots(ids_out, weights_out, out, expert, weight, exists, PACKED)
    if importance is not None:
        _add_importance(
            importance, logits, row, counted, segment, lse2, sums, EXPERTS, COLUMNS
        )  # fmt: skip


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, 2), 1)


@triton.jit
def _max(tile):
    return tl.max(tl.max(tile, 2), 1)


@triton.jit
def _min(tile):
    return tl.min(tl.min(tile, 2), 1)


@triton.jit
def _xlogx(x):
    return tl.where(x > 0, x * tl.log(tl.maximum(x, TINY)), 0.0)


@triton.jit
def _barred_groups(
    rank, is_expert, BEST_TWO: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Say which groups [BLOCK, groups] are not among the best, which go by the lower id."""
    best = tl.max(rank, 2)
    if BEST_TWO:
        # strike out the first of equals, so that two equal scores count as two
        place = tl.arange(0, rank.shape[2])[None, None, :]
        first = tl.min(tl.where(rank == best[:, :, None], place, NO_EXPERT), 2)
        others = is_expert & (place != first[:, :, None])
        best = best + tl.max(tl.where(others, rank, float("-inf")), 2)
    group = tl.arange(0, GROUPS_PADDED)[None, :]
    barred = (group >= 0) & tl.full([BLOCK, GROUPS_PADDED], True, tl.int1)
    for _ in range(TOP_GROUPS):
        candidates = barred & (group < GROUPS)
        top = tl.max(tl.where(candidates, best, float("-inf")), 1)
        taken = tl.min(tl.where(candidates & (best == top[:, None]), group, NO_EXPERT), 1)
        barred = barred & (group != taken[:, None])
    return barred


@triton.jit
def gate_rows(
    table, rows, valid, segments,
    ids_out, weights_out, statistics, load, weight_sum, importance,
    n_tokens, n_segments, replicas,
    LOGITS: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr, BIASED: tl.constexpr,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RULE: tl.constexpr,
    RENORMALIZE: tl.constexpr, PACKED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Serve a block of tokens of one site. ``LOGITS`` or ``IDS`` is None where there are none."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    entry = table + tl.program_id(1) * 4
    token, exists, counted, row, segment = tokens_here(
        rows, valid, segments, n_tokens, n_segments, BLOCK
    )
    group = tl.arange(0, GROUPS_PADDED)[None, :, None]
    place = tl.arange(0, SIZE_PADDED)[None, None, :]
    expert = group * SIZE + place
    is_expert = (group < GROUPS) & (place < SIZE)
    slot = tl.arange(0, SLOTS)[None, :]

    if LOGITS is not None:
        logits = tl.load(entry).to(tl.pointer_type(LOGITS))
        inside = counted[:, None, None] & is_expert
        at = row[:, None, None] * EXPERTS + expert
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(is_expert, x, float("-inf"))
        top = _max(x)
        terms = tl.exp(x - top[:, None, None])
        total = _sum(terms)
        logsumexp = top + tl.log(total)
        if RULE == SOFTMAX or RULE == SOFTMAX_TOPK:
            unbiased = terms / total[:, None, None]
            probs = unbiased
            d = tl.where(terms > 0, x - top[:, None, None], 0.0)
            entropy = tl.log(total) - _sum(probs * d)
        else:
            unbiased = x
            if RULE == SIGMOID:
                small = tl.exp(-tl.abs(x))
                unbiased = tl.where(x >= 0, 1.0, small) / (1.0 + small)
            unbiased = tl.where(is_expert, unbiased, 0.0)
            total = _sum(unbiased)
            probs = unbiased / tl.maximum(total, TINY)[:, None, None]
            entropy = -_sum(_xlogx(probs))
        scores = x
        if RULE == SOFTMAX or RULE == SIGMOID:
            scores = unbiased
        # without a bias the logits rank the experts as the scores do, but before any rounding
        rank = x
        if BIASED:
            bias = tl.load(entry + 3)
            given = is_expert & (bias != 0)
            pointer = bias.to(tl.pointer_type(tl.float32))
            scores = scores + tl.load(pointer + expert, mask=given, other=0.0)
            rank = tl.where(is_expert, tl.where(bias != 0, scores, x), float("-inf"))
        if TOP_GROUPS < GROUPS:
            barred = _barred_groups(
                rank, is_expert, False, GROUPS, TOP_GROUPS, GROUPS_PADDED, BLOCK
            )
            if BIASED and SIZE > 1:
                by_two = _barred_groups(
                    rank, is_expert, True, GROUPS, TOP_GROUPS, GROUPS_PADDED, BLOCK
                )
                barred = tl.where(bias != 0, by_two, barred)
            rank = tl.where(barred[:, :, None], float("-inf"), rank)
            scores = tl.where(barred[:, :, None], float("-inf"), scores)
        left = is_expert & (counted | (counted == 0))[:, None, None]  # of the tile's shape

    if IDS is not None:
        ids = tl.load(entry + 1).to(tl.pointer_type(IDS))
        weights = tl.load(entry + 2).to(tl.pointer_type(WEIGHTS))
        at = row[:, None] * TOP_K + slot
        given = tl.load(ids + at, mask=counted[:, None] & (slot < TOP_K), other=-1)
        filled = (given >= 0) & (given < EXPERTS)
        weight = tl.load(weights + at, mask=filled, other=0.0).to(tl.float32)
        keys = slot_key(weight, given.to(tl.int32), filled)

    experts = tl.full([BLOCK, SLOTS], -1, tl.int32)
    values = tl.zeros([BLOCK, SLOTS], tl.float32)
    n_chosen = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        if IDS is not None:
            key = tl.max(keys, 1)
            keys = tl.where(keys == key[:, None], NO_SLOT, keys)
            best = slot_expert(key)
            value = slot_weight(key)
        else:
            high = _max(tl.where(left, rank, float("-inf")))
            best = _min(tl.where(left & (rank == high[:, None, None]), expert, NO_EXPERT))
            best = tl.where(counted, best, -1)
            source = probs
            if RULE == SIGMOID:
                source = unbiased
            if RULE == SOFTMAX_TOPK:
                source = x
            value = _max(tl.where(expert == best[:, None, None], source, float("-inf")))
        if LOGITS is not None:
            hit = is_expert & (expert == best[:, None, None])
            mass += _sum(tl.where(hit, probs, 0.0))
            left = left & (expert != best[:, None, None])
        n_chosen += (best >= 0).to(tl.int32)
        experts = tl.where(slot == j, best[:, None], experts)
        values = tl.where(slot == j, tl.where(best >= 0, value, 0.0)[:, None], values)

    if LOGITS is not None:
        last = _min(tl.where(is_expert & (left == 0), scores, float("inf")))
        left_out = _max(tl.where(left, scores, float("-inf")))
        margin = difference(last, left_out)
        margin = tl.where((n_chosen == EXPERTS) | (n_chosen == 0), float("inf"), margin)
        store_statistics(
            statistics, token, n_tokens, exists, counted, entropy, margin, logsumexp, mass
        )
    if IDS is None and RULE == SOFTMAX_TOPK:
        peak = tl.max(tl.where(experts >= 0, values, float("-inf")), 1)
        peak = tl.where(counted, peak, 0.0)[:, None]
        values = tl.where(experts >= 0, tl.exp(values - peak), 0.0)
    if IDS is None and (RENORMALIZE or RULE == SOFTMAX_TOPK):
        values = values / tl.maximum(tl.sum(values, 1), TINY)[:, None]
    sums = sums_of_program(n_segments, replicas, EXPERTS)
    add_slots(load, weight_sum, sums, segment[:, None], experts, values, EXPERTS)
    out = (tl.program_id(1).to(tl.int64) * n_tokens + token)[:, None] * TOP_K + slot
    stored = exists[:, None] & (slot < TOP_K)
    store_slots(ids_out, weights_out, out, experts, values, stored, PACKED)
    if importance is not None:
        first = tl.min(tl.where(segment >= 0, segment, NO_EXPERT), 0)
        column = tl.reshape(expert, [GROUPS_PADDED, SIZE_PADDED])
        is_column = tl.reshape(is_expert, [GROUPS_PADDED, SIZE_PADDED])
        for s in range(first, tl.max(segment, 0) + 1):
            added = tl.sum(tl.where((segment == s)[:, None, None], probs, 0.0), 0)
            cell = importance + sums + s * EXPERTS + column
            tl.atomic_add(cell, added, mask=is_column, sem="relaxed")
