"""The definition of :func:`kernels.gate`, in plain PyTorch."""

from typing import Any, NamedTuple

import torch

from kernels.ops.gate.types import (
    NO_WEIGHT,
    WEIGHT_LARGEST_BITS,
    WEIGHT_OFFSET,
    WEIGHT_SHIFT,
    GateBatchOutput,
    GateInputs,
    ScoreFunction,
)


def probabilities(logits: torch.Tensor, score_function: ScoreFunction) -> torch.Tensor:
    """Return each token's distribution over the experts, [T, E] float32.

    Sigmoid scores are divided by their sum: they are not a distribution by themselves.
    """
    if score_function in ("softmax", "softmax_topk"):
        return logits.softmax(dim=-1)
    return _normalized(logits.sigmoid() if score_function == "sigmoid" else logits)


def encode_weights(weights: torch.Tensor) -> torch.Tensor:
    """Round float32 weights to the nearest code, ties to even: uint16 of the same shape."""
    bits = (weights + 0.0).view(torch.int32)  # -0 becomes 0
    # as an unsigned number every negative, nan or infinite weight lies above every legal one
    legal = (bits >= 0) & (bits <= WEIGHT_LARGEST_BITS)
    bits = bits.masked_fill(~legal, 0)
    rounded = (bits + ((bits >> WEIGHT_SHIFT) & 1) + ((1 << (WEIGHT_SHIFT - 1)) - 1)) >> (
        WEIGHT_SHIFT
    )
    code = (rounded - WEIGHT_OFFSET).clamp_min(0).masked_fill(~legal, NO_WEIGHT)
    return code.to(torch.uint16)


def gate_reference(inputs: GateInputs) -> GateBatchOutput:
    """Compute what :func:`kernels.ops.gate.gate_batch` and ``gate`` compute, readably."""
    sites = [_site(inputs, site) for site in range(inputs.n_sites)]
    found: dict[str, Any] = {}
    for name in GateBatchOutput._fields:
        values = [value for site in sites if (value := site[name]) is not None]
        found[name] = torch.stack(values) if values else None
    return GateBatchOutput(**found)


def _site(inputs: GateInputs, site: int) -> dict[str, torch.Tensor | None]:
    """Compute the fields of the output for one router."""
    valid = inputs.valid
    logits = scored = None
    if inputs.logits is not None:
        logits = _pick(inputs.logits[site], inputs.rows).float()
        if valid is not None:  # padding may hold anything, nan included
            logits = logits.masked_fill(~valid.unsqueeze(-1), 0.0)
        scored = _score(inputs, site, logits)
    if inputs.expert_ids is not None and inputs.weights is not None:
        expert_ids = _pick(inputs.expert_ids[site], inputs.rows).long()
        weights = _pick(inputs.weights[site], inputs.rows).float()
    else:
        assert logits is not None and scored is not None
        expert_ids, weights = _select(inputs, logits, scored)
    filled = (expert_ids >= 0) & (expert_ids < inputs.n_experts)
    if valid is not None:
        filled = filled & valid.unsqueeze(-1)
    weights = weights.masked_fill(~filled, 0.0)
    expert_ids = expert_ids.masked_fill(~filled, -1)
    if inputs.expert_ids is not None:
        expert_ids, weights = _best_first(expert_ids, weights)
        filled = expert_ids >= 0
    out = _sums(inputs, expert_ids, weights, None if scored is None else scored.probs)
    if logits is not None and scored is not None:
        out |= _statistics(inputs, logits, scored, expert_ids, filled)
    else:
        out |= dict.fromkeys(("entropy", "margin", "logsumexp", "topk_mass"))
    if inputs.packed:
        # -1 becomes all ones
        ones = 0xFF if inputs.id_dtype == torch.uint8 else 0xFFFF
        return out | {
            "expert_ids": (expert_ids & ones).to(inputs.id_dtype),
            "weights": encode_weights(weights),
        }
    return out | {"expert_ids": expert_ids.int(), "weights": weights}


def _pick(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values.index_select(0, rows)


def _normalized(scores: torch.Tensor) -> torch.Tensor:
    # a row of zeros stays a row of zeros: it has no entropy and no mass
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class _Scored(NamedTuple):
    """What follows from the logits of one router, [T, E] each."""

    probs: torch.Tensor  # the distribution
    scores: torch.Tensor  # what the margin compares; -inf outside the surviving groups
    ranked: torch.Tensor  # what the choice sorts by; -inf outside the surviving groups


def _score(inputs: GateInputs, site: int, logits: torch.Tensor) -> _Scored:
    if inputs.score_function == "sigmoid":
        scores = logits.sigmoid()
        probs = _normalized(scores)
    else:
        probs = probabilities(logits, inputs.score_function)
        scores = probs if inputs.score_function == "softmax" else logits
    bias = None if inputs.selection_bias is None else inputs.selection_bias[site]
    # without a bias the logits rank the experts as the scores do, but before any rounding
    ranked = logits
    if bias is not None:
        ranked = scores = scores + bias.float()
    if inputs.top_groups >= inputs.n_groups:
        return _Scored(probs, scores, ranked)
    grouped = ranked.reshape(
        len(ranked), inputs.n_groups, inputs.n_experts // inputs.n_groups
    )  # [T, G, E / G]
    best = 1 if bias is None else min(2, grouped.shape[-1])
    group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)  # [T, G]
    order = group_scores.argsort(dim=-1, descending=True, stable=True)
    barred = torch.ones_like(group_scores, dtype=torch.bool)
    barred.scatter_(-1, order[:, : inputs.top_groups], False)
    barred = barred.repeat_interleave(grouped.shape[-1], dim=-1)
    return _Scored(
        probs, scores.masked_fill(barred, -torch.inf), ranked.masked_fill(barred, -torch.inf)
    )


def _select(
    inputs: GateInputs, logits: torch.Tensor, scored: _Scored
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best experts and the weights a router gives them, from scores without bias."""
    expert_ids = scored.ranked.argsort(dim=-1, descending=True, stable=True)[:, : inputs.top_k]
    if inputs.score_function == "softmax_topk":
        return expert_ids, logits.gather(-1, expert_ids).softmax(dim=-1)
    unbiased = logits.sigmoid() if inputs.score_function == "sigmoid" else scored.probs
    chosen = unbiased.gather(-1, expert_ids)
    return expert_ids, _normalized(chosen) if inputs.renormalize else chosen


def _best_first(
    expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each token's slots by weight, ties by the lower id, empty slots last."""
    by_id = expert_ids.argsort(dim=-1, stable=True)
    expert_ids, weights = expert_ids.gather(-1, by_id), weights.gather(-1, by_id)
    key = weights.masked_fill(expert_ids < 0, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    return expert_ids.gather(-1, order), weights.gather(-1, order)


def _sums(
    inputs: GateInputs, expert_ids: torch.Tensor, weights: torch.Tensor, probs: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Sum assignments, weights and probabilities per segment and expert."""
    n_segments, n_experts = inputs.n_segments, inputs.n_experts
    shape = (n_experts,) if inputs.segments is None else (n_segments, n_experts)
    segment = torch.zeros(inputs.n_tokens, dtype=torch.int64, device=expert_ids.device)
    if inputs.segments is not None:
        segment = inputs.segments.long()
    counted = (segment >= 0) & (segment < n_segments)
    if inputs.valid is not None:
        counted = counted & inputs.valid
    # one cell more than there are takes what counts nowhere
    size = n_segments * n_experts
    cell = segment.unsqueeze(-1) * n_experts + expert_ids
    cell = torch.where(counted.unsqueeze(-1) & (expert_ids >= 0), cell, size).flatten()
    load = torch.zeros(size + 1, dtype=torch.int64, device=cell.device)
    load.index_add_(0, cell, torch.ones_like(cell))
    weight = torch.zeros(size + 1, dtype=torch.float64, device=cell.device)
    weight.index_add_(0, cell, weights.flatten().double())
    importance = None
    if inputs.importance and probs is not None:
        segments = torch.arange(n_segments, device=cell.device).unsqueeze(-1)
        is_in = (segment == segments) & counted  # [G, T]
        importance = (is_in.to(probs.dtype) @ probs).reshape(shape)
    return {
        "load": load[:-1].reshape(shape),
        "weight_sum": weight[:-1].float().reshape(shape),
        "importance": importance,
    }


def _statistics(
    inputs: GateInputs,
    logits: torch.Tensor,
    scored: _Scored,
    expert_ids: torch.Tensor,
    filled: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Return the four statistics of each token, [T] each."""
    slots = expert_ids.masked_fill(~filled, 0)
    found = {
        "entropy": torch.special.entr(scored.probs).sum(dim=-1),
        "margin": _margin(scored.scores, slots, filled),
        "logsumexp": logits.logsumexp(dim=-1),
        "topk_mass": scored.probs.gather(-1, slots).masked_fill(~filled, 0.0).sum(dim=-1),
    }
    if inputs.valid is not None:
        found = {name: value.masked_fill(~inputs.valid, 0.0) for name, value in found.items()}
    return {name: value.to(inputs.statistic_dtype) for name, value in found.items()}


def _margin(scores: torch.Tensor, slots: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Return the last chosen score minus the best score left out, [T]."""
    last = scores.gather(-1, slots).masked_fill(~filled, torch.inf).amin(dim=-1)
    # empty slots point at expert 0; writing expert 0's own score back leaves it in the running
    chosen = torch.where(filled, -torch.inf, scores.gather(-1, slots))
    left_out = scores.scatter_reduce(-1, slots, chosen, "amin").amax(dim=-1)
    everyone = filled.sum(dim=-1) == scores.shape[-1]
    return torch.where((last == left_out) & ~everyone, 0.0, last - left_out).masked_fill(
        everyone, torch.inf
    )
