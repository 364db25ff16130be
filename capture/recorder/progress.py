"""How far a capture is: one record for a bar in the terminal and for the app."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

_log = logging.getLogger(__name__)

Stage = Literal["loading", "self-test", "recording", "writing", "done"]


class Progress(NamedTuple):
    """One report of a running capture.

    Attributes
    ----------
    stage : {"loading", "self-test", "recording", "writing", "done"}
    tokens_done, tokens_total : int, tokens
        Those that are stored, which nothing can take back. The total counts every token that may
        be generated, so a capture can end below it.
    tokens_per_second : float
        Over the recording so far; 0 before it starts.
    seconds_left : float or None
    message : str
        What just began, or the cost estimate; '' in between.
    """

    stage: Stage
    tokens_done: int = 0
    tokens_total: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    message: str = ""


class Reporter:
    """Turns what the session does into :class:`Progress` for one sink.

    Parameters
    ----------
    progress : bool or callable
        True draws a bar on standard error, False is silent, a callable gets every report.
    """

    def __init__(self, progress: bool | Callable[[Progress], None]) -> None:
        self._bar = Bar() if progress is True else None
        self._sink: Callable[[Progress], None] | None = None
        if callable(progress):
            self._sink = progress
        elif self._bar is not None:
            self._sink = self._bar.show
        self.draws = self._bar is not None
        self._stage: Stage = "loading"
        self._total = 0
        self._done = 0
        self._started = time.monotonic()

    def enter(self, stage: Stage, message: str, *, total: int | None = None) -> None:
        """Begin a stage; ``total`` starts the clock of the recording."""
        _log.info("%s: %s", stage, message)
        self._stage = stage
        if total is not None:
            self._total = total
            self._started = time.monotonic()
        self._report(message)

    def stored(self, tokens: int) -> None:
        """Say how many tokens are on the disk by now; those that may yet be lost do not count."""
        self._done = tokens
        self._report("")

    def close(self) -> None:
        """Leave the terminal in order; a callable needs nothing."""
        if self._bar is not None:
            self._bar.close()

    def _report(self, message: str) -> None:
        if self._sink is None:
            return
        elapsed = time.monotonic() - self._started
        speed = self._done / elapsed if self._done and elapsed > 0 else 0.0
        left = (self._total - self._done) / speed if speed else None
        if self._stage == "done":
            left = 0.0
        self._sink(Progress(self._stage, self._done, self._total, speed, left, message))


class Bar:
    """A progress bar on standard error, with tokens per second and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, report: Progress) -> None:
        """Draw one report."""
        from tqdm import tqdm

        if report.message:
            tqdm.write(report.message, file=_stderr())
        if report.stage != "recording":
            self.close()
            return
        if self._bar is None:
            self._bar = tqdm(total=report.tokens_total, unit="tok", file=_stderr(), leave=False)
        self._bar.update(report.tokens_done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _stderr() -> Any:
    import sys

    return sys.stderr
