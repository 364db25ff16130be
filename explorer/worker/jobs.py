"""What the worker does for each kind of request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from capture.errors import CaptureCancelled
from explorer.worker.protocol import CaptureRequest, JobProgress, RecoverRequest, Request

Report = Callable[[JobProgress], None]


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
    """Do what a request asks and return the path of the run file that came of it.

    Raises
    ------
    Cancelled
        When ``cancelled()`` became true and the job ended because of it.
    CaptureError
        With a message for the user.
    """
    if isinstance(request, RecoverRequest):
        return _recover(request, report)
    return _capture(request, report, cancelled)


def _capture(request: CaptureRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    if cancelled():
        raise Cancelled("The capture was stopped before it began.", None)
    report(JobProgress("loading", message="importing the model library"))
    from capture import record

    def on_progress(progress: Any) -> None:
        values = progress._asdict()
        report(JobProgress(**{name: values[name] for name in JobProgress._fields}))

    Path(request.out).parent.mkdir(parents=True, exist_ok=True)
    try:
        path = record(
            request.model,
            request.prompts,
            Path(request.out),
            level=request.level,
            generate=request.generate,
            sample_tokens=request.sample_tokens,
            **request.attention,
            progress=on_progress,
            cancel=cancelled,
        )
    except CaptureCancelled as stop:
        raise Cancelled(str(stop), _existing(request.out)) from None
    return str(path)


def _recover(request: RecoverRequest, report: Report) -> str:
    from capture.store import recover

    report(JobProgress("writing", message="closing the file"))
    return str(recover(Path(request.partial)))


def _existing(path: str) -> str | None:
    return path if Path(path).exists() else None
