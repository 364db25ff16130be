"""``capture.TrainerCallback``: watch routing while ``transformers.Trainer`` trains.

What routers did with the batches of a step are sums on the device, and figures on the host.
"""

import inspect
import json
import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import TrainerCallback as Base

from capture.errors import CaptureError, ConfigError, quoted
from capture.model.inputs import is_sharded
from capture.model.sites import Site
from capture.paths import given_path
from capture.prompts import PromptSource, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.observe import SiteGroup, group_sites
from capture.recorder.own_loop.listening import CallListener, Failure, ObservedCall, innermost
from capture.recorder.own_loop.recording import evaluating, ranked, take, tested
from capture.recorder.record import record
from capture.recorder.transfer import WAIT_SECONDS, Parcel, Staging, WriterThread
from capture.store.records import Array, Level
from kernels.ops.gate import gate_batch

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
            if self._prompts is not None and is_sharded(kwargs["model"]):
                raise CaptureError(
                    "Prompts are recorded by one process, but each holds a part of the weights "
                    "(FSDP). Leave out every and prompts, and record saved checkpoints instead."
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
        self._sums: _Sums | None = None
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
        listener = CallListener(self._model, self._sites, self._failure, self._take)
        self._hooks.enter_context(listener.open())

    def away(self) -> ExitStack:
        """Listen to nothing until the block is left."""
        stack = ExitStack()
        if self._is_open:
            self._hooks.close()
            stack.callback(self._listen)
        return stack

    def _take(self, seen: ObservedCall) -> None:
        # evaluation in between is none of the training batches
        if self._model.training:
            self._sums = _added(self._sums, _sums_of(seen, self._groups))

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
        figures, routers = _figures_of(parcel.open(), self._groups, self._sites)
        self._logged.append(figures)
        if self._file is not None:
            self._file.write(_as_line(step, figures, routers))
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


REAL, PADDING = 0, 1
Figures = dict[str, float]


class _GroupSums(NamedTuple, Generic[Array]):
    """Sums of S routers of one shape over the tokens of a step; [., 0] real ones, [., 1] padding.

    Attributes
    ----------
    load : array [S, 2, E], assignments
    importance : array [S, 2, E] or None
        Sums of probabilities; None where the routers' scores are not known.
    entropy, squares : array [S] or None
        Sums over real tokens of the gate entropy (nats) and of logsumexp squared.
    tokens : array [2]
    """

    load: Array
    importance: Array | None
    entropy: Array | None
    squares: Array | None
    tokens: Array


_Sums = list[_GroupSums[torch.Tensor]]


@torch.no_grad()
def _sums_of(seen: ObservedCall, groups: Sequence[SiteGroup]) -> _Sums:
    """Return the sums of one call; nothing waits for the device."""
    valid = seen.call.valid
    n_rows = seen.call.rows * seen.call.width
    found = []
    for group in groups:
        picked = [seen.sites[i] for i in group.members]
        device = picked[0].expert_ids.device
        real = torch.ones(n_rows, dtype=torch.bool, device=device)
        if valid is not None:
            real = valid.flatten().to(device, non_blocking=True)
        scores = [one.scores for one in picked if one.scores is not None]
        with torch.autocast(device.type, enabled=False):
            out = gate_batch(
                scores if len(scores) == len(picked) else None,
                expert_ids=[one.expert_ids for one in picked],
                weights=[one.weights for one in picked],
                rows=None,
                n_experts=group.n_experts,
                top_k=group.top_k,
                score_function=group.score_function,
                segments=(~real).long(),
                n_segments=2,
                importance=True,
            )
        squares = None
        if out.logsumexp is not None and group.logsumexp_known:
            squares = torch.where(real, out.logsumexp.square(), 0.0).sum(-1)
        found.append(
            _GroupSums(
                load=out.load,
                importance=out.importance,
                entropy=None if out.entropy is None else torch.where(real, out.entropy, 0).sum(-1),
                squares=squares,
                tokens=torch.stack([real.sum(), n_rows - real.sum()]),
            )
        )
    return found


def _added(sums: _Sums | None, more: _Sums) -> _Sums:
    """Add the sums of two calls."""
    if sums is None:
        return more

    def plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None or other is None else one + other

    return [
        _GroupSums(*(plus(a, b) for a, b in zip(one, other, strict=True)))  # type: ignore[arg-type]
        for one, other in zip(sums, more, strict=True)
    ]


def _figures_of(
    sums: Sequence[_GroupSums[npt.NDArray[Any]]], groups: Sequence[SiteGroup], sites: Sequence[Site]
) -> tuple[Figures, list[dict[str, Any]]]:
    """Return the figures of a step: over all routers, and of each.

    Returns
    -------
    figures : dict
        Means over the routers: ``max_violation`` (busiest expert's excess, fair shares),
        ``load_entropy`` (share of ln E), ``gate_entropy`` (nats), ``z_loss`` (mean square of
        logsumexp); ``dead_experts``, how many took no token, of all routers together; and
        ``aux_loss``, the load-balancing loss as transformers computes it over all routers, with
        ``aux_loss_with_padding``, what it is where padding counts. What is not known is left out.
    routers : list of dict
        ``layer``, ``site``, ``load`` (E counts) and the same figures.

    References
    ----------
    Fedus et al. 2021, arXiv:2101.03961, eq. 4-6; Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    routers: list[dict[str, Any]] = []
    pooled: dict[str, list[float]] = {}
    for group, one in zip(groups, sums, strict=True):
        n_real, n_all = float(one.tokens[REAL]), float(one.tokens.sum())
        if not n_real:
            continue
        for place, index in enumerate(group.members):
            info = sites[index].info
            load = one.load[place, REAL].astype(np.float64)
            here: dict[str, Any] = {"layer": info.layer, "site": info.site}
            here["load"] = one.load[place, REAL].tolist()
            here |= _balance(load)
            if one.entropy is not None:
                here["gate_entropy"] = float(one.entropy[place]) / n_real
            if one.squares is not None:
                here["z_loss"] = float(one.squares[place]) / n_real
            if one.importance is not None:
                importance = one.importance[place].astype(np.float64)
                here["aux_loss"] = _aux_loss(load, importance[REAL], n_real)
                both = one.load[place].sum(axis=0).astype(np.float64)
                here["aux_loss_with_padding"] = _aux_loss(both, importance.sum(axis=0), n_all)
            routers.append(here)
        if one.importance is not None:
            n_sites = len(group.members)
            load, importance = one.load.sum(axis=0), one.importance.sum(axis=0)
            pooled.setdefault("aux_loss", []).append(
                _aux_loss(load[REAL], importance[REAL], n_real * n_sites)
            )
            pooled.setdefault("aux_loss_with_padding", []).append(
                _aux_loss(load.sum(axis=0), importance.sum(axis=0), n_all * n_sites)
            )
    routers.sort(key=lambda router: (router["layer"], router["site"]))
    figures: Figures = {}
    for name in ("max_violation", "load_entropy", "gate_entropy", "z_loss"):
        values = [router[name] for router in routers if name in router]
        if values:
            figures[name] = float(np.mean(values))
    if routers:
        figures["dead_experts"] = float(sum(router["dead_experts"] for router in routers))
    # routers of different shapes have no common one
    figures |= {name: values[0] for name, values in pooled.items() if len(groups) == 1}
    return figures, routers


def _balance(load: npt.NDArray[np.float64]) -> dict[str, float]:
    share = load / load.sum() if load.sum() else load
    used = share[share > 0]
    n_experts = len(load)
    entropy = float(-(used * np.log(used)).sum())
    return {
        "max_violation": float(share.max() * n_experts - 1),
        "load_entropy": entropy / np.log(n_experts) if n_experts > 1 else 1.0,
        "dead_experts": int((load == 0).sum()),
    }


def _aux_loss(load: npt.NDArray[Any], importance: npt.NDArray[Any], n_tokens: float) -> float:
    """Return E times the sum over experts of assignments a token times mean probability."""
    product = (load.astype(np.float64) / n_tokens) * (importance.astype(np.float64) / n_tokens)
    return float(len(load) * product.sum())


def _as_line(step: int, figures: Figures, routers: Sequence[dict[str, Any]]) -> str:
    """Write the figures of a step as one line of JSON; what is no number is left out."""

    def numbers(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or np.isfinite(value)
        }

    rows = [numbers(router) for router in routers]
    return json.dumps({"step": step, **numbers(figures), "routers": rows}) + "\n"
