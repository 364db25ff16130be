"""Where attention heads look, from queries and keys, without a matrix of all their weights."""

import torch

from kernels.dispatch import BACKENDS, implementation, resolve_backend
from kernels.errors import KernelError
from kernels.ops.attention.reference import attention_reference
from kernels.ops.attention.types import (
    QUERY_BLOCK,
    RECENT,
    AttentionOutput,
    bin_width,
    n_bins,
    used_queries,
)

__all__ = [
    "BACKENDS",
    "QUERY_BLOCK",
    "RECENT",
    "AttentionOutput",
    "attention",
    "attention_reference",
    "bin_width",
    "n_bins",
    "used_queries",
]

MAX_SIZE = 256  # of a head in the Triton kernel: a block of queries stays on the chip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    _check_tensors(query, key)
    _check_optional(query, key, lse, sinks, valid)
    _check_options(window, softcap, bins, every, top_keys)
    chosen = resolve_backend(backend, device=query.device, refusals=_refusals(query.shape[-1]))
    out: AttentionOutput = implementation("attention", chosen)(
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


def _check_optional(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> None:
    expected = {
        "key": (key, key.shape),
        "lse": (lse, query.shape[:3]),
        "sinks": (sinks, query.shape[1:2]),
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
    for name, value in (("lse", lse), ("sinks", sinks)):
        if value is not None and not value.dtype.is_floating_point:
            raise KernelError(f"{name} must hold floating point numbers, got {value.dtype}.")
    if valid is not None and (valid.dtype.is_floating_point or valid.dtype.is_complex):
        raise KernelError(
            "valid must be bool (False = padding) or integer (sequence numbers, 0 = padding), "
            f"got {valid.dtype}. Pass valid=mask.bool() for a mask of zeros and ones."
        )


def _check_options(
    window: int | None, softcap: float | None, bins: int, every: int, top_keys: int
) -> None:
    if softcap is not None and not softcap > 0:
        raise KernelError(f"softcap must be greater than 0, got {softcap}. None turns it off.")
    if window is not None and window < 1:
        raise KernelError(f"window must be at least 1 key, got {window}. None turns it off.")
    for name, value, least in (("bins", bins, 1), ("every", every, 1), ("top_keys", top_keys, 0)):
        if value < least:
            raise KernelError(f"{name} must be at least {least}, got {value}.")
