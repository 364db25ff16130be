"""After a kill: the server, or it and its worker at once; what was open and half done."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from app_pages import opened
from synthetic import write_run

from capture.store import RunReader
from explorer.queries.overview import token_count
from explorer.run import open_run
from explorer.worker import RecoverRequest, WorkerClient
from explorer.worker.client import ROOT

pytestmark = pytest.mark.slow

# an app without its pages: a run is open, a capture runs; it says what its bar has counted
SERVER = """
import json, sys, time
from pathlib import Path
from explorer.queries.overview import token_count
from explorer.run import open_run
from explorer.worker import CaptureRequest, WorkerClient
opened, out = sys.argv[1:]
worker = WorkerClient()
with open_run(Path(opened)) as run:
    job = worker.submit(CaptureRequest(out, prompts="demo-heldout", sample_tokens=0)).job_id
    while worker.job(job).progress.tokens_done < 2000:
        assert worker.job(job).active, worker.job(job).error
        time.sleep(0.02)
    counted = worker.job(job).progress.tokens_done
    print(json.dumps([worker.pid, counted, token_count(run)]), flush=True)
    time.sleep(600)
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("killed", ["server", "both"])
def test_a_kill_spares_open_runs_and_what_the_bar_had_counted(tmp_path, killed):
    mine, out = tmp_path / "mine.duckdb", tmp_path / "new.duckdb"
    partial = tmp_path / "new.duckdb.partial"
    write_run(mine)
    before = digest(mine)
    command = [sys.executable, "-c", SERVER, str(mine), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        pid, counted, tokens = json.loads(server.stdout.readline())
        if killed == "both":
            os.kill(pid, signal.SIGKILL)
        server.kill()

    worker = WorkerClient()
    try:
        if killed == "both":
            # the restarted app offers it on the page Capture
            assert partial.exists() and not out.exists()
            job = worker.wait(worker.submit(RecoverRequest(str(partial))).job_id, 120)
            assert (job.state, job.path) == ("done", str(out)), job.error
        else:
            # a worker without its app ends the job as if it were cancelled
            until(out.exists)
            until(lambda: not partial.exists())
    finally:
        worker.close()
    with RunReader.open(out) as run:
        assert run.info["complete"] is False
        assert run.info["n_tokens"] >= counted
    with open_run(mine) as run:
        assert token_count(run) == tokens
    assert digest(mine) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.duckdb", "new.duckdb"]


def test_a_link_to_a_job_of_before_the_restart_says_so(tmp_path, monkeypatch):
    write_run(tmp_path / "mine.duckdb")
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    app = opened("capture", run="mine", job="7")
    assert not app.exception
    assert any("the app was restarted" in info.value for info in app.info)
