"""Reading a finished run file; many processes may do so at once."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from capture.errors import SchemaVersionError, StoreError
from capture.store import schema
from capture.store.records import SiteInfo

# a run may come from a stranger: a query on it reads no other file and no Python variable
_CONFIG = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}


class RunReader:
    """A read-only connection to one run file.

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
        self.sites = [SiteInfo(*row) for row in connection.sql(schema.SELECT_SITES).fetchall()]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run file for reading.

        Raises
        ------
        SchemaVersionError
            If the file has another schema version.
        StoreError
            If the file does not exist or is no run file.
        """
        path = Path(path)
        connection = connect(path, read_only=True, config=_CONFIG)
        try:
            check_version(path, connection)
            return cls(path, connection)
        except duckdb.Error as error:
            connection.close()
            raise not_a_run(path, error) from error
        except BaseException:
            connection.close()
            raise

    def query(
        self, sql: str, params: Sequence[object] | dict[str, object] | None = None
    ) -> pa.Table:
        """Run a SELECT and return Arrow; safe to call from several threads.

        Parameters
        ----------
        sql : str
            With ``?`` or ``$name`` for every value that comes from outside.
        params : sequence or dict, optional
            Their values.

        Raises
        ------
        StoreError
            If DuckDB refuses the statement.
        """
        with self._lock:
            if self._connection is None:
                raise StoreError(f"{self.path} is closed. Open it again with RunReader.open.")
            cursor = self._connection.cursor()
        try:
            relation = cursor.sql(sql, params=params)
            if relation is None:
                raise StoreError(f"A query must return rows, got {sql[:200]!r}. Use a SELECT.")
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise StoreError(f"The query on {self.path} failed: {error}") from error
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


def connect(
    path: Path, *, read_only: bool, config: dict[str, str] | None = None
) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB file, with one clear error for all that can be wrong with it."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StoreError(
            f"A run file was expected at {path}, which is {found}. Record one with: "
            "python -m capture MODEL --prompts FILE --out RUN"
        )
    try:
        return duckdb.connect(str(path), read_only=read_only, config=dict(config or {}))
    except duckdb.Error as error:
        if "different configuration" in str(error):
            raise StoreError(
                f"{path} is open in this process with other settings. Close that connection first."
            ) from error
        if "Could not set lock" in str(error):
            raise StoreError(
                f"{path} is being written by another process. Wait until its capture ends."
            ) from error
        raise not_a_run(path, error) from error


def check_version(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse a run file of another schema version, and a file that is no run at all."""
    found = read_version(path, connection)
    if found < schema.SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {found}, and this code reads {schema.SCHEMA_VERSION}. "
            f"Convert it: python -m capture migrate '{path}' NEW"
        )
    if found > schema.SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {found}, and this code reads {schema.SCHEMA_VERSION}. "
            "Update RouteScope to read it."
        )


def read_version(path: Path, connection: duckdb.DuckDBPyConnection) -> int:
    """Return the schema version of an open file."""
    try:
        rows = connection.sql(schema.SELECT_VERSION).fetchall()
    except duckdb.Error as error:
        raise not_a_run(path, error) from error
    if len(rows) != 1:
        raise not_a_run(path, None)
    return int(rows[0][0])


def not_a_run(path: Path, error: Exception | None) -> StoreError:
    """Make the error for a file that is not a run file."""
    reason = str(error).splitlines()[0] if error else "its run table has no single row"
    return StoreError(
        f"A run file was expected at {path}, but it is none ({reason}). Record one with: "
        "python -m capture MODEL --prompts FILE --out RUN"
    )
