"""The result type shared by the implementations of project_topk."""

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
