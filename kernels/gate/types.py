"""The result type shared by the implementations of the gate."""

from typing import Literal, NamedTuple

import torch

ScoreFunction = Literal["softmax", "sigmoid", "softmax_topk", "probabilities"]
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = (
    "softmax",
    "sigmoid",
    "softmax_topk",
    "probabilities",
)


class GateOutput(NamedTuple):
    """What one router decided for ``T`` tokens, ``K`` slots and ``E`` experts.

    Rows that ``valid`` masks out hold -1 in ``expert_ids`` and 0 elsewhere.

    Attributes
    ----------
    expert_ids : Tensor [T, K], int32
        Chosen experts, best first; -1 = empty slot. Ties go to the lower expert id.
    weights : Tensor [T, K], float32
        Combine weight of each slot; 0 where the slot is empty.
    entropy : Tensor [T], float32, nats
        Gate entropy, from 0 (certain) to ``ln E`` (uniform).
    margin : Tensor [T], float32
        Selection score of the last chosen expert minus that of the best expert left out;
        ``inf`` when none is left out. Negative when the scores do not explain the choice.
    logsumexp : Tensor [T], float32
        Log of the sum of exponentials of the logits.
    topk_mass : Tensor [T], float32
        Probability of the chosen experts together, 0 to 1.
    load : Tensor [E], int64, assignments
        How many slots of valid tokens chose each expert.
    importance : Tensor [E], float32, or None
        Sum of each expert's probability over the valid tokens; None when not asked for.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor
    logsumexp: torch.Tensor
    topk_mass: torch.Tensor
    load: torch.Tensor
    importance: torch.Tensor | None
