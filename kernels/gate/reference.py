"""The definition of :func:`kernels.gate.gate`, in plain PyTorch."""

import torch

from kernels.gate.types import GateOutput, ScoreFunction


def probabilities(logits: torch.Tensor, score_function: ScoreFunction) -> torch.Tensor:
    """Return each token's distribution over the experts, [T, E] float32.

    Sigmoid scores are divided by their sum: they are not a distribution by themselves.
    """
    if score_function in ("softmax", "softmax_topk"):
        return logits.softmax(dim=-1)
    scores = logits.sigmoid() if score_function == "sigmoid" else logits
    # a row of zeros stays a row of zeros: it has no entropy and no mass
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def selection_scores(
    logits: torch.Tensor,
    score_function: ScoreFunction,
    selection_bias: torch.Tensor | None,
    n_groups: int | None,
    top_groups: int | None,
) -> torch.Tensor:
    """Return what the choice sorts by, [T, E] float32; ``-inf`` outside the surviving groups."""
    if score_function == "softmax":
        scores = logits.softmax(dim=-1)
    elif score_function == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = logits
    if selection_bias is not None:
        scores = scores + selection_bias.float()
    if n_groups is None or top_groups is None or top_groups >= n_groups:
        return scores
    grouped = scores.reshape(len(scores), n_groups, scores.shape[-1] // n_groups)  # [T, G, E / G]
    best = 1 if selection_bias is None else min(2, grouped.shape[-1])
    group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)  # [T, G]
    kept = group_scores.argsort(dim=-1, descending=True, stable=True)[:, :top_groups]
    survives = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)
    return grouped.masked_fill(~survives.unsqueeze(-1), -torch.inf).flatten(-2)


def gate_reference(
    logits: torch.Tensor,
    *,
    top_k: int,
    score_function: ScoreFunction,
    selection_bias: torch.Tensor | None = None,
    n_groups: int | None = None,
    top_groups: int | None = None,
    renormalize: bool = True,
    expert_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    importance: bool = True,
) -> GateOutput:
    """Compute what :func:`kernels.gate.gate` computes, readably; inputs were checked there."""
    logits = logits.float()
    if valid is not None:  # padding may hold anything, nan included
        logits = logits.masked_fill(~valid.unsqueeze(-1), 0.0)
    probs = probabilities(logits, score_function)
    scores = selection_scores(logits, score_function, selection_bias, n_groups, top_groups)

    if expert_ids is None or weights is None:
        expert_ids = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        weights = _combine_weights(logits, probs, expert_ids, score_function, renormalize)
    weights = weights.float()
    filled = expert_ids >= 0
    if valid is not None:
        filled = filled & valid.unsqueeze(-1)
    slots = expert_ids.long().masked_fill(~filled, 0)

    entropy = torch.special.entr(probs).sum(dim=-1)
    margin = _margin(scores, slots, filled)
    topk_mass = probs.gather(-1, slots).masked_fill(~filled, 0.0).sum(dim=-1)
    logsumexp = logits.logsumexp(dim=-1)
    if valid is not None:
        entropy, margin, logsumexp = (
            value.masked_fill(~valid, 0.0) for value in (entropy, margin, logsumexp)
        )
        probs = probs.masked_fill(~valid.unsqueeze(-1), 0.0)
    load = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device)
    load.index_add_(0, slots.flatten(), filled.flatten().long())
    return GateOutput(
        expert_ids=expert_ids.int().masked_fill(~filled, -1),
        weights=weights.masked_fill(~filled, 0.0),
        entropy=entropy,
        margin=margin,
        logsumexp=logsumexp,
        topk_mass=topk_mass,
        load=load,
        importance=probs.sum(dim=0) if importance else None,
    )


def _combine_weights(
    logits: torch.Tensor,
    probs: torch.Tensor,
    expert_ids: torch.Tensor,
    score_function: ScoreFunction,
    renormalize: bool,
) -> torch.Tensor:
    """Return the weights a router gives to its own choice, from the scores without bias."""
    if score_function == "softmax_topk":
        return logits.gather(-1, expert_ids).softmax(dim=-1)
    unbiased = logits.sigmoid() if score_function == "sigmoid" else probs
    chosen = unbiased.gather(-1, expert_ids)
    return chosen / chosen.sum(dim=-1, keepdim=True) if renormalize else chosen


def _margin(scores: torch.Tensor, slots: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Return the last chosen score minus the best score left out, [T]."""
    last = scores.gather(-1, slots).masked_fill(~filled, torch.inf).amin(dim=-1)
    # empty slots point at expert 0; writing expert 0's own score back leaves it in the running
    chosen = torch.where(filled, -torch.inf, scores.gather(-1, slots))
    left_out = scores.scatter_reduce(-1, slots, chosen, "amin").amax(dim=-1)
    return last - left_out
