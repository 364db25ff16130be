"""``capture.engines.ray``: one capture by the machines of a Ray cluster, spread by Ray Data.

``python -m capture MODEL --engine ray``, which is ``record``, cuts the prompts into slices, which
Ray Data hands to a pool of actors that hold the model. A slice becomes a part file under a name
made from its prompts (``capture.recorder.parts``), so that one whose actor died is recorded again
without a trace of the first attempt, and what is there already is not recorded again.
"""

import importlib.util
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capture.errors import CaptureCancelled, CaptureError, ConfigError, first_line, quoted
from capture.interrupts import Interrupts, Terminated, remembered_interrupts
from capture.paths import RUN_SUFFIX, given_path
from capture.progress import Reporter
from capture.prompts import PromptList, PromptSource, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.parts import RunPart, is_whole, plan_parts, put_together
from capture.recorder.record import template_of
from capture.store import partition
from capture.store.files import check_new
from capture.store.merge import merged_from
from capture.store.reader import RunReader

if TYPE_CHECKING:
    from capture.recorder.session import Prepared

SLICE = 256  # prompts
MOST_SLICES = 1000  # a merge holds all of them open
TRIES = 6  # of a slice whose actors die, which Ray Data itself would begin again for ever

_HERE = "local"  # Ray's word for a cluster of its own


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How a capture is spread: ``--engine-options`` with ``--engine ray``.

    Attributes
    ----------
    actors : int, optional
        Processes that hold the model; by default one a GPU of the cluster, or 2.
    prompts : int, optional
        Of a slice, by default 256, or as many as make 1,000 slices; a kill costs the slice at hand.
    num_gpus, num_cpus : float
        Of an actor; by default 1 GPU where the cluster has some, and 1 CPU, which is as many
        threads.
    address : str, optional
        Of a cluster that runs, or ``"auto"`` to find it; by default the environment variable
        RAY_ADDRESS, or else Ray starts on this machine.
    partition : bool
        Write the run with its rows in partitioned Parquet, as ``python -m capture partition``.
    """

    actors: int | None = None
    prompts: int | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    address: str | None = None
    partition: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("actors", "prompts"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise _wrong(name, "a whole number of at least 1", value)
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (value is None and name == "num_gpus") and not (is_number and value >= 0):
                raise _wrong(name, "a number of at least 0", value)
        if type(self.partition) is not bool:
            raise _wrong("partition", "true or false", self.partition)
        if self.address is not None and not isinstance(self.address, str):
            raise _wrong("address", "a text such as 'ray-head:6379'", self.address)

    def slices(self, n_prompts: int) -> int:
        """Return into how many slices so many prompts are cut, whoever records them."""
        size = self.prompts or max(SLICE, math.ceil(n_prompts / MOST_SLICES))
        return math.ceil(n_prompts / size)


def record(
    model: str | Path,
    prompts: PromptSource,
    out: str | Path,
    *,
    progress: bool = True,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Record the routing of a model on a Ray cluster, as ``capture.record`` does in one process.

    The driver reads the prompts; every actor loads the model and writes into the folder of ``out``,
    which all of them must see. The same call goes on where a capture was stopped.

    Parameters
    ----------
    model : str or Path
        ``"demo"``, a Hugging Face id, or a local folder.
    prompts : str, Path or iterable
        As ``capture.record`` takes them.
    out : str or Path
        The run file; it must not exist.
    progress : bool
        Whether to draw a bar on standard error.
    engine : mapping, optional
        The fields of :class:`Pool`, such as ``{"actors": 8, "num_gpus": 1}``.
    **options
        Those of :class:`capture.CaptureConfig`, but for ``shard`` and ``parts``.

    Raises
    ------
    CaptureCancelled
        If it was interrupted; slices that are whole stay.
    ConfigError
        If Ray is not installed or cannot start, or an option cannot work.
    CaptureError
        If the prompts, the model or the file cannot work, or fewer prompts or tokens are in the run
        than there are.
    """
    pool, config = _pool_of(engine or {}), CaptureConfig(**options)
    if config.shard is not None or config.parts is not None:
        raise ConfigError(
            "shard and parts are for processes that share the prompts by themselves, and Ray hands "
            "slices out. Leave them out; --engine-options '{\"prompts\": 64}' sets a slice's size."
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "Ray is not installed in this environment. Run: pip install "
            "-r capture/engines/requirements-ray.txt"
        )
    if config.chat_template is not None:
        config = replace(config, chat_template=template_of(config.chat_template))
    path = given_path(out, "the run file")
    given = read_prompts(
        prompts,
        text_column=config.text_column,
        domain_column=config.domain_column,
        encoding=config.encoding,
    )
    with closing(Reporter(progress, unit=" slices")) as reporter:
        plan = plan_parts(str(model), given, config, path.absolute(), pool.slices(len(given)))
        if merged_from(path) == plan[0].note.capture:
            reporter.enter("done", f"{path} is there already, of all {len(plan)} slices.")
            return path
        check_new(path)
        tokens = _spread(model, given, config, plan, pool, reporter)
        reporter.enter("writing", f"Putting {len(plan):,} slices together as {path}.")
        _finish(plan, path, pool)
        _check_counts(path, len(given), tokens)
        reporter.enter("done", f"{path}: {len(given):,} prompts recorded.")
    return path


def _wrong(name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"The engine option {name} must be {expected}, got {quoted(value)}.")


def _pool_of(engine: Mapping[str, Any]) -> Pool:
    known = [field.name for field in fields(Pool)]
    unknown = [name for name in engine if name not in known]
    if unknown:
        raise ConfigError(
            f"Ray's engine options are {', '.join(known)}; {quoted(unknown[0])} is none of them."
        )
    return Pool(**engine)


def _spread(
    model: str | Path,
    given: PromptList,
    config: CaptureConfig,
    plan: Sequence[RunPart],
    pool: Pool,
    reporter: Reporter,
) -> int | None:
    """Record the slices that are not there; return how many prompt tokens all are to have.

    None where all of them were there.
    """
    todo = [number for number, part in enumerate(plan) if not is_whole(part)]
    if not todo:
        return None
    if model != "demo" and Path(model).is_dir():
        model = Path(model).absolute()  # an actor may work in another folder
    reporter.enter("loading", f"Starting Ray for {len(todo):,} slices of {len(given):,} prompts.")
    tokens = 0
    # what Ray says of dead processes goes to standard output, where the run's path is to be
    with redirect_stdout(sys.stderr), _cluster(pool) as local, remembered_interrupts():
        reporter.enter("recording", total=len(plan))
        done = len(plan) - len(todo)
        reporter.reach(done)
        job = (str(model), given, config, plan)
        try:
            with closing(_rows(todo, job, pool, config.device, local)) as rows:
                for row in rows:
                    if row["error"]:
                        raise pickle.loads(row["error"])  # of our own actor
                    tokens, done = int(row["tokens"]), done + 1
                    reporter.reach(done)
        except KeyboardInterrupt as error:
            how = "Terminated" if isinstance(error, Terminated) else "Interrupted"
            raise CaptureCancelled(
                f"{how}: {done} of {len(plan)} slices are in {plan[0].path.parent}. The same "
                "command records the others."
            ) from error
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"Ray could not record all slices: {first_line(error)}. {done} of {len(plan)} are "
                f"in {plan[0].path.parent}; the same command records the others."
            ) from error
    return tokens


@contextmanager
def _cluster(pool: Pool) -> Iterator[bool]:
    """Connect to Ray, or start it on this machine; yield whether it was started here."""
    # of what its processes in C++ say, only why they end
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray  # optional: only whoever records with it has it

    if ray.is_initialized():
        yield False
        return
    root = str(Path(__file__).parents[2])
    found = os.environ.get("PYTHONPATH")
    address = pool.address or os.environ.get("RAY_ADDRESS") or _HERE
    environment = {"PYTHONPATH": os.pathsep.join([root, *([found] if found else [])])}
    try:
        ray.init(
            address,
            include_dashboard=False if address == _HERE else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
        )
    except Exception as error:
        raise ConfigError(f"Ray cannot start: {first_line(error)}.") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray leaves Python at once
        yield address == _HERE
    finally:
        ray.shutdown()


def _rows(
    todo: Sequence[int],
    job: tuple[str, PromptList, CaptureConfig, Sequence[RunPart]],
    pool: Pool,
    device: str | None,
    local: bool,
) -> Generator[dict[str, Any]]:
    """Have Ray Data map the slices; yield what each came to, as they end."""
    import ray
    import ray.data

    have = ray.cluster_resources()
    gpus = pool.num_gpus
    if gpus is None:
        gpus = 1 if have.get("GPU") and device != "cpu" else 0
    actors = pool.actors or (max(1, int(have.get("GPU", 0) // gpus)) if gpus else 2)
    actors = min(actors, len(todo))
    for name, each in (("GPU", gpus), ("CPU", pool.num_cpus)):
        if local and each * actors > have.get(name, 0):
            raise ConfigError(
                f"{actors} actors of {each:g} {name}s were asked for, and this machine has "
                f"{have.get(name, 0):g}. Set actors, num_gpus or num_cpus in --engine-options."
            )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    slices = ray.data.from_items(
        [{"slice": number} for number in todo], override_num_blocks=len(todo)
    )
    done = slices.map_batches(
        _Recorder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        # in a list, Ray hands references on as they are
        fn_constructor_args=[[ray.put(job)], ray.remote(num_cpus=0)(_Tries).remote()],
        num_cpus=pool.num_cpus,
        num_gpus=gpus,
    )
    yield from done.iter_rows()


class _Tries:
    """An actor that knows how often each slice was begun."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count a try of a slice; return which one it is."""
        self._begun[number] += 1
        return self._begun[number]


class _Recorder:
    """An actor of the pool: holds the model from its first slice on.

    What it raises comes back as a row: Ray would try again, and tell it in its own words.
    """

    def __init__(self, job: list[Any], tries: Any) -> None:
        self._job = job[0]
        self._tries = tries
        self._ready: tuple[Prepared, Sequence[RunPart]] | None = None
        self._open = ExitStack()  # as long as the process

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Record a batch of one slice."""
        tokens, failure = 0, b""
        try:
            tokens = self._record(int(batch["slice"][0]))
        except CaptureError as error:
            failure = pickle.dumps(error)
        return {"tokens": np.array([tokens]), "error": np.array([failure], object)}

    def _record(self, number: int) -> int:
        import ray

        from capture.recorder.session import Stopper, prepared  # the driver needs no torch

        started = time.monotonic()
        if ray.get(self._tries.begin.remote(number)) > TRIES:
            raise CaptureError(
                f"Slice {number} was begun {TRIES} times, and its actor died each time: perhaps "
                "the memory of a machine is too small for so many actors. Give fewer, or slices "
                "of fewer prompts (--engine-options)."
            )
        if self._ready is None:
            model, given, config, plan = ray.get(self._job)
            whole = self._open.enter_context(
                prepared(model, given, config, None, Reporter(progress=False))
            )
            self._ready = whole, plan
        whole, plan = self._ready
        if not is_whole(plan[number]):
            whole.record_part(plan[number], Stopper(Interrupts()), started)
        return sum(len(prompt.ids) for prompt in whole.prompts)


def _finish(plan: Sequence[RunPart], out: Path, pool: Pool) -> None:
    """Merge the slices, and partition the run where that is asked for."""
    merged = plan[0].path.with_name(f"whole{RUN_SUFFIX}") if pool.partition else out
    if put_together(plan, merged) is None:
        missing = [str(number) for number, part in enumerate(plan) if not is_whole(part)]
        raise CaptureError(
            f"Ray ended, and the slices {', '.join(missing[:10])} of {len(plan)} are not in "
            f"{plan[0].path.parent}, which every machine must see. The same command records them."
        )
    if pool.partition:
        partition(merged, out)
        merged.unlink()


def _check_counts(out: Path, n_prompts: int, n_tokens: int | None) -> None:
    """Refuse a run that has not as many prompts, and prompt tokens, as were planned."""
    with RunReader.open(out) as run:
        info = run.info
    found = info["n_prompts"], info["n_tokens"] - info["n_generated"]
    planned = n_prompts, found[1] if n_tokens is None else n_tokens
    if found != planned:
        raise CaptureError(
            f"{planned[0]} prompts of {planned[1]} tokens were to be recorded, but {found[0]} of "
            f"{found[1]} were. Please report this."
        )
