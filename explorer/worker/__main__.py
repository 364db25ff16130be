"""The worker process, which the app starts as ``python -m explorer.worker``: one job at a time."""

import importlib
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from capture import record
from capture.errors import CaptureCancelled, CaptureError, first_line
from capture.progress import Progress
from capture.store import recover
from explorer.errors import ComparisonCancelled, ExplorerError, JobCancelled
from explorer.worker.requests import (
    CaptureRequest,
    CompareRequest,
    JobOutcome,
    RecoverRequest,
    Request,
)

REPORT_SECONDS = 0.1  # progress is sent at most this often

Report = Callable[[Progress], None]


def run_job(request: Request, report: Report, cancelled: Callable[[], bool]) -> str:
    """Do what a request asks and return the path of the file that came of it.

    Raises
    ------
    CaptureCancelled, ComparisonCancelled, JobCancelled
        When ``cancelled()`` became true and the job ended because of it.
    CaptureError, ExplorerError
        With a message for the user.
    """
    if cancelled():
        raise JobCancelled("The job was stopped before it began.")
    if isinstance(request, RecoverRequest):
        report(Progress("writing", message="closing the file"))
        return str(recover(Path(request.partial)))
    if isinstance(request, CaptureRequest):
        return _capture(request, report, cancelled)
    if isinstance(request, CompareRequest) and request.capture is not None:
        _capture(request.capture, report, cancelled)
    report(Progress("loading", message="importing the libraries"))
    # by name: it imports torch and scikit-learn, which a capture does not have to wait for
    jobs = importlib.import_module("explorer.worker.jobs")
    return str(jobs.run_job(request, report, cancelled))


def _capture(request: CaptureRequest, report: Report, cancelled: Callable[[], bool]) -> str:
    report(Progress("loading", message="importing the model library"))
    out = Path(request.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = request.recorded()
    record(request.model, request.prompts, out, **options, progress=report, cancel=cancelled)
    return str(out)


class Worker:
    """Run jobs in the order they come in.

    Parameters
    ----------
    connection : Connection
        To the app; see :mod:`explorer.worker.requests`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._app_is_gone = threading.Event()
        self._last_report = 0.0
        self._last_stage = ""

    def run(self) -> None:
        """Work until the app says that it is over, or is gone."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        while (job := self._jobs.get()) is not None:
            number, request = job
            self._send(number, self._outcome(number, request))

    def stop(self) -> None:
        """End the job at hand as if it were cancelled, and then the process."""
        self._app_is_gone.set()
        self._jobs.put(None)

    def _listen(self) -> None:
        try:
            while (message := self._connection.recv()) is not None:
                number, request = message
                if request is None:
                    self._cancelled.add(number)
                else:
                    self._jobs.put((number, request))
        except (EOFError, OSError):
            pass  # the app is gone
        self.stop()

    def _outcome(self, number: int, request: Request) -> JobOutcome:
        def progress(report: Progress) -> None:
            self._report_progress(number, report)

        def cancelled() -> bool:
            return self._app_is_gone.is_set() or number in self._cancelled

        try:
            return JobOutcome("done", run_job(request, progress, cancelled))
        except (CaptureCancelled, ComparisonCancelled, JobCancelled) as stop:
            return JobOutcome("cancelled", None if stop.path is None else str(stop.path), str(stop))
        except (CaptureError, ExplorerError) as error:
            return JobOutcome("failed", error=str(error))
        except Exception as error:
            # our bug, or one of a library: the console gets the traceback, the page one line
            traceback.print_exc()
            said = f"{type(error).__name__}: {first_line(error)}"
            return JobOutcome("failed", error=f"{said} (the app's console has the whole story)")

    def _report_progress(self, number: int, report: Progress) -> None:
        now = time.monotonic()
        if report.stage == self._last_stage and now - self._last_report < REPORT_SECONDS:
            return
        self._last_report, self._last_stage = now, report.stage
        self._send(number, report)

    def _send(self, number: int, message: Progress | JobOutcome) -> None:
        try:
            self._connection.send((number, message))
        except OSError:
            self._app_is_gone.set()


def serve() -> None:
    """Work for the app at the other end of the connection whose number is the last argument."""
    with Connection(int(sys.argv[-1])) as connection:
        worker = Worker(connection)
        # the stop of a container, or of the service that runs the app
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        worker.run()


if __name__ == "__main__":
    serve()
