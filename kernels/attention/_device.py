"""What the Triton path leaves to PyTorch: where sequences begin, sums of bins, top keys."""

import torch

from kernels.attention.reference import visible_keys

TOP_SCORES = 1 << 24  # scores the pass for the top keys holds at once, 64 MiB


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
    query: torch.Tensor,
    key: torch.Tensor,
    totals: torch.Tensor,
    positions: torch.Tensor,
    sequences: torch.Tensor | None,
    top_keys: int,
    *,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """List the heaviest keys of each used query: rows of scores, a chunk of queries at a time."""
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
        scores = (rows @ keys * scaling).view(batch, heads, len(here), n_keys)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        visible = visible_keys(here, sequences, causal=causal, window=window)
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
        best, best_ids = scores.topk(kept, dim=-1)
        weight = (best - totals[:, :, low : low + chunk].unsqueeze(-1)).exp()
        weight = weight.masked_fill(best == -torch.inf, 0.0)  # totals of padding may be -inf too
        weights[:, :, low : low + chunk, :kept] = weight
        ids[:, :, low : low + chunk, :kept] = best_ids.int().masked_fill(weight == 0, -1)
    return ids, weights
