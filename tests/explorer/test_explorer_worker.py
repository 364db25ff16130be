"""The worker: a real process without a model, driven as the app does."""

import json
import os
import signal
import sys
import textwrap
import time
from multiprocessing import Pipe

import pytest

from capture.progress import Progress
from explorer.errors import WorkerError
from explorer.worker import CaptureRequest, RecoverRequest, WorkerClient
from explorer.worker.capture_cost import CHARACTERS_PER_TOKEN, comparison_seconds, cost

pytestmark = pytest.mark.slow

# what a job does is told by its model name, so that no test needs a real model
FAKE = """
    import os, sys, time
    from capture.errors import ModelError
    from explorer.worker import __main__ as process
    from explorer.errors import JobCancelled
    from capture.progress import Progress

    def run_job(request, report, cancelled):
        print("a library prints this", flush=True)
        word = request.model
        if word == "quick":
            report(Progress("recording", 5, 10, 2.5, 2.0, "half"))
            return request.out
        if word == "refused":
            raise ModelError("No such model; give another.")
        if word == "bug":
            raise ValueError("surprise")
        if word == "dies":
            os.kill(os.getpid(), 9)
        if word == "prompts":
            return str(len(request.prompts)) + request.prompts[0]["text"]
        for _ in range(600):
            report(Progress("recording", 1, 10))
            if cancelled() and word != "deaf":
                raise JobCancelled("Stopped.", request.out)
            time.sleep(0.05)
        return request.out

    process.run_job = run_job
    process.serve()
"""


@pytest.fixture(scope="module")
def client():
    """A worker for all tests: what dies in one of them is started again by the next job."""
    worker = WorkerClient([sys.executable, "-c", textwrap.dedent(FAKE)], cancel_seconds=60.0)
    yield worker
    worker.close()


def submit(client, word, out="none/a.duckdb", prompts="demo"):
    return client.submit(CaptureRequest(out, word, prompts)).job_id


def until_running(client, job_id):
    deadline = time.monotonic() + 60
    while client.job(job_id).progress.stage != "recording":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_reports_progress_and_its_file(client):
    job = client.wait(submit(client, "quick"), 60)
    assert (job.state, job.path) == ("done", "none/a.duckdb")
    assert job.progress == Progress("recording", 5, 10, 2.5, 2.0, "half")


def test_refusals_are_messages_and_bugs_name_their_kind(client):
    refused = client.wait(submit(client, "refused"), 60)
    assert (refused.state, refused.error) == ("failed", "No such model; give another.")
    bug = client.wait(submit(client, "bug"), 60)
    assert bug.error.startswith("ValueError: surprise")


def test_one_process_runs_jobs_in_order(client):
    first, second = submit(client, "slow", "/a"), submit(client, "quick", "/b")
    until_running(client, first)
    pid = client.pid
    assert client.job(second).state == "queued"
    client.cancel(first)
    assert client.wait(first, 60).state == "cancelled"
    assert client.wait(second, 60).state == "done"
    assert client.pid == pid


def test_a_second_request_for_the_same_file_joins_the_first(client):
    first = submit(client, "slow", "/a")
    assert submit(client, "slow", "/a") == first
    client.cancel(first)
    client.wait(first, 60)
    assert submit(client, "quick", "/a") != first


def test_cancelling_a_waiting_job_never_starts_it(client):
    first, second = submit(client, "slow", "/a"), submit(client, "quick", "/b")
    client.cancel(second)
    assert client.job(second).state == "cancelled"
    client.cancel(first)
    assert client.wait(first, 60).path == "/a"


def test_a_job_that_does_not_stop_loses_its_process(client, monkeypatch):
    monkeypatch.setattr(client, "_cancel_seconds", 0.5)
    job_id = submit(client, "deaf")
    until_running(client, job_id)
    client.cancel(job_id)
    job = client.wait(job_id, 60)
    assert job.state == "cancelled"
    assert "did not end by itself" in job.error
    assert client.wait(submit(client, "quick"), 60).state == "done"


def test_a_dying_worker_takes_only_its_job_and_says_what_is_left(client, tmp_path):
    out = tmp_path / "mine.duckdb"
    (tmp_path / "mine.duckdb.partial").touch()
    died, waiting = submit(client, "dies", str(out)), submit(client, "quick", "/b")
    job = client.wait(died, 60)
    assert job.state == "failed"
    assert "signal 9" in job.error
    assert "mine.duckdb.partial" in job.error
    assert client.wait(waiting, 60).state == "done"


def test_prompts_of_any_script_arrive_whole(client):
    text = "שלום <b>\n🙂\u202e"
    job = client.wait(submit(client, "prompts", prompts=[{"text": text}]), 60)
    assert job.path == "1" + text


def test_sigterm_ends_the_job_and_keeps_what_it_recorded(client):
    job_id = submit(client, "slow", "/a")
    until_running(client, job_id)
    os.kill(client.pid, signal.SIGTERM)
    job = client.wait(job_id, 60)
    assert (job.state, job.path) == ("cancelled", "/a")


def test_closing_ends_the_process_and_refuses_new_jobs():
    worker = WorkerClient([sys.executable, "-c", textwrap.dedent(FAKE)], cancel_seconds=5.0)
    job_id = submit(worker, "slow")
    until_running(worker, job_id)
    worker.close()
    assert worker.pid is None
    with pytest.raises(WorkerError, match="restart the app"):
        submit(worker, "quick")


def test_a_command_that_cannot_start_is_a_message():
    worker = WorkerClient(["/nonexistent/python"])
    job = worker.wait(submit(worker, "quick"), 5)
    assert job.state == "failed"
    assert "could not be started" in job.error
    worker.close()


@pytest.mark.parametrize(
    "request_", [CaptureRequest("/a.duckdb", generate=3), RecoverRequest("/a.duckdb.partial")]
)
def test_requests_arrive_as_they_were_sent(request_):
    ours, theirs = Pipe()
    with ours, theirs:
        ours.send(request_)
        assert theirs.recv() == request_
    assert request_.title == "a"


def test_the_cost_of_the_demo_model_is_counted_without_loading_it():
    from capture.prompts import read_prompts

    prompts = read_prompts(["one two three", {"text": "four", "domain": "d"}])
    found = cost("demo", prompts, level="ids", generate=10, sample_tokens=5)
    assert found.counted
    assert 20 + 4 <= found.estimate.tokens < 40
    assert found.estimate.sample_tokens == 5


def test_the_cost_of_a_model_without_tokenizer_is_guessed(tmp_path):
    from capture.prompts import read_prompts

    config = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = cost(str(tmp_path), read_prompts(["x" * 400]), level="stats")
    assert not found.counted
    assert found.estimate.tokens == int(400 / CHARACTERS_PER_TOKEN) + 1
    (tmp_path / "config.json").write_text("{}")
    assert cost(str(tmp_path), read_prompts(["x"]), level="stats") is None
    assert cost("no/such model!", read_prompts(["x"]), level="stats") is None


@pytest.mark.slow(seconds=5)
def test_a_real_capture_runs_in_the_worker_and_cancel_keeps_what_was_recorded(tmp_path):
    from capture.store import RunReader

    worker = WorkerClient()
    try:
        out = tmp_path / "run.duckdb"
        request = CaptureRequest(str(out), prompts=[{"text": "Once upon a time"}], sample_tokens=0)
        job = worker.wait(worker.submit(request).job_id, 120)
        assert job.state == "done", job.error
        with RunReader.open(out) as run:
            assert run.info["n_prompts"] == 1
        again = worker.wait(worker.submit(request).job_id, 60)
        assert again.state == "failed"
        assert "run.duckdb" in again.error
    finally:
        worker.close()


def test_a_comparison_takes_as_many_passes_as_it_has_routers_and_conditions():
    what = {"tokens": 1000, "fit_tokens": 2000, "seeds": 1, "latency": False}
    low, high = comparison_seconds((1e-3, 2e-3), routers=2, conditions=0, **what)
    # one pass of each at least; two controls and a fit beside each, and as much again, at most
    assert low == pytest.approx(2.0) and high == pytest.approx(2 * 2e-3 * 2 * (3000 + 2000))
    more = comparison_seconds((1e-3, 2e-3), routers=2, conditions=3, **what)
    assert more[0] == pytest.approx(low + 3.0) and more[1] > high
    seeds = comparison_seconds((1e-3, 2e-3), routers=2, conditions=0, **what | {"seeds": 3})
    assert seeds == pytest.approx((low, 3 * high))
