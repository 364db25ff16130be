"""What one call of a model says about its rows: tokens, padding, where texts begin."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from capture.errors import CaptureError

MATRIX, MASK = 2, 4  # axes
LEAST_BIAS = -1_000.0  # what is added to a weight that counts; masks add far less
# of engines that lay requests out as they like; which row is whose is theirs to know
PAGED = ("block_table", "block_tables", "read_index", "write_index", "slot_mapping")
# of models with layers of several kinds, whose masks come as a dictionary
WHOLE_MASKS = ("full_attention",)


class CannotFollow(CaptureError):
    """A call, a cache or a result that does not tell which token each row was."""


class Call(NamedTuple):
    """The rows of one call, ``B`` by ``S``, as tensors of its own on the device.

    Attributes
    ----------
    rows, width : int
        B and S.
    tokens : Tensor [B, S], integer, or None
        None where the model was given embeddings.
    valid : Tensor [B, S], bool, or None
        False at padding; None where every row is a token.
    starts : Tensor [B, S], bool, or None
        Where texts begin that share a row; None where each row is one text, or goes one on.
    """

    rows: int
    width: int
    tokens: torch.Tensor | None
    valid: torch.Tensor | None
    starts: torch.Tensor | None


def read_call(arguments: Mapping[str, Any], past: int) -> Call:
    """Read the arguments of a forward pass.

    Parameters
    ----------
    arguments : mapping
        By name.
    past : int, columns
        How many the cache held before the call, padding included; 0 without a cache.

    Raises
    ------
    CannotFollow
        If the arguments do not tell which row is which token.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    given = ids if isinstance(ids, torch.Tensor) else embeds
    if not isinstance(given, torch.Tensor) or given.ndim < MATRIX:
        raise CannotFollow(
            "input_ids [B, S] or inputs_embeds [B, S, D] were expected in a call of the model, got "
            f"{sorted(arguments)}. Call the model that was given to recording()."
        )
    paged = [name for name in PAGED if arguments.get(name) is not None]
    if paged:
        raise CannotFollow(
            f"A call with {paged[0]} comes from an engine that packs requests into one row "
            "(continuous batching), and does not tell whose each row is. Record generate(), or "
            "what the engine itself returns."
        )
    rows, width = int(given.shape[0]), int(given.shape[1])
    mask, is_whole = _mask_of(arguments)
    valid = starts = None
    if isinstance(mask, torch.Tensor) and mask.ndim == MATRIX:
        valid = _columns(mask, past, width)
    elif isinstance(mask, torch.Tensor) and mask.ndim == MASK:
        valid, follows = _of_whole_mask(mask, past, rows, width)
        if is_whole and past == 0 and width > 1:
            starts = valid & ~follows
    elif mask is not None:
        raise CannotFollow(
            "An attention mask [B, S] or [B, 1, S, keys] was expected, got a "
            f"{type(mask).__name__}, from which padding cannot be told. Give attention_mask as a "
            "tensor, or choose attn_implementation='sdpa'."
        )
    if starts is None and width > 1:
        starts = _starts(arguments, valid, past, rows, width)
    return Call(
        rows=rows,
        width=width,
        # copies: a loop may use its buffers again before they are on the host
        tokens=ids.detach().reshape(rows, width).clone() if isinstance(ids, torch.Tensor) else None,
        valid=None if valid is None else valid.expand(rows, width).clone(),
        starts=starts,
    )


def _mask_of(arguments: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the mask, and whether it shows all tokens that a token may look back to."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Mapping):
        return mask, True
    for kind in (*WHOLE_MASKS, *mask):
        if mask.get(kind) is not None:
            return mask[kind], kind in WHOLE_MASKS
    return None, True


def _columns(mask: torch.Tensor, past: int, width: int) -> torch.Tensor:
    """Return the part of a mask [B, keys] that is of this call's columns."""
    keys = mask.shape[1]
    if keys in (width, past + width):
        return mask[:, -width:].bool()
    if keys > past + width:  # as long as a static cache
        return mask[:, past : past + width].bool()
    raise CannotFollow(
        f"An attention mask of {width} or {past + width} columns was expected, got {keys}, so "
        "padding is not known. Give the mask of all tokens that the cache holds and of the new "
        "ones."
    )


def _of_whole_mask(
    mask: torch.Tensor, past: int, rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which columns are tokens, and which see the column before them, both [B, S].

    A token sees itself; padding is seen by nobody.
    """
    keys = mask.shape[-1]
    if keys < past + width or mask.shape[-2] < width:
        raise CannotFollow(
            f"An attention mask [B, 1, {width}, {past + width}] was expected, got "
            f"{list(mask.shape)}, so padding is not known. Give attention_mask as [B, S]."
        )
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > LEAST_BIAS
    if not mask.dtype.is_floating_point and mask.dtype != torch.bool:
        seen = mask[:, 0] != 0
    query = torch.arange(width, device=mask.device)
    valid = seen[:, query, past + query].expand(rows, width)
    before = (past + query - 1).clamp_min(0)
    follows = seen[:, query, before].expand(rows, width) & (past + query > 0)
    return valid, follows


def _starts(
    arguments: Mapping[str, Any],
    valid: torch.Tensor | None,
    past: int,
    rows: int,
    width: int,
) -> torch.Tensor | None:
    """Return where texts begin, from the lengths or the positions that a packed call gives."""
    bounds = arguments.get("cu_seq_lens_q")
    if isinstance(bounds, torch.Tensor):
        found = torch.zeros(rows * width, dtype=torch.bool, device=bounds.device)
        found[bounds[:-1].long()] = True
        return found.reshape(rows, width)
    positions = arguments.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.ndim != MATRIX:
        return None
    if positions.shape[1] != width:
        return None
    # as transformers tells packed texts apart, but for padding
    jumps = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    jumps = jumps.expand(rows, width).clone()
    if valid is not None:
        before = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, :-1]], dim=1)
        jumps &= valid & before
    jumps[:, 0] = past == 0
    return jumps
