"""The app's side of the worker: a queue of jobs and the process that runs them."""

import atexit
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from capture.progress import Progress
from explorer.errors import WorkerError
from explorer.worker.requests import JobOutcome, Request

ROOT = Path(__file__).resolve().parent.parent.parent
# threads that spin while they wait made captures seven times slower beside another busy program
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
COMMAND = (sys.executable, "-m", "explorer.worker")
KEPT_JOBS = 50  # finished jobs remembered
CANCEL_SECONDS = 15.0  # a cancelled job that has not ended by then loses its process


@dataclass(slots=True)
class Job:
    """One request and what became of it; ``progress`` keeps the last message that was not empty."""

    job_id: int
    request: Request
    state: Literal["queued", "running", "done", "failed", "cancelled"] = "queued"
    progress: Progress = field(default_factory=Progress)
    cancelling: bool = False
    path: str | None = None  # the run file, once there is one
    error: str = ""
    submitted_at: float = 0.0  # seconds since the epoch

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")


class WorkerClient:
    """Hand jobs to one worker process, started on the first job and again when it has died.

    The process gets one job at a time; the queue stays here, so that a dying process takes
    only the job with it that it was running. Safe to use from several threads.

    Parameters
    ----------
    command : sequence of str
        How the process is started; the number of its end of the connection is added.
    cancel_seconds : float, seconds
        How long a cancelled job may take to end before its process is killed.
    """

    def __init__(
        self, command: Sequence[str] = COMMAND, *, cancel_seconds: float = CANCEL_SECONDS
    ) -> None:
        self._command = list(command)
        self._cancel_seconds = cancel_seconds
        self._lock = threading.RLock()
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._queue: deque[int] = deque()
        self._running: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._reader: threading.Thread | None = None
        self._timers: list[threading.Timer] = []
        self._closed = False

    def submit(self, request: Request) -> Job:
        """Queue a job; a job that already waits or runs for the same file is returned instead.

        Raises
        ------
        WorkerError
            When the worker was closed.
        """
        with self._lock:
            if self._closed:
                raise WorkerError("The capture worker is shut down; restart the app.")
            for job in self._jobs.values():
                if job.active and job.request.out == request.out:
                    return replace(job)
            job = Job(next(self._numbers), request, submitted_at=time.time())
            self._jobs[job.job_id] = job
            self._queue.append(job.job_id)
            self._forget_old_jobs()
            self._start_next()
            return replace(job)

    def job(self, job_id: int) -> Job | None:
        """Return a snapshot of a job, or None when there is no job of that number."""
        with self._lock:
            job = self._jobs.get(job_id)
            return replace(job) if job else None

    def jobs(self) -> list[Job]:
        """Return snapshots of all jobs, newest first."""
        with self._lock:
            return [replace(job) for job in reversed(self._jobs.values())]

    def cancel(self, job_id: int) -> None:
        """Ask a job to stop: at once when it waits, else after the forward pass it is in."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or not job.active or job.cancelling:
                return
            job.cancelling = True
            if job.state == "queued":
                self._queue.remove(job_id)
                job.state = "cancelled"
                return
            self._send((job_id, None))
            timer = threading.Timer(self._cancel_seconds, self._kill_if_running, [job_id])
            timer.daemon = True
            self._timers.append(timer)
            timer.start()

    def wait(self, job_id: int, timeout: float) -> Job:
        """Block until a job has ended and return its snapshot; for tests and scripts.

        Raises
        ------
        WorkerError
            When there is no such job, or it has not ended after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if job is None:
                raise WorkerError(f"The worker knows no job {job_id}.")
            if not job.active:
                return job
            time.sleep(0.02)
        raise WorkerError(f"Job {job_id} has not ended after {timeout:g} s; cancel it.")

    @property
    def pid(self) -> int | None:
        """Process id of the living worker, or None."""
        with self._lock:
            process = self._process
            return process.pid if process and process.poll() is None else None

    def close(self) -> None:
        """End the process; a running capture keeps what it has recorded."""
        with self._lock:
            self._closed = True
            process, reader = self._process, self._reader
            for timer in self._timers:
                timer.cancel()
            self._send(None)
        if process is None:
            return
        try:
            process.wait(timeout=self._cancel_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader is not None:
            reader.join(timeout=5)

    def _start_next(self) -> None:
        if self._running is not None or not self._queue:
            return
        job = self._jobs[self._queue.popleft()]
        job.state, self._running = "running", job.job_id
        try:
            self._ensure_process()
        except OSError as error:
            text = f"The capture worker could not be started: {error}"
            self._end(job, JobOutcome("failed", error=text))
            return
        self._send((job.job_id, job.request))

    def _ensure_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        ours, theirs = Pipe()
        with theirs:
            # its own session: Ctrl-C in the terminal ends the app, and the app's end the worker
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                cwd=ROOT,
                env=ENVIRONMENT | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._connection = ours
        self._reader = threading.Thread(
            target=self._read, args=(self._process, ours), name="worker reader", daemon=True
        )
        self._reader.start()

    def _send(self, message: tuple[int, Request | None] | None) -> None:
        if self._connection is None:
            return
        # a broken pipe means the process is gone: its reader says so, with the exit status
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def _read(self, process: "subprocess.Popen[bytes]", connection: Connection) -> None:
        # half a message is the last thing that a dying process leaves
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                self._handle(*connection.recv())
        status = process.wait()
        with self._lock:
            if self._process is not process:
                return
            self._process = self._connection = None
            if self._running is not None and not self._closed:
                self._end_of_dead(self._jobs[self._running], status)

    def _handle(self, job_id: int, message: Progress | JobOutcome) -> None:
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or job.state != "running":
                return
            if isinstance(message, JobOutcome):
                self._end(job, message)
            else:
                # between two messages, what the last one said still holds
                job.progress = message._replace(message=message.message or job.progress.message)

    def _end(self, job: Job, outcome: JobOutcome) -> None:
        job.state, job.path, job.error = outcome
        job.cancelling = False
        self._running = None
        self._start_next()

    def _end_of_dead(self, job: Job, status: int) -> None:
        kept = (
            f" What was recorded until then is in {Path(job.request.out).name}.partial: "
            "the Capture page can recover it."
            if Path(job.request.out + ".partial").exists()
            else ""
        )
        if job.cancelling:
            text = f"The worker was stopped because it did not end by itself.{kept}"
            self._end(job, JobOutcome("cancelled", error=text))
            return
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = " Signal 9 usually means that memory ran out: try a smaller model or fewer prompts."
        text = (
            f"The capture worker {how} while it recorded {job.request.title!r}."
            f"{hint if status == -9 else ''}{kept} The next capture starts a new worker."
        )
        self._end(job, JobOutcome("failed", error=text))

    def _kill_if_running(self, job_id: int) -> None:
        with self._lock:
            if self._running == job_id and self._process is not None:
                self._process.kill()

    def _forget_old_jobs(self) -> None:
        ended = [job.job_id for job in self._jobs.values() if not job.active]
        for job_id in ended[:-KEPT_JOBS]:
            del self._jobs[job_id]


@functools.cache
def shared_worker() -> WorkerClient:
    """Return the one worker of this server, for every session and page."""
    client = WorkerClient()
    atexit.register(client.close)
    return client


def close_shared_worker() -> None:
    """End the worker of this server, if one was started; a running capture keeps what it has."""
    if shared_worker.cache_info().currsize:
        shared_worker().close()
