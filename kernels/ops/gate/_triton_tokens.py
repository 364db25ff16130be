"""The gate for the common case, a thread per token: no data crosses a thread until the sums.

A tile [BLOCK, CHUNK] of logits is 16 bytes a row. Triton gives each row to one lane and loads it at
once, so that maxima, sums and sorting networks over the experts are plain register arithmetic. The
softmax runs along (m = maximum so far, s = sum of 2**(x - m), h = sum of 2**(x - m) * (x - m)), in
powers of two. The sum of probabilities per expert is a second look at the tile, in the layout
where lanes own experts; it comes from the cache.
"""

import triton
import triton.language as tl

from kernels.ops.gate._triton_parts import (
    NO_SLOT,
    add_slots,
    as_tile,
    difference,
    in_order,
    slot_expert,
    slot_key,
    slot_weight,
    sorted_by,
    store_slots,
    store_statistics,
    sums_of_program,
    tokens_here,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
# 2**FLUSHED is 0 in float32: what a barred expert adds, instead of 0 * -inf
FLUSHED = tl.constexpr(-200.0)
# a selection key keeps the 19 highest bits of float32, all that bfloat16 and float16 fill
ID_MASK = tl.constexpr(0x1FFF)
NO_KEY = tl.constexpr(-(2**31))


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
            weight = weight / tl.maximum(total, 1.1754943508222875e-38)
        weight = tl.where(counted, weight, 0.0)
        add_slots(load, weight_sum, sums, segment, expert, weight, EXPERTS)
        out = (site * n_tokens + token) * TOP_K + j
        store_slots(ids_out, weights_out, out, expert, weight, exists, PACKED)
    if importance is not None:
        _add_importance(
            importance, logits, row, counted, segment, lse2, sums, EXPERTS, COLUMNS
        )  # fmt: skip
