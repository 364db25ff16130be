"""The one way from a call of a model to its run file, whoever makes the call.

``capture.record`` calls the model itself, ``capture.recording`` follows somebody's calls. On the
thread of the call a :class:`Sender` reduces what the routers did on the device and sends it off; on
the writer's thread a *follower* says which token each row was, and a :class:`Ledger` writes.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from capture.model.forward import Ints
from capture.model.sites import Site
from capture.recorder.attention.summary import PackedAttention
from capture.recorder.observe import (
    Observed,
    PairCounter,
    RealRows,
    SiteGroup,
    StretchSums,
    group_sites,
    observe,
)
from capture.recorder.transfer import Parcel, Staging, WriterThread
from capture.store import RunWriter
from capture.store.codec import decode_weights
from capture.store.records import (
    LEVELS,
    PHASES,
    Array,
    Block,
    ForwardRows,
    Level,
    PairSums,
    Phase,
    SiteBlock,
)
from capture.store.schema import STATISTICS

Numbers = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


class CallResult(NamedTuple, Generic[Array]):
    """What one call gave: B texts of S columns, of which N rows were looked at.

    Attributes
    ----------
    sites : list of SiteBlock
        One for each group of sites.
    expert_ids : list of array [sites, N, K]
        Of each group, at every level; empty where every row counts.
    tokens, valid, starts : array [B, S] or None
        As in :class:`capture.recorder.own_loop.call.Call`; of a decoding step [B].
    loss, has_loss : array, or None
        Of the next token, nats, and where it is known.
    loss_before, has_before : array [B] or None
        Of the first column, by what the call before put out.
    attention : PackedAttention or None
    """

    sites: list[SiteBlock[Array]]
    expert_ids: list[Array]
    tokens: Array | None = None
    valid: Array | None = None
    starts: Array | None = None
    loss: Array | None = None
    has_loss: Array | None = None
    loss_before: Array | None = None
    has_before: Array | None = None
    attention: PackedAttention[Array] | None = None


@dataclass(frozen=True, slots=True)
class CallStep:
    """One call, on its way to the writer's thread.

    Attributes
    ----------
    about : object
        What its follower needs to know of it.
    parcel : Parcel of CallResult
    """

    about: Any
    parcel: Parcel[CallResult[Numbers]]


@dataclass(frozen=True, slots=True)
class PairStep:
    """Counts of experts that met since the last such step."""

    parcel: Parcel[list[StretchSums[Numbers]]]


class Sender:
    """Reduces calls on the device and sends them to the writer's thread.

    Parameters
    ----------
    groups : sequence of SiteGroup
    level : Level
    thread : WriterThread
    staging : Staging
    pairs : PairCounter, optional
        Counts the experts that meet, where every row counts. Without it ids are sent at every
        level, so that what is dropped later can be counted again.
    """

    def __init__(
        self,
        groups: Sequence[SiteGroup],
        level: Level,
        thread: WriterThread[Any],
        staging: Staging,
        pairs: PairCounter | None = None,
    ) -> None:
        self._groups = groups
        self._level: Level = level if pairs is not None or is_routed(level) else "ids"
        self._thread = thread
        self._staging = staging
        self._pairs = pairs
        self._torn = False  # whether a call is handed over, but not its pairs

    @torch.no_grad()
    def send(self, seen: Observed, rows: RealRows, about: object, **more: Any) -> None:
        """Send one call; ``more`` are fields of :class:`CallResult`."""
        blocks, expert_ids = [], []
        for group in self._groups:
            device = seen[group.members[0]].expert_ids.device
            with torch.autocast(device.type, enabled=False):
                block, ids = observe(group, seen, rows.on(device), self._level)
            blocks.append(block)
            expert_ids.append(ids)
        result = CallResult(blocks, [] if self._pairs is not None else expert_ids, **more)
        parcel = self._staging.send(result, stop=self._thread.failed)
        self._torn = True
        self._thread.put(CallStep(about, parcel))
        if self._pairs is not None:
            self._pairs.add(expert_ids)
            self._torn = False
            if self._pairs.is_full:
                self.send_pairs()

    def send_pairs(self) -> None:
        """Send what was counted since the last time."""
        sums = None if self._pairs is None else self._pairs.take()
        if sums:
            self._thread.put(PairStep(self._staging.send(sums, stop=self._thread.failed)))

    def rescue_pairs(self) -> None:
        """After a failure send what was counted, unless it would not fit the calls sent."""
        if not self._torn:
            with suppress(Exception):  # the first error is the one to tell
                self.send_pairs()


def senders_of(
    sites: Sequence[Site], level: Level, thread: WriterThread[Any]
) -> dict[Phase, Sender]:
    """Return what sends the calls of each phase: one, or an encoder's and its decoder's."""
    staging, groups, made = Staging(), group_sites(sites), dict[str | None, Sender]()
    found: dict[Phase, Sender] = {}
    for phase in PHASES:
        here = [group for group in groups if sites[group.members[0]].info.reads(phase)]
        side = here[0].side if here else phase
        if side not in made:
            made[side] = Sender(here, level, thread, staging, PairCounter(sites, here))
        found[phase] = made[side]
    return found


class Follower(Protocol):
    """Says which token each row of the calls was, on the writer's thread."""

    def consume(self, step: Any) -> None:
        """Take one step, in the order in which they happened."""

    def settle(self) -> None:
        """Hand over what no later step can change."""

    def finish(self) -> None:
        """Hand over everything."""


class Ledger:
    """Writes into the run file what a follower hands over; on the writer's thread.

    Attributes
    ----------
    writer : RunWriter
    follower : Follower
        Set before the first step.
    tokens, forwards : int
        Appended so far.
    """

    def __init__(self, writer: RunWriter, sites: Sequence[Site]) -> None:
        self.writer = writer
        self.follower: Follower
        self.tokens = self.forwards = 0
        self._sites = sites

    def consume(self, step: object) -> None:
        """Take one step."""
        if isinstance(step, PairStep):
            self.writer.append_pairs(pair_sums(step.parcel.open()))
        else:
            self.follower.consume(step)
        self.keep_up()

    def keep_up(self) -> None:
        """Commit what has waited long enough."""
        if self.writer.is_due:
            self.follower.settle()
            self.writer.flush()

    def append(self, forward: ForwardRows) -> None:
        """Write the rows of one call."""
        self.writer.append(forward)
        self.tokens += len(forward.tokens.token_id)
        self.forwards += 1

    def finish(self, seconds: float, notes: dict[str, Any], *, complete: bool) -> Path:
        """Close the file; ``notes`` say what else a reader should know."""
        notes = {"forward_passes": self.forwards, **notes}
        biases = (site.selection_bias for site in self._sites)
        if any(bias is not None and bool(bias.any()) for bias in biases):
            notes["selection_bias"] = "Margins include the bias that routers add for the choice."
        choices = [choice for site in self._sites if (choice := site.choice()) is not None]
        if choices:
            notes["choice"] = choices
        factors = [site.after_sum() for site in self._sites if site.factor != 1]
        if factors:
            notes["factor_after_sum"] = factors
        told = dict.fromkeys(site.parts.note for site in self._sites if site.parts.note)
        if told:
            notes["routers"] = " ".join(told)
        return self.writer.finish(seconds=seconds, complete=complete, notes=notes)

    def abandon(self) -> str:
        """Leave the partial file; returns the words that say how to close it."""
        self.writer.abandon()
        partial = self.writer.partial
        return (
            f"What was recorded is in {partial}. Close it with: python -m capture recover "
            f"'{partial}'"
        )


def is_routed(level: Level) -> bool:
    """Whether a level keeps the ids and weights of every token."""
    return LEVELS.index(level) >= LEVELS.index("ids")


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
    def of_texts(cls, starts: Bools) -> "Segments":
        """Take texts together that begin here [B, S]; a row never shares one with the next."""
        begins = starts.copy()
        begins[:, 0] = True
        found = begins.ravel().cumsum() - 1
        return cls(found.astype(np.int64), int(found[-1]) + 1 if len(found) else 0)


class RowsOfCall(NamedTuple):
    """Rows of one call that count, each with the domain of its text.

    Attributes
    ----------
    rows : array [N], int64
        Places among the rows of the call.
    domain : array [N], int64
        Which of the ``n_domains``.
    n_domains : int
    """

    rows: Ints
    domain: Ints
    n_domains: int

    def blocks(
        self,
        blocks: Sequence[Block],
        expert_ids: Sequence[Numbers],
        segments: Segments,
        valid: Bools,
        level: Level,
    ) -> list[Block]:
        """Return what every group of sites did with these rows.

        Parameters
        ----------
        blocks, expert_ids : sequences
            Of all rows of the call, sums apart by segment.
        segments : Segments
        valid : array [B x S], bool
        level : Level
        """
        share = self._share(segments, valid)
        found = []
        for block, ids in zip(blocks, expert_ids, strict=True):
            part = picked(block, self.rows, ids.shape[1])
            if share is None:
                sums = self._counted(ids[:, self.rows], part.weights, block)
            else:
                # [D, G] times [S, G, E]
                sums = {
                    name: None if values is None else np.einsum("dg,sge->sde", share, values)
                    for name in ("assignments", "weight_sum", "prob_sum")
                    for values in (getattr(block, name),)
                }
            if not is_routed(level):
                sums |= dict.fromkeys(("expert_ids", "weights", *STATISTICS))
            found.append(replace(part, **sums))
        return found

    def _share(self, segments: Segments, valid: Bools) -> npt.NDArray[np.int64] | None:
        """Return how often each segment counts in each domain, [D, G]; None where a part does."""
        segment, n_segments = segments
        if self.n_domains == 1 and np.array_equal(np.sort(self.rows), np.flatnonzero(valid)):
            return np.ones((1, n_segments), np.int64)
        whole = np.bincount(segment[valid], minlength=n_segments)
        share = np.zeros((self.n_domains, n_segments), np.int64)
        for number in range(self.n_domains):
            times = np.bincount(self.rows[self.domain == number], minlength=len(segment))
            counted = np.bincount(segment, weights=times, minlength=n_segments).astype(np.int64)
            most = np.zeros(n_segments, np.int64)
            np.maximum.at(most, segment, times)
            if not np.array_equal(counted, most * whole):
                return None
            share[number] = most
        return share

    def _counted(self, ids: Numbers, weights: Numbers | None, block: Block) -> dict[str, Any]:
        """Count the sums again from the rows; probabilities of single tokens are not known."""
        n_sites, _, n_experts = block.assignments.shape
        applied = None if weights is None else decode_weights(weights)
        load = np.zeros((n_sites, self.n_domains, n_experts), np.int64)
        heavy = np.zeros((n_sites, self.n_domains, n_experts))
        for site in range(n_sites):
            filled = ids[site] < n_experts
            at = self.domain[np.nonzero(filled)[0]], ids[site][filled].astype(np.int64)
            np.add.at(load[site], at, 1)
            if applied is not None:
                np.add.at(heavy[site], at, applied[site][filled])
        return {"assignments": load, "weight_sum": heavy, "prob_sum": None}


def picked(block: Block, rows: Ints, n_rows: int) -> Block:
    """Return a block with only these of its ``n_rows`` rows, sums as they are."""
    if len(rows) == n_rows and bool((np.diff(rows) == 1).all()):
        return block
    per_token: dict[str, Any] = {
        name: None if values is None else values[:, rows]
        for name in ("expert_ids", "weights", *STATISTICS)
        for values in (getattr(block, name),)
    }
    place = np.full(n_rows, -1)
    for name in ("scores", "hidden"):
        given = getattr(block, name)
        if given is not None:
            # a row may count several times, in texts that share what was read
            place[given[0]] = np.arange(len(given[0]))
            here = np.flatnonzero(place[rows] >= 0)
            per_token[name] = here, [values[place[rows[here]]] for values in given[1]]
            place[given[0]] = -1
    return replace(block, **per_token)


def next_losses(values: Numbers, known: Bools) -> "np.ma.MaskedArray[Any, Any]":
    """Return losses as the store takes them, masked where none is known."""
    return np.ma.array(np.where(known, values, 0).astype(np.float32), mask=~known)


def pair_sums(stretches: Sequence[StretchSums[Any]]) -> list[PairSums]:
    """Return counts on the host as the store takes them."""
    return [
        PairSums(
            site,
            np.asarray(sums.pairs[row]),
            None
            if following is None or sums.transitions is None
            else np.asarray(sums.transitions[row]),
            following,
        )
        for sums in stretches
        for row, site, following in sums.by_site()
    ]
