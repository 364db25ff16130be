"""What one call of a model says about its rows, and what happens between calls, as steps.

Of a call: tokens, padding, where texts begin, and how well the next tokens were predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from capture.errors import CaptureError
from capture.model.forward import losses_of
from capture.recorder.attention.summary import PromptRow
from capture.recorder.engine import CallStep, Numbers, Segments
from capture.recorder.transfer import Parcel

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


@dataclass(frozen=True, slots=True)
class OwnCall:
    """What the writer's thread needs to know of one call.

    Attributes
    ----------
    number : int
        Of the call, from 0 on.
    rows, width : int
        B and S.
    key : int or None
        Of the cache that the call went on from or made; None where it keeps nothing.
    scope : int or None
        Of the ``generate`` that made the call.
    segments : Segments
        Of its rows.
    attended : sequence of PromptRow
        Texts whose attention is recorded; ``prompt`` is their row.
    """

    number: int
    rows: int
    width: int
    key: int | None
    scope: int | None
    segments: Segments
    attended: Sequence[PromptRow] = ()


@dataclass(frozen=True, slots=True)
class ChangeStep:
    """A cache was changed: ``what`` of :data:`capture.recorder.own_loop.intercept.CHANGES`.

    Attributes
    ----------
    key : int
    what : str
    value : Parcel of array, int or None
        Rows, how often each is repeated, or columns that are left out.
    """

    key: int
    what: str
    value: Parcel[Numbers] | int | None


@dataclass(frozen=True, slots=True)
class EndStep:
    """Texts that nobody goes on with: of these caches."""

    keys: Sequence[int]


@dataclass(frozen=True, slots=True)
class GenerateStep:
    """``generate`` begins.

    Attributes
    ----------
    scope : int
    columns : int
        Of what it was given, padding included.
    returned : int
        Columns in front of what it generates in what it returns.
    prompts : int or None
        Rows of what it was given; it may read each of them several times.
    tokens : Parcel of array [prompts, columns], or None
    """

    scope: int
    columns: int
    returned: int
    prompts: int | None
    tokens: Parcel[Numbers] | None


@dataclass(frozen=True, slots=True)
class GeneratedStep:
    """``generate`` came back.

    Attributes
    ----------
    scope : int
    sequences : Parcel of array [texts, length], or None
        None where it failed.
    end_ids : tuple of int
    pad_id : int or None
    may_stop : bool
        Whether something else than an end token may have ended a text.
    """

    scope: int
    sequences: Parcel[Numbers] | None
    end_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    may_stop: bool = False


class Declared(NamedTuple):
    """What somebody says of a text before the model reads it."""

    text: str | None = None
    domain: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class DeclareStep:
    """The next texts, in the order in which calls read them."""

    prompts: Sequence[Declared]


OwnStep = CallStep | ChangeStep | EndStep | GenerateStep | GeneratedStep | DeclareStep


class LastLogits(NamedTuple):
    """What a call put out at its last column: logits [B, V], and which rows have a token there."""

    logits: torch.Tensor
    known: torch.Tensor


def read_losses(
    logits: Any, call: Call, before: LastLogits | None, n_words: int
) -> tuple[dict[str, torch.Tensor], LastLogits | None]:
    """Return losses of next tokens as far as a call tells them, and what the next call needs.

    Parameters
    ----------
    logits : Tensor [B, k, V]
        Of the last k columns; anything else tells nothing.
    call : Call
    before : LastLogits or None
        Of the call that this one goes on from.
    n_words : int
        Of the vocabulary: a classifier has fewer scores.

    Returns
    -------
    losses : dict
        Fields of :class:`capture.recorder.engine.CallResult`.
    last : LastLogits or None
    """
    fits = isinstance(logits, torch.Tensor) and logits.ndim == 3 and not hasattr(logits, "to_local")
    if not fits or call.tokens is None:
        return {}, None
    rows, count, words = logits.shape
    if rows != call.rows or not 0 < count <= call.width or words < n_words:
        return {}, None
    tokens = call.tokens.to(logits.device, torch.int64)
    in_words = (tokens >= 0) & (tokens < words)  # images have numbers of their own
    valid = in_words if call.valid is None else in_words & call.valid.to(logits.device)
    tokens = tokens.clamp(0, words - 1)
    logits = logits.detach()
    found: dict[str, torch.Tensor] = {}
    if before is not None and len(before.logits) == rows:
        loss = cross_entropy(before.logits.float(), tokens[:, 0], reduction="none")
        found |= {"loss_before": loss, "has_before": before.known & valid[:, 0] & loss.isfinite()}
    if count > 1:
        loss = torch.zeros(rows, call.width, device=logits.device)
        known = torch.zeros_like(loss, dtype=torch.bool)
        predicted, following = slice(-count, -1), slice(call.width - count + 1, None)
        # the last column of each row is read along, for whole rows need no copy
        targets = torch.roll(tokens[:, -count:], -1, dims=1).flatten()
        every = losses_of(logits.reshape(-1, words), targets).reshape(rows, count)
        loss[:, predicted] = every[:, :-1]
        known[:, predicted] = valid[:, predicted] & valid[:, following] & every[:, :-1].isfinite()
        if call.starts is not None:
            known[:, predicted] &= ~call.starts.to(logits.device)[:, following]
        found |= {"loss": loss, "has_loss": known}
    return found, LastLogits(logits[:, -1].clone(), valid[:, -1])
