"""The definition of :func:`kernels.project_topk` in plain PyTorch, and its result."""

from typing import NamedTuple

import torch


class ProjectTopkOutput(NamedTuple):
    """What ``R`` routers of ``E`` experts would choose for ``T`` tokens, ``K`` experts each.

    Attributes
    ----------
    expert_ids : Tensor [T, R, K], int32
        Experts with the highest logits, best first. Ties go to the lower expert id.
    values : Tensor [T, R, K], float32
        Their logits.
    logsumexp : Tensor [T, R], float32
        Log of the sum of exponentials of all ``E`` logits: ``exp(values - logsumexp)`` are the
        softmax probabilities of the chosen.
    """

    expert_ids: torch.Tensor
    values: torch.Tensor
    logsumexp: torch.Tensor


def project_topk_reference(
    hidden: torch.Tensor,
    projections: torch.Tensor,
    *,
    top_k: int,
    bias: torch.Tensor | None = None,
) -> ProjectTopkOutput:
    """Compute what :func:`kernels.project_topk` computes, a router at a time."""
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
