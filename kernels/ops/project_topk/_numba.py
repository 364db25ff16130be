"""CPU implementation of project_topk: chunks of logits that stay in cache, then a selection."""

import numba
import numpy as np
import torch

from kernels.ops.project_topk import ProjectTopkOutput

CHUNK_BYTES = 2**22  # logits at once: small chunks wait on the cores of the matrix product
MIN_CHUNK = 16  # tokens; fewer make matrix products slow


@numba.njit(cache=True, nogil=True)
def _select(logits, n_experts, top_k, expert_ids, values):
    """Write each row's best, [tokens, routers * experts] to [tokens, routers, K]."""
    n_tokens, n_routers, _ = expert_ids.shape
    for token in range(n_tokens):
        for router in range(n_routers):
            row = logits[token, router * n_experts : (router + 1) * n_experts]
            best = values[token, router]
            ids = expert_ids[token, router]
            for expert in range(n_experts):
                value = row[expert]
                # only a strictly better one moves up: of equals the lower id stays ahead
                if expert >= top_k and not value > best[top_k - 1]:
                    continue
                slot = min(expert, top_k - 1)
                while slot > 0 and value > best[slot - 1]:
                    best[slot] = best[slot - 1]
                    ids[slot] = ids[slot - 1]
                    slot -= 1
                best[slot] = value
                ids[slot] = expert


def project_topk_numba(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
) -> ProjectTopkOutput:
    """Project a chunk of tokens through all routers, select, and forget the logits."""
    n_tokens, (n_routers, n_experts, width) = len(hidden), projections.shape
    expert_ids = np.empty((n_tokens, n_routers, top_k), np.int32)
    values = np.empty((n_tokens, n_routers, top_k), np.float32)
    logsumexp = torch.empty((n_tokens, n_routers))
    stacked = projections.float().reshape(n_routers * n_experts, width).T
    offsets = None if bias is None else bias.float().reshape(-1)
    chunk = max(MIN_CHUNK, CHUNK_BYTES // (4 * n_routers * n_experts))
    logits = torch.empty((min(chunk, n_tokens), n_routers * n_experts))
    for start in range(0, n_tokens, chunk):
        tokens = slice(start, min(start + chunk, n_tokens))
        part = logits[: tokens.stop - start]
        if offsets is None:
            torch.mm(hidden[tokens].float(), stacked, out=part)
        else:
            torch.addmm(offsets, hidden[tokens].float(), stacked, out=part)
        apart = part.view(len(part), n_routers, n_experts)
        torch.logsumexp(apart, dim=-1, out=logsumexp[tokens])
        _select(part.numpy(), n_experts, top_k, expert_ids[tokens], values[tokens])
    return ProjectTopkOutput(torch.from_numpy(expert_ids), torch.from_numpy(values), logsumexp)
