"""A comparison file from somebody else: it does not answer for itself, and nothing in it is run."""

import duckdb
import pytest

from explorer.comparison import results_file as reading
from explorer.comparison.results_file import (
    FORMAT_VERSION,
    empty_rows,
    open_comparison,
    write_comparison,
)
from explorer.errors import ComparisonError

pytestmark = pytest.mark.slow

FOREVER = "(SELECT count(*) FROM range(3000000000) AS a, range(1000) AS b) > 5"


@pytest.fixture
def path(tmp_path):
    rows = empty_rows()
    rows["comparison"] = [
        {"format_version": FORMAT_VERSION, "settings": "{}", "packages": "{}", "complete": True}
    ]
    rows["results"] = [{"router": "top_k", "mode": "live", "loss": 3.0}]
    write_comparison(tmp_path / "run.12345678.comparison", rows)
    return tmp_path / "run.12345678.comparison"


def changed(path, *statements):
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


@pytest.mark.timeout(60)
def test_a_macro_does_not_answer_for_the_tables(path):
    with duckdb.connect(str(path), read_only=True) as connection:
        found = connection.sql("SELECT table_name, sql FROM duckdb_tables()").fetchall()
    values = ", ".join(f"('{name}', '{sql.replace(chr(39), chr(39) * 2)}')" for name, sql in found)
    changed(
        path,
        "ALTER TABLE results RENAME TO kept",
        f"CREATE MACRO duckdb_tables() AS TABLE SELECT * FROM (VALUES {values}) t(table_name, sql)",
        f"CREATE VIEW results AS SELECT * FROM kept WHERE {FOREVER}",
    )
    with pytest.raises(ComparisonError, match="has other tables than this code"):
        open_comparison(path)


@pytest.mark.timeout(60)
def test_macros_beside_our_tables_are_not_run(path):
    forever = FOREVER.removesuffix(" > 5")
    changed(path, f"CREATE MACRO sum(x) AS {forever}", f"CREATE MACRO count(x) AS {forever}")
    with open_comparison(path) as found:
        assert found.table["router"].tolist() == ["top_k"]
        assert found.query("SELECT count(*) AS n FROM results")["n"].tolist() == [1]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "INSERT INTO units SELECT 'a', 0, 'live', '', '' FROM range(20001)",
            "holds 20,003 rows, and a comparison is read up to 20,000",
        ),
        ("UPDATE comparison SET model = repeat('x', 6000000)", "6 MB of text"),
        ("UPDATE comparison SET settings = '[]'", "settings are no JSON object"),
        ("UPDATE comparison SET settings = repeat('[', 100000)", "is no comparison file"),
        ("UPDATE comparison SET settings = NULL", "is no comparison file"),
        ("DELETE FROM comparison", "has another format"),
        ("ALTER TABLE results ADD COLUMN more INTEGER", "has other tables"),
    ],
)
def test_what_is_no_comparison_is_refused_in_a_sentence(path, statement, said, monkeypatch):
    monkeypatch.setattr(reading, "MAX_TEXT", 5 * 10**6)
    monkeypatch.setattr(reading, "MAX_ROWS", 20_000)
    with pytest.raises(ComparisonError, match=said) as caught:
        open_comparison(changed(path, statement))
    assert len(str(caught.value)) < 400
