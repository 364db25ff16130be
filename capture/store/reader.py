"""Reading a finished run file; many processes may do so at once.

A query may take so long and no more, and what is wrong with a file is one kind of error.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from capture.errors import StoreError, first_line, quoted
from capture.store import schema
from capture.store.check import UNREADABLE, check_values, limited
from capture.store.records import SiteInfo
from capture.store.sandbox import not_a_run, open_sandbox

SECONDS = 120.0  # what a query may take


class RunReader:
    """A read-only connection to one run file, whoever made it; see ``sandbox``.

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
    def open(cls, path: str | Path, *, checked: bool = False) -> Self:
        """Open a run file for reading.

        Parameters
        ----------
        path : str or Path
        checked : bool
            Refuse a file whose values contradict each other, see ``checking``.

        Raises
        ------
        SchemaVersionError
            If the file has another schema version.
        StoreError
            If the file does not exist or is no run file.
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

        Parameters
        ----------
        sql : str
            With ``?`` or ``$name`` for every value that comes from outside.
        params : sequence or dict, optional
            Their values.

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
                f"The query on {self.path.name} failed: {first_line(error)}"
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
