"""What the user's thread tells the writer's thread, in the order in which it happened."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.model.forward import Ints
from capture.recorder.transfer import Parcel
from capture.store.records import Array, SiteBlock

Numbers = npt.NDArray[Any]


class PassResult(NamedTuple, Generic[Array]):
    """What one call gave: B rows of S columns.

    Attributes
    ----------
    tokens, valid, starts : array [B, S] or None
        As in :class:`capture.recorder.own_loop.call.Call`.
    sites : list of SiteBlock
        One for each group of sites, with all B x S rows; sums apart by segment.
    expert_ids : list of array [sites, B x S, K]
        Of each group, at every level.
    """

    tokens: Array | None
    valid: Array | None
    starts: Array | None
    sites: list[SiteBlock[Array]]
    expert_ids: list[Array]


@dataclass(frozen=True, slots=True)
class PassStep:
    """One call.

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
    parcel : Parcel of PassResult
    """

    number: int
    rows: int
    width: int
    key: int | None
    scope: int | None
    segments: "Segments"
    parcel: Parcel[PassResult[Numbers]]


@dataclass(frozen=True, slots=True)
class ChangeStep:
    """A cache was changed: ``what`` of :data:`..intercept.CHANGES`.

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


OwnStep = PassStep | ChangeStep | EndStep | GenerateStep | GeneratedStep | DeclareStep


class Segments(NamedTuple):
    """What is kept or dropped together of a call: its sums are apart by these.

    Attributes
    ----------
    of_row : array [B x S], int64
    total : int
    """

    of_row: Ints
    total: int

    @classmethod
    def of_columns(cls, rows: int, width: int, tail: int) -> "Segments":
        """Take the columns of each row together but for the last ``tail``."""
        head = width - min(tail, width)
        per_row = min(width, tail) + (1 if head else 0)
        column = np.maximum(np.arange(width) - max(head - 1, 0), 0)
        found = np.arange(rows)[:, None] * per_row + column[None]
        return cls(found.astype(np.int64).ravel(), rows * per_row)

    @classmethod
    def of_texts(cls, starts: npt.NDArray[np.bool_]) -> "Segments":
        """Take texts together that begin here [B, S]; a row never shares one with the next."""
        begins = starts.copy()
        begins[:, 0] = True
        found = begins.ravel().cumsum() - 1
        return cls(found.astype(np.int64), int(found[-1]) + 1 if len(found) else 0)
