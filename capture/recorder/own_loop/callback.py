"""``capture.TrainerCallback``: watch routing while ``transformers.Trainer`` trains."""

import inspect
import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from torch import nn
from transformers import TrainerCallback as Base

from capture.errors import CaptureError, ConfigError, quoted
from capture.paths import given_path
from capture.prompts import PromptSource, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.observe import SiteGroup, group_sites
from capture.recorder.own_loop.listening import Failure, Listener, Seen, innermost
from capture.recorder.own_loop.recording import evaluating, ranked, take, tested
from capture.recorder.own_loop.statistics import Sums, added, as_line, figures_of, sums_of
from capture.recorder.record import record
from capture.recorder.transfer import WAIT_SECONDS, Parcel, Staging, WriterThread
from capture.store.records import Level

log = logging.getLogger(__name__)
STATISTICS = "statistics.jsonl"
PREFIX = "routing/"
# the sums of a step with its number, or somebody who waits for all before
_Item = tuple[int, Parcel[Any]] | threading.Event


class TrainerCallback(Base):
    """Record fixed prompts every N steps, and statistics of every training batch.

    Prompts become one run file a step in the folder ``out``, which the page *Trends* opens while
    training runs. Statistics become a line a step in ``out/statistics.jsonl``, router by router,
    and their means since the last log go to whatever the trainer logs to, as ``routing/...``.
    Training computes what it computes without, bit for bit.

    Parameters
    ----------
    out : str or Path
        A folder; it is made where it is not there. Files of a training that is resumed stay.
    every : int, steps
        0 records no prompts.
    prompts : str, Path or iterable
        As ``capture.record`` takes them.
    statistics : bool
        Whether training batches are measured.
    level : str
        Of the run files.
    strict : bool
        Raise what fails where it happens; else training goes on, and it is logged once.

    Attributes
    ----------
    error : Exception or None
        What failed first; nothing is measured from there on.

    Raises
    ------
    ConfigError
        If steps are asked for without prompts, or the other way round.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int = 0,
        prompts: "PromptSource | None" = None,
        statistics: bool = True,
        level: Level = "ids",
        strict: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ConfigError(
                f"every must be a number of steps, got {quoted(every)}. 0 records no prompts."
            )
        if (every > 0) != (prompts is not None):
            raise ConfigError(
                "Prompts are recorded every N steps: give both prompts=... and every=N, or neither."
            )
        self._config = CaptureConfig(level=level, sample_tokens=0)
        self._out = given_path(out, "the folder of the runs")
        self._every = every
        self._prompts = None if prompts is None else read_prompts(prompts)
        self._measures = statistics
        self._failure = Failure(strict=strict)
        self._watch: _Watch | None = None
        self._told = False
        self._last_step = -1

    @property
    def error(self) -> Exception | None:
        """What failed first."""
        return self._failure.error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch; the first run is that of the model as it is."""
        frame = inspect.currentframe()
        _come_first(self, None if frame is None or frame.f_back is None else frame.f_back)
        with self._failure.kept():
            if getattr(args, "n_gpu", 1) > 1:
                raise CaptureError(
                    "Routing is watched in one model a process, but this trainer copies it to "
                    f"{args.n_gpu} GPUs (DataParallel). Start it with torchrun."
                )
            self._out.mkdir(parents=True, exist_ok=True)
            self._watch = _Watch(kwargs["model"], self._out, self._failure)
            self._record(state, kwargs)
            if self._measures:
                self._watch.open()
        self._tell()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the statistics of the step, and record the prompts where it is their turn."""
        if self._watch is not None and self.error is None:
            with self._failure.kept():
                self._watch.step(int(state.global_step))
                if self._every and state.global_step % self._every == 0:
                    self._record(state, kwargs)
        self._tell()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the means since the last log to what is logged."""
        logs = kwargs.get("logs")
        if self._watch is not None and self.error is None and isinstance(logs, dict):
            with self._failure.kept():
                if "loss" in logs:
                    found = self._watch.since_last_log()
                    logs.update(found)
                    if state.log_history and isinstance(state.log_history[-1], dict):
                        state.log_history[-1].update(found)
        self._tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the prompts once more, and stop."""
        if self._watch is not None:
            with self._failure.kept():
                if self.error is None:
                    self._record(state, kwargs)
            with self._failure.kept():
                self._watch.close()
            self._watch = None
        self._tell()

    def _record(self, state: Any, kwargs: dict[str, Any]) -> None:
        """Record the prompts with the model as it is now."""
        step = int(state.global_step)
        if self._prompts is None or step == self._last_step or not state.is_world_process_zero:
            return
        self._last_step = step
        path = ranked(self._out / f"step_{step:06d}.duckdb")
        if path.exists():
            return
        model = innermost(kwargs["model"])
        processing = kwargs.get("processing_class")
        assert self._watch is not None
        with self._watch.away(), evaluating(model):
            record(
                model,
                self._prompts,
                path,
                tokenizer=processing if callable(processing) else None,
                progress=False,
                level=self._config.level,
                sample_tokens=0,
            )

    def _tell(self) -> None:
        """Say once what failed; training goes on."""
        if self.error is not None and not self._told:
            self._told = True
            log.warning("Routing is no longer watched: %s Training goes on.", self.error)


def _come_first(callback: TrainerCallback, frame: Any) -> None:
    """Be called before those that log: a trainer calls callbacks in turn, its own loggers first."""
    handler = None if frame is None else frame.f_locals.get("self")
    callbacks = getattr(handler, "callbacks", None)
    if isinstance(callbacks, list) and callback in callbacks:
        callbacks.remove(callback)
        callbacks.insert(0, callback)


class _Watch:
    """Statistics of the training batches of one model, step by step."""

    def __init__(self, model: nn.Module, out: Path, failure: Failure) -> None:
        self._model = innermost(take(model, None).model)
        self._sites = tested(self._model)
        self._groups: list[SiteGroup] = group_sites(self._sites)
        self._path = ranked(out / STATISTICS)
        self._failure = failure
        self._sums: Sums | None = None
        self._logged: list[dict[str, float]] = []
        self._staging = Staging()
        self._file: TextIO | None = None
        self._thread: WriterThread[_Item] | None = None
        self._hooks = ExitStack()
        self._is_open = False

    def open(self) -> None:
        """Begin."""
        self._file = self._path.open("a", encoding="utf-8")
        self._thread = WriterThread(self._write)
        self._is_open = True
        self._listen()

    def _listen(self) -> None:
        listener = Listener(self._model, self._sites, self._failure, self._take)
        self._hooks.enter_context(listener.open())

    def away(self) -> ExitStack:
        """Listen to nothing until the block is left."""
        stack = ExitStack()
        if self._is_open:
            self._hooks.close()
            stack.callback(self._listen)
        return stack

    def _take(self, seen: Seen) -> None:
        # evaluation in between is none of the training batches
        if self._model.training:
            self._sums = added(self._sums, sums_of(seen, self._groups))

    def step(self, number: int) -> None:
        """Send the sums of a step."""
        if self._sums is not None and self._thread is not None:
            sums, self._sums = self._sums, None
            self._thread.put((number, self._staging.send(sums, stop=self._thread.failed)))

    def _write(self, item: _Item) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        step, parcel = item
        figures, routers = figures_of(parcel.open(), self._groups, self._sites)
        self._logged.append(figures)
        if self._file is not None:
            self._file.write(as_line(step, figures, routers))
            self._file.flush()

    def since_last_log(self) -> dict[str, float]:
        """Return the means of the figures since the last call."""
        reached = threading.Event()
        if self._thread is not None:
            self._thread.put(reached)
            while not reached.wait(WAIT_SECONDS) and not self._thread.failed.is_set():
                pass
        steps, self._logged = self._logged, []
        names = dict.fromkeys(name for step in steps for name in step)
        return {
            f"{PREFIX}{name}": sum(step[name] for step in steps if name in step)
            / sum(name in step for step in steps)
            for name in names
        }

    def close(self) -> None:
        """End; hooks are removed whatever happens."""
        self._is_open = False
        self._hooks.close()
        try:
            if self._thread is not None:
                self._thread.close()
        finally:
            if self._file is not None:
                self._file.close()
