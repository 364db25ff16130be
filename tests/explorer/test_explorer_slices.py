"""Slices: what is saved is what is loaded, and nothing else is believed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_run

from explorer import slices, writing
from explorer.errors import ExplorerError, NotAllowedError, RunError
from explorer.run import open_run

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "known.duckdb")
    with open_run(tmp_path / "known.duckdb") as opened:
        yield opened


def files(run):
    return sorted(run.path.with_suffix(".slices").glob("*"))


def test_a_slice_comes_back_sorted_and_without_repetitions(run):
    assert slices.list_slices(run) == []
    slices.save_slice(run, " <b>rare</b> Größe 🙂 ", [7, 3, 7, 0], note="n", author="me")
    (info,) = slices.list_slices(run)
    assert info[:3] == ("<b>rare</b> Größe 🙂", "n", "me")
    assert (info.n_tokens, info.problem) == (3, "")
    assert slices.load_slice(run, info.name).token_ids.tolist() == [0, 3, 7]
    (file,) = files(run)
    assert file.name.isascii() and "<" not in file.name


def test_newest_first_and_deleting(run, monkeypatch):
    slices.save_slice(run, "a", [1])
    slices.save_slice(run, "b", [2])
    before = slices.version(run)
    assert {info.name for info in slices.list_slices(run)} == {"a", "b"}
    slices.delete_slice(run, "a")
    slices.delete_slice(run, "a")
    assert [info.name for info in slices.list_slices(run)] == ["b"]
    assert slices.version(run) != before


def test_names_alike_in_their_file_names_are_told_apart(run):
    slices.save_slice(run, "a b", [1])
    slices.save_slice(run, "a-b", [2])
    assert slices.load_slice(run, "a b").token_ids.tolist() == [1]
    assert slices.load_slice(run, "a-b").token_ids.tolist() == [2]


@pytest.mark.parametrize(
    ("name", "ids", "error", "words"),
    [
        ("", [1], ExplorerError, "1 to 80 characters"),
        ("x" * 81, [1], ExplorerError, "1 to 80 characters"),
        ("none", [], ExplorerError, "got 0"),
        ("strange", [1, 10_000], RunError, "1 of 2 are not in it"),
        ("negative", [-1], RunError, "1 of 1 are not in it"),
        ("taken", [1], ExplorerError, "Choose another name"),
    ],
)
def test_what_is_no_slice_is_refused(run, name, ids, error, words):
    slices.save_slice(run, "taken", [2])
    with pytest.raises(error, match=words):
        slices.save_slice(run, name, ids)
    assert len(files(run)) == 1


def test_too_many_tokens(run, monkeypatch):
    monkeypatch.setattr(slices, "MAX_TOKENS", 2)
    with pytest.raises(ExplorerError, match="1 to 2 tokens, got 3"):
        slices.save_slice(run, "many", [1, 2, 3])


@pytest.mark.parametrize("name", ["nothing", "../known", "/etc/passwd"])
def test_a_name_that_is_not_there(run, name):
    with pytest.raises(ExplorerError, match="There is no slice"):
        slices.load_slice(run, name)


def test_a_slice_of_another_recording_is_told(run, tmp_path):
    slices.save_slice(run, "old", [1])
    (tmp_path / "other").mkdir()
    write_run(tmp_path / "other" / "known.duckdb", level="scores")
    (tmp_path / "known.slices").rename(tmp_path / "other" / "known.slices")
    with open_run(tmp_path / "other" / "known.duckdb") as other:
        assert other.fingerprint != run.fingerprint
        assert "another recording" in slices.list_slices(other)[0].problem
        with pytest.raises(ExplorerError, match="another recording"):
            slices.load_slice(other, "old")


def test_a_copy_of_the_run_has_its_fingerprint(run, tmp_path):
    (tmp_path / "copy.duckdb").write_bytes(run.path.read_bytes())
    with open_run(tmp_path / "copy.duckdb") as copy:
        assert copy.fingerprint == run.fingerprint


def test_damaged_and_foreign_files_are_named_and_not_used(run):
    slices.save_slice(run, "good", [1])
    (good,) = files(run)
    good.with_name("text.parquet").write_text("no parquet")
    pq.write_table(pa.table({"token_id": [1]}), good.with_name("bare.parquet"))
    facts = dict.fromkeys(("name", "note", "author", "created", "fingerprint"), "x")
    table = pa.table({"token_id": [1]})
    pq.write_table(
        table.replace_schema_metadata({b"routescope slice": json.dumps(facts)}),
        good.with_name("misnamed.parquet"),
    )
    usable = [info.name for info in slices.list_slices(run) if not info.problem]
    assert usable == ["good"]
    assert len(slices.list_slices(run)) == 4
    good.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(ExplorerError, match="can be read"):
        slices.load_slice(run, "good")


def test_the_content_of_a_slice_is_its_tokens_and_nothing_else(run):
    slices.save_slice(run, "s", [1, 2], note="n")
    path = slices.slice_path(run.path, "s")
    before = slices.content(path)
    slices.delete_slice(run, "s")
    slices.save_slice(run, "s", [2, 1, 1], note="another note", author="me")
    assert slices.content(path) == before
    slices.delete_slice(run, "s")
    slices.save_slice(run, "s", [1, 3], note="n")
    assert slices.content(path) != before
    path.write_bytes(b"no parquet")
    with pytest.raises(ExplorerError, match="damaged"):
        slices.content(path)


def test_read_only_servers_save_and_delete_nothing(run):
    slices.save_slice(run, "kept", np.array([1]))
    writing.configure(writing.Policy(read_only=True))
    try:
        with pytest.raises(NotAllowedError, match="Saving a slice"):
            slices.save_slice(run, "new", [2])
        with pytest.raises(NotAllowedError, match="Deleting a slice"):
            slices.delete_slice(run, "kept")
    finally:
        writing.configure(writing.Policy())
    assert [info.name for info in slices.list_slices(run)] == ["kept"]
