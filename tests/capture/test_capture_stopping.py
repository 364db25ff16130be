"""What a capture leaves behind however it ends: by a signal, by a kill, on a full disk."""

import errno
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import processes
import pytest
import tiny_models
from store_runs import make_forward, make_site, start, write
from synthetic import write_run

import capture
from capture.errors import CaptureCancelled, StoreError
from capture.recorder import session
from capture.recorder.transfer import WriterThread
from capture.store import RunReader, RunWriter, counts_only, files, migrate, recover
from capture.store import writer as writer_module

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITES = [make_site(0, 5, 2), make_site(1, 4, 1)]


@pytest.fixture
def default_signals():
    """Handle signals as a program does that is started in a terminal."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    kept = {number: signal.getsignal(number) for number in ours}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert kept == ours, "a capture leaves the signals as they were"


def forward(first=0):
    return make_forward(first, 4, SITES, np.random.default_rng(first))


def record(model, out, **options):
    prompts = [[3 + n, 4, 5, 6] for n in range(12)]
    options = {"sample_tokens": 0, "progress": False, "batch_tokens": 1, **options}
    return capture.record(model, prompts, out, **options)


def on_forward(action, *, number=6):
    """Return a tiny model that calls ``action`` in one of its forward passes."""
    model, calls = tiny_models.build("olmoe"), []

    def hook(*_):
        calls.append(1)
        if len(calls) == number:
            action()

    model.model.register_forward_pre_hook(hook)
    return model


def n_tokens(path):
    with RunReader.open(path) as run:
        return run.info["n_tokens"], run.info["complete"]


@pytest.mark.parametrize(
    ("sent", "word"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated")]
)
def test_a_signal_while_recording_keeps_what_was_recorded(tmp_path, default_signals, sent, word):
    model = on_forward(lambda: signal.raise_signal(sent), number=8)
    with pytest.raises(CaptureCancelled, match=f"{word}: .* kept as the incomplete run") as caught:
        record(model, tmp_path / "a.duckdb")
    stored, complete = n_tokens(caught.value.path)
    assert stored in range(4, 48, 4) and not complete
    assert [path.name for path in tmp_path.iterdir()] == ["a.duckdb"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_closing_is_told_and_the_file_is_closed(tmp_path, default_signals, sent):
    messages = []

    def listen(report):
        messages.append(report.message)
        if report.message.startswith("Closing"):
            signal.raise_signal(sent)

    path = record(tiny_models.build("olmoe"), tmp_path / "a.duckdb", progress=listen)
    assert n_tokens(path) == (48, True)
    assert any("is being closed, which goes on" in message for message in messages)


def test_a_second_signal_while_closing_leaves_all_to_recover(
    tmp_path, default_signals, monkeypatch
):
    finish = RunWriter.finish

    def interrupted(self, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return finish(self, **options)

    monkeypatch.setattr(RunWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        record(tiny_models.build("olmoe"), tmp_path / "a.duckdb")
    assert "capture recover" in caught.value.__notes__[0]
    assert n_tokens(recover(tmp_path / "a.duckdb.partial")) == (48, False)


def test_a_signal_between_the_two_steps_of_a_rename_keeps_the_run(
    tmp_path, default_signals, monkeypatch
):
    unlink = os.unlink

    def interrupted(path, **options):
        if str(path).endswith("a.duckdb.partial"):
            monkeypatch.setattr(os, "unlink", unlink)
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(tiny_models.build("olmoe"), tmp_path / "a.duckdb")
    assert n_tokens(tmp_path / "a.duckdb") == (48, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.duckdb"]


def test_recover_ends_a_rename_that_a_kill_cut_in_half(tmp_path):
    out = write(tmp_path / "a.duckdb", SITES, [forward()])
    partial = files.partial_of(out)
    os.link(out, partial)
    assert recover(partial) == out
    assert n_tokens(out) == (4, True)
    assert not partial.exists()


def test_what_waits_is_committed_while_the_model_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0.05)
    kept = []
    create = RunWriter.create
    monkeypatch.setattr(RunWriter, "create", lambda *args: kept.append(create(*args)) or kept[0])

    def wait():  # as a forward pass that takes long
        deadline = time.monotonic() + 60
        while kept[0].stored_tokens < 5 * 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        kept.append(kept[0].stored_tokens)

    monkeypatch.setattr(session, "_Session", _waiting(session._Session, wait, after=5))
    record(tiny_models.build("olmoe"), tmp_path / "a.duckdb")
    assert kept[1] == 5 * 4


def _waiting(kind, wait, *, after):
    """Return a session that waits before the pass that follows ``after`` recorded ones."""

    class Waiting(kind):
        def run(self, stop):
            check, passes = stop.check, []

            def counted():
                passes.append(1)
                if len(passes) == after + 1:
                    wait()
                check()

            return super().run(_Stop(stop, counted))

    return Waiting


class _Stop:
    def __init__(self, stop, check):
        self.interrupts, self.check = stop.interrupts, check


def test_decoding_steps_are_committed_before_their_batch_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0)
    done = []
    texts = ["naïve 日本語 🙂 text", "one two"]
    options = {"sample_tokens": 0, "generate": 24}
    often = capture.record("demo", texts, tmp_path / "a", progress=done.append, **options)
    counted = {report.tokens_done for report in done if report.stage == "recording"}
    assert len(counted) > 4, "nothing, the prompts, and several times some of the decoded tokens"
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 1e9)
    once = capture.record("demo", texts, tmp_path / "b", progress=False, **options)
    with RunReader.open(often) as a, RunReader.open(once) as b:
        sql = "SELECT prompt_id, position, phase, token, text, loss FROM tokens ORDER BY ALL"
        assert a.query(sql).to_pydict() == b.query(sql).to_pydict()


# records one prompt a pass and prints what the bar says
COUNTING = """
import sys, time, capture, tiny_models
from capture.store import writer
writer.COMMIT_SECONDS = 0.05
model = tiny_models.build("olmoe")
model.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
capture.record(model, [[3, 4, 5]] * 1000, sys.argv[1], batch_tokens=1, sample_tokens=0,
               progress=lambda r: print(r.tokens_done, flush=True))
"""


@pytest.mark.slow(seconds=5)
def test_what_the_bar_has_counted_survives_a_kill(tmp_path):
    out = tmp_path / "a.duckdb"
    process = processes.start(tmp_path, [out], code=COUNTING)

    def counted():
        # the line that is being printed may be half there
        return max(map(int, process.stdout.rpartition("\n")[0].split()), default=0)

    while counted() < 60:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert n_tokens(recover(files.partial_of(out)))[0] >= counted()


def test_an_idle_writer_thread_keeps_up_and_tells_what_went_wrong():
    idle, done = threading.Event(), []
    thread = WriterThread(done.append, idle=idle.set)
    thread.put(1)
    assert idle.wait(60)
    thread.close()
    assert done == [1]

    def fail():
        raise StoreError("no room")

    thread = WriterThread(done.append, idle=fail)
    assert thread.failed.wait(60)
    with pytest.raises(StoreError, match="no room"):
        thread.close()


# ---- names


def test_two_captures_of_one_name_make_one_file(tmp_path, monkeypatch):
    first = start(tmp_path / "a", SITES)
    # the other one looked before the first one had made its file
    monkeypatch.setattr(writer_module, "check_new", lambda out: None)
    with pytest.raises(StoreError, match="appeared while this capture began"):
        start(tmp_path / "a", SITES)
    first.append(forward())
    assert n_tokens(first.finish(seconds=0)) == (4, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_partial_file_that_vanished_leaves_no_empty_run(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_link)
    writer = start(tmp_path / "a", SITES)
    writer.append(forward())
    abandon = writer.abandon
    monkeypatch.setattr(writer, "abandon", lambda: (abandon(), writer.partial.unlink()))
    with pytest.raises(StoreError, match="vanished before it could be named"):
        writer.finish(seconds=0)
    assert not list(tmp_path.iterdir())


def refuse_link(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("make", [counts_only, migrate])
def test_two_exports_of_one_name_make_one_run(tmp_path, monkeypatch, make, links):
    source = tmp_path / "source.duckdb"
    source.write_bytes(gzip.decompress((ROOT / "tests/data/run_v1.duckdb.gz").read_bytes()))
    if make is counts_only:
        source = write_run(tmp_path / "new.duckdb").path
    if not links:
        monkeypatch.setattr(os, "link", refuse_link)
    give_name, out = files.give_name, tmp_path / "out.duckdb"

    def late(fresh, name):
        out.write_text("another one was quicker")
        give_name(fresh, name)

    monkeypatch.setattr(files, "give_name", late)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(
        StoreError, match="appeared in the meantime, and a run is never overwritten"
    ):
        make(source, out)
    assert {path.name for path in tmp_path.iterdir()} == before | {"out.duckdb"}
    assert out.read_text() == "another one was quicker"


def test_a_capture_killed_before_its_first_transaction_frees_its_name(tmp_path):
    partial = files.partial_of(tmp_path / "a")
    for n, make in enumerate([lambda: duckdb.connect(str(partial)).close(), partial.touch]):
        make()
        with pytest.raises(StoreError, match=r"it holds nothing, .* Record a again"):
            recover(partial)
        writer = start(tmp_path / "a", SITES)
        writer.append(forward(n))
        assert n_tokens(writer.finish(seconds=0)) == (4, True)
        (tmp_path / "a").unlink()


def test_files_without_a_name_are_forgotten_after_a_day(tmp_path):
    old, young = tmp_path / ".a.1.new", tmp_path / ".a.2.new"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    start(tmp_path / "b", SITES).discard()
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


def test_a_run_whose_rename_failed_is_recovered_complete(tmp_path, monkeypatch):
    writer = start(tmp_path / "a", SITES)
    writer.append(forward())
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse_link)
        patch.setattr(os, "replace", refuse_link)
        with pytest.raises(StoreError, match="closed and whole, but could not be renamed"):
            writer.finish(seconds=7)
    assert not writer.out.exists()
    with RunReader.open(recover(writer.partial)) as run:
        assert run.info["complete"] and run.info["seconds"] == 7


# closes a partial file where a file may have so many bytes and no more
LIMITED = """
import resource, sys
from capture.errors import StoreError
from capture.store import recover
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    recover(sys.argv[1])
except StoreError as error:
    print(error)
"""


def test_recover_on_a_full_disk_says_so_and_loses_nothing(tmp_path):
    writer = start(tmp_path / "a", SITES)
    random = np.random.default_rng(0)
    for n in range(40):
        writer.append(make_forward(n * 200, 200, SITES, random))
    writer.flush()
    writer.abandon()
    room = writer.partial.stat().st_size
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, writer.partial, str(room)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "could not be" in said.stdout and "a run file was expected" not in said.stdout.lower()
    assert "space" in said.stdout and not said.stderr
    assert n_tokens(recover(writer.partial)) == (8000, False)


def test_links_and_pipes_are_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    writer = start(elsewhere / "a", SITES)
    writer.append(forward())
    writer.flush()
    writer.abandon()
    (folder / "a.partial").symlink_to(writer.partial)
    os.mkfifo(folder / "b.partial")
    for name in ("a.partial", "b.partial"):
        assert not files.is_own_file(folder / name)
        with pytest.raises(StoreError, match="a link out of its folder, a folder or a device"):
            recover(folder / name)
    assert writer.partial.exists()
    (elsewhere / "c.partial").symlink_to("a.partial")
    assert files.is_own_file(elsewhere / "c.partial")
    (elsewhere / "loop").symlink_to("loop")
    assert not files.is_own_file(elsewhere / "loop")
