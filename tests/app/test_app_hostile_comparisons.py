"""Comparison files with the right columns and wrong values: refused, or the page shows them."""

import shutil

import duckdb
import pytest
from app_pages import opened
from hostile_comparisons import CONTRADICTIONS, N_NEVER, N_ODD, never, odd
from synthetic import write_run
from test_app_compare import write_results

from explorer.comparison.results_file import TABLES, open_comparison
from explorer.comparison.values import wrong_values
from explorer.errors import ComparisonError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a run, and a comparison of it whose every table has a row."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder / "known.duckdb")
    path = write_results(folder)
    with duckdb.connect(str(path)) as connection:
        for table, columns in TABLES.items():
            if connection.sql(f"SELECT count(*) FROM {table}").fetchall() == [(0,)]:
                key = next(iter(columns))
                connection.execute(f"INSERT INTO {table} ({key}) VALUES ('top_k(k=1)')")
                if "mode" in columns:
                    connection.execute(f"UPDATE {table} SET mode = 'live'")
    open_comparison(path).close()
    return folder, path.name


@pytest.fixture
def path(runs, made):
    """Return a copy of the comparison, which the app shows with its run."""
    folder, name = made
    shutil.copytree(folder, runs, dirs_exist_ok=True)
    return runs / name


@pytest.fixture(scope="module")
def connected(made):
    folder, name = made
    with duckdb.connect(str(folder / name)) as connection:
        assert found_in(connection) == []
        yield connection


@pytest.fixture
def inside(connected):
    """Return an open comparison; its changes are taken back."""
    connected.execute("BEGIN")
    yield connected
    connected.execute("ROLLBACK")


def found_in(connection):
    return list(wrong_values(connection, "", TABLES))


@pytest.mark.parametrize("nth", range(N_NEVER))
def test_values_that_cannot_be_are_found_in_every_column(inside, nth):
    changed = dict(never(nth))
    for statement in changed.values():
        inside.execute(statement)
    said = " ".join(found_in(inside))
    assert [column for column in changed if f"values of {column} that cannot" not in said] == []


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_found(inside, name):
    inside.execute(CONTRADICTIONS[name])
    assert found_in(inside)


def test_a_file_with_one_is_refused_in_a_sentence(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE results SET loss = 'nan'")
    with pytest.raises(ComparisonError, match=r"it has values of results\.loss that cannot be"):
        open_comparison(path)
    app = opened("compare", run="known")
    assert "values of results.loss that cannot be" in app.error[0].value.replace("\\", "")


@pytest.mark.parametrize("nth", range(N_ODD))
def test_what_is_odd_breaks_no_page(path, nth):
    with duckdb.connect(str(path)) as connection:
        connection.execute("BEGIN; " + "; ".join(odd(nth)) + "; COMMIT")
    open_comparison(path).close()
    assert opened("compare", run="known")


def test_taken_back_the_changes_leave_a_sound_file(connected):
    assert found_in(connected) == []
