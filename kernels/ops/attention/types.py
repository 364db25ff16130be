"""The result type, the constants and the index rules shared by the implementations of attention."""

from typing import NamedTuple

import torch

RECENT = 16  # keys that count as recent, the query itself included
QUERY_BLOCK = 64  # positions a query block has; `every` picks whole blocks
LEAST_ROW = 1e-30  # weight on all keys below which a row of the map is rounding, and so nan


class AttentionOutput(NamedTuple):
    """Where ``H`` heads look, for the ``Q`` queries used, in ``n`` bins of positions.

    Queries that ``valid`` marks as padding hold 0 in the statistics and -1 in ``top_ids``.

    Attributes
    ----------
    entropy : Tensor [B, H, Q], float32, nats
        ``-sum p ln p`` over the keys, from 0 (one key) to ``ln S`` (all alike).
    sink_mass : Tensor [B, H, Q], float32
        Weight on the first key of the query's sequence.
    mean_distance : Tensor [B, H, Q], float32, tokens
        ``sum p (position of the query - position of the key)``.
    window_mass : Tensor [B, H, Q], float32
        Weight on the last ``RECENT`` positions up to the query itself.
    map : Tensor [B, H, n, n], float32
        Mean weight that the queries of one bin put on the keys of another, [query, key]; each
        row is divided by its sum. nan in rows without a used query, or with less than ``LEAST_ROW``
        on all keys together (a sink may take everything).
    received : Tensor [B, H, n], float32
        Weight that the keys of each bin receive, summed over the used queries.
    top_ids : Tensor [B, H, Q, top_keys], int32
        Positions of the heaviest keys, heaviest first, equals in any order; -1 = no such key.
    top_weights : Tensor [B, H, Q, top_keys], float32
        Weights of ``top_ids``; 0 where there is none.
    queries : Tensor [Q], int64
        Index of each query used, ascending, from 0 to T - 1.
    """

    entropy: torch.Tensor
    sink_mass: torch.Tensor
    mean_distance: torch.Tensor
    window_mass: torch.Tensor
    map: torch.Tensor
    received: torch.Tensor
    top_ids: torch.Tensor
    top_weights: torch.Tensor
    queries: torch.Tensor


def row_shares(pooled: torch.Tensor) -> torch.Tensor:
    """Divide each row of pooled weights [..., n, n] by its sum; nan where that is no weight."""
    total = pooled.sum(dim=-1, keepdim=True)
    return pooled / total.masked_fill(total < LEAST_ROW, torch.nan)


def bin_width(n_keys: int, bins: int) -> int:
    """Return the smallest power of two of positions a bin that needs at most ``bins`` bins."""
    return 1 << (max(1, -(-n_keys // bins)) - 1).bit_length()


def n_bins(n_keys: int, bins: int) -> int:
    """Return how many bins ``n_keys`` positions fill, at most ``bins``."""
    return -(-n_keys // bin_width(n_keys, bins))


def used_before(position: int, every: int) -> int:
    """Return how many positions before this one are used with ``every``."""
    stride = QUERY_BLOCK * every
    return position // stride * QUERY_BLOCK + min(position % stride, QUERY_BLOCK)


def used_queries(
    n_queries: int, n_keys: int, every: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the indices of the queries in every ``every``-th block of positions, [Q] int64.

    Query ``i`` stands at position ``n_keys - n_queries + i``. Blocks count from position 0, so a
    prompt in chunks uses the same queries as the prompt at once.
    """
    first = n_keys - n_queries
    ranks = torch.arange(used_before(first, every), used_before(n_keys, every), device=device)
    if every == 1:
        return ranks - first
    block = torch.div(ranks, QUERY_BLOCK, rounding_mode="floor")
    return ranks + block * (QUERY_BLOCK * (every - 1)) - first
