"""Which token each row of a forward pass is: ids, positions, sequences, padding."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capture.errors import SwapError

MASK_DIMS = 2


@dataclass(frozen=True, eq=False)
class PassTokens:
    """The rows of one forward pass, padding included.

    Attributes
    ----------
    n_rows : int
        Batch x sequence.
    real : Tensor [T] or None, int64
        Rows that are no padding, ascending; None where all are real.
    token_ids : Tensor [T] or None, int64
    positions, sequences : Tensor [T], int64
        Position from the sequence's first real token on; row of the batch.
    starts : Tensor [T], bool
        First real token of its sequence.
    """

    n_rows: int
    real: torch.Tensor | None
    token_ids: torch.Tensor | None
    positions: torch.Tensor
    sequences: torch.Tensor
    starts: torch.Tensor

    def on(self, device: torch.device) -> "PassTokens":
        """Return the same on a layer's device, where a model is spread over several."""
        if self.positions.device == device:
            return self
        return PassTokens(
            n_rows=self.n_rows,
            real=None if self.real is None else self.real.to(device),
            token_ids=None if self.token_ids is None else self.token_ids.to(device),
            positions=self.positions.to(device),
            sequences=self.sequences.to(device),
            starts=self.starts.to(device),
        )


class Passes:
    """Follows a model's forward passes; ``tokens`` describes the one that runs.

    Attributes
    ----------
    count : int
        Forward passes since it was opened.
    """

    def __init__(self) -> None:
        self.count = 0
        self._tokens: PassTokens | None = None

    @property
    def tokens(self) -> PassTokens:
        """Return the rows of the pass that runs now.

        Raises
        ------
        SwapError
            If a layer runs on its own, outside of the model.
        """
        if self._tokens is None:
            raise SwapError(
                "A forward pass of the whole model was expected, but a layer ran on its own. Call "
                "the model that was given to swap()."
            )
        return self._tokens

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator["Passes"]:
        """Read the arguments of every forward pass of ``model``."""
        signature = inspect.signature(type(model).forward)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind_partial(module, *args, **kwargs).arguments
            bound |= bound.pop("kwargs", {})
            self._tokens = pass_tokens(bound)
            self.count += 1

        def after(*_: object) -> None:
            self._tokens = None

        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def pass_tokens(arguments: dict[str, Any]) -> PassTokens:
    """Describe the rows of a forward pass from the model's arguments.

    Raises
    ------
    SwapError
        If there are neither token ids nor embeddings.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    given = ids if isinstance(ids, torch.Tensor) else embeds
    if not isinstance(given, torch.Tensor):
        raise SwapError(
            "input_ids [B, S] or inputs_embeds [B, S, D] were expected in the model's call, got "
            f"{sorted(arguments)}."
        )
    batch, length = given.shape[:2]
    mask = arguments.get("attention_mask")
    known = isinstance(mask, torch.Tensor) and mask.ndim == MASK_DIMS
    # without a mask, or with one already made for attention, nothing tells padding apart
    valid = mask.bool() if known and isinstance(mask, torch.Tensor) else None
    positions = _positions(arguments, valid, batch, length, given.device)
    here = None if valid is None else valid[:, -length:]
    sequences = torch.arange(batch, device=given.device)[:, None].expand(batch, length).flatten()
    real = None
    if here is not None and not bool(here.all()):
        real = here.flatten().nonzero().flatten()
        positions, sequences = positions[real], sequences[real]
    token_ids = ids.flatten() if isinstance(ids, torch.Tensor) else None
    return PassTokens(
        n_rows=batch * length,
        real=real,
        token_ids=token_ids if token_ids is None or real is None else token_ids[real],
        positions=positions,
        sequences=sequences,
        starts=positions == 0,
    )


def _positions(
    arguments: dict[str, Any],
    valid: torch.Tensor | None,
    batch: int,
    length: int,
    device: torch.device,
) -> torch.Tensor:
    """Return positions [B * S], counted from each sequence's first real token."""
    if valid is not None:
        return (valid.long().cumsum(-1) - 1)[:, -length:].clamp_min(0).flatten()
    given = arguments.get("position_ids")
    if isinstance(given, torch.Tensor) and given.ndim == MASK_DIMS:
        return given.long().expand(batch, length).flatten()
    cache = arguments.get("past_key_values") or arguments.get("cache")
    seen = int(cache.get_seq_length()) if cache is not None else 0
    return (torch.arange(length, device=device) + seen).expand(batch, length).flatten()
