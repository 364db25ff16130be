"""Opening and reading a run file, whoever made it; many processes may do so at once.

A file may come from a stranger. Its views, macros and generated columns are programs of theirs, and
a view named ``tokens`` that reads for ever looks like any other. So the file is attached to an
empty database in memory, its tables are held against ours column by column, and our own views are
made over them there; what else the file holds has no name in that database. Memory and time of what
runs on it are limited, and what is wrong with a file is one kind of error.
"""

import functools
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import duckdb
import pyarrow as pa

from capture.errors import SchemaVersionError, StoreError, first_line, quoted
from capture.store import check, schema
from capture.store.check import UNREADABLE, check_values
from capture.store.codec import Layout
from capture.store.files import (
    SAFE,
    cannot_open,
    check_file,
    is_partitioned,
    limited,
    not_a_run,
    rows_folder,
)
from capture.store.records import sites_of

SECONDS = 120.0  # what a query may take
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
# tables that grow with the tokens: of a partitioned run they lie in Parquet files, not in the file
ROW_TABLES = ("token", "route", "score", "hidden")
FIRST_RELEASED = 1  # schema version
# columns that are not read as they are stored
_READ = {("token", "token"): f"nullif(token, {schema.NO_TOKEN}) AS token"}
MAX_SITES = 4_096
MAX_EXPERTS = 65_534  # the largest number of experts that a packed id can name
MAX_EXPERTS_IN_ALL = 2**20
MAX_SLOTS = 1_024


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
        rows = connection.execute(schema.select_version(table)).fetchall()
    except duckdb.Error as error:
        raise not_a_run(path, error) from error
    if len(rows) != 1:
        raise not_a_run(path, "its run table has no single row")
    return int(rows[0][0])


def attach(path: Path, name: str, *, read_only: bool = True) -> duckdb.DuckDBPyConnection:
    """Attach a file, whoever made it, as ``name`` to an empty database in memory.

    Its tables are read under their whole names, ``name.schema.table``; no other file can be read,
    except those of the folder of a partitioned run.

    Raises
    ------
    duckdb.Error
        If the file is not a database, or is open elsewhere.
    """
    connection = duckdb.connect(":memory:", config=dict(SAFE))
    try:
        # what does not fit in memory is put aside here, never beside the file
        spill = Path(tempfile.gettempdir()) / "routescope-spill"
        connection.execute("SET temp_directory = ?", [str(spill)])
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute(f"SET max_temp_directory_size = '{SPILLED}'")
        # a query of seconds would draw it into what a command prints
        connection.execute("SET enable_progress_bar = false")
        here = _quoted(path.absolute())
        connection.execute(f"ATTACH {here} AS {name}{' (READ_ONLY)' if read_only else ''}")
        if read_only and (rows := rows_folder(path)).is_dir() and not rows.is_symlink():
            connection.execute(f"SET allowed_directories = [{_quoted(rows.absolute())}]")
        connection.execute(_LOCK)
    except BaseException:
        connection.close()
        raise
    return connection


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def tables_in(
    connection: duckdb.DuckDBPyConnection, database: str, folder: str = "main"
) -> dict[str, str]:
    """Return how DuckDB writes down each table in a schema of an attached file.

    The text names columns, types, keys, defaults and generated columns, so that equal text means
    an equal table. Views are not among them.
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
        If there is no such file, or it is not a run file of ours.
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
        layout = _layout(path, connection)
        (notes,) = connection.execute(in_file(schema.SELECT_NOTES)).fetchall()[0]
        rows = _partitions(path, connection, layout) if is_partitioned(notes) else {}
        for statement in _views(layout, missing, rows):
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
        If there is no such file, it is not a run, or it holds macros, indexes or other tables.
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
    """Refuse tables that are not ours to the last column.

    Returns the tables that a file of this older version does not have.
    """
    found = tables_in(connection, FILE, _SCHEMA)
    if found.get("run") != expected_tables(Layout(8, 1))["run"].sql:
        raise not_a_run(path, "it has no table packed.run as RouteScope makes it")
    version = check_version(path, connection, in_file(schema.RUN_TABLE), oldest=oldest)
    missing = frozenset(name for name, (since, _) in schema.STAND_INS.items() if version < since)
    ours = expected_tables(_layout(path, connection))
    _refuse_strange(
        path, [name for name in ours if name not in missing and found.get(name) != ours[name].sql]
    )
    return missing


def _partitions(
    path: Path, connection: duckdb.DuckDBPyConnection, layout: Layout
) -> dict[str, str]:
    """Return what to read in the place of each table of rows; refuse what are not its rows."""
    folder = rows_folder(path.absolute())
    if not folder.is_dir() or folder.is_symlink():
        raise StoreError(
            f"The rows of {path.name} lie in the folder {folder.name}, which is not beside it. Put "
            "it back there, or open the run that both were made of."
        )
    found = {table: f"read_parquet({_files(folder, table)})" for table in ROW_TABLES}
    for table, rows in found.items():
        columns = dict(
            row[:2] for row in connection.execute(f"DESCRIBE SELECT * FROM {rows}").fetchall()
        )
        if columns != expected_tables(layout)[table].types:
            raise not_a_run(
                path, f"its rows in {folder.name}/{table} are not as RouteScope makes them"
            )
    return found


def _files(folder: Path, table: str) -> str:
    """Write the files of a table, and that the name of a folder is no column."""
    return f"{_quoted(folder / table / 'part=*' / 'rows.parquet')}, hive_partitioning = false"


def _refuse_strange(path: Path, names: list[str]) -> None:
    if names:
        raise not_a_run(path, f"its table packed.{min(names)} is not as RouteScope makes it")


def _layout(path: Path, connection: duckdb.DuckDBPyConnection) -> Layout:
    row = connection.execute(in_file(schema.SELECT_LAYOUT)).fetchall()[0]
    layout = Layout(*row)
    if layout.id_bits not in (8, 16) or not 1 <= layout.slots <= MAX_SLOTS:
        raise not_a_run(
            path, f"it says that rows have {layout.slots} slots of {layout.id_bits} bit"
        )
    return layout


def _check_sites(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse numbers of experts that would make every question on the run count for ever."""
    count, most, fewest, in_all = connection.execute(
        "SELECT count(*), coalesce(max(n_experts), 0), coalesce(min(n_experts), 1),"
        " coalesce(sum(n_experts), 0) FROM sites"
    ).fetchall()[0]
    wrong = count > MAX_SITES or in_all > MAX_EXPERTS_IN_ALL
    if wrong or most > MAX_EXPERTS or fewest < 1:
        raise not_a_run(
            path, f"it says that it has {count:,} routers of {fewest:,} to {most:,} experts"
        )


class PackedTable(NamedTuple):
    """One of our tables: how DuckDB writes it down, and its columns."""

    sql: str
    columns: list[str]
    types: dict[str, str]


@functools.cache
def expected_tables(layout: Layout) -> dict[str, PackedTable]:
    """Return the tables that a run file of this layout has."""
    with duckdb.connect(":memory:") as connection:
        for statement in schema.create_statements(layout):
            connection.execute(statement)
        return {
            name: PackedTable(
                sql, table.columns, dict(zip(table.columns, map(str, table.types), strict=True))
            )
            for name, sql in tables_in(connection, "memory", _SCHEMA).items()
            for table in [connection.table(f"{_SCHEMA}.{name}")]
        }


def _views(layout: Layout, missing: frozenset[str], rows: Mapping[str, str]) -> list[str]:
    """Write our views, over views that stand for the tables of the file, or for its ``rows``."""
    tables = []
    for name, table in expected_tables(layout).items():
        if name in missing:
            continue
        columns = ", ".join(_READ.get((name, column), column) for column in table.columns)
        place = rows.get(name, f"{FILE}.packed.{name}")
        tables.append(f"CREATE VIEW packed.{name} AS SELECT {columns} FROM {place}")
    for name in sorted(missing):
        tables.append(f"CREATE VIEW packed.{name} AS {schema.STAND_INS[name][1]}")
    ours = (*schema.view_statements(layout), *schema.views_without_weights(layout))
    return ["CREATE SCHEMA packed", *tables, *ours]


def view_script(layout: Layout, name: str) -> str:
    """Write the documented views of a partitioned run for DuckDB, started where the file lies."""
    folder = rows_folder(Path(name))
    rows = {table: f"read_parquet({_files(folder, table)})" for table in ROW_TABLES}
    statements = [
        f"-- duckdb -init '{folder}/views.sql', in the folder of {name}",
        f"ATTACH {_quoted(Path(name))} AS {FILE} (READ_ONLY)",
        *_views(layout, frozenset(), rows),
    ]
    return ";\n".join(part.strip().rstrip(";") for part in statements) + ";\n"


class RunReader:
    """A read-only connection to one run file, whoever made it.

    Attributes
    ----------
    path : Path
    info : dict
        The row of the view ``run``.
    sites : list of SiteInfo
        Ordered by layer and site.
    """

    def __init__(self, path: Path, connection: duckdb.DuckDBPyConnection) -> None:
        self.path = path
        self._connection: duckdb.DuckDBPyConnection | None = connection
        self._lock = threading.Lock()
        run = connection.sql(schema.SELECT_RUN).to_arrow_table()
        self.info: dict[str, Any] = run.to_pylist()[0]
        self.sites = sites_of(connection.execute(schema.SELECT_SITES).fetchall())

    @classmethod
    def open(cls, path: str | Path, *, checked: bool = False) -> Self:
        """Open a run file for reading; ``checked`` refuses values that contradict each other.

        Raises
        ------
        SchemaVersionError
            If the file has another schema version.
        StoreError
            If the file does not exist or is not a run file.
        """
        path = Path(path)
        connection = open_sandbox(path)
        try:
            if checked:
                check_values(path, connection)
            return cls(path, connection)
        except UNREADABLE as error:
            connection.close()
            raise not_a_run(path, error) from error
        except BaseException:
            connection.close()
            raise

    def query(
        self, sql: str, params: Sequence[object] | dict[str, object] | None = None
    ) -> pa.Table:
        """Run a SELECT and return Arrow; safe to call from several threads.

        ``?`` or ``$name`` stands for every value that comes from outside, and ``params`` has it.

        Raises
        ------
        StoreError
            If DuckDB refuses the statement, cannot read the file, or takes too long.
        """
        with self._lock:
            if self._connection is None:
                raise StoreError(f"{self.path} is closed. Open it again with RunReader.open.")
            cursor = self._connection.cursor()
        try:
            kinds = [statement.type for statement in cursor.extract_statements(sql)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise StoreError(
                    f"The query on {self.path.name} failed: expected one SELECT, got {quoted(sql)}."
                )
            with limited(cursor, SECONDS):
                return cursor.sql(sql, params=params).to_arrow_table()
        except duckdb.InterruptException:
            raise StoreError(
                f"The query on {self.path.name} took over {SECONDS:g} s and was stopped. Choose a "
                "part of the run at the side."
            ) from None
        except UNREADABLE as error:
            raise StoreError(
                f"The query on {self.path.name} failed: {first_line(error)}."
            ) from error
        finally:
            cursor.close()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_run(path: str | Path, *, seconds: float = check.SECONDS) -> None:
    """Refuse a run file whose parts contradict each other.

    One that takes longer than ``seconds`` is refused too: it would make every page wait.

    Raises
    ------
    SchemaVersionError, StoreError
        With what is wrong.
    """
    path = Path(path)
    connection = open_sandbox(path)
    try:
        check_values(path, connection, seconds=seconds)
    finally:
        connection.close()
