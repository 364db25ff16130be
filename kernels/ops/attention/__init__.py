"""Where attention heads look, from queries and keys, without a matrix of all their weights.

The op with its checks, its result, the index rules that its implementations share, and its
definition in plain PyTorch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.dispatch import BACKENDS, KernelError, implementation, resolve_backend

MAX_SIZE = 256  # of a head in the Triton kernel: a block of queries stays on the chip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The arguments of a call, as every implementation takes them; see :func:`attention`."""

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    lse: torch.Tensor | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    bins: int = 64
    every: int = 1
    top_keys: int = 0


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


def attention(
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
    backend: str = "auto",
) -> AttentionOutput:
    """Summarise the attention weights of every head, in memory linear in the number of keys.

    The weights are the model's own, as ``output_attentions`` of its eager implementation shows
    them; with ``sinks`` they sum to less than 1, and the statistics take them as they are.

    Parameters
    ----------
    query : Tensor [B, H, T, D], float32 | bfloat16 | float16
        Queries after the position embedding. Query ``i`` stands at key position ``S - T + i``.
    key : Tensor [B, Hkv, S, D], the dtype of ``query``
        Keys after the position embedding, S >= T. Head ``h`` reads key head ``h // (H / Hkv)``.
    scaling : float
        Factor on the products of queries and keys.
    lse : Tensor [B, H, T], float32, optional
        Natural log of each query's sum of exponentials over the keys it sees, ``sinks`` left
        out, as fused attention kernels return it. Saves a pass over the keys.
    causal : bool
        Whether a query sees no later keys.
    window : int, optional
        A query sees keys at a distance below this, as Transformers counts ``sliding_window`` in
        causal attention; without ``causal``, to both sides.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    sinks : Tensor [H], optional
        A logit of each head that joins the denominator only (gpt-oss).
    valid : Tensor [B, S], bool or integer, optional
        False = padding. Integers number packed sequences from 1 on, 0 = padding; a query sees
        its own sequence only.
    bins : int
        Bins of positions, at most. Their width is the smallest power of two that does.
    every : int
        Use every n-th block of ``QUERY_BLOCK`` positions as queries: blocks 0, n, 2n, ...
    top_keys : int
        How many of the heaviest keys to list for each query.
    backend : {"auto", "triton", "numba", "torch"}
        A backend asked for by name is used or refused, never replaced. ``"torch"`` is the
        definition of the op and holds all T x S weights.

    Raises
    ------
    KernelError
        If a shape, a dtype, an option or the backend is not supported.

    References
    ----------
    Milakov and Gimelshein 2018, arXiv:1805.02867 (one-pass softmax); Xiao et al. 2023,
    arXiv:2309.17453 (attention sinks).
    """
    inputs = AttentionInputs(
        query,
        key,
        scaling=scaling,
        lse=lse,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        valid=valid,
        bins=bins,
        every=every,
        top_keys=top_keys,
    )
    _check_tensors(query, key)
    _check_optional(inputs)
    _check_options(inputs)
    chosen = resolve_backend(backend, device=query.device, refusals=_refusals(query.shape[-1]))
    out: AttentionOutput = implementation("attention", chosen)(inputs)
    return out


def _refusals(size: int) -> dict[str, str | None]:
    too_large = f"heads of size {size} do not fit, at most {MAX_SIZE} do"
    return {**dict.fromkeys(BACKENDS), "triton": too_large if size > MAX_SIZE else None}


def _check_tensors(query: torch.Tensor, key: torch.Tensor) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise KernelError(
            "attention() takes queries [batch, heads, tokens, size] and keys [batch, key heads, "
            f"tokens, size], got {list(query.shape)} and {list(key.shape)}. "
            "Take them after the heads are split."
        )
    batch, heads, n_queries, size = query.shape
    key_heads, n_keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != size:
        raise KernelError(
            f"Queries {list(query.shape)} and keys {list(key.shape)} must agree in batch and in "
            "size of a head."
        )
    if key_heads < 1 or heads % key_heads:
        raise KernelError(
            f"{heads} query heads cannot share {key_heads} key heads evenly. "
            "Pass the key heads as the model has them, not repeated in part."
        )
    if n_keys < n_queries:
        raise KernelError(
            f"{n_queries} queries need at least as many keys, got {n_keys}. "
            "Queries stand at the last key positions; pass the cached keys too."
        )
    if query.dtype != key.dtype or query.dtype not in DTYPES:
        raise KernelError(
            f"Queries and keys must share one of float32, bfloat16 and float16, got {query.dtype} "
            f"and {key.dtype}. Cast one to the other: key.to(query.dtype)."
        )


def _check_optional(inputs: AttentionInputs) -> None:
    query, key, valid = inputs.query, inputs.key, inputs.valid
    expected = {
        "key": (key, key.shape),
        "lse": (inputs.lse, query.shape[:3]),
        "sinks": (inputs.sinks, query.shape[1:2]),
        "valid": (valid, (key.shape[0], key.shape[2])),
    }
    for name, (value, shape) in expected.items():
        if value is None:
            continue
        if value.shape != shape:
            raise KernelError(f"{name} must have shape {list(shape)}, got {list(value.shape)}.")
        if value.device != query.device:
            raise KernelError(
                f"{name} must be where the queries are, on {query.device}, got {value.device}. "
                f"Move it: {name}.to(query.device)."
            )
    for name, value in (("lse", inputs.lse), ("sinks", inputs.sinks)):
        if value is not None and not value.dtype.is_floating_point:
            raise KernelError(f"{name} must hold floating point numbers, got {value.dtype}.")
    if valid is not None and (valid.dtype.is_floating_point or valid.dtype.is_complex):
        raise KernelError(
            "valid must be bool (False = padding) or integer (sequence numbers, 0 = padding), "
            f"got {valid.dtype}. Pass valid=mask.bool() for a mask of zeros and ones."
        )


def _check_options(inputs: AttentionInputs) -> None:
    softcap, window = inputs.softcap, inputs.window
    if softcap is not None and not softcap > 0:
        raise KernelError(f"softcap must be greater than 0, got {softcap}. None turns it off.")
    if window is not None and window < 1:
        raise KernelError(f"window must be at least 1 key, got {window}. None turns it off.")
    for name, least in (("bins", 1), ("every", 1), ("top_keys", 0)):
        value = getattr(inputs, name)
        if value < least:
            raise KernelError(f"{name} must be at least {least}, got {value}.")


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


def attention_reference(inputs: AttentionInputs) -> AttentionOutput:
    """Compute what :func:`attention` computes, readably, from all T x S weights."""
    query, key, valid, sinks = inputs.query, inputs.key, inputs.valid, inputs.sinks
    n_queries, n_keys = query.shape[2], key.shape[2]
    queries = used_queries(n_queries, n_keys, inputs.every, query.device)
    positions = queries + n_keys - n_queries
    if valid is None:
        valid = torch.ones(len(key), n_keys, dtype=torch.bool, device=key.device)
    sequences = valid.long()
    visible = visible_keys(
        positions, sequences, causal=inputs.causal, window=inputs.window
    ).unsqueeze(1)

    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[:, :, queries].float() @ keys.transpose(-1, -2) * inputs.scaling  # [B, H, Q, S]
    if inputs.softcap is not None:
        scores = (scores / inputs.softcap).tanh() * inputs.softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    sink = query.new_full((1, 1, 1, 1), -torch.inf) if sinks is None else sinks.view(1, -1, 1, 1)
    sink = sink.float().expand(*scores.shape[:-1], 1)
    if inputs.lse is None:
        probs = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        total = torch.logaddexp(inputs.lse[:, :, queries].float().unsqueeze(-1), sink)
        probs = (scores - total).exp()
    probs = probs.masked_fill(~visible, 0.0)  # padding sees nothing, 0 / 0 above

    distance = positions.unsqueeze(-1) - torch.arange(n_keys, device=key.device)  # [Q, S]
    recent = (distance >= 0) & (distance < RECENT)
    own = sequences[:, positions].unsqueeze(-1) == sequences.unsqueeze(-2)  # [B, Q, S]
    is_first = own & (own.cumsum(dim=-1) == 1)
    pooled = _pool(probs, positions, inputs.bins)
    top_ids, top_weights = _top(probs, inputs.top_keys)
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
