"""A connection that reads the tables of a run file and runs nothing that the file brings along.

A run may come from a stranger. Its views, macros and generated columns are programs of theirs, and
a view named ``tokens`` that reads for ever looks like any other. So the file is attached to an
empty database in memory, its tables are held against ours column by column, and our own views are
made over them there; what else the file holds has no name in that database.
"""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import duckdb

from capture.store import schema
from capture.store.codec import Layout
from capture.store.opening import SAFE, cannot_open, check_file, check_version, not_a_run

_LOCK = "SET enable_external_access = false; SET lock_configuration = true"
_FILE = "run_file"
_TABLES = (
    "SELECT table_name, sql FROM duckdb_tables() WHERE database_name = ? AND schema_name = 'packed'"
)
# columns that are not read as they are stored
_READ = {("token", "token"): f"nullif(token, {schema.NO_TOKEN}) AS token"}
MAX_SITES = 100_000
MAX_EXPERTS = 65_534  # the largest number of experts that a packed id can name
MAX_SLOTS = 1_024


def open_sandbox(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a run file for reading.

    Raises
    ------
    SchemaVersionError
        If the file has another schema version.
    StoreError
        If there is no such file, or it is no run file of ours.
    """
    check_file(path)
    connection = duckdb.connect(":memory:", config=dict(SAFE))
    try:
        _attach(path, connection)
        missing = _check_tables(path, connection)
        for statement in _views(_layout(path, connection), missing):
            connection.execute(statement)
        _check_sites(path, connection)
    except duckdb.Error as error:
        connection.close()
        raise not_a_run(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _attach(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    # what does not fit in memory is put aside here, never beside the run
    spill = Path(tempfile.gettempdir()) / "routescope-spill"
    connection.execute("SET temp_directory = ?", [str(spill)])
    name = str(path.absolute()).replace("'", "''")
    try:
        connection.execute(f"ATTACH '{name}' AS {_FILE} (READ_ONLY)")
    except duckdb.Error as error:
        raise cannot_open(path, error) from error
    connection.execute(_LOCK)


def _check_tables(path: Path, connection: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """Refuse tables that are not ours to the last column; a view is no table.

    Returns the tables that a file of this older version does not have.

    The text that DuckDB writes for a table names its columns, types, keys, defaults and generated
    columns, so that equal text means an equal table.
    """
    found = dict(connection.execute(_TABLES, [_FILE]).fetchall())
    if found.get("run") != expected_tables(Layout(8, 1))["run"].sql:
        raise not_a_run(path, "it has no table packed.run as RouteScope makes it")
    table = f"{_FILE}.{schema.RUN_TABLE}"
    version = check_version(path, connection, table, oldest=schema.OLDEST_READ)
    missing = frozenset(schema.STAND_INS if version < schema.SCHEMA_VERSION else ())
    ours = expected_tables(_layout(path, connection))
    strange = sorted(
        name for name in ours if name not in missing and found.get(name) != ours[name].sql
    )
    if strange:
        raise not_a_run(path, f"its table packed.{strange[0]} is not as RouteScope makes it")
    return missing


def _layout(path: Path, connection: duckdb.DuckDBPyConnection) -> Layout:
    row = connection.sql(f"SELECT id_bits, slots FROM {_FILE}.packed.run").fetchall()[0]
    layout = Layout(*row)
    if layout.id_bits not in (8, 16) or not 1 <= layout.slots <= MAX_SLOTS:
        raise not_a_run(
            path, f"it says that rows have {layout.slots} slots of {layout.id_bits} bit"
        )
    return layout


def _check_sites(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse numbers of experts that would make every question on the run count for ever."""
    sites = "SELECT count(*), coalesce(max(n_experts), 0), coalesce(min(n_experts), 1) FROM sites"
    count, most, fewest = connection.sql(sites).fetchall()[0]
    if count > MAX_SITES or most > MAX_EXPERTS or fewest < 1:
        raise not_a_run(path, f"it says that it has {count} routers of up to {most} experts")


class Table(NamedTuple):
    """One of our tables: how DuckDB writes it down, and its columns."""

    sql: str
    columns: list[str]


@functools.cache
def expected_tables(layout: Layout) -> dict[str, Table]:
    """Return the tables that a run file of this layout has."""
    with duckdb.connect(":memory:") as connection:
        for statement in schema.create_statements(layout):
            connection.execute(statement)
        return {
            name: Table(sql, connection.table(f"packed.{name}").columns)
            for name, sql in connection.execute(_TABLES, ["memory"]).fetchall()
        }


def _views(layout: Layout, missing: frozenset[str]) -> list[str]:
    """Write our views, over views that stand for the tables of the file."""
    tables = []
    for name, table in expected_tables(layout).items():
        if name in missing:
            continue
        columns = ", ".join(_READ.get((name, column), column) for column in table.columns)
        tables.append(f"CREATE VIEW packed.{name} AS SELECT {columns} FROM {_FILE}.packed.{name}")
    for name in sorted(missing):
        tables.append(f"CREATE VIEW packed.{name} AS {schema.STAND_INS[name]}")
    return ["CREATE SCHEMA packed", *tables, *schema.view_statements(layout)]
