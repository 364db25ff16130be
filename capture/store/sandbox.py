"""Opening a run file, whoever made it: its tables are read and nothing that it brings along is run.

A file may come from a stranger. Its views, macros and generated columns are programs of theirs, and
a view named ``tokens`` that reads for ever looks like any other. So the file is attached to an
empty database in memory, its tables are held against ours column by column, and our own views are
made over them there; what else the file holds has no name in that database. What runs on it may
take so much memory and no more. There is one clear error for all that can be wrong with a file.
"""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import duckdb

from capture import errors
from capture.errors import SchemaVersionError, StoreError
from capture.store import schema
from capture.store.codec import Layout

# statements on a file that may come from a stranger read no other file and no Python variable
SAFE = {
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
LOCKED = SAFE | {"enable_external_access": "false", "lock_configuration": "true"}


# what a system says when a write finds no room
_NO_ROOM = ("No space left", "File too large", "quota exceeded")
MEMORY = "1GB"  # of one connection; what does not fit is spilled
SPILLED = "16GB"
_LOCK = "SET enable_external_access = false; SET lock_configuration = true"
FILE = "run_file"
# the whole name: a file may hold a macro that is called as the function is
_TABLES = (
    "SELECT table_name, sql FROM system.main.duckdb_tables()"
    " WHERE database_name = ? AND schema_name = ?"
)
_INDEXES = "SELECT count(*) FROM system.main.duckdb_indexes() WHERE database_name = ?"
_MACROS = "SELECT count(*) FROM system.main.duckdb_functions() WHERE database_name = ?"
_SCHEMA = "packed"
FIRST_RELEASED = 1  # schema version
# columns that are not read as they are stored
_READ = {("token", "token"): f"nullif(token, {schema.NO_TOKEN}) AS token"}
MAX_SITES = 4_096
MAX_EXPERTS = 65_534  # the largest number of experts that a packed id can name
MAX_EXPERTS_IN_ALL = 2**20
MAX_SLOTS = 1_024


def check_file(path: Path) -> None:
    """Refuse a path with no file."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StoreError(
            f"A run file was expected at {path}, which is {found}. Record one with: "
            "python -m capture MODEL --prompts FILE --out RUN"
        )


def connect(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB file itself, to write it or to look at its version."""
    check_file(path)
    try:
        return duckdb.connect(str(path), read_only=read_only, config=dict(LOCKED))
    except duckdb.Error as error:
        raise cannot_open(path, error) from error


def cannot_open(path: Path, error: duckdb.Error) -> StoreError:
    """Make the error for what DuckDB says when it cannot open a file."""
    if "different configuration" in str(error) or "already attached" in str(error):
        return StoreError(
            f"{path} is open in this process with other settings. Close that connection first."
        )
    if "Could not set lock" in str(error):
        return StoreError(
            f"{path} is being written by another process. Wait until its capture ends."
        )
    if any(words in str(error) for words in _NO_ROOM):
        return StoreError(
            f"{path} could not be opened: {first_line(error)}. Free disk space; nothing in it is "
            "lost."
        )
    return not_a_run(path, error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the full stop."""
    return errors.first_line(error).rstrip(".")


def check_version(
    path: Path,
    connection: duckdb.DuckDBPyConnection,
    table: str = schema.RUN_TABLE,
    *,
    oldest: int = schema.SCHEMA_VERSION,
) -> int:
    """Return the version of a run file; refuse one before ``oldest``, a newer one, and no run."""
    found = read_version(path, connection, table)
    if found < oldest:
        raise SchemaVersionError(
            f"{path} has schema version {found}, and this code reads {schema.SCHEMA_VERSION}. "
            f"Convert it: python -m capture migrate '{path}' NEW"
        )
    if found > schema.SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {found}, and this code reads {schema.SCHEMA_VERSION}. "
            "Update RouteScope to read it."
        )
    return found


def read_version(
    path: Path, connection: duckdb.DuckDBPyConnection, table: str = schema.RUN_TABLE
) -> int:
    """Return the schema version of an open file."""
    try:
        rows = connection.sql(schema.select_version(table)).fetchall()
    except duckdb.Error as error:
        raise not_a_run(path, error) from error
    if len(rows) != 1:
        raise not_a_run(path, "its run table has no single row")
    return int(rows[0][0])


def not_a_run(path: Path, reason: Exception | str) -> StoreError:
    """Make the error for a file that is not a run file."""
    reason = errors.first_line(reason)
    return StoreError(
        f"A run file was expected at {path}, but it is none ({reason}). Record one with: "
        "python -m capture MODEL --prompts FILE --out RUN"
    )


def attach(path: Path, name: str, *, read_only: bool = True) -> duckdb.DuckDBPyConnection:
    """Attach a file, whoever made it, as ``name`` to an empty database in memory.

    Its tables are read under their whole names, ``name.schema.table``; no other file can be read.

    Raises
    ------
    duckdb.Error
        If the file is no database, or is open elsewhere.
    """
    connection = duckdb.connect(":memory:", config=dict(SAFE))
    try:
        # what does not fit in memory is put aside here, never beside the file
        spill = Path(tempfile.gettempdir()) / "routescope-spill"
        connection.execute("SET temp_directory = ?", [str(spill)])
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute(f"SET max_temp_directory_size = '{SPILLED}'")
        quoted = str(path.absolute()).replace("'", "''")
        connection.execute(f"ATTACH '{quoted}' AS {name}{' (READ_ONLY)' if read_only else ''}")
        connection.execute(_LOCK)
    except BaseException:
        connection.close()
        raise
    return connection


def tables_in(
    connection: duckdb.DuckDBPyConnection, database: str, folder: str = "main"
) -> dict[str, str]:
    """Return how DuckDB writes down each table in a schema of an attached file.

    The text names columns, types, keys, defaults and generated columns, so that equal text means
    an equal table. A view is no table.
    """
    return dict(connection.execute(_TABLES, [database, folder]).fetchall())


def open_sandbox(
    path: Path, *, read_only: bool = True, oldest: int = schema.OLDEST_READ
) -> duckdb.DuckDBPyConnection:
    """Open a run file for reading, or to write in its tables, see :func:`in_file`.

    Raises
    ------
    SchemaVersionError
        If the file has a schema version before ``oldest``, or a newer one.
    StoreError
        If there is no such file, or it is no run file of ours.
    """
    check_file(path)
    try:
        connection = attach(path, FILE, read_only=read_only)
    except duckdb.Error as error:
        raise cannot_open(path, error) from error
    try:
        missing = _check_tables(path, connection, oldest)
        if not read_only:
            _check_indexes(path, connection)
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


def check_old(path: Path) -> int:
    """Return the version of a run file that is to be migrated, if it holds nothing that would run.

    Its views are not looked at: no step reads one.

    Raises
    ------
    StoreError
        If there is no such file, it is no run, or it brings along macros, indexes or other tables.
    """
    check_file(path)
    try:
        connection = attach(path, FILE)
    except duckdb.Error as error:
        raise cannot_open(path, error) from error
    try:
        found = tables_in(connection, FILE, _SCHEMA)
        if "run" not in found:
            raise not_a_run(path, "it has no table packed.run")
        version = read_version(path, connection, in_file(schema.RUN_TABLE))
        _check_indexes(path, connection)
        if connection.execute(_MACROS, [FILE]).fetchall() != [(0,)]:
            raise not_a_run(path, "it has macros, and RouteScope makes none")
        if FIRST_RELEASED <= version < schema.SCHEMA_VERSION:
            # a step may add tables; it changed none that were there
            ours = expected_tables(_layout(path, connection))
            _refuse_strange(path, [n for n in ours if found.get(n, ours[n].sql) != ours[n].sql])
    except duckdb.Error as error:
        raise not_a_run(path, error) from error
    finally:
        connection.close()
    return version


def in_file(statement: str) -> str:
    """Write a statement on our tables for those of the file that is attached."""
    return statement.replace(f"{_SCHEMA}.", f"{FILE}.{_SCHEMA}.")


def _check_indexes(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse indexes, whose expressions would be computed for every row that is written."""
    if connection.execute(_INDEXES, [FILE]).fetchall() != [(0,)]:
        raise not_a_run(path, "it has indexes, and RouteScope makes none")


def _check_tables(path: Path, connection: duckdb.DuckDBPyConnection, oldest: int) -> frozenset[str]:
    """Refuse tables that are not ours to the last column; a view is no table.

    Returns the tables that a file of this older version does not have.
    """
    found = tables_in(connection, FILE, _SCHEMA)
    if found.get("run") != expected_tables(Layout(8, 1))["run"].sql:
        raise not_a_run(path, "it has no table packed.run as RouteScope makes it")
    version = check_version(path, connection, in_file(schema.RUN_TABLE), oldest=oldest)
    missing = frozenset(schema.STAND_INS if version < schema.SCHEMA_VERSION else ())
    ours = expected_tables(_layout(path, connection))
    _refuse_strange(
        path, [name for name in ours if name not in missing and found.get(name) != ours[name].sql]
    )
    return missing


def _refuse_strange(path: Path, names: list[str]) -> None:
    if names:
        raise not_a_run(path, f"its table packed.{min(names)} is not as RouteScope makes it")


def _layout(path: Path, connection: duckdb.DuckDBPyConnection) -> Layout:
    row = connection.sql(in_file(schema.SELECT_LAYOUT)).fetchall()[0]
    layout = Layout(*row)
    if layout.id_bits not in (8, 16) or not 1 <= layout.slots <= MAX_SLOTS:
        raise not_a_run(
            path, f"it says that rows have {layout.slots} slots of {layout.id_bits} bit"
        )
    return layout


def _check_sites(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse numbers of experts that would make every question on the run count for ever."""
    count, most, fewest, in_all = connection.sql(
        "SELECT count(*), coalesce(max(n_experts), 0), coalesce(min(n_experts), 1),"
        " coalesce(sum(n_experts), 0) FROM sites"
    ).fetchall()[0]
    wrong = count > MAX_SITES or in_all > MAX_EXPERTS_IN_ALL
    if wrong or most > MAX_EXPERTS or fewest < 1:
        raise not_a_run(
            path, f"it says that it has {count:,} routers of {fewest:,} to {most:,} experts"
        )


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
            name: Table(sql, connection.table(f"{_SCHEMA}.{name}").columns)
            for name, sql in tables_in(connection, "memory", _SCHEMA).items()
        }


def _views(layout: Layout, missing: frozenset[str]) -> list[str]:
    """Write our views, over views that stand for the tables of the file."""
    tables = []
    for name, table in expected_tables(layout).items():
        if name in missing:
            continue
        columns = ", ".join(_READ.get((name, column), column) for column in table.columns)
        tables.append(f"CREATE VIEW packed.{name} AS SELECT {columns} FROM {FILE}.packed.{name}")
    for name in sorted(missing):
        tables.append(f"CREATE VIEW packed.{name} AS {schema.STAND_INS[name]}")
    return ["CREATE SCHEMA packed", *tables, *schema.view_statements(layout)]
