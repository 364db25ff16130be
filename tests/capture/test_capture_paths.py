"""Names that are empty, and that mean a home folder."""

import re
from pathlib import Path

import pytest
import tiny_models

import capture
from capture.__main__ import main
from capture.errors import CaptureError, ModelError, PromptError, StoreError
from capture.model.load import load_model
from capture.paths import given_path, is_run_name, suggested_name
from capture.prompts import read_prompts
from capture.store import migrate, recover
from explorer.__main__ import main as explorer
from explorer.errors import RunError
from explorer.run import open_run

EMPTY = "A name was expected for .*unset shell variable"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stand in a folder that holds what an empty name would mean."""
    (tmp_path / "requirements.txt").write_text("torch\nsecret-package\n")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused_everywhere(name, folder):
    before = sorted(folder.iterdir())
    for call, error in (
        (lambda: read_prompts(name), PromptError),
        (lambda: capture.record("demo", name, "run.duckdb", progress=False), PromptError),
        (lambda: capture.record("demo", ["x"], name, progress=False), CaptureError),
        (lambda: recover(name), StoreError),
        (lambda: migrate(name, "new.duckdb"), StoreError),
        (lambda: migrate("old.duckdb", name), StoreError),
        (lambda: open_run(name), RunError),
    ):
        with pytest.raises(error, match=EMPTY):
            call()
    with pytest.raises(ModelError, match="A model folder was expected"):
        load_model(name)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--prompts", ""], ["demo", "--out", ""], [""], ["recover", ""], ["migrate", "", "b"]],
)
def test_an_empty_argument_is_refused(arguments, folder, capsys):
    assert main(arguments) == 2
    assert re.search("A (name|model folder) was expected", capsys.readouterr().err)


def test_the_explorer_refuses_one_too(folder, capsys):
    for arguments in (["report", "", "--out", "x.html"], ["report", "x.duckdb", "--out", ""]):
        with pytest.raises(SystemExit):
            explorer(arguments)
        assert "A name was expected for" in capsys.readouterr().err


def test_a_home_folder_is_found_where_no_shell_did(folder):
    (folder / "texts.txt").write_text("one\ntwo\n")
    assert [p.text for p in read_prompts("~/texts.txt")] == ["one", "two"]
    assert given_path("~/a", "a file") == folder / "a"
    model = tiny_models.build("mixtral")
    assert capture.record(model, [[5, 6]], "~/run.duckdb", progress=False) == folder / "run.duckdb"
    with open_run("~/run.duckdb") as run:
        assert run.info["n_tokens"] == 2
    assert not (folder / "~").exists()
    with pytest.raises(CaptureError, match=r"no such home folder\. Write \./~nobody"):
        given_path("~nobody-here/a", "a file")


def test_a_name_may_have_spaces_and_tildes_inside():
    assert given_path("a b~c", "a file") == Path("a b~c")
    assert given_path(Path("."), "a file") == Path(".")


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ("allenai/OLMoE 1B", "allenai-OLMoE-1B"),
        ("../../etc", "etc"),
        ("café été", "café-été"),
        ("-.-", "run"),
        ("x" * 99, "x" * 50),
    ],
)
def test_a_suggested_name_is_one_that_a_run_may_have(wish, name):
    assert suggested_name(wish) == name
    assert is_run_name(name)


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "x" * 61, "x\n"])
def test_what_no_run_may_be_named(name):
    assert not is_run_name(name)
