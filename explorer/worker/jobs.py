"""What the worker does for each kind of request."""

from collections.abc import Callable
from pathlib import Path

from capture.errors import CaptureCancelled, quoted
from capture.progress import Progress
from capture.store import recover
from explorer.errors import ComparisonCancelled, ComparisonError
from explorer.maps.cache import MapOptions
from explorer.maps.data import Source
from explorer.run import open_run
from explorer.worker.protocol import (
    DEMO_MODEL,
    CaptureRequest,
    CompareRequest,
    CosinesRequest,
    ProjectRequest,
    RecoverRequest,
    Request,
)

Report = Callable[[Progress], None]


class Cancelled(Exception):
    """The job was stopped because the app asked for it.

    Attributes
    ----------
    path : str or None
        The run file with what was recorded until then, when there is one.
    """

    def __init__(self, message: str, path: str | None) -> None:
        super().__init__(message)
        self.path = path


def run_job(request: Request, report: Report, cancelled: Callable[[], bool]) -> str:
    """Do what a request asks and return the path of the file that came of it.

    Raises
    ------
    Cancelled
        When ``cancelled()`` became true and the job ended because of it.
    CaptureError, ExplorerError
        With a message for the user.
    """
    if isinstance(request, RecoverRequest):
        return _recover(request, report)
    if isinstance(request, ProjectRequest):
        return _project(request, report, cancelled)
    if isinstance(request, CompareRequest):
        return _compare(request, report, cancelled)
    if isinstance(request, CosinesRequest):
        return _cosines(request, report, cancelled)
    return _capture(request, report, cancelled)


def _capture(request: CaptureRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    if cancelled():
        raise Cancelled("The capture was stopped before it began.", None)
    report(Progress("loading", message="importing the model library"))
    from capture import record

    Path(request.out).parent.mkdir(parents=True, exist_ok=True)
    try:
        path = record(
            request.model,
            request.prompts,
            Path(request.out),
            **request.recorded(),
            progress=report,
            cancel=cancelled,
        )
    except CaptureCancelled as stop:
        raise Cancelled(str(stop), _existing(request.out)) from None
    return str(path)


def _recover(request: RecoverRequest, report: Report) -> str:
    report(Progress("writing", message="closing the file"))
    return str(recover(Path(request.partial)))


def _project(request: ProjectRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    # it needs no torch, but seconds of imports that a capture can do without
    from explorer.maps.make import make_clusters, make_map, make_rerouted

    def on_progress(message: str, part: float) -> None:
        if cancelled():
            raise Cancelled("Nothing was kept.", None)
        report(Progress("mapping", message=message, part=part))

    on_progress("Loading the libraries", 0.0)
    source = Source(request.unit, request.feature, request.layer, request.site)  # type: ignore[arg-type]
    out = Path(request.out)
    if request.router:
        chosen = (request.router, request.seed)
        return str(make_rerouted(request.run, source, out, *chosen, on_progress))
    if not request.method:
        options = MapOptions(seed=request.seed)
        return str(make_map(request.run, source, out, options, on_progress))
    how = (request.method, request.n_clusters, request.seed)
    return str(make_clusters(request.run, source, out, *how, on_progress))  # type: ignore[arg-type]


def _compare(request: CompareRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    if request.capture is not None:
        _capture(request.capture, report, cancelled)
    if cancelled():
        raise Cancelled("The comparison was stopped before it began.", None)
    _refuse_unnamed_model(request)
    report(Progress("loading", message="importing the model library"))
    from explorer.comparison.compare import compare

    try:
        with compare(
            request.run,
            request.routers or None,
            live=request.live,
            layers=request.layers,
            replay=request.replay,
            seeds=request.seeds,
            tokens=request.tokens,
            fit_tokens=request.fit_tokens,
            controls=request.controls,
            latency=request.latency,
            oracle=request.oracle,
            progress=report,
            cancelled=cancelled,
        ) as comparison:
            path = str(comparison.path)
    except ComparisonCancelled as stop:
        raise Cancelled(str(stop), None if stop.path is None else str(stop.path)) from None
    if request.conditions:
        _conditions(request, path, report, cancelled)
    return path


def _refuse_unnamed_model(request: CompareRequest) -> None:
    """Refuse to load a model that only the run names, and not whoever started the job."""
    if not (request.live or request.layers or request.oracle or request.conditions):
        return
    with open_run(request.run) as run:
        named = str(run.info["model"])
    if named not in (DEMO_MODEL, request.model):
        raise ComparisonError(
            f"This needs the model that the run names, {quoted(named)}, and nobody said that it "
            "may be loaded. Tick the box that names it, or compare by replay only."
        )


def _conditions(
    request: CompareRequest, path: str, report: Report, cancelled: Callable[[], bool]
) -> None:
    from explorer.comparison.conditions.effects import measure_conditions

    def say(what: str) -> None:
        if cancelled():
            raise Cancelled("The conditions that were measured are in the file.", path)
        report(Progress("comparing", message=f"condition: {what}"))

    measure_conditions(
        request.run,
        request.conditions,
        students=(),
        tokens=request.tokens,
        fit_tokens=request.fit_tokens,
        progress=say,
    )


def _cosines(request: CosinesRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    from explorer.worker.expert_weights import measure_cosines  # torch

    def on_progress(message: str, part: float) -> None:
        if cancelled():
            raise Cancelled("Nothing was kept.", None)
        report(Progress("mapping", message=message, part=part))

    model = (request.model, request.revision)
    return str(measure_cosines(Path(request.out), request.run, *model, on_progress))


def _existing(path: str) -> str | None:
    return path if Path(path).exists() else None
