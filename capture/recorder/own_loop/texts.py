"""Put the rows of many calls together to texts: what each call read, after what, in which row.

A text is a chain of pieces, each what one call read of one row. Rows that go on from the same
piece share it, so what beams, assistants and copies of rows leave behind is a piece that no kept
text leads to.
"""

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from capture.model.forward import Ints
from capture.recorder.attention.summary import AttentionTaps, unpack_attention
from capture.recorder.engine import Bools, CallResult, CallStep, Numbers, next_losses
from capture.recorder.own_loop.call import (
    CannotFollow,
    ChangeStep,
    Declared,
    DeclareStep,
    EndStep,
    GeneratedStep,
    GenerateStep,
    OwnCall,
    OwnStep,
)
from capture.store.records import Block, PromptAttention
from capture.store.schema import NO_TOKEN

# of calls whose texts may go on; more, and the oldest ones are taken to have ended
HELD_BYTES = 2**30


@dataclass(eq=False, slots=True)
class ReadCall:
    """One call, on the host.

    Attributes
    ----------
    about : OwnCall
    valid : array [B x S], bool
    result : CallResult
    """

    about: OwnCall
    valid: Bools
    result: CallResult[Numbers]

    @property
    def width(self) -> int:
        """Columns."""
        return self.about.width

    @property
    def blocks(self) -> list[Block]:
        """What the sites did, one for each group."""
        return self.result.sites

    @property
    def n_bytes(self) -> int:
        """What it holds, about."""
        arrays = [*self.result.expert_ids]
        for block in self.blocks:
            arrays += [block.assignments, block.weight_sum]
            arrays += [a for a in (block.weights, block.entropy, block.prob_sum) if a is not None]
            for vectors in (block.scores, block.hidden):
                arrays += [] if vectors is None else [*vectors[1]]
        return sum(int(array.nbytes) for array in arrays)


@dataclass(eq=False, slots=True)
class Piece:
    """What one call read of one row.

    Attributes
    ----------
    before : Tip or None
        What it follows.
    of : ReadCall
    rows : array [n], int64
        Places among the B x S rows of the call, without padding.
    tokens : array [n], int64
        ``NO_TOKEN`` where they are not known.
    given : array [n], bool
        False for tokens that a model had generated.
    length : int
        Of the text up to its end.
    declared : Declared or None
        Of the text, on its first piece.
    attention : PromptAttention or None
        Of the text, on its first piece, without its numbers.
    """

    before: "Tip | None"
    of: ReadCall
    rows: Ints
    tokens: Ints
    given: Bools
    length: int = 0
    declared: Declared | None = None
    attention: PromptAttention | None = None

    def __post_init__(self) -> None:
        """Add up the length."""
        before = 0 if self.before is None else self.before.length
        self.length = before + len(self.rows)


class Tip(NamedTuple):
    """Where a text ends for now: after ``upto`` tokens of a piece, ``width`` columns of a call."""

    piece: Piece
    upto: int
    width: int

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return self.piece.length - len(self.piece.rows) + self.upto


@dataclass(slots=True)
class Text:
    """One text that ended: its pieces, in order, each with how many tokens of it count."""

    pieces: list[tuple[Piece, int]]

    @property
    def declared(self) -> Declared | None:
        """What somebody said of it."""
        return self.pieces[0][0].declared

    def tokens(self) -> Ints:
        """Return its token ids."""
        return np.concatenate([piece.tokens[:upto] for piece, upto in self.pieces])

    def given(self) -> Bools:
        """Return which of its tokens no model had generated."""
        return np.concatenate([piece.given[:upto] for piece, upto in self.pieces])

    def losses(self) -> "np.ma.MaskedArray[Any, Any]":
        """Return the loss of each token's next one; none where the prompt or the text ends."""
        values: list[Numbers] = []
        known: list[Bools] = []
        for piece, upto in self.pieces:
            result, here = piece.of.result, piece.rows[:upto]
            if result.loss_before is not None and result.has_before is not None and values:
                row = int(here[0]) // piece.of.width
                first = int(here[0]) % piece.of.width == 0
                values[-1][-1] = result.loss_before[row]
                known[-1][-1] = first and result.has_before[row]
            if result.loss is None or result.has_loss is None:
                values.append(np.zeros(upto, np.float32))
                known.append(np.zeros(upto, np.bool_))
            else:
                values.append(result.loss.ravel()[here])
                known.append(result.has_loss.ravel()[here])
            known[-1][-1] = False  # what followed there may not be of this text
        all_known, given = np.concatenate(known), self.given()
        all_known[:-1] &= ~(given[:-1] & ~given[1:])
        return next_losses(np.concatenate(values), all_known)


def text_of(tip: Tip) -> Text:
    """Return the text that ends here."""
    pieces = []
    at: Tip | None = tip
    while at is not None:
        if at.upto:
            pieces.append((at.piece, at.upto))
        at = at.piece.before
    return Text(pieces[::-1])


@dataclass(slots=True)
class _CacheRows:
    """The rows of a cache, or of a ``generate`` without one."""

    tips: list[Tip | None]
    columns: int = 0
    n_bytes: int = 0
    is_over: bool = False  # its texts cannot go on


@dataclass(slots=True)
class _Scope:
    """A ``generate`` that runs."""

    about: GenerateStep
    tokens: Numbers | None
    left: int | None = None  # columns of the prompts that are still to be read
    key: int | None = None
    rows: _CacheRows | None = None  # without a cache
    pieces: list[Piece] = field(default_factory=list)
    n_rows: int = 0


class Texts:
    """Follows calls; hands every text that ended to ``ended``.

    Parameters
    ----------
    ended : callable
        Takes texts that ended together, in the order of their rows.
    attention : AttentionTaps or None
        Which sites and options attention comes from.
    """

    def __init__(
        self, ended: Callable[[list[Text]], None], attention: AttentionTaps | None = None
    ) -> None:
        self._ended = ended
        self._attention = attention
        self._rows: dict[int, _CacheRows] = {}
        self._scopes: dict[int, _Scope] = {}
        self._declared: deque[Declared] = deque()

    def consume(self, step: OwnStep) -> None:
        """Take one step.

        Raises
        ------
        CannotFollow
            If it does not fit what came before.
        """
        if isinstance(step, CallStep):
            self._read(step.about, step.parcel.open())
        elif isinstance(step, ChangeStep):
            self._change(step)
        elif isinstance(step, EndStep):
            for key in step.keys:
                self._end(key)
        elif isinstance(step, DeclareStep):
            self._declared.extend(step.prompts)
        elif isinstance(step, GenerateStep):
            tokens = None if step.tokens is None else step.tokens.open()
            self._scopes[step.scope] = _Scope(step, tokens)
        elif isinstance(step, GeneratedStep):
            self._generated(step)

    def settle(self) -> None:
        """Hand over nothing: rows may be dropped until a text has ended."""

    def finish(self) -> None:
        """Hand over what is open; of a ``generate`` that did not come back nobody knows the end."""
        unknown = {scope.key for scope in self._scopes.values()}
        for key in list(self._rows):
            if key not in unknown:
                self._end(key)

    def _read(self, step: OwnCall, result: CallResult[Numbers]) -> None:
        """Put what a call read to the texts that it goes on."""
        shape = (step.rows, step.width)
        valid = np.ones(shape, np.bool_) if result.valid is None else result.valid
        tokens = np.full(shape, NO_TOKEN) if result.tokens is None else result.tokens
        attention = {}
        if self._attention is not None and result.attention is not None:
            taps = self._attention
            found = unpack_attention(result.attention, step.attended, taps.sites, taps.options)
            attention = {one.prompt_id: one for one in found}
        done = ReadCall(step, valid.ravel(), result._replace(attention=None))
        scope = None if step.scope is None else self._scopes.get(step.scope)
        if scope is not None and not scope.n_rows:
            scope.n_rows = step.rows
        if step.key is None and scope is not None:
            self._read_again(done, valid, tokens, scope)
            return
        known = None if step.key is None else self._rows.get(step.key)
        tips: list[Tip | None] = [None] * step.rows if known is None else known.tips
        if known is not None and known.is_over:
            raise CannotFollow(
                "A cache was gone on from after its texts had been stored: they were packed into "
                "one row, or too many were open at once. Start them with an empty cache."
            )
        if len(tips) != step.rows:
            raise CannotFollow(
                f"A call of {len(tips)} rows was expected, as many as its cache has texts, got "
                f"{step.rows}. Change the rows of a cache by its own methods (reorder_cache, "
                "batch_select_indices, batch_repeat_interleave)."
            )
        given = self._given(step, known, tokens, scope)
        ends, several = [], False
        for row in range(step.rows):
            place = np.flatnonzero(valid[row])
            bounds = [0]
            if result.starts is not None:
                bounds += (np.flatnonzero(result.starts[row, place[1:]]) + 1).tolist()
            several |= len(bounds) > 1
            for start, stop in zip(bounds, [*bounds[1:], len(place)], strict=True):
                here = place[start:stop]
                piece = Piece(
                    before=tips[row],
                    of=done,
                    rows=(row * step.width + here).astype(np.int64),
                    tokens=tokens[row, here].astype(np.int64),
                    given=given[here],
                    attention=attention.get(row),
                )
                ends.append(Tip(piece, len(here), step.width))
        if several and known is not None:
            raise CannotFollow(
                "A call that goes on from a cache had several texts in one row: position_ids or "
                "the attention mask start anew within it. Give each text a row of its own."
            )
        self._declare(ends, known is None, scope)
        if scope is not None:
            scope.pieces += [tip.piece for tip in ends]
            scope.key = step.key
        if step.key is None or several:
            self._ended([text_of(tip) for tip in ends if tip.length])
            if step.key is not None:
                self._rows[step.key] = _CacheRows([], is_over=True)
            return
        rows = known or self._rows.setdefault(step.key, _CacheRows([]))
        rows.tips = list(ends)
        rows.columns += step.width
        rows.n_bytes += done.n_bytes
        self._let_go(step.key)

    def _given(
        self, step: OwnCall, known: _CacheRows | None, tokens: Numbers, scope: _Scope | None
    ) -> Bools:
        """Return which columns of a call hold tokens that somebody gave."""
        given = np.ones(step.width, np.bool_)
        if scope is None:
            # one token after others: what a loop that generates reads
            return given & (known is None or step.width > 1)
        if scope.left is None:
            past = 0 if known is None else known.columns
            scope.left = self._columns_given(step, past, tokens, scope)
        given[scope.left :] = False
        scope.left = max(0, scope.left - step.width)
        return given

    @staticmethod
    def _columns_given(step: OwnCall, past: int, tokens: Numbers, scope: _Scope) -> int:
        """Return how many columns of the prompts ``generate`` has yet to read."""
        rest = scope.about.columns - past
        if past and rest > 0 and scope.tokens is not None:
            # the whole text was given, and the cache holds its beginning
            n = min(rest, step.width)
            if np.array_equal(scope.tokens[0, past : past + n], tokens[0, :n]):
                return rest
        return scope.about.columns

    def _read_again(self, done: ReadCall, valid: Bools, tokens: Numbers, scope: _Scope) -> None:
        """Take a call that reads whole texts, of which all but the end was read before."""
        rows = scope.rows = scope.rows or _CacheRows([])
        tips: list[Tip] = []
        for row in range(done.about.rows):
            place = np.flatnonzero(valid[row])
            ids = tokens[row, place].astype(np.int64)
            tip = _longest(rows.tips, scope.pieces, ids, row)
            known = 0 if tip is None else tip.length
            piece = Piece(
                before=tip,
                of=done,
                rows=(row * done.width + place[known:]).astype(np.int64),
                tokens=ids[known:],
                given=place[known:] < scope.about.columns,
            )
            tips.append(Tip(piece, len(piece.rows), done.width))
        self._declare(tips, not scope.pieces, scope)
        scope.pieces += [tip.piece for tip in tips]
        rows.tips = list(tips)

    def _declare(self, tips: Sequence[Tip], is_new: bool, scope: _Scope | None) -> None:
        """Give texts that begin what was said of them."""
        if not is_new:
            return
        each, said = 1, None
        if scope is not None and scope.about.prompts:
            each = max(1, len(tips) // scope.about.prompts)
        for place, tip in enumerate(tips):
            if place % each == 0:
                said = self._declared.popleft() if self._declared else None
            tip.piece.declared = said

    def _change(self, step: ChangeStep) -> None:
        """Follow a change of a cache's rows or columns."""
        # opened whatever comes of it, so that its block of memory is free again
        value = step.value if step.value is None or isinstance(step.value, int) else None
        chosen = None if value is step.value else step.value.open()  # type: ignore[union-attr]
        rows = self._rows.get(step.key)
        if rows is None:
            return
        if step.what == "reset":
            self._end(step.key)
        elif step.what == "crop":
            count = value or 0
            rows.tips = [_cropped(tip, count) for tip in rows.tips]
            rows.columns -= count
        elif value is not None:
            rows.tips = [tip for tip in rows.tips for _ in range(value)]
        elif chosen is not None:
            rows.tips = [rows.tips[int(row)] for row in np.atleast_1d(chosen)]

    def _generated(self, step: GeneratedStep) -> None:
        """Keep of a ``generate`` what it returned."""
        scope = self._scopes.pop(step.scope)
        sequences = None if step.sequences is None else step.sequences.open()
        rows = scope.rows if scope.key is None else self._rows.get(scope.key)
        if rows is None:
            return
        if sequences is not None and scope.pieces:
            rows.tips = self._kept(step, scope, rows, sequences)
        if scope.rows is not None:
            self._ended([text_of(tip) for tip in rows.tips if tip is not None and tip.length])

    def _kept(
        self, step: GeneratedStep, scope: _Scope, rows: _CacheRows, sequences: Numbers
    ) -> list[Tip | None]:
        """Return where the returned texts end among what was read."""
        n_prompts = scope.about.prompts or len(sequences)
        per_prompt = max(1, len(sequences) // n_prompts)
        own_pieces = {id(piece) for piece in scope.pieces}
        kept: list[Tip | None] = []
        for number, sequence in enumerate(sequences):
            wanted = _until_end(sequence[scope.about.returned :], step)
            own = rows.tips[number] if len(rows.tips) == len(sequences) else None
            tip = None if own is None else _agreed(own, wanted, own_pieces)
            if tip is None:
                tip = _found(scope, number // per_prompt, n_prompts, wanted, own_pieces)
            if tip is None:
                raise CannotFollow(
                    f"Text {number + 1} of {len(sequences)} that generate() returned is not "
                    "among those that the model was seen to read: its way of decoding changes "
                    "rows in a way that is not known. Use greedy search, sampling, beams or an "
                    "assistant, or call the model yourself."
                )
            kept.append(tip)
        return kept

    def _end(self, key: int) -> None:
        """Hand over the texts of a cache."""
        rows = self._rows.pop(key, None)
        if rows is not None:
            self._ended([text_of(tip) for tip in rows.tips if tip is not None and tip.length])

    def _let_go(self, current: int) -> None:
        """Hand over the oldest texts where too much is held."""
        total = sum(rows.n_bytes for rows in self._rows.values())
        busy = {scope.key for scope in self._scopes.values()} | {current}
        for key in list(self._rows):
            if total <= HELD_BYTES:
                return
            if key not in busy:
                total -= self._rows[key].n_bytes
                self._end(key)
                self._rows[key] = _CacheRows([], is_over=True)


def _cropped(tip: Tip | None, columns: int) -> Tip | None:
    """Return a text without the last columns of its row."""
    while tip is not None and columns >= tip.width:
        columns -= tip.width
        tip = tip.piece.before
    if tip is None or not columns:
        return tip
    width = tip.width - columns
    column = tip.piece.rows[: tip.upto] % tip.piece.of.width
    return Tip(tip.piece, int((column < width).sum()), width)


def _until_end(generated: Numbers, step: GeneratedStep) -> Ints:
    """Return a generated text up to its end token, without what fills the row after it."""
    ends = np.flatnonzero(np.isin(generated, step.end_ids))
    if len(ends):
        return generated[: ends[0] + 1].astype(np.int64)
    if step.may_stop:
        fills = [-1] if step.pad_id is None else [-1, step.pad_id]
        other = np.flatnonzero(~np.isin(generated, fills))
        return generated[: other[-1] + 1 if len(other) else 0].astype(np.int64)
    return generated.astype(np.int64)


def _longest(
    tips: Sequence[Tip | None], pieces: Sequence[Piece], ids: Ints, row: int
) -> Tip | None:
    """Return the longest text that was read before and with which ``ids`` begin."""
    if len(ids) > 1 and row < len(tips):
        # nearly always the row's own, or another one of the last call
        for tip in (tips[row], *tips):
            is_last = tip is not None and tip.length == len(ids) - 1
            if tip is not None and is_last and _begins(ids, tip):
                return tip
    best: Tip | None = None
    for piece in pieces:
        tip = Tip(piece, len(piece.rows), piece.of.width)
        if (0 if best is None else best.length) < tip.length < len(ids) and _begins(ids, tip):
            best = tip
    return best


def _begins(ids: Ints, tip: Tip) -> bool:
    return np.array_equal(text_of(tip).tokens(), ids[: tip.length])


def _agreed(tip: Tip, wanted: Ints, pieces: Set[int]) -> Tip | None:
    """Return the text cut to the wanted generated tokens, None where it has others.

    ``pieces`` are those that this ``generate`` read.
    """
    chain = []
    at: Tip | None = tip
    while at is not None and id(at.piece) in pieces:
        chain.append(at)
        at = at.piece.before
    done = 0
    last = None
    for at in reversed(chain):
        own = np.flatnonzero(~at.piece.given[: at.upto])
        fits = min(len(own), len(wanted) - done)
        if not np.array_equal(at.piece.tokens[own[:fits]], wanted[done : done + fits]):
            return None
        done += fits
        if fits < len(own):
            return Tip(at.piece, int(own[fits]), at.width)
        last = at
    return last if done >= len(wanted) - 1 else None


def _found(scope: _Scope, item: int, n_items: int, wanted: Ints, own: Set[int]) -> Tip | None:
    """Return the text of one prompt with the wanted generated tokens, as long as it was read."""
    following: dict[int, list[Piece]] = {}
    roots = []
    for piece in scope.pieces:
        if piece.before is None or id(piece.before.piece) not in own:
            roots.append(piece)
        else:
            following.setdefault(id(piece.before.piece), []).append(piece)
    per_item = max(1, scope.n_rows // n_items)
    waiting = []
    for piece in roots:
        if len(piece.rows) and (int(piece.rows[0]) // piece.of.width) // per_item == item:
            waiting.append((piece, 0))
    best: tuple[int, Tip] | None = None
    while waiting:
        piece, done = waiting.pop()
        read = piece.tokens[~piece.given]
        if not np.array_equal(read, wanted[done : done + len(read)]):
            continue
        done += len(read)
        if best is None or done > best[0]:
            best = done, Tip(piece, len(piece.rows), piece.of.width)
        waiting += [(after, done) for after in following.get(id(piece), ())]
    if best is None or best[0] < len(wanted) - 1:
        return None
    return best[1]
