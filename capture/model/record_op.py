"""How hooks hear from inside compiled code: one custom op, which hands tensors to a channel.

A compiler traces a hook once and keeps what it did to tensors, not what it did to Python objects.
The op is opaque to it, claims to write to a sink so that it is neither dropped nor moved, and runs
in Python at every forward pass. It copies what it is given: compiled code uses its buffers again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

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
