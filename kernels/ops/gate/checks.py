"""Checks of the gate's arguments; every error says what to pass instead."""

from collections.abc import Sequence

import torch

from kernels.errors import KernelError
from kernels.ops.gate.types import SCORE_FUNCTIONS, GateInputs

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_logits(logits: torch.Tensor) -> None:
    """Refuse logits that are not [tokens, experts]."""
    if logits.ndim != 2:
        raise KernelError(
            f"gate() takes router logits of shape [tokens, experts], got {list(logits.shape)}. "
            "Flatten batch and sequence first: logits.flatten(0, -2)."
        )


def check_rule(inputs: GateInputs) -> None:
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


def groups_given(n_groups: int | None, top_groups: int | None) -> tuple[int, int]:
    """Return the groups, one of one where none are asked for."""
    if n_groups is None and top_groups is None:
        return 1, 1
    if n_groups is None or top_groups is None:
        raise KernelError("n_groups and top_groups belong together: pass both or neither.")
    return n_groups, top_groups


def check_slots(
    expert_ids: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], shape: tuple[int, int]
) -> None:
    """Refuse ids or weights that are not [tokens, top_k], or ids that are no integers."""
    for name, values in (("expert_ids", expert_ids), ("weights", weights)):
        for value in values:
            if value.shape != shape:
                raise KernelError(
                    f"{name} must have shape {list(shape)} ([tokens, top_k]), "
                    f"got {list(value.shape)}."
                )
    for value in expert_ids:
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise KernelError(f"expert_ids must be integers, got {value.dtype}.")


def check_tokens(inputs: GateInputs) -> None:
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


def check_devices(inputs: GateInputs) -> None:
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
