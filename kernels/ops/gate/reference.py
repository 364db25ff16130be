"""What the gate takes and puts out, the codes of packed outputs, and its definition in PyTorch."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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

    Ids and weights both given: observe. Neither: select.
    """

    n_tokens: int
    n_experts: int
    top_k: int
    score_function: ScoreFunction
    logits: tuple[torch.Tensor, ...] | None  # S tensors [R, E]
    expert_ids: tuple[torch.Tensor, ...] | None = None  # S tensors [R, K], as the weights
    weights: tuple[torch.Tensor, ...] | None = None
    rows: torch.Tensor | None = None  # [T] int64, row of the batch of each output row; None: all
    selection_bias: tuple[torch.Tensor | None, ...] | None = None  # S tensors [E]
    n_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    valid: torch.Tensor | None = None  # [T] bool
    segments: torch.Tensor | None = None  # [T]; a token outside range(n_segments) counts in none
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


def probabilities(logits: torch.Tensor, score_function: ScoreFunction) -> torch.Tensor:
    """Return each token's distribution over the experts, [T, E] float32.

    Sigmoid scores are divided by their sum: they are not a distribution by themselves.
    """
    if score_function in ("softmax", "softmax_topk"):
        return logits.softmax(dim=-1)
    return _normalized(logits.sigmoid() if score_function == "sigmoid" else logits)


def encode_weights(weights: torch.Tensor) -> torch.Tensor:
    """Round float32 weights to the nearest code, ties to even: uint16 of the same shape."""
    bits = (weights + 0.0).view(torch.int32)  # -0 becomes 0
    # as an unsigned number every negative, nan or infinite weight lies above every legal one
    legal = (bits >= 0) & (bits <= WEIGHT_LARGEST_BITS)
    bits = bits.masked_fill(~legal, 0)
    rounded = (bits + ((bits >> WEIGHT_SHIFT) & 1) + ((1 << (WEIGHT_SHIFT - 1)) - 1)) >> (
        WEIGHT_SHIFT
    )
    code = (rounded - WEIGHT_OFFSET).clamp_min(0).masked_fill(~legal, NO_WEIGHT)
    return code.to(torch.uint16)


def gate_reference(inputs: GateInputs) -> GateBatchOutput:
    """Compute what :func:`kernels.ops.gate.gate_batch` and ``gate`` compute, readably."""
    sites = [_site(inputs, site) for site in range(inputs.n_sites)]
    found: dict[str, Any] = {}
    for name in GateBatchOutput._fields:
        values = [value for site in sites if (value := site[name]) is not None]
        found[name] = torch.stack(values) if values else None
    return GateBatchOutput(**found)


def _site(inputs: GateInputs, site: int) -> dict[str, torch.Tensor | None]:
    """Compute the fields of the output for one router."""
    valid = inputs.valid
    logits = scored = None
    if inputs.logits is not None:
        logits = _pick(inputs.logits[site], inputs.rows).float()
        if valid is not None:  # padding may hold anything, nan included
            logits = logits.masked_fill(~valid.unsqueeze(-1), 0.0)
        scored = _score(inputs, site, logits)
    if inputs.expert_ids is not None and inputs.weights is not None:
        expert_ids = _pick(inputs.expert_ids[site], inputs.rows).long()
        weights = _pick(inputs.weights[site], inputs.rows).float()
    else:
        assert logits is not None and scored is not None
        expert_ids, weights = _select(inputs, logits, scored)
    filled = (expert_ids >= 0) & (expert_ids < inputs.n_experts)
    if valid is not None:
        filled = filled & valid.unsqueeze(-1)
    weights = weights.masked_fill(~filled, 0.0)
    expert_ids = expert_ids.masked_fill(~filled, -1)
    if inputs.expert_ids is not None:
        expert_ids, weights = _best_first(expert_ids, weights)
        filled = expert_ids >= 0
    out = _sums(inputs, expert_ids, weights, None if scored is None else scored.probs)
    if logits is not None and scored is not None:
        out |= _statistics(inputs, logits, scored, expert_ids, filled)
    else:
        out |= dict.fromkeys(("entropy", "margin", "logsumexp", "topk_mass"))
    if inputs.packed:
        # -1 becomes all ones
        ones = 0xFF if inputs.id_dtype == torch.uint8 else 0xFFFF
        return out | {
            "expert_ids": (expert_ids & ones).to(inputs.id_dtype),
            "weights": encode_weights(weights),
        }
    return out | {"expert_ids": expert_ids.int(), "weights": weights}


def _pick(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values.index_select(0, rows)


def _normalized(scores: torch.Tensor) -> torch.Tensor:
    # a row of zeros stays a row of zeros: it has no entropy and no mass
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


class _Scored(NamedTuple):
    """What follows from the logits of one router, [T, E] each."""

    probs: torch.Tensor  # the distribution
    scores: torch.Tensor  # what the margin compares; -inf outside the surviving groups
    ranked: torch.Tensor  # what the choice sorts by; -inf outside the surviving groups


def _score(inputs: GateInputs, site: int, logits: torch.Tensor) -> _Scored:
    if inputs.score_function == "sigmoid":
        scores = logits.sigmoid()
        probs = _normalized(scores)
    else:
        probs = probabilities(logits, inputs.score_function)
        scores = probs if inputs.score_function == "softmax" else logits
    bias = None if inputs.selection_bias is None else inputs.selection_bias[site]
    # without a bias the logits rank the experts as the scores do, but before any rounding
    ranked = logits
    if bias is not None:
        ranked = scores = scores + bias.float()
    if inputs.top_groups >= inputs.n_groups:
        return _Scored(probs, scores, ranked)
    grouped = ranked.reshape(
        len(ranked), inputs.n_groups, inputs.n_experts // inputs.n_groups
    )  # [T, G, E / G]
    best = 1 if bias is None else min(2, grouped.shape[-1])
    group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)  # [T, G]
    order = group_scores.argsort(dim=-1, descending=True, stable=True)
    barred = torch.ones_like(group_scores, dtype=torch.bool)
    barred.scatter_(-1, order[:, : inputs.top_groups], False)
    barred = barred.repeat_interleave(grouped.shape[-1], dim=-1)
    return _Scored(
        probs, scores.masked_fill(barred, -torch.inf), ranked.masked_fill(barred, -torch.inf)
    )


def _select(
    inputs: GateInputs, logits: torch.Tensor, scored: _Scored
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best experts and the weights a router gives them, from scores without bias."""
    expert_ids = scored.ranked.argsort(dim=-1, descending=True, stable=True)[:, : inputs.top_k]
    if inputs.score_function == "softmax_topk":
        return expert_ids, logits.gather(-1, expert_ids).softmax(dim=-1)
    unbiased = logits.sigmoid() if inputs.score_function == "sigmoid" else scored.probs
    chosen = unbiased.gather(-1, expert_ids)
    return expert_ids, _normalized(chosen) if inputs.renormalize else chosen


def _best_first(
    expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each token's slots by weight, ties by the lower id, empty slots last."""
    by_id = expert_ids.argsort(dim=-1, stable=True)
    expert_ids, weights = expert_ids.gather(-1, by_id), weights.gather(-1, by_id)
    key = weights.masked_fill(expert_ids < 0, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    return expert_ids.gather(-1, order), weights.gather(-1, order)


def _sums(
    inputs: GateInputs, expert_ids: torch.Tensor, weights: torch.Tensor, probs: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Sum assignments, weights and probabilities per segment and expert."""
    n_segments, n_experts = inputs.n_segments, inputs.n_experts
    shape = (n_experts,) if inputs.segments is None else (n_segments, n_experts)
    segment = torch.zeros(inputs.n_tokens, dtype=torch.int64, device=expert_ids.device)
    if inputs.segments is not None:
        segment = inputs.segments.long()
    counted = (segment >= 0) & (segment < n_segments)
    if inputs.valid is not None:
        counted = counted & inputs.valid
    # one cell more than there are takes what counts nowhere
    size = n_segments * n_experts
    cell = segment.unsqueeze(-1) * n_experts + expert_ids
    cell = torch.where(counted.unsqueeze(-1) & (expert_ids >= 0), cell, size).flatten()
    load = torch.zeros(size + 1, dtype=torch.int64, device=cell.device)
    load.index_add_(0, cell, torch.ones_like(cell))
    weight = torch.zeros(size + 1, dtype=torch.float64, device=cell.device)
    weight.index_add_(0, cell, weights.flatten().double())
    importance = None
    if inputs.importance and probs is not None:
        segments = torch.arange(n_segments, device=cell.device).unsqueeze(-1)
        is_in = (segment == segments) & counted  # [G, T]
        importance = (is_in.to(probs.dtype) @ probs).reshape(shape)
    return {
        "load": load[:-1].reshape(shape),
        "weight_sum": weight[:-1].float().reshape(shape),
        "importance": importance,
    }


def _statistics(
    inputs: GateInputs,
    logits: torch.Tensor,
    scored: _Scored,
    expert_ids: torch.Tensor,
    filled: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Return the four statistics of each token, [T] each."""
    slots = expert_ids.masked_fill(~filled, 0)
    found = {
        "entropy": torch.special.entr(scored.probs).sum(dim=-1),
        "margin": _margin(scored.scores, slots, filled),
        "logsumexp": logits.logsumexp(dim=-1),
        "topk_mass": scored.probs.gather(-1, slots).masked_fill(~filled, 0.0).sum(dim=-1),
    }
    if inputs.valid is not None:
        found = {name: value.masked_fill(~inputs.valid, 0.0) for name, value in found.items()}
    return {name: value.to(inputs.statistic_dtype) for name, value in found.items()}


def _margin(scores: torch.Tensor, slots: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Return the last chosen score minus the best score left out, [T]."""
    last = scores.gather(-1, slots).masked_fill(~filled, torch.inf).amin(dim=-1)
    # empty slots point at expert 0; writing expert 0's own score back leaves it in the running
    chosen = torch.where(filled, -torch.inf, scores.gather(-1, slots))
    left_out = scores.scatter_reduce(-1, slots, chosen, "amin").amax(dim=-1)
    everyone = filled.sum(dim=-1) == scores.shape[-1]
    return torch.where((last == left_out) & ~everyone, 0.0, last - left_out).masked_fill(
        everyone, torch.inf
    )
