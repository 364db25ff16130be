"""What the implementations of the gate share: inputs, outputs, and the codes of packed outputs."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

ScoreFunction = Literal["softmax", "sigmoid", "softmax_topk", "probabilities"]
SCORE_FUNCTIONS: tuple[ScoreFunction, ...] = (
    "softmax",
    "sigmoid",
    "softmax_topk",
    "probabilities",
)

# The code of a packed weight has 6 exponent and 10 mantissa bits: relative error <= 2**-11 from
# 2**-55 up to 2**9; 0 stays 0. It is float32's own layout with fewer bits, so that rounding is an
# addition and a shift of the bits.
WEIGHT_MANTISSA = 10
WEIGHT_BIAS = 55
WEIGHT_SHIFT = 23 - WEIGHT_MANTISSA
WEIGHT_OFFSET = (127 - WEIGHT_BIAS) << WEIGHT_MANTISSA
WEIGHT_LIMIT = 2.0**9
# float32 bits of the largest weight with a code: what is larger would round to NO_WEIGHT
WEIGHT_LARGEST_BITS = ((127 + 9) << 23) - (3 << (WEIGHT_SHIFT - 1))
# the largest code: a weight that has none, because it is nan, negative or too large
NO_WEIGHT = 0xFFFF


class GateOutput(NamedTuple):
    """What one router decided for ``T`` tokens, ``K`` slots and ``E`` experts.

    Rows that ``valid`` masks out hold -1 in ``expert_ids`` and 0 elsewhere. With segments,
    ``load``, ``weight_sum`` and ``importance`` are [n_segments, E].

    Attributes
    ----------
    expert_ids : Tensor [T, K], int32; packed: uint8 up to 255 experts, else uint16
        Chosen experts, best first; -1 (packed: all ones) = empty slot. Best is the selection score
        when the op selects and the weight when it observes; ties go to the lower expert id.
    weights : Tensor [T, K], float32; packed: uint16, see ``WEIGHT_MANTISSA``
        Combine weight of each slot; 0 where the slot is empty.
    entropy : Tensor [T], float32 (packed: float16, as the next three), nats
        Gate entropy, from 0 (certain) to ``ln E`` (uniform).
    margin : Tensor [T]
        Selection score of the last chosen expert minus that of the best expert left out;
        ``inf`` when none is left out, 0 when both are barred. Negative when the scores do not
        explain the choice.
    logsumexp : Tensor [T]
        Log of the sum of exponentials of the logits.
    topk_mass : Tensor [T]
        Probability of the chosen experts together, 0 to 1.
    load : Tensor [E], int64, assignments
        How many slots of valid tokens chose each expert.
    importance : Tensor [E], float32, or None
        Sum of each expert's probability over the valid tokens; None when not asked for.
    weight_sum : Tensor [E], float32
        Sum of the combine weights that each expert got from valid tokens.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor
    logsumexp: torch.Tensor
    topk_mass: torch.Tensor
    load: torch.Tensor
    importance: torch.Tensor | None
    weight_sum: torch.Tensor


class GateBatchOutput(NamedTuple):
    """What ``S`` routers of equal shape decided: the fields of :class:`GateOutput`, [S, ...] each.

    The statistics and ``importance`` are None where the logits were not given.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor | None
    margin: torch.Tensor | None
    logsumexp: torch.Tensor | None
    topk_mass: torch.Tensor | None
    load: torch.Tensor
    importance: torch.Tensor | None
    weight_sum: torch.Tensor


@dataclass(frozen=True, slots=True)
class GateInputs:
    """The checked arguments of a call, as every implementation takes them.

    Attributes
    ----------
    logits : tuple of S tensors [R, E], or None
    expert_ids, weights : tuple of S tensors [R, K], or None
        Both given: observe. Both None: select, and ``logits`` are given.
    rows : Tensor [T], int64, or None
        Row of the batch that each output row shows; None = all rows in order.
    selection_bias : tuple of S tensors [E] float32 or None each
    valid : Tensor [T], bool, or None
    segments : Tensor [T], integer, or None
        A token whose segment is outside ``range(n_segments)`` is counted in none.
    """

    n_tokens: int
    n_experts: int
    top_k: int
    score_function: ScoreFunction
    logits: tuple[torch.Tensor, ...] | None
    expert_ids: tuple[torch.Tensor, ...] | None = None
    weights: tuple[torch.Tensor, ...] | None = None
    rows: torch.Tensor | None = None
    selection_bias: tuple[torch.Tensor | None, ...] | None = None
    n_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    valid: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    n_segments: int = 1
    importance: bool = True
    packed: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What each site brings: its logits, or its ids where it has none."""
        return (self.logits or ()) if self.expert_ids is None else self.expert_ids

    @property
    def n_sites(self) -> int:
        """Number of routers, S."""
        return len(self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def biased(self) -> bool:
        """Whether any site has a selection bias."""
        return any(bias is not None for bias in self.selection_bias or ())

    @property
    def id_dtype(self) -> torch.dtype:
        """Type of the ids put out."""
        return packed_id_dtype(self.n_experts) if self.packed else torch.int32

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the weights put out."""
        return torch.uint16 if self.packed else torch.float32

    @property
    def statistic_dtype(self) -> torch.dtype:
        """Type of the statistics put out."""
        return torch.float16 if self.packed else torch.float32


def packed_id_dtype(n_experts: int) -> torch.dtype:
    """Return the narrowest type that holds the ids and, all ones, the empty slot."""
    return torch.uint8 if n_experts <= 255 else torch.uint16
