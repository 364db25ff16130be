"""Links out of the runs folder, pipes and folders in it are neither listed nor opened."""

import os

import pytest

from explorer import saved_views, slices, writing
from explorer.comparison.results_file import comparisons_of
from explorer.errors import ExplorerError


@pytest.fixture
def folder(tmp_path):
    """Make a runs folder in which a stranger has put names."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    runs.mkdir()
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("{}")
    for name in ("a.duckdb", "a.k.comparison", "views/0123456789.json", "own.slices/b.parquet"):
        (runs / name).parent.mkdir(exist_ok=True)
        (runs / name).symlink_to(elsewhere / "secret")
    os.mkfifo(runs / "pipe.duckdb")
    (runs / "folder.duckdb").mkdir()
    (runs / "own.duckdb").write_text("mine")
    (runs / "same.duckdb").symlink_to("own.duckdb")
    return runs


def test_only_own_files_are_listed(folder):
    names = [path.name for path in writing.own_files(folder, "*.duckdb")]
    assert names == ["own.duckdb", "same.duckdb"]
    assert comparisons_of(folder / "a.duckdb") == []
    assert saved_views.list_views(folder) == ([], [])
    assert writing.own_files(folder / "own.slices", "*.parquet") == []
    assert writing.own_files(folder / "none", "*") == []


@pytest.mark.parametrize("name", ["a.duckdb", "pipe.duckdb", "folder.duckdb", "a.k.comparison"])
def test_other_names_open_nothing(folder, name):
    with pytest.raises(ExplorerError, match="leads out of it or is not a file name"):
        writing.in_folder(folder, name)
    assert writing.in_folder(folder, "same.duckdb") == folder / "same.duckdb"
    assert writing.in_folder(folder, "new.duckdb") == folder / "new.duckdb"
    with pytest.raises(ExplorerError, match="There is no saved view"):
        saved_views.load_view(folder, "0123456789")


def test_a_slice_that_is_a_link_is_none(folder):
    class Own:
        path = folder / "own.duckdb"

    slices.slice_path(Own.path, "b").unlink(missing_ok=True)
    slices.slice_path(Own.path, "b").symlink_to(folder.parent / "elsewhere" / "secret")
    with pytest.raises(ExplorerError, match="There is no slice"):
        slices.load_slice(Own, "b")
