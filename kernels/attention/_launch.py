"""Launches of the Triton kernels of attention."""

import torch
import triton

from kernels.attention._device import first_keys, pool, top_keys_of
from kernels.attention._triton import denominator_kernel, statistics_kernel
from kernels.attention.types import (
    QUERY_BLOCK,
    AttentionOutput,
    bin_width,
    n_bins,
    row_shares,
    used_queries,
)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability to choose block sizes for; an H100's without a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def config(
    size: int, itemsize: int, every: int, width: int, version: tuple[int, int]
) -> dict[str, int]:
    """Return block sizes, warps and stages for a head size, a bin width and a compute capability.

    Queries and staged keys share a program's shared memory: 227 KiB on 9.0 and 10.0, 163 KiB on
    8.0, 99 KiB on 8.6, 8.9 and 12, 64 KiB on AMD's GPUs. Blocks of 128 keys spill registers
    except on 9.0, whose tensor cores read queries from shared memory. float32 has no tensor cores
    of its own precision: its operands are in registers, which small blocks over many warps leave.
    """
    block_d = max(16, triton.next_power_of_2(size))
    row_bytes = block_d * itemsize
    single, amd = itemsize == 4, torch.version.hip is not None
    block_m = QUERY_BLOCK if every > 1 or row_bytes > 256 or single else 128
    block_n = (64 if row_bytes <= 256 else 32) // (2 if single else 1)
    hopper = version == (9, 0) and not amd and not single
    if hopper and row_bytes <= 512 and block_m == 128:
        # narrow bins are many sums a block, which need the registers of half of it
        block_n *= 2 if width >= 16 else 1
    blocks = {
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_m == 128 or single else 4,
        "num_stages": 3 if hopper and row_bytes <= 256 else 2,
    }
    # AMD's compiler has no such option
    return blocks if amd else {**blocks, "maxnreg": 255}


def attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    lse: torch.Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    valid: torch.Tensor | None,
    bins: int,
    every: int,
    top_keys: int,
) -> AttentionOutput:
    """Launch the kernels; inputs were checked by :func:`kernels.attention.attention`."""
    query, key = (value if value.stride(-1) == 1 else value.contiguous() for value in (query, key))
    batch, heads, n_queries, size = query.shape
    key_heads, n_keys = key.shape[1:3]
    queries = used_queries(n_queries, n_keys, every, query.device)
    sequences = starts = None
    if valid is not None:
        sequences = valid.to(torch.int32).contiguous()
        starts = first_keys(sequences)
    sinks = None if sinks is None else sinks.float().contiguous()

    width = bin_width(n_keys, bins)
    blocks = config(size, query.itemsize, every, width, capability(query.device))
    block_m, block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    part_m, part_n = min(width, block_m), min(width, block_n)
    first, step = n_keys - n_queries, block_m * every
    base = triton.cdiv(first // block_m, every) * step  # where the first block used begins
    tiles = max(0, triton.cdiv(n_keys - base, step))
    columns = triton.cdiv(n_keys, block_n) * (block_n // part_n)

    stats = query.new_empty((4, batch, heads, len(queries)), dtype=torch.float32)
    totals = query.new_empty((batch, heads, len(queries)), dtype=torch.float32)
    # keys that no row of a block sees are never written
    rows = tiles * (block_m // part_m)
    parts = query.new_zeros((batch, heads, rows, columns), dtype=torch.float32)
    if stats.numel():
        grid = (tiles, heads, batch)
        numbers = (
            *query.stride()[:3], *key.stride()[:3],
            n_queries, n_keys, len(queries), base, step, max(0, first - base),
        )  # fmt: skip
        options = {
            "GROUP": heads // key_heads, "SIZE": size, "CAUSAL": causal,
            "WINDOW": window is not None, "SOFTCAP": softcap is not None,
            "SEQUENCES": sequences is not None, **blocks,
        }  # fmt: skip
        # a pointer that a kernel does not follow may be any
        given = [query if value is None else value for value in (sinks, sequences, starts)]
        scores = (window or 0, float(scaling), float(softcap or 0.0))
        if lse is None:
            denominator_kernel[grid](
                query, key, *given, totals, *numbers, *scores, SINKS=sinks is not None, **options
            )
        else:
            totals = lse[:, :, queries].float()
            if sinks is not None:
                totals = torch.logaddexp(totals, sinks.view(1, -1, 1))
        statistics_kernel[grid](
            query, key, totals, *given[1:], stats, parts, *numbers, columns, *scores,
            PART_M=part_m, PART_N=part_n, **options,
        )  # fmt: skip
    pooled = pool(parts, base, step, block_m, part_m, part_n, width, n_bins(n_keys, bins))
    top_ids, top_weights = top_keys_of(
        query,
        key,
        totals,
        queries + first,
        sequences,
        top_keys,
        scaling=scaling,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    entropy, sink_mass, mean_distance, window_mass = stats.unbind()
    return AttentionOutput(
        entropy=entropy,
        sink_mass=sink_mass,
        mean_distance=mean_distance,
        window_mass=window_mass,
        map=row_shares(pooled),
        received=pooled.sum(dim=-2),
        top_ids=top_ids,
        top_weights=top_weights,
        queries=queries,
    )
