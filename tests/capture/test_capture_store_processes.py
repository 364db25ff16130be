"""The run file among several processes and threads, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_runs import make_forward, make_site, start, write

from capture.errors import StoreError
from capture.store import RunReader, recover

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITES = [make_site(1, 5, 2), make_site(4, 300, 3)]
BATCH = 7

# appends without end; prints the number of forward passes that are certainly on disk
ENDLESS = f"""
import sys
from pathlib import Path
import numpy as np
from store_runs import make_forward, make_site, start
from capture.store import writer
writer.COMMIT_SECONDS = 0.05
random = np.random.default_rng(0)
sites = [make_site(1, 5, 2), make_site(4, 300, 3)]
run = start(Path(sys.argv[1]), sites)
for n in range(10**6):
    run.append(make_forward(n * {BATCH}, {BATCH}, sites, random))
    if n % 10 == 9:
        run.flush()
        print(n + 1, flush=True)
"""
READ = """
import sys
from capture.store import RunReader
with RunReader.open(sys.argv[1]) as run:
    print(run.query("SELECT count(*) AS n FROM assignments").to_pylist()[0]["n"], flush=True)
    sys.stdin.readline()
"""


def spawn(code, *arguments):
    """Start a Python process that finds our packages and the tests' helpers."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "capture")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_importing_the_store_imports_no_torch():
    code = (
        "import sys, json, capture, capture.store; "
        "print(json.dumps([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules]))"
    )
    with spawn(code) as process:
        assert json.loads(process.stdout.read()) == []


def test_a_killed_capture_keeps_every_whole_forward_pass(tmp_path):
    out = tmp_path / "run.duckdb"
    partial = tmp_path / "run.duckdb.partial"
    with spawn(ENDLESS, out) as process:
        acknowledged = 0
        while acknowledged < 30:
            acknowledged = int(process.stdout.readline())
        with pytest.raises(StoreError, match="being written by another process"):
            recover(partial)
        with pytest.raises(StoreError, match="being written by another process"):
            RunReader.open(partial)
        os.kill(process.pid, signal.SIGKILL)

    with RunReader.open(partial) as run:
        assert run.info["complete"] is False
        tokens = run.info["n_tokens"]
    assert recover(partial) == out
    assert [path.name for path in tmp_path.iterdir()] == ["run.duckdb"]
    with RunReader.open(out) as run:
        assert run.info["n_tokens"] == tokens >= acknowledged * BATCH
        assert run.info["complete"] is False
        assert run.info["seconds"] > 0
        check_whole(run, tokens)
        sums = run.query("SELECT sum(tokens)::BIGINT AS n FROM gate_sums").to_pylist()
        rows = "count(entropy) + count(margin) + count(logsumexp) + count(topk_mass)"
        assert sums == run.query(f"SELECT {rows} AS n FROM gates").to_pylist()


def check_whole(run, tokens):
    """Check that every stored forward pass has all its rows, and that the load counts them."""
    sizes = run.query("SELECT tokens FROM batches ORDER BY batch_id")["tokens"].to_pylist()
    assert sizes == [BATCH] * (tokens // BATCH)
    per_batch = run.query(
        "SELECT batch_id, layer, count(*) AS n FROM gates JOIN token_batches USING (token_id)"
        " GROUP BY ALL"
    )
    assert set(per_batch["n"].to_pylist()) == {BATCH}
    assert per_batch.num_rows == len(sizes) * len(SITES)
    counted = (
        "SELECT layer, expert_id, count(*) AS n, sum(weight) AS w FROM assignments GROUP BY ALL"
    )
    summed = (
        "SELECT layer, expert_id, assignments AS n, weight_sum AS w FROM expert_load"
        " WHERE assignments > 0"
    )
    counted = run.query(f"FROM ({counted}) ORDER BY ALL").to_pydict()
    summed = run.query(f"FROM ({summed}) ORDER BY ALL").to_pydict()
    assert counted["n"] == summed["n"]
    np.testing.assert_allclose(counted["w"], summed["w"], rtol=2.0**-11)


def test_a_capture_killed_before_its_first_token_is_recovered_empty(tmp_path):
    writer = start(tmp_path / "run", SITES)
    writer.abandon()
    with RunReader.open(recover(writer.partial)) as run:
        assert (run.info["n_tokens"], run.info["n_prompts"], run.info["complete"]) == (0, 2, False)


def test_many_processes_read_a_run_at_once(tmp_path):
    random = np.random.default_rng(0)
    out = write(tmp_path / "run.duckdb", SITES, [make_forward(0, 9, SITES, random, empty=0)])
    before = (out.stat().st_mtime_ns, out.read_bytes())
    readers = [spawn(READ, out) for _ in range(3)]
    try:
        assert [int(reader.stdout.readline()) for reader in readers] == [9 * 5] * 3
        with duckdb.connect(str(out), read_only=True) as stranger:
            assert stranger.sql("SELECT count(*) FROM assignments").fetchall() == [(45,)]
    finally:
        for reader in readers:
            reader.communicate("\n", timeout=60)
    assert (out.stat().st_mtime_ns, out.read_bytes()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.duckdb"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_run_in_a_folder_that_cannot_be_written_is_readable(tmp_path):
    random = np.random.default_rng(0)
    out = write(tmp_path / "run.duckdb", SITES, [make_forward(0, 2, SITES, random)])
    out.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with RunReader.open(out) as run:
            assert run.info["n_tokens"] == 2
    finally:
        tmp_path.chmod(0o755)


def test_threads_share_a_reader(tmp_path):
    random = np.random.default_rng(0)
    out = write(tmp_path / "run.duckdb", SITES, [make_forward(0, 50, SITES, random)])
    with RunReader.open(out) as run, ThreadPoolExecutor(8) as pool:

        def ask(token):
            rows = run.query("SELECT token_id FROM tokens WHERE token_id = ?", [token])
            return rows["token_id"].to_pylist()

        assert list(pool.map(ask, range(50))) == [[token] for token in range(50)]


def test_another_thread_may_write(tmp_path):
    random = np.random.default_rng(0)
    writer = start(tmp_path / "run", SITES)
    done = []

    def fill():
        for n in range(3):
            writer.append(make_forward(n * 5, 5, SITES, random))
        done.append(writer.finish(seconds=0))

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    with RunReader.open(done[0]) as run:
        assert run.info["n_tokens"] == 15


def test_small_forward_passes_of_decoding_are_cheap(tmp_path):
    sites = [make_site(layer, 128, 8) for layer in range(48)]
    forward = make_forward(0, 8, sites, np.random.default_rng(0))
    writer = start(tmp_path / "run", sites)
    writer.append(forward)
    started = time.perf_counter()
    for _ in range(20):
        writer.append(forward)
    # a decode step of a model of this size takes some 20 ms; 10 times that is a defect
    assert (time.perf_counter() - started) / 20 < 0.2
    writer.abandon()
