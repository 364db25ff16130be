"""How far a capture, a comparison or a job is: one record for the terminal and for the app."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm import tqdm

_log = logging.getLogger(__name__)
TOKENS = "tok"


class Progress(NamedTuple):
    """One report of something that runs: a capture counts tokens, a comparison routers.

    Stages of a capture are "loading", "self-test", "recording", "writing" and "done"; of a
    comparison "loading", "comparing" and "done". Tokens that are done are stored, which nothing
    can take back; their total counts every token that may be generated, so a capture can end below
    it. Routers count once for each seed and mode.
    """

    stage: str = "starting"
    done: int = 0
    total: int = 0
    per_second: float = 0.0  # over the stage so far; 0 before it starts
    seconds_left: float | None = None
    message: str = ""  # what just began, or the cost estimate; "" in between
    part: float | None = None  # how much is done, 0..1, of a job that counts nothing
    unit: str = TOKENS

    @property
    def tokens_done(self) -> int:
        """Tokens that are stored; 0 where something else is counted."""
        return self.done if self.unit == TOKENS else 0

    @property
    def tokens_total(self) -> int:
        """Tokens there are to be at most; 0 where something else is counted."""
        return self.total if self.unit == TOKENS else 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens stored a second; 0 where something else is counted."""
        return self.per_second if self.unit == TOKENS else 0.0


class Reporter:
    """Turns what runs into :class:`Progress` for one sink.

    True draws a bar on standard error, False is silent, a callable gets every report.
    """

    def __init__(self, progress: bool | Callable[[Progress], None], *, unit: str = TOKENS) -> None:
        self._sink = progress if callable(progress) else None
        self.draws = progress is True
        self._bar: Any = None
        self._now = Progress("loading", unit=unit)
        self._started = time.monotonic()

    @property
    def done(self) -> int:
        """How much is done."""
        return self._now.done

    def enter(
        self, stage: str, message: str = "", *, total: int | None = None, written: bool = True
    ) -> None:
        """Begin a stage; ``total`` begins to count, and ``written`` shows it in the terminal."""
        _log.info("%s: %s", stage, message)
        self._now = self._now._replace(stage=stage)
        if message and written:
            self.note(message)
        self._close_bar()
        if total is not None:
            self._now = self._now._replace(total=total)
            self._started = time.monotonic()
            self._open_bar(total)
        self._report(message)

    def reach(self, done: int) -> None:
        """Say how much is done by now; what may yet be lost does not count."""
        self._now = self._now._replace(done=done)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        self._report("")

    def at(self, message: str) -> None:
        """Say what is done now, beside the bar."""
        if self._bar is not None:
            self._bar.set_description(message)
        self._report(message)

    def note(self, message: str) -> None:
        """Write a line that stays in the terminal."""
        if self.draws:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal in order; a callable needs nothing."""
        self._close_bar()

    def _open_bar(self, total: int) -> None:
        if self.draws and total:
            unit = self._now.unit
            self._bar = tqdm(total=total, unit=unit, file=sys.stderr, leave=False)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _report(self, message: str) -> None:
        if self._sink is None:
            return
        now, elapsed = self._now, time.monotonic() - self._started
        speed = now.done / elapsed if now.done and elapsed > 0 else 0.0
        left = (now.total - now.done) / speed if speed else None
        if now.stage == "done":
            left = 0.0
        self._sink(now._replace(per_second=speed, seconds_left=left, message=message))
