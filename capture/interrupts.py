"""Ctrl-C and a request to end: never lost, no torn file, and told apart from errors of DuckDB."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# what DuckDB raises instead, as a bare RuntimeError
_INTERRUPTED = "Query interrupted"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a container is stopped, or a job is preempted."""


class Interrupts:
    """Which signals have come since :func:`remembered_interrupts` began.

    ``last`` is how to tell of the last one, None when there was none.
    """

    def __init__(self) -> None:
        self.last: type[KeyboardInterrupt] | None = None
        self._closing: Callable[[], None] | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: raise what it means, or put the first one off while a file is closed."""
        self.last = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        say, self._closing = self._closing, None
        if say is None:
            raise self.last
        say()

    @contextmanager
    def closing(self, say: Callable[[], None]) -> Iterator[None]:
        """Let the block end although a signal comes; ``say`` tells so, and the next one ends it."""
        self._closing = say
        try:
            yield
        finally:
            self._closing = None


@contextmanager
def remembered_interrupts() -> Iterator[Interrupts]:
    """Turn SIGTERM into :class:`Terminated`, and remember it and Ctrl-C.

    Python raises KeyboardInterrupt wherever the main thread is. Inside a callback whose errors
    are ignored, such as a finalizer or an operator of torch, it is swallowed; ``last`` still
    knows. Outside the main thread nothing is changed, nor is a signal that the caller handles.
    """
    interrupts = Interrupts()
    taken = {}
    if threading.current_thread() is threading.main_thread():
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        taken = {n: handler for n, handler in ours.items() if signal.getsignal(n) is handler}
    try:
        for number in taken:
            signal.signal(number, interrupts.handle)
        yield interrupts
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt where DuckDB says that a query was interrupted."""
    try:
        yield
    except RuntimeError as error:
        if _INTERRUPTED not in str(error):
            raise
        raise KeyboardInterrupt from error
