"""A capture by the actors of a Ray cluster, one of them killed; where Ray is installed.

In an environment with tests/requirements.txt and capture/engines/requirements-ray.txt:

    python -m pytest -o addopts= -o filterwarnings=default tests/capture/test_capture_engines_ray.py
"""

import importlib.util
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_capture_shards import COMPARED, files

import capture
from capture.__main__ import main
from capture.store import check_run
from capture.store.reader import RunReader

missing = importlib.util.find_spec("ray") is None
RECORDED = {"generate": 8, "level": "scores", "sample_tokens": 60}


def rows(path):
    with RunReader.open(path) as run:
        return {name: run.query(sql).to_pylist() for name, sql in COMPARED.items()}


def write_prompts(folder):
    """Write 24 texts of two domains, half of them as JSON lines and half as Parquet."""
    folder.mkdir()
    texts = [f"The {n} quick brown foxes " + "jump over dogs " * (n % 5) for n in range(24)]
    domains = ["ab"[n % 3 == 0] for n in range(24)]
    lines = [json.dumps({"text": t, "domain": d}) for t, d in zip(texts, domains, strict=True)]
    folder.joinpath("a.jsonl").write_text("\n".join(lines[:12]), encoding="utf-8")
    pq.write_table(pa.table({"text": texts[12:], "domain": domains[12:]}), folder / "b.parquet")


def kill_a_writer(parts, killed):
    """Kill the process that writes the second slice, in the middle of it."""
    deadline = time.monotonic() + 400
    while not killed and time.monotonic() < deadline:
        time.sleep(0.002)
        whole = [path for path in parts.glob("part-*") if "attempt" not in path.name]
        for descriptor in Path("/proc").glob("[0-9]*/fd/*") if whole else ():
            try:
                name = os.readlink(descriptor)
            except OSError:
                continue
            if f"{parts}/part-" in name and ".attempt-" in name:
                pid = int(descriptor.parts[2])
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
                    killed += [pid, name]
                    break


@pytest.mark.slow(seconds=90)
@pytest.mark.skipif(missing, reason="Ray is optional: capture/engines/requirements-ray.txt")
def test_an_actor_is_killed_and_the_run_is_that_of_one_process(tmp_path, capsys):
    import ray

    out, parts, one = (tmp_path / name for name in ("run.duckdb", "run.parts", "one.duckdb"))
    write_prompts(tmp_path / "texts")
    capture.record("demo", tmp_path / "texts", one, progress=False, **RECORDED)
    command = ["demo", "--prompts", tmp_path / "texts", "--out", out, "--quiet", "--engine", "ray"]
    for name, value in RECORDED.items():
        command += [f"--{name.replace('_', '-')}", value]
    command += ["--engine-options", '{"actors": 2, "prompts": 4, "partition": true}']
    command = list(map(str, command))
    killed = []
    killer = threading.Thread(target=kill_a_writer, args=(parts, killed))
    killer.start()
    assert main(command) == 0
    killer.join()
    assert not ray.is_initialized()
    assert killed and capsys.readouterr().out.strip() == str(out)
    # the slice that was cut short is there once, and nothing of the first attempt
    assert len(files(parts)) == 6 and not [name for name in files(parts) if "attempt" in name]
    assert rows(out) == rows(one)
    check_run(out)
    assert list(out.with_suffix(".parquet").glob("route/part=*/rows.parquet"))
    # again: all is there
    before = files(parts)
    assert main(command) == 0 and files(parts) == before
    # and where a slice is lost, that slice alone is recorded
    out.unlink()
    for path in sorted(out.with_suffix(".parquet").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.with_suffix(".parquet").rmdir()
    lost = next(parts.glob("part-2-of-6-*"))
    lost.unlink()
    assert main(command) == 0
    after = files(parts)
    assert {name for name in after if after[name] != before[name]} == {lost.name}
    assert rows(out) == rows(one)
    command[0], command[command.index("--out") + 1] = str(tmp_path), str(tmp_path / "no.duckdb")
    assert main(command) == 2
    assert "error: A model folder with config.json" in capsys.readouterr().err


def test_without_ray_it_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--engine", "ray", "--out", str(tmp_path / "run.duckdb")]) == 2
    assert "pip install -r capture/engines/requirements-ray.txt" in capsys.readouterr().err
