"""The worker process, which the app starts as ``python -m explorer.worker``.

It takes jobs from standard input, one at a time, and reports on them to standard output.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import IO, Any

from capture.errors import CaptureError, first_line
from capture.progress import Progress
from explorer.errors import ExplorerError
from explorer.worker.jobs import Cancelled, run_job
from explorer.worker.protocol import encode, unpack_request

REPORT_SECONDS = 0.1  # progress is sent at most this often


class Worker:
    """Run jobs in the order they come in.

    Parameters
    ----------
    commands, reports : text streams
        Lines of the protocol, in and out.
    """

    def __init__(self, commands: IO[str], reports: IO[str]) -> None:
        self._commands = commands
        self._reports = reports
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._app_is_gone = threading.Event()
        self._last_report = 0.0
        self._last_stage = ""

    def run(self) -> None:
        """Work until the app closes the commands."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        while (job := self._jobs.get()) is not None:
            self._run_one(job["job"], job["request"])

    def stop(self) -> None:
        """End the job at hand as if it were cancelled, and then the process."""
        self._app_is_gone.set()
        self._jobs.put(None)

    def _listen(self) -> None:
        for line in self._commands:
            message = json.loads(line)
            if message["do"] == "cancel":
                self._cancelled.add(message["job"])
            else:
                self._jobs.put(message)
        self.stop()

    def _run_one(self, job_id: int, request: dict[str, Any]) -> None:
        def progress(report: Progress) -> None:
            self._report_progress(job_id, report)

        def cancelled() -> bool:
            return self._app_is_gone.is_set() or job_id in self._cancelled

        try:
            path = run_job(unpack_request(request), progress, cancelled)
            self._send(event="done", job=job_id, path=path)
        except Cancelled as stop:
            self._send(event="cancelled", job=job_id, path=stop.path, error=str(stop))
        except (CaptureError, ExplorerError) as error:
            self._send(event="failed", job=job_id, error=str(error))
        except Exception as error:
            # our bug, or one of a library: the console gets the traceback, the page one line
            traceback.print_exc()
            said = f"{type(error).__name__}: {first_line(error)}"
            text = f"{said} (the app's console has the whole story)"
            self._send(event="failed", job=job_id, error=text)

    def _report_progress(self, job_id: int, report: Progress) -> None:
        now = time.monotonic()
        if report.stage == self._last_stage and now - self._last_report < REPORT_SECONDS:
            return
        self._last_report, self._last_stage = now, report.stage
        self._send(event="progress", job=job_id, progress=report._asdict())

    def _send(self, **message: Any) -> None:
        try:
            self._reports.write(encode(message))
            self._reports.flush()
        except BrokenPipeError:
            self._app_is_gone.set()


def serve() -> None:
    """Keep standard output for the protocol alone, and work."""
    # what a library prints would break the protocol: it goes to standard error instead
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with reports, sys.stdin as commands:
        worker = Worker(commands, reports)
        # the stop of a container, or of the service that runs the app
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        worker.run()


if __name__ == "__main__":
    serve()
