"""Processes that record, forked from one that has imported torch and transformers already.

Importing both takes 6 CPU seconds, which is most of what a small capture costs. ``start`` forks
from a process that did it once and did nothing else: it has one thread, no model and no database.
What runs is a process of its own: it has a folder, an environment and standard output in files,
ends with an exit code or by a signal, and may be killed.

Run as a script, this file is the process that is forked from. It reads one request a line: what
to run (answered by the process id), or the id of a process (answered by how it ended, or null).
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Process:
    """A process with its output in files; ``ask`` returns how it ended, or None."""

    def __init__(self, pid, ask, out):
        self.pid = pid
        self.returncode = None
        self._ask = ask
        self._out = out

    @property
    def stdout(self):
        """What it has printed by now."""
        return self._out.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def stderr(self):
        """What it has printed of errors and progress by now."""
        return self._out.with_suffix(".err").read_text(encoding="utf-8")

    def poll(self):
        """Return the exit code, minus the signal that ended it, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:  # before it is asked for, its number is nobody else's
            os.kill(self.pid, number)

    def wait(self, seconds=300):
        """Return how it ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)
        return self.returncode


def start(folder, arguments, *, code=None, **environment):
    """Start ``python -m capture`` with arguments in a folder, or a script of other code."""
    _server().started = number = _server().started + 1
    out = Path(folder) / f".process-{number}"
    given = {"arguments": [str(one) for one in arguments], "code": code, "folder": str(folder)}
    given |= {"out": str(out), "environment": os.environ | environment}
    for suffix in (".out", ".err"):
        out.with_suffix(suffix).touch()
    pid = _ask(given)
    return Process(pid, lambda: _ask(pid), out)


def start_anew(folder, arguments):
    """Start ``python -m capture`` as people do, which imports everything again."""
    out = Path(folder) / ".process"
    with out.with_suffix(".out").open("w") as stdout, out.with_suffix(".err").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "capture", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=stdout,
            stderr=stderr,
            # whoever runs the tests in the background has them ignore Ctrl-C, and children inherit
            # that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    return Process(process.pid, process.poll, out)


def _ask(request):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/capture")))
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    server.started = 0
    atexit.register(server.communicate)  # the end of its input is the end of it
    return server


def _serve():
    """Answer requests until there are none; return, in a new process, the one to be run."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            answers.close()
            return request
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def _become(request):
    """Be the process that was asked for, as if it had been started by itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)  # the one before has read ahead
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['out']}.{suffix}", os.O_WRONLY), number)
    sys.argv = ["capture", *request["arguments"]]
    if request["code"] is None:
        runpy.run_module("capture", run_name="__main__", alter_sys=True)
    else:
        exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import pyarrow.pandas_compat  # noqa: F401
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401
    from numba.core.registry import cpu_target

    import capture.recorder.session  # noqa: F401
    import kernels.ops.coactivation._numba
    import kernels.ops.gate._numba  # noqa: F401

    cpu_target.target_context.refresh()  # as before numba's first call of a compiled function
    # a lock that a thread holds would stay locked in those that are forked; the memory of Arrow
    # has a thread that knows of forks
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(names) - names.count("jemalloc_bg_thd") == 1, names
    gc.freeze()
    _become(_serve())
