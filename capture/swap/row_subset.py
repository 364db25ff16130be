"""Run a layer on some of its tokens: take their rows out of every argument."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from capture.errors import SwapError

CACHES = ("past_key_values", "past_key_value")
MASK_DIMS = 4


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows of a batch [B, S] packed into [B', S'], sequences without a kept token left out.

    Attributes
    ----------
    shape : (int, int)
        B and S; 1 and R where rows are not told apart by sequence.
    sequences : Tensor [B'], int64
    index : Tensor [B', S'], int64
        Places in the sequence; the places after a sequence's last token repeat it.
    filled : Tensor [B', S'], bool
        False where a place repeats.
    """

    shape: tuple[int, int]
    sequences: torch.Tensor
    index: torch.Tensor
    filled: torch.Tensor

    @property
    def n_rows(self) -> int:
        """Rows that are computed."""
        return self.index.numel()

    @property
    def place(self) -> torch.Tensor:
        """Return the row of the batch [N] of every kept token."""
        rows: torch.Tensor = self.sequences[:, None] * self.shape[1] + self.index
        return rows[self.filled]

    def real(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the kept tokens [N, D] of an output [B' * S' rows, D]."""
        return rows.reshape(-1, rows.shape[-1])[self.filled.flatten()]

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return the kept rows of ``value`` [B or 1, S, ...]."""
        whole = value.expand(self.shape[0], *value.shape[1:])
        return whole[self.sequences[:, None], self.index]


def kept_rows(keep: torch.Tensor, shape: torch.Size, *, flat: bool) -> Kept:
    """Pack the rows to keep.

    Parameters
    ----------
    keep : Tensor [R], bool
    shape : Size
        Of the hidden states [..., D].
    flat : bool
        Take all rows as one sequence: right where rows do not see each other.
    """
    batch, length = (1, len(keep)) if flat or len(shape) < len("BSD") else (shape[0], shape[1])
    grid = keep.reshape(batch, length)
    counts = grid.sum(dim=-1)
    sequences = counts.nonzero().flatten()
    longest = int(counts.max()) if len(sequences) else 0
    grid, counts = grid[sequences], counts[sequences]
    # a stable sort brings the kept places to the front, in their order
    order = (~grid).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :longest]
    last = order.gather(-1, (counts - 1).clamp_min(0)[:, None])
    filled = torch.arange(longest, device=keep.device) < counts[:, None]
    return Kept((batch, length), sequences, torch.where(filled, order, last), filled)


def on_kept_rows(
    stock: Callable[..., Any],
    kept: Kept,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    place: str,
) -> Any:
    """Call ``stock`` with the kept rows of its arguments.

    Raises
    ------
    SwapError
        If an argument's rows cannot be told, or there is a cache that the others would miss.
    """
    if any(kwargs.get(name) is not None for name in CACHES):
        raise SwapError(
            f"{place}: tokens that skip a layer would be missing in its cache. Call the model "
            "with use_cache=False."
        )
    hidden = args[0] if args else kwargs["hidden_states"]
    first = kept.take(hidden.reshape(*kept.shape, hidden.shape[-1]))
    if hidden.ndim < len("BSD"):
        first = first[0]
    take = _Take(kept, place)
    if args:
        rest = tuple(take(f"argument {i}", v) for i, v in enumerate(args[1:], start=1))
        return stock(first, *rest, **{k: take(k, v) for k, v in kwargs.items()})
    others = {k: take(k, v) for k, v in kwargs.items() if k != "hidden_states"}
    return stock(hidden_states=first, **others)


@dataclass(frozen=True)
class _Take:
    """Takes the kept rows out of one argument, by its shape."""

    kept: Kept
    place: str

    def __call__(self, name: str, value: Any) -> Any:
        batch, length = self.kept.shape
        if isinstance(value, tuple | list):
            return type(value)(self(name, v) for v in value)
        if isinstance(value, dict):
            return {k: self(name, v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == MASK_DIMS and value.shape[1] == 1 and value.shape[2:] == (length, length):
            return self._mask(value)
        if value.ndim > 1 and value.shape[0] in (1, batch) and value.shape[1] == length:
            return self.kept.take(value)
        raise SwapError(
            f"{self.place}: some tokens cannot skip it, because its {name} of shape "
            f"{list(value.shape)} has no rows for tokens. Skip it for all tokens or for none."
        )

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Take rows and columns of a mask [B or 1, 1, S, S]; repeated places are seen by nobody."""
        kept = self.kept
        whole = mask.expand(kept.shape[0], 1, *mask.shape[2:])[kept.sequences, 0]
        numbers = torch.arange(len(kept.sequences), device=mask.device)[:, None, None]
        taken = whole[numbers, kept.index[:, :, None], kept.index[:, None, :]]
        hidden = ~kept.filled[:, None, :]
        no: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return taken.masked_fill(hidden, no)[:, None]
