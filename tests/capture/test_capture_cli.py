"""The command line: what it prints, how it ends, and that Ctrl-C loses nothing."""

import re
import signal
import time
from pathlib import Path

import processes
import pytest

from capture.__main__ import main
from capture.store import RunReader, RunWriter

pytestmark = pytest.mark.slow


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("--prompts", "--level", "recover", "migrate", "examples:", "demo-heldout", "csv"):
        assert word in text
    for command in ("recover", "migrate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--prompts", "none.txt"], "error: There is no prompt file 'none.txt'"),
        (["demo", "--level", "maps"], "error: level must be one of stats, ids, scores, attention"),
        (["demo", "--attention-every", "0"], "error: attention_every must be a whole number"),
        (["demo", "--sample-tokens", "-3"], "error: sample_tokens must be a whole number"),
        (["demo", "--dtype", "float12"], "error: dtype must be one of float32"),
        (["./nothing", "--prompts", "p.txt"], "error: A model folder was expected"),
        (["demo", "--out", "p.txt"], "error: p.txt already exists"),
        (["demo", "--out", "no/folder/run.duckdb"], "does not exist. Create it first"),
        (["demo", "--engine-options", "{}"], "error: --engine-options are for an engine"),
        (["demo", "--engine", "vllm", "--level", "scores"], "level='scores' is not for it"),
        (["demo", "--engine", "ray", "--shard", "0/2"], "shard and parts are for processes"),
        (["demo", "--engine", "ray", "--engine-options", '{"gpus": 1}'], "options are actors, "),
        (["demo", "--engine", "ray", "--engine-options", '{"actors": 0}'], "option actors must be"),
        (["recover", "p.txt"], "error: recover takes the .partial file"),
        (["migrate", "p.txt", "q.duckdb"], "error: A run file was expected at p.txt"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("hello\n", encoding="utf-8")
    assert (
        main([*arguments, "--quiet"] if arguments[0] not in ("recover", "migrate") else arguments)
        == 2
    )
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("**/*.partial"))


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--nonsense"])
    assert caught.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_one_command_records_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("text,domain\nHello world,en\nבוקר טוב,he\n", encoding="utf-8")
    assert main(["demo", "--prompts", "p.csv", "--generate", "2", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / out.strip()
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}\.duckdb", out.strip())
    assert re.search(r"Bytes per token by level: stats \d+ B, ids \d+ B, scores \d+ B", err)
    assert "tokens recorded" in err and "Traceback" not in err
    with RunReader.open(path) as run:
        assert run.info["complete"]
        assert run.info["n_generated"] >= 2
        domains = run.query("SELECT domain FROM prompts ORDER BY prompt_id").to_pydict()
        assert domains == {"domain": ["en", "he"]}


def test_recover_closes_what_a_killed_capture_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finish = RunWriter.finish

    def killed(self, **_):
        self.flush()
        self.abandon()
        raise KeyboardInterrupt

    monkeypatch.setattr(RunWriter, "finish", killed)
    Path("p.txt").write_text("hello\n", encoding="utf-8")
    command = ["demo", "--prompts", "p.txt", "--out", "r.duckdb", "--quiet"]
    assert main(command) == 130
    err = capsys.readouterr().err
    assert "python -m capture recover 'r.duckdb.partial'" in err
    assert "Loading" not in err  # of transformers, whose bar --quiet hides too
    monkeypatch.setattr(RunWriter, "finish", finish)
    assert main(["recover", "r.duckdb.partial"]) == 0
    assert capsys.readouterr().out.strip() == "r.duckdb"
    with RunReader.open("r.duckdb") as run:
        assert not run.info["complete"]
        assert run.info["n_tokens"] > 0


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    ("sent", "code", "word", "start"),
    [
        (signal.SIGINT, 130, "Interrupted", processes.start_anew),
        (signal.SIGTERM, 143, "Terminated", processes.start),
    ],
)
def test_a_signal_ends_cleanly_and_keeps_what_was_recorded(tmp_path, sent, code, word, start):
    line = "The quick brown fox jumps over the lazy dog. " * 8 + "\n"
    (tmp_path / "p.txt").write_text(line * 2000, encoding="utf-8")
    process = start(
        tmp_path, ["demo", "--prompts", "p.txt", "--out", "r.duckdb", "--batch-tokens", "400"]
    )
    while not re.search(r"\dtok/s", process.stderr):  # before there are some, it says ?tok/s
        assert process.poll() is None, process.stderr
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(sent)
    assert process.wait(60) == code, process.stderr
    rest = process.stderr
    assert f"{word}: " in rest and "incomplete run r.duckdb" in rest
    assert "Traceback" not in rest
    with RunReader.open(tmp_path / "r.duckdb") as run:
        assert not run.info["complete"]
        n_tokens = run.info["n_tokens"]
        assert 0 < n_tokens < 2000 * 80
        gates = run.query("SELECT count(*) n FROM gates").to_pydict()
        assert gates["n"] == [n_tokens * run.info["n_layers"]]
    assert not (tmp_path / "r.duckdb.partial").exists()
