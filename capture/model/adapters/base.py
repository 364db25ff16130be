"""What an adapter is: how one kind of MoE block is recognised, listened to, told a choice.

Hooks fill a channel. From inside compiled code they reach it through one custom op: a compiler
traces a hook once and keeps what it did to tensors, not what it did to Python objects. The op is
opaque to it, claims to write to a sink so that it is neither dropped nor moved, and runs in Python
at every forward pass. It copies what it is given: compiled code uses its buffers again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model.attributes import flat_rows

# what is recorded: ids and weights with the run of the experts, without it, the run alone, and
# the router's scores and input, as far as they are named behind it
CHOICE, IDS, RUN, SCORES = "choice", "ids", "run", "scores"


class Listener(Protocol):
    """Where a site's tensors go: a :class:`capture.model.adapters.Channel`."""

    number: int

    def put_choice(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep ids and weights, and count a run of the experts."""
        ...

    def put_ids(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep ids and weights."""
        ...

    def put_run(self) -> None:
        """Count a run of the experts."""
        ...

    def put_scores(self, scores: torch.Tensor | None, hidden: torch.Tensor | None) -> None:
        """Keep scores and the wanted rows of the router's input."""
        ...


_listeners: dict[int, Listener] = {}


@contextmanager
def listening(listeners: Sequence[Listener]) -> Iterator[None]:
    """Let compiled code reach the listeners while the block runs."""
    _listeners.update({listener.number: listener for listener in listeners})
    try:
        yield
    finally:
        for listener in listeners:
            _listeners.pop(listener.number, None)


# CUDA graphs replay kernels without Python; the tag keeps the op out of them
@torch.library.custom_op(
    "routescope::record", mutates_args=("sink",), tags=(torch.Tag.cudagraph_unsafe,)
)
def record(sink: torch.Tensor, values: list[torch.Tensor], number: int, what: str) -> None:
    """Hand copies of the tensors to the listener of this number, if it still listens.

    Parameters
    ----------
    sink : Tensor [1]
        Left as it is.
    values : list of Tensor
    number : int
    what : str
        One of the words above.
    """
    listener = _listeners.get(number)
    if listener is None:
        return
    kind, *names = what.split()
    if kind == RUN:
        listener.put_run()
    elif kind == SCORES:
        given = dict(zip(names, values, strict=True))
        scores = given.get("scores")
        # the wanted rows of the input are copied there
        listener.put_scores(None if scores is None else scores.clone(), given.get("hidden"))
    else:
        put = listener.put_choice if kind == CHOICE else listener.put_ids
        put(values[0].clone(), values[1].clone())


@record.register_fake
def _(sink: torch.Tensor, values: list[torch.Tensor], number: int, what: str) -> None:
    """Nothing comes back."""


class Parts(NamedTuple):
    """The pieces of one MoE block that an adapter recognised.

    Attributes
    ----------
    router : Module
        Scores the experts.
    experts : Module
        Holds the experts' weights; equals the block itself where they have no module.
    n_experts : int
        Routed experts, as many as the router's scores have columns.
    top_k : int
        Experts per token.
    score_function : str or None
        Fixed by the family, or None: the self-test measures it.
    skips : bool
        Whether the last of the experts is the choice to leave out the block.
    is_proven : bool
        Whether the adapter held what it hears against what the block puts out, row by row.
    note : str
        What a reader of the run should know of this kind of block, or nothing.
    """

    router: nn.Module
    experts: nn.Module
    n_experts: int
    top_k: int
    score_function: str | None = None
    skips: bool = False
    is_proven: bool = False
    note: str = ""


@dataclass(slots=True)
class Channel:
    """What one site put out during one forward pass; hooks fill it, ``Taps.take`` empties it.

    Attributes
    ----------
    scores : Tensor [..., E] or None
        As the router put them out.
    hidden : Tensor [R', D] or None
        Router inputs of the wanted rows, copied.
    expert_ids, weights : Tensor [R, K] or None
        In the model's order; -1 = empty slot.
    n_scored, n_routed : int
        How often the router and the experts ran.
    problems : list of str
        What a hook could not read; ``Taps.take`` refuses the forward pass with it.
    rows : Rows or None
        Which router inputs are wanted; None = none.
    translate : callable or None
        Turns the ids and weights that the experts were told into the ids to record.
    number : int
        By which compiled code names this channel, see :mod:`capture.model.adapters.base`.
    sink : Tensor [1]
        What the custom op claims to write to, so that compilers neither drop nor move it.
    """

    scores: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    expert_ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    n_scored: int = 0
    n_routed: int = 0
    problems: list[str] = field(default_factory=list)
    rows: "Rows | None" = None
    translate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    number: int = field(default_factory=count().__next__)
    sink: torch.Tensor = field(default_factory=lambda: torch.zeros(1))

    def put_choice(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep what the experts were told to do: ids [..., K] and weights [..., K]."""
        if torch.compiler.is_compiling():
            record(self.sink, [expert_ids.detach(), weights.detach()], self.number, CHOICE)
            return
        self.put_ids(expert_ids, weights)
        self.put_run()

    def put_ids(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep ids [..., K] and weights [..., K], where another hook sees the experts run."""
        if torch.compiler.is_compiling():
            record(self.sink, [expert_ids.detach(), weights.detach()], self.number, IDS)
            return
        self.expert_ids, self.weights = expert_ids.detach(), weights.detach()
        if self.translate is not None:
            self.expert_ids = self.translate(self.expert_ids, self.weights)

    def put_run(self) -> None:
        """Count a run of the experts."""
        if torch.compiler.is_compiling():
            record(self.sink, [], self.number, RUN)
            return
        self.n_routed += 1

    def put_scores(self, scores: torch.Tensor | None, hidden: torch.Tensor | None) -> None:
        """Keep the router's scores [..., E] and copy the wanted rows of its input [..., D]."""
        if torch.compiler.is_compiling():
            given = {"scores": scores, "hidden": hidden}
            names = [name for name, value in given.items() if value is not None]
            values = [value.detach() for value in given.values() if value is not None]
            record(self.sink, values, self.number, " ".join([SCORES, *names]))
            return
        self.scores = None if scores is None else scores.detach()
        rows = None if self.rows is None else self.rows()
        if rows is not None and hidden is not None:
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            # copied now: the block may go on to write into this tensor, and the rest is not wanted
            self.hidden = flat.index_select(0, rows.to(flat.device, non_blocking=True))
        self.n_scored += 1

    def clear(self) -> None:
        """Forget the forward pass."""
        self.scores = self.hidden = self.expert_ids = self.weights = None
        self.n_scored = self.n_routed = 0
        self.problems.clear()


class Rows(Protocol):
    """Tells which rows of the router's input a forward pass should keep."""

    def __call__(self) -> torch.Tensor | None:
        """Return row indices [R'], int64, or None for no rows."""
        ...


class Choice(NamedTuple):
    """What experts are told to do for ``T`` tokens.

    Attributes
    ----------
    expert_ids : Tensor [T, K], int64
        In the order of the slots; -1 = empty slot, which costs nothing.
    weights : Tensor [T, K]
        Combine weights as the experts apply them; 0 in an empty slot.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor

    def flat(self) -> "Choice":
        """Return a choice [..., K] as [R, K]."""
        return Choice(flat_rows(self.expert_ids), flat_rows(self.weights))


class Decider(Protocol):
    """Decides what a block executes in place of its router.

    Attributes
    ----------
    replays : bool
        Whether it tells experts what a model told them, so that the model's own code runs as is.
    reads : frozenset of str
        What it reads of the model's own router: ``"logits"``, ``"native"``, both or nothing.
    hears : bool
        Whether :meth:`see` has to be called.
    """

    replays: bool
    reads: frozenset[str]
    hears: bool

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Take the router's input [..., D] and its output [..., E]."""
        ...

    def decide(self, native: Choice | None) -> Choice:
        """Return what the experts are told instead of ``native`` [R, K]; None = not computed."""
        ...


class Seat(NamedTuple):
    """Where a choice is put in: one block.

    Attributes
    ----------
    module : str
        Its full name, for messages.
    block : Module
    parts : Parts
    """

    module: str
    block: nn.Module
    parts: Parts


class Adapter(Protocol):
    """One kind of MoE block.

    One that can also be told another choice than its router's has ``replace``, see
    :class:`Replacing`.
    """

    name: str

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Return the parts of ``block`` when it is of this kind, by its structure."""
        ...

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Install hooks that fill ``channel`` and never change what the model computes."""
        ...


@runtime_checkable
class Replacing(Protocol):
    """An adapter whose blocks can be told another choice than their router's."""

    name: str

    def replace(self, seat: Seat, decider: Decider) -> AbstractContextManager[None]:
        """Let the block execute what ``decider`` says and nothing but that, until it is left.

        The place is that at which :meth:`Adapter.listen` listens. The model's own experts code
        runs throughout, on fewer rows where slots are empty, so that a swapped layer is as fast or
        slow as the implementation the model was loaded with.

        Raises
        ------
        SwapError
            Here or while the block runs, if this block has no place where a choice can be put in.
        """
        ...
