"""The definition of :func:`kernels.attention`: plain PyTorch, all T x S weights."""

import torch

from kernels.ops.attention.types import (
    RECENT,
    AttentionOutput,
    bin_width,
    n_bins,
    row_shares,
    used_queries,
)


def visible_keys(
    positions: torch.Tensor, sequences: torch.Tensor, *, causal: bool, window: int | None
) -> torch.Tensor:
    """Return which keys each query sees, [B, Q, S] bool; nothing for padding.

    Parameters
    ----------
    positions : Tensor [Q], int64
        Where the queries stand among the keys.
    sequences : Tensor [B, S], int64
        Sequence number of each key, 0 = padding.
    causal : bool
        Whether later keys are hidden.
    window : int or None
        Keys at this distance or farther are hidden.
    """
    own = sequences[:, positions]  # [B, Q]
    visible = (own.unsqueeze(-1) == sequences.unsqueeze(-2)) & (own > 0).unsqueeze(-1)
    distance = positions.unsqueeze(-1) - torch.arange(sequences.shape[-1], device=sequences.device)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    return visible


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    lse: torch.Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    bins: int = 64,
    every: int = 1,
    top_keys: int = 0,
) -> AttentionOutput:
    """Compute what :func:`kernels.attention` computes; inputs were checked there."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    queries = used_queries(n_queries, n_keys, every, query.device)
    positions = queries + n_keys - n_queries
    if valid is None:
        valid = torch.ones(len(key), n_keys, dtype=torch.bool, device=key.device)
    sequences = valid.long()
    visible = visible_keys(positions, sequences, causal=causal, window=window).unsqueeze(1)

    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, queries].float() @ keys.transpose(-1, -2) * scaling  # [B, H, Q, S]
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    sink = query.new_full((1, 1, 1, 1), -torch.inf) if sinks is None else sinks.view(1, -1, 1, 1)
    sink = sink.float().expand(*scores.shape[:-1], 1)
    if lse is None:
        probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        total = torch.logaddexp(lse[:, :, queries].float().unsqueeze(-1), sink)
        probs = (scores - total).exp()
    probs = probs.masked_fill(~visible, 0.0)  # padding sees nothing, 0 / 0 above

    distance = positions.unsqueeze(-1) - torch.arange(n_keys, device=key.device)  # [Q, S]
    recent = (distance >= 0) & (distance < RECENT)
    own = sequences[:, positions].unsqueeze(-1) == sequences.unsqueeze(-2)  # [B, Q, S]
    is_first = own & (own.cumsum(dim=-1) == 1)
    pooled = _pool(probs, positions, bins)
    top_ids, top_weights = _top(probs, top_keys)
    return AttentionOutput(
        entropy=torch.special.entr(probs).sum(dim=-1),
        sink_mass=(probs * is_first.unsqueeze(1)).sum(dim=-1),
        mean_distance=(probs * distance).sum(dim=-1),
        window_mass=(probs * recent).sum(dim=-1),
        map=row_shares(pooled),
        received=pooled.sum(dim=-2),
        top_ids=top_ids,
        top_weights=top_weights,
        queries=queries,
    )


def _pool(probs: torch.Tensor, positions: torch.Tensor, bins: int) -> torch.Tensor:
    """Return the weight from the queries of each bin on the keys of each bin, [B, H, n, n]."""
    n_keys = probs.shape[-1]
    width, count = bin_width(n_keys, bins), n_bins(n_keys, bins)
    padded = torch.nn.functional.pad(probs, (0, count * width - n_keys))
    per_query = padded.view(*probs.shape[:-1], count, width).sum(dim=-1)  # [B, H, Q, n]
    pooled = probs.new_zeros(*probs.shape[:2], count, count)
    return pooled.index_add_(2, positions // width, per_query)


def _top(probs: torch.Tensor, top_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heaviest keys of each query and their weights, [B, H, Q, top_keys] each."""
    weights, ids = probs.sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[..., :top_keys], ids[..., :top_keys]
    ids = ids.masked_fill(weights == 0, -1)
    missing = (0, top_keys - weights.shape[-1])
    return (
        torch.nn.functional.pad(ids, missing, value=-1).int(),
        torch.nn.functional.pad(weights, missing),
    )
