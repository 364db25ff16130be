"""Top-k gating with the statistics a routing explorer needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kernels.dispatch import KernelError, implementation, resolve_backend
from kernels.ops.gate.reference import (
    SCORE_FUNCTIONS,
    GateBatchOutput,
    GateInputs,
    GateOutput,
    ScoreFunction,
    gate_reference,
)

__all__ = [
    "SCORE_FUNCTIONS",
    "GateBatchOutput",
    "GateOutput",
    "ScoreFunction",
    "gate",
    "gate_batch",
    "gate_reference",
]

TRITON_MAX_EXPERTS = 4096  # one row has to fit in the registers of one program
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def gate(
    logits: torch.Tensor,
    *,
    top_k: int,
    score_function: ScoreFunction,
    selection_bias: torch.Tensor | None = None,
    n_groups: int | None = None,
    top_groups: int | None = None,
    renormalize: bool = True,
    expert_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    n_segments: int = 1,
    importance: bool = True,
    packed: bool = False,
    backend: str = "auto",
) -> GateOutput:
    """Route tokens, or observe how a model routed them, with statistics of every token.

    With ``expert_ids`` and ``weights`` the op *observes*: nothing is selected again, the ids are
    the model's own, sorted by weight. Without them it *selects* ``top_k`` experts a token; ties
    go to the lower id.

    Parameters
    ----------
    logits : Tensor [T, E], float16 | bfloat16 | float32
        Router output of each token. ``-inf`` bars an expert; nan is allowed in invalid rows only.
    top_k : int
        Slots per token, ``1 <= top_k <= E``.
    score_function : {"softmax", "sigmoid", "softmax_topk", "probabilities"}
        How scores follow from logits. ``softmax_topk`` selects on logits and takes the softmax
        over the chosen; ``probabilities`` says that ``logits`` holds probabilities already.
    selection_bias : Tensor [E], optional
        Added to the scores for the choice only, never to the weights (DeepSeek-V3).
    n_groups, top_groups : int, optional
        Choose only within the ``top_groups`` best of ``n_groups`` equal groups. A group counts by
        the sum of its two best scores when there is a bias (DeepSeek-V3), else by its best
        (DeepSeek-V2).
    renormalize : bool
        Whether selected weights sum to 1 per token.
    expert_ids : Tensor [T, K], integer, optional
        The model's own choice, distinct ids in any order; anything outside 0..E-1 is an empty
        slot. Requires ``weights``.
    weights : Tensor [T, K], optional
        The model's own combine weights; requires ``expert_ids``.
    valid : Tensor [T], bool, optional
        False for padding, which counts nowhere.
    segments : Tensor [T], integer, optional
        What the sums are kept apart by, 0 .. ``n_segments - 1``; any other value counts nowhere.
    n_segments : int
        How many segments there are.
    importance : bool
        Whether to sum the probabilities per expert.
    packed : bool
        Whether per-token outputs come in the narrow types of a run file, see :class:`GateOutput`.
        A weight without a code (nan, negative, 2**9 or more) gives ``NO_WEIGHT``.
    backend : {"auto", "triton", "numba", "torch"}
        A backend asked for by name is used or refused, never replaced.

    Notes
    -----
    Backends agree on expert ids and loads exactly, and on the rest to float32 rounding (1e-5). The
    one exception: scores that are equal up to that rounding can be ordered differently once a
    ``selection_bias`` was added to them.

    Raises
    ------
    KernelError
        If a shape, an option or the backend is not supported.

    References
    ----------
    Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
    """
    _check_logits(logits)
    if (expert_ids is None) != (weights is None):
        raise KernelError("expert_ids and weights belong together: pass both or neither.")
    groups = _groups_given(n_groups, top_groups)
    inputs = GateInputs(
        n_tokens=logits.shape[0],
        n_experts=logits.shape[1],
        top_k=top_k,
        score_function=score_function,
        logits=(logits,),
        expert_ids=None if expert_ids is None else (expert_ids,),
        weights=None if weights is None else (weights,),
        selection_bias=None if selection_bias is None else (selection_bias,),
        n_groups=groups[0],
        top_groups=groups[1],
        renormalize=renormalize,
        valid=valid,
        segments=segments,
        n_segments=n_segments,
        importance=importance,
        packed=packed,
    )
    out = _run(inputs, backend)
    first: dict[str, Any] = {
        name: None if value is None else value[0] for name, value in out._asdict().items()
    }
    return GateOutput(**first)


def gate_batch(
    logits: Sequence[torch.Tensor] | None,
    *,
    expert_ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rows: torch.Tensor | None,
    n_experts: int,
    top_k: int,
    score_function: ScoreFunction,
    selection_bias: Sequence[torch.Tensor | None] | None = None,
    n_groups: int | None = None,
    top_groups: int | None = None,
    valid: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    n_segments: int = 1,
    importance: bool = True,
    packed: bool = False,
    backend: str = "auto",
) -> GateBatchOutput:
    """Observe what ``S`` routers of equal shape did to the same tokens, as :func:`gate` does.

    On a GPU all routers are served by one launch over a table of pointers.

    Parameters
    ----------
    logits : sequence of S tensors [R, E], or None
        Router outputs; None where they are not known: there are no statistics then.
    expert_ids, weights : sequences of S tensors [R, K]
        The models' own choices.
    rows : Tensor [T], int64, or None
        Which of the ``R`` rows of the batch are wanted, in the order of the output; None for all.
        On a GPU they are not checked to be rows of the batch.
    selection_bias : sequence of S tensors [E] or None, optional
        A bias per router.
    valid, segments : Tensor [T], optional
        In the order of the output.

    The other parameters are those of :func:`gate`.

    Returns
    -------
    GateBatchOutput
        The fields of :class:`GateOutput` with a leading axis of ``S`` routers.

    Raises
    ------
    KernelError
        If a shape, an option or the backend is not supported.
    """
    counts = {len(values) for values in (logits, expert_ids, weights, selection_bias) if values}
    if len(counts) != 1 or not expert_ids or not weights:
        raise KernelError(
            "gate_batch() takes as many logits, expert_ids, weights and biases as there are "
            f"sites, at least one, got {sorted(counts)}."
        )
    n_rows = expert_ids[0].shape[0]
    for site_logits in logits or ():
        if site_logits.shape != (n_rows, n_experts):
            raise KernelError(
                f"logits must have shape [{n_rows}, {n_experts}] ([rows, experts]), "
                f"got {list(site_logits.shape)}."
            )
    groups = _groups_given(n_groups, top_groups)
    inputs = GateInputs(
        n_tokens=n_rows if rows is None else rows.numel(),
        n_experts=n_experts,
        top_k=top_k,
        score_function=score_function,
        logits=None if logits is None else tuple(logits),
        expert_ids=tuple(expert_ids),
        weights=tuple(weights),
        rows=rows,
        selection_bias=None if selection_bias is None else tuple(selection_bias),
        n_groups=groups[0],
        top_groups=groups[1],
        valid=valid,
        segments=segments,
        n_segments=n_segments,
        importance=importance and logits is not None,
        packed=packed,
    )
    return _run(inputs, backend)


def _run(inputs: GateInputs, backend: str) -> GateBatchOutput:
    """Check what both ops share, choose the backend and run it."""
    _check_rule(inputs)
    if inputs.expert_ids is not None and inputs.weights is not None:
        n_rows = inputs.expert_ids[0].shape[0] if inputs.rows is not None else inputs.n_tokens
        _check_slots(inputs.expert_ids, inputs.weights, (n_rows, inputs.top_k))
    _check_tokens(inputs)
    _check_devices(inputs)
    chosen = resolve_backend(backend, device=inputs.device, refusals=_refusals(inputs))
    out: GateBatchOutput = implementation("gate", chosen)(
        inputs if chosen == "torch" else _plain(inputs)
    )
    return out


def _refusals(inputs: GateInputs) -> dict[str, str | None]:
    """Return why each backend cannot run these inputs; the reference can run all."""
    reason = None
    floats = [*(inputs.logits or ()), *(inputs.weights or ())]
    for value in floats:
        if value.dtype not in FLOATS:
            reason = f"it takes float16, bfloat16 and float32, got {value.dtype}"
    if torch.is_grad_enabled() and any(value.requires_grad for value in floats):
        reason = "an input requires a gradient, and it has no backward pass"
    too_many = None
    if inputs.n_experts > TRITON_MAX_EXPERTS:
        too_many = f"it takes at most {TRITON_MAX_EXPERTS} experts, got {inputs.n_experts}"
    return {"triton": reason or too_many, "numba": reason, "torch": None}


def _plain(inputs: GateInputs) -> GateInputs:
    """Return the inputs as compiled code takes them: contiguous, ids int32 or int64, no graph."""

    def ids(value: torch.Tensor) -> torch.Tensor:
        wide = value if value.dtype in (torch.int32, torch.int64) else value.long()
        return wide.contiguous()

    def each(values: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
        return None if values is None else tuple(v.detach().contiguous() for v in values)

    bias = inputs.selection_bias if inputs.biased else None
    return dataclasses.replace(
        inputs,
        logits=each(inputs.logits),
        expert_ids=None if inputs.expert_ids is None else tuple(map(ids, inputs.expert_ids)),
        weights=each(inputs.weights),
        selection_bias=None
        if bias is None
        else tuple(None if b is None else b.detach().float().contiguous() for b in bias),
        rows=None if inputs.rows is None else inputs.rows.contiguous(),
        valid=None if inputs.valid is None else inputs.valid.contiguous(),
        segments=None if inputs.segments is None else inputs.segments.int().contiguous(),
    )


def _check_logits(logits: torch.Tensor) -> None:
    """Refuse logits that are not [tokens, experts]."""
    if logits.ndim != 2:
        raise KernelError(
            f"gate() takes router logits of shape [tokens, experts], got {list(logits.shape)}. "
            "Flatten batch and sequence first: logits.flatten(0, -2)."
        )


def _check_rule(inputs: GateInputs) -> None:
    """Refuse a top_k, score function, bias or groups that do not fit the experts."""
    n_experts, top_k = inputs.n_experts, inputs.top_k
    if not 1 <= top_k <= n_experts:
        raise KernelError(f"top_k must be between 1 and {n_experts} (the experts), got {top_k}.")
    if inputs.score_function not in SCORE_FUNCTIONS:
        raise KernelError(
            f"Unknown score_function {inputs.score_function!r}. "
            f"Choose one of {', '.join(SCORE_FUNCTIONS)}."
        )
    for bias in inputs.selection_bias or ():
        if bias is not None and bias.shape != (n_experts,):
            raise KernelError(
                f"selection_bias must have shape [{n_experts}], one value an expert, "
                f"got {list(bias.shape)}."
            )
    n_groups, top_groups = inputs.n_groups, inputs.top_groups
    if n_groups < 1 or n_experts % n_groups or not 1 <= top_groups <= n_groups:
        raise KernelError(
            f"{n_experts} experts cannot form n_groups={n_groups} equal groups of which "
            f"top_groups={top_groups} are kept."
        )
    if inputs.expert_ids is None and top_k > n_experts // n_groups * top_groups:
        raise KernelError(
            f"top_k={top_k} experts do not fit into {top_groups} groups of "
            f"{n_experts // n_groups}. Raise top_groups or lower top_k."
        )


def _groups_given(n_groups: int | None, top_groups: int | None) -> tuple[int, int]:
    """Return the groups, one of one where none are asked for."""
    if n_groups is None and top_groups is None:
        return 1, 1
    if n_groups is None or top_groups is None:
        raise KernelError("n_groups and top_groups belong together: pass both or neither.")
    return n_groups, top_groups


def _check_slots(
    expert_ids: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], shape: tuple[int, int]
) -> None:
    """Refuse ids or weights that are not [tokens, top_k], or ids that are not integers."""
    for name, values in (("expert_ids", expert_ids), ("weights", weights)):
        for value in values:
            if value.shape != shape:
                raise KernelError(
                    f"{name} must have shape {list(shape)} ([tokens, top_k]), "
                    f"got {list(value.shape)}."
                )
    for value in expert_ids:
        if not _integers(value):
            raise KernelError(f"expert_ids must be integers, got {value.dtype}.")


def _check_tokens(inputs: GateInputs) -> None:
    """Refuse a mask, segments or rows that do not fit the tokens."""
    n_tokens, valid, segments = inputs.n_tokens, inputs.valid, inputs.segments
    if valid is not None and (valid.shape != (n_tokens,) or valid.dtype != torch.bool):
        raise KernelError(
            f"valid must be a boolean tensor of shape [{n_tokens}], "
            f"got {valid.dtype} of shape {list(valid.shape)}."
        )
    if inputs.n_segments < 1:
        raise KernelError(f"n_segments must be at least 1, got {inputs.n_segments}.")
    if segments is None and inputs.n_segments != 1:
        raise KernelError(f"n_segments={inputs.n_segments} needs segments, one a token.")
    if segments is not None and (segments.shape != (n_tokens,) or not _integers(segments)):
        raise KernelError(
            f"segments must be an integer tensor of shape [{n_tokens}], "
            f"got {segments.dtype} of shape {list(segments.shape)}."
        )
    rows = inputs.rows
    if rows is None:
        return
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise KernelError(
            f"rows must be an int64 tensor of one dimension, got {rows.dtype} of shape "
            f"{list(rows.shape)}."
        )
    n_rows = inputs.tensors[0].shape[0]
    # on a GPU the look would wait for the device
    if (
        rows.device.type == "cpu"
        and n_tokens
        and not 0 <= int(rows.min()) <= int(rows.max()) < n_rows
    ):
        raise KernelError(
            f"rows must be from 0 to {n_rows - 1}, the rows of the batch, got "
            f"{int(rows.min())} to {int(rows.max())}."
        )


def _check_devices(inputs: GateInputs) -> None:
    """Refuse tensors on different devices, and sites whose tensors differ in type."""
    groups = {
        "logits": inputs.logits or (),
        "expert_ids": inputs.expert_ids or (),
        "weights": inputs.weights or (),
        "selection_bias": tuple(b for b in inputs.selection_bias or () if b is not None),
        "rows, valid or segments": tuple(
            v for v in (inputs.rows, inputs.valid, inputs.segments) if v is not None
        ),
    }
    for name, values in groups.items():
        for value in values:
            if value.device != inputs.device:
                raise KernelError(
                    f"All tensors must be on one device: {name} is on {value.device}, "
                    f"the first on {inputs.device}."
                )
            if name in ("logits", "expert_ids", "weights") and value.dtype != values[0].dtype:
                raise KernelError(
                    f"All sites of a batch must have {name} of one type, got {values[0].dtype} "
                    f"and {value.dtype}. Call gate_batch() once for each."
                )


def _integers(values: torch.Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
