"""How far a comparison is: one record for a bar in the terminal and for the app."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Stage = Literal["loading", "comparing", "done"]


class Progress(NamedTuple):
    """One report of a running comparison.

    Attributes
    ----------
    stage : {"loading", "comparing", "done"}
    done, total : int
        Routers, counted once for each seed and mode.
    seconds_left : float or None
    message : str
        What is being done.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    message: str = ""


class Reporter:
    """Turns what a comparison does into :class:`Progress` for one sink.

    Parameters
    ----------
    progress : bool or callable
        True draws a bar on standard error, False is silent, a callable gets every report.
    """

    def __init__(self, progress: bool | Callable[[Progress], None]) -> None:
        self._sink = progress if callable(progress) else None
        self._draws = progress is True
        self._bar: Any = None
        self._total = self._done = 0
        self._started = time.monotonic()

    def loading(self, message: str) -> None:
        """Say what happens before the first router."""
        self._report("loading", message)
        if self._draws:
            self.note(message)

    def start(self, total: int) -> None:
        """Begin with so many routers to go."""
        self._total, self._started = total, time.monotonic()
        if self._draws and total:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="run", leave=False)

    def at(self, message: str) -> None:
        """Say which router it is."""
        if self._bar is not None:
            self._bar.set_description(message)
        self._report("comparing", message)

    def advance(self) -> None:
        """Count one router."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        self._report("comparing", "")

    def note(self, message: str) -> None:
        """Write a line that stays."""
        if self._draws:
            from tqdm import tqdm

            tqdm.write(message, file=_stderr())

    def close(self, message: str = "") -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._report("done", message)

    def _report(self, stage: Stage, message: str) -> None:
        if self._sink is None:
            return
        elapsed, left = time.monotonic() - self._started, None
        if stage == "comparing" and self._done:
            left = elapsed / self._done * (self._total - self._done)
        self._sink(Progress(stage, self._done, self._total, left, message))


def _stderr() -> Any:
    import sys

    return sys.stderr
