"""What a trace of routing holds, and what has to be found out before it can be stored.

Shapes: R recorded tokens, L layers as the trace counts them, K slots.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import TraceError, first_line, quoted

Record = Mapping[str, Any]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# engines profile before the first request, with one token again and again: thousands of equal rows
MIN_WARM_UP = 32
MAX_TOP_K = 64
# groups of a wrong size stay free of repeats by chance in a few rows only
MIN_ROWS = 64


class Sequence(NamedTuple):
    """One prompt, and what is generated after it.

    Attributes
    ----------
    name : str
        What the trace calls it, such as a line or a request.
    ids : array [R, L, K], int32
        Experts of the tokens ``first .. first + R - 1``; -1 = empty slot.
    weights : array [R, L, K], float32, or None
    first : int
        Position of the first recorded token; those before it were not recorded.
    n_prompt : int or None
        Tokens of the prompt; None: all of them.
    tokens : array [T] of int32, or None
        Ids of all tokens, recorded or not.
    text, domain : str or None
    """

    name: str
    ids: Ids
    weights: Floats | None = None
    first: int = 0
    n_prompt: int | None = None
    tokens: Ids | None = None
    text: str | None = None
    domain: str | None = None

    @property
    def length(self) -> int:
        """Tokens up to the last one that is recorded or has an id."""
        known = 0 if self.tokens is None else len(self.tokens)
        return max(known, self.first + len(self.ids))


class Trace(NamedTuple):
    """A trace that can be read as often as needed.

    Attributes
    ----------
    format : str
    sequences : callable
        Returns them in order, one at a time.
    layers : tuple of int, or None
        Decoder layer of each of the L; None: they are counted from 0.
    n_experts : int or None
        None: not said.
    model : str or None
    facts : mapping
        What else the trace says of itself; plain JSON.
    close : callable
        Lets go of what reading it holds.
    """

    format: str
    sequences: Callable[[], Iterator[Sequence]]
    layers: tuple[int, ...] | None = None
    n_experts: int | None = None
    model: str | None = None
    facts: Mapping[str, Any] = {}
    close: Callable[[], None] = lambda: None


@dataclass
class Survey:
    """What one pass over a trace finds out.

    Attributes
    ----------
    top_k : int
    routed : array [L] of bool
        Layers with a router; a dense layer reads as zeros.
    n_experts : int
        The largest id and one.
    warm_up : int
        Equal rows at the head.
    rows, missing : int
        Recorded tokens, and (token, layer) without a choice among them.
    """

    top_k: int = 0
    routed: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    n_experts: int = 0
    warm_up: int = 0
    rows: int = 0
    missing: int = 0


def is_choice(ids: Ids) -> npt.NDArray[np.bool_]:
    """Return for [..., K] where there is a choice: an expert, and none twice.

    ``[0] * k`` is no choice of a router with k > 1: zeros stand for what was not recorded.
    """
    ordered = np.sort(ids, axis=-1)
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    return np.asarray((ids >= 0).any(-1) & ~twice)


def survey(trace: Trace) -> Survey:
    """Read a trace once.

    Raises
    ------
    TraceError
        If it holds nothing, sequences do not fit together, or an id is negative.
    """
    found = Survey()
    head: Ids | None = None
    in_head = True
    for sequence in trace.sequences():
        ids = sequence.ids
        _check(sequence, found)
        if not len(ids):
            continue
        if not len(found.routed):
            found.top_k, found.routed = ids.shape[2], np.zeros(ids.shape[1], bool)
            nonzero = np.zeros(ids.shape[1], bool)
        chosen = is_choice(ids)
        found.routed |= chosen.any(0)
        nonzero |= (ids > 0).any((0, 2))
        found.n_experts = max(found.n_experts, int(ids.max()) + 1)
        if in_head:
            head = ids[0] if head is None else head
            equal = (ids == head).all((1, 2))
            in_head = bool(equal.all())
            found.warm_up += len(ids) if in_head else int(equal.argmin())
        found.rows += len(ids)
        found.missing += int((~chosen).sum())
    if not found.rows or not found.routed.any():
        raise TraceError(
            f"The {trace.format} trace holds no choice of experts. Record it again with the "
            "routing switched on."
        )
    # one expert a token: a layer of zeros before the first router is dense, as models begin
    if found.top_k == 1:
        leading = np.cumsum(nonzero) == 0
        found.routed &= ~leading
    found.missing -= found.rows * int((~found.routed).sum())
    found.warm_up = found.warm_up if MIN_WARM_UP <= found.warm_up < found.rows else 0
    return found


def _check(sequence: Sequence, found: Survey) -> None:
    ids, where = sequence.ids, sequence.name
    if ids.ndim != 3 or not 1 <= ids.shape[2] <= MAX_TOP_K:
        raise TraceError(
            f"{where}: expected expert ids [tokens, layers, top k], got shape {list(ids.shape)}."
        )
    if len(found.routed) and ids.shape[1:] != (len(found.routed), found.top_k):
        raise TraceError(
            f"{where}: has {ids.shape[1]} layers of {ids.shape[2]} experts, the sequences before "
            f"it {len(found.routed)} of {found.top_k}. One run holds the routing of one model."
        )
    if ids.size and int(ids.min()) < -1:
        raise TraceError(f"{where}: expert ids are 0 or more, -1 = none; got {int(ids.min())}.")
    weights = sequence.weights
    if weights is not None and weights.shape != ids.shape:
        raise TraceError(
            f"{where}: has weights of shape {list(weights.shape)} for ids of shape "
            f"{list(ids.shape)}. Pass one weight for each id."
        )


def without_fakes(ids: Ids) -> Ids:
    """Return rows [T, L, K] without those at the end that count experts up, ``arange % E``.

    slime fills padding so, for each expert to get as much of it.
    """
    flat = ids.reshape(-1).astype(np.int64)
    n_experts, width = int(ids.max(initial=0)) + 1, ids[:1].size
    up = np.diff(flat) % n_experts == 1
    run = len(up) if up.all() else int(np.argmax(~up[::-1]))  # numbers that count up to the end
    rows = (run + 1) // width if width else 0
    # from 0 on, and enough of them for it to be no chance
    while rows and (flat[-rows * width] or rows * width < 8):
        rows -= 1
    return ids[: len(ids) - rows]


def top_k_of(flat: npt.NDArray[np.integer[Any]], width: int | None = None) -> int:
    """Return how many experts a token has, from ids that stand in one row.

    The largest size of groups in which no expert stands twice; zeros alone are a dense layer.

    Parameters
    ----------
    flat : array [N]
    width : int, optional
        Ids of a token over all layers, which a group must divide.

    Raises
    ------
    TraceError
        If there are too few ids to be sure.
    """
    for size in range(min(MAX_TOP_K, width or MAX_TOP_K), 0, -1):
        if len(flat) % size or (width is not None and width % size):
            continue
        groups = flat.reshape(-1, size).astype(np.int32)
        enough = len(groups) >= MIN_ROWS * (2 if size == 1 else 1)
        if enough and (is_choice(groups) | ~groups.any(1)).all():
            return size
    raise TraceError(
        f"How many experts a token has cannot be told from {len(flat)} ids. Say it with --top-k."
    )


def first_record(path: Path) -> Record:
    """Return the first object of a JSON file."""
    for _, record in records(path):
        return record
    raise TraceError(f"{path.name} holds no JSON object.")


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """Return the objects of a JSON file, or of its lines, with the number of the line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                if number > 1:
                    raise TraceError(f"{path.name}, line {number} is not JSON: {error}.") from None
                break
            if not isinstance(record, dict):
                raise TraceError(
                    f"{path.name}, line {number}: expected an object, got {quoted(record)}."
                )
            yield number, record
        else:
            return
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise TraceError(f"{path.name} is not JSON: {first_line(error)}.") from None
    yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
