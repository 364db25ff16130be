"""One capture by several processes: nothing twice, nothing lost, and the run of one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import processes
import pytest
import tiny_models

import capture
from capture.__main__ import main
from capture.errors import ConfigError, PromptError, StoreError
from capture.recorder.parts import Shard, shard_of
from capture.store import check_run, merge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROMPTS = [{"ids": list(range(2, 5 + n)), "domain": "ab"[n % 3 == 0]} for n in range(7)]
# each view by what does not depend on how prompts were batched
COMPARED = {
    "prompts": "SELECT * FROM prompts ORDER BY prompt_id",
    "tokens": "SELECT token_id, prompt_id, position, token, text FROM tokens"
    " WHERE phase = 'prompt' ORDER BY token_id",
    "generated": "SELECT prompt_id, position, token FROM tokens ORDER BY ALL",
    "assignments": "SELECT prompt_id, position, layer, site, slot, expert_id"
    " FROM assignments JOIN tokens USING (token_id) ORDER BY ALL",
    "sampled": "SELECT token_id FROM sampled_tokens ORDER BY ALL",
    "scored": "SELECT token_id, layer FROM scores ORDER BY ALL",
    "load": "SELECT * EXCLUDE (weight_sum, prob_sum) FROM expert_load_by ORDER BY ALL",
    "pairs": "SELECT * FROM coactivation ORDER BY ALL",
    "transitions": "SELECT * FROM transitions ORDER BY ALL",
    "gates": "SELECT layer, domain, phase, statistic, tokens FROM gate_sums ORDER BY ALL",
    "attended": "SELECT prompt_id, tokens, bins FROM attention_prompts ORDER BY ALL",
    "heads": "SELECT prompt_id, layer, head, queries FROM attention_stats ORDER BY ALL",
    "keys": "SELECT token_id, layer, head, rank, key_token_id FROM attention_top_keys ORDER BY ALL",
    "facts": "SELECT model, config, sample, n_prompts, n_tokens, n_generated, complete FROM run",
}


def rows(path):
    with duckdb.connect(str(path), read_only=True) as connection:
        return {name: connection.execute(sql).fetchall() for name, sql in COMPARED.items()}


def files(folder):
    """Return what tells a file from one that was written again."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow(seconds=5)
def test_shares_of_three_processes_are_the_run_of_one(tmp_path):
    model = tiny_models.build("mixtral", num_hidden_layers=2)
    options = {"level": "attention", "attention_prompts": 3, "generate": 2, "progress": False}
    options |= {"sample_tokens": 9}
    one, out, folder = (tmp_path / name for name in ("one.duckdb", "run.duckdb", "run.parts"))
    capture.record(model, PROMPTS, one, **options)
    for number, share in enumerate(("2/3", "0/3", "0/3"), start=1):
        assert capture.record(model, PROMPTS, out, shard=share, **options) == folder
        assert len(files(folder)) == min(number, 2) and not out.exists()
    with pytest.raises(StoreError, match=r"1 of 3 parts are missing: 1/3\. Record .*--shard 1/3"):
        merge(folder, tmp_path / "early.duckdb")
    before = files(folder)
    assert capture.record(model, PROMPTS, out, shard="1/3", **options) == out
    check_run(out)
    assert rows(out) == rows(one)
    # again: what is there stays as it is
    for share in ("0/3", "2/3"):
        assert capture.record(model, PROMPTS, out, shard=share, **options) == out
    assert before.items() <= files(folder).items() and len(files(folder)) == 3
    # by hand, in any order
    again = tmp_path / "again.duckdb"
    parts = sorted(folder.iterdir(), reverse=True)
    assert main(["merge", *map(str, parts), "--out", str(again)]) == 0
    assert rows(again) == rows(one)

    other = tmp_path / "other.duckdb"
    capture.record(model, PROMPTS[1:3], other, shard="0/3", level="ids", progress=False)
    (foreign,) = other.with_name("other.parts").iterdir()
    for given, message in (
        ([*parts, foreign], "are parts of two captures"),
        ([*parts, parts[0]], "are the same part. Give one of them"),
        ([*parts[1:], one], "one.duckdb is a run of its own and no part"),
        (parts[1:], "1 of 3 parts are missing: 2/3"),
    ):
        with pytest.raises(StoreError, match=message):
            merge(given, tmp_path / "refused.duckdb")
    with pytest.raises(StoreError, match="already exists"):
        merge(folder, out)
    # another model, other options and other prompts have parts of other names
    with pytest.raises(StoreError, match="already exists"):
        capture.record(model, PROMPTS, out, shard="0/3", level="ids", progress=False)
    assert not list(tmp_path.glob("refused*"))


def test_more_processes_than_prompts_and_more_parts_than_processes(tmp_path):
    model, out = tiny_models.build("mixtral"), tmp_path / "run.duckdb"
    given = PROMPTS[:2]
    for rank in (3, 0, 1):
        capture.record(model, given, out, shard=f"{rank}/4", progress=False)
    assert [row[0] for row in rows(out)["prompts"]] == [0, 1]
    more = tmp_path / "more.duckdb"
    capture.record(model, PROMPTS, more, shard="1/2", parts=4, progress=False)
    assert len(files(tmp_path / "more.parts")) == 2
    # two processes failed, one does the rest
    assert capture.record(model, PROMPTS, more, shard="0/1", parts=4, progress=False) == more
    assert len(rows(more)["prompts"]) == len(PROMPTS)


def test_which_share_is_a_process_s_own(tmp_path, monkeypatch):
    out = tmp_path / "run.duckdb"
    assert shard_of(None, out) is None and shard_of("2/3", out) == Shard(2, 3)
    for wrong in ("3/3", "1", "-1/3", "a/b", "0/0"):
        with pytest.raises(ConfigError, match="shard must be 'slurm' or one of 0/4"):
            shard_of(wrong, out)
    with pytest.raises(ConfigError, match=r"Slurm job array.*sbatch --array"):
        shard_of("slurm", out)
    for name, value in {"ID": 9, "MIN": 3, "MAX": 12, "STEP": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert shard_of("slurm", out) == Shard(2, 4)
    # an array alone may be one of models: only who asks gets a share
    assert shard_of(None, out) is None
    for name, value in {"WORLD_SIZE": 2, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert shard_of(None, out) == Shard(1, 2)
    assert shard_of(None, tmp_path / "run-rank1.duckdb") is None
    assert shard_of(None, tmp_path / "run-rank11.duckdb") == Shard(1, 2)
    with pytest.raises(PromptError, match="Standard input goes to one process"):
        capture.record("demo", "-", out, progress=False)


# the command, but in its second part it records one forward pass and stays there
STAYS = """
import time
from capture.__main__ import main
from capture.store import RunWriter
append, writers = RunWriter.append, []
def stays(self, *args, **kwargs):
    append(self, *args, **kwargs)
    if self not in writers:
        writers.append(self)
    if len(writers) > 1:
        time.sleep(600)
RunWriter.append = stays
main()
"""


@pytest.mark.slow(seconds=15)
def test_one_of_four_processes_is_killed_and_comes_again(tmp_path):
    out, folder = tmp_path / "run.duckdb", tmp_path / "run.parts"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"The {n} quick brown foxes.\n" for n in range(16)))
    options = ["demo", "--prompts", prompts, "--out", out, "--parts", "8", "--generate", "4"]
    options += ["--quiet", "--shard"]
    killed = processes.start(tmp_path, [*options, "1/4"], code=STAYS)
    others = [processes.start(tmp_path, [*options, f"{rank}/4"]) for rank in (0, 2, 3)]
    # its second part is begun, and the first one is whole
    deadline = time.monotonic() + 300
    while not list(folder.glob("part-5-of-8-*.partial")):
        assert time.monotonic() < deadline and killed.poll() is None, killed.stderr
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert [(other.wait(), other.stderr) for other in others] == [(0, "")] * 3
    assert not out.exists() and list(folder.glob("part-5-*.attempt-*"))
    before = {name: time for name, time in files(folder).items() if "attempt" not in name}
    assert len(before) == 7
    again = processes.start(tmp_path, [*options, "1/4"])
    assert again.wait() == 0, again.stderr
    assert again.stdout.strip() == str(out)
    after = files(folder)
    assert len(after) == 8 and before.items() <= after.items()
    check_run(out)
    with duckdb.connect(str(out), read_only=True) as run:
        counts = run.execute(
            "SELECT count(*), count(DISTINCT (prompt_id, position)), count(DISTINCT prompt_id)"
            " FROM tokens"
        ).fetchone()
        read = run.execute(
            "SELECT count(*) FROM prompt_sizes JOIN (SELECT prompt_id, count(*) AS n FROM tokens"
            " WHERE phase = 'prompt' GROUP BY prompt_id) USING (prompt_id) WHERE n = n_tokens"
        ).fetchone()
    assert counts[0] == counts[1] and counts[2] == read[0] == 16


@pytest.mark.slow(seconds=20)
def test_torchrun_gives_one_run(tmp_path):
    out, prompts = tmp_path / "run.duckdb", tmp_path / "prompts.txt"
    prompts.write_text("".join(f"The {n} quick brown foxes.\n" for n in range(6)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "capture", "demo", "--prompts", prompts, "--out", out, "--quiet"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    with duckdb.connect(str(out), read_only=True) as run:
        assert run.execute("SELECT n_prompts, complete FROM run").fetchone() == (6, True)
