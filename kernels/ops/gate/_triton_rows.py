"""The gate for every case: a few tokens at a time, all their experts in one tile.

The tile is [BLOCK, groups, experts of a group], each rounded up to a power of two; without groups
there is one group. Slots are found in ``TOP_K`` rounds of "the best that is left": among the
experts when the op selects, among the given slots when it observes.
"""

import triton
import triton.language as tl

from kernels.ops.gate._triton_parts import (
    NO_SLOT,
    add_slots,
    difference,
    slot_expert,
    slot_key,
    slot_weight,
    store_slots,
    store_statistics,
    sums_of_program,
    tokens_here,
)

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SOFTMAX_TOPK = tl.constexpr(2)
PROBABILITIES = tl.constexpr(3)
TINY = tl.constexpr(1.1754943508222875e-38)
NO_EXPERT = tl.constexpr(2147483647)


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
