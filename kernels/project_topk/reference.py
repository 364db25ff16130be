"""The definition of :func:`kernels.project_topk.project_topk`, in plain PyTorch."""

import torch

from kernels.project_topk.types import ProjectTopkOutput


def project_topk_reference(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
) -> ProjectTopkOutput:
    """Compute what :func:`kernels.project_topk.project_topk` computes, a router at a time."""
    n_tokens, n_routers = len(hidden), len(projections)
    out = ProjectTopkOutput(
        expert_ids=hidden.new_empty((n_tokens, n_routers, top_k), dtype=torch.int32),
        values=hidden.new_empty((n_tokens, n_routers, top_k), dtype=torch.float32),
        logsumexp=hidden.new_empty((n_tokens, n_routers), dtype=torch.float32),
    )
    for router, projection in enumerate(projections):
        logits = hidden.float() @ projection.float().T  # [T, E]
        if bias is not None:
            logits = logits + bias[router].float()
        # torch.topk leaves the order of ties open; a stable sort keeps the lower id
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        out.expert_ids[:, router] = order[:, :top_k]
        out.values[:, router] = values[:, :top_k]
        out.logsumexp[:, router] = logits.logsumexp(dim=-1)
    return out
