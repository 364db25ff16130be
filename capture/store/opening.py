"""Opening a DuckDB file as a run file, with one clear error for all that can be wrong with it."""

from pathlib import Path

import duckdb

from capture import quoting
from capture.errors import SchemaVersionError, StoreError
from capture.store import schema

# statements on a file that may come from a stranger read no other file and no Python variable
SAFE = {
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
LOCKED = SAFE | {"enable_external_access": "false", "lock_configuration": "true"}


# what a system says when a write finds no room
_NO_ROOM = ("No space left", "File too large", "quota exceeded")


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
    return quoting.first_line(error).rstrip(".")


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
    reason = quoting.first_line(reason)
    return StoreError(
        f"A run file was expected at {path}, but it is none ({reason}). Record one with: "
        "python -m capture MODEL --prompts FILE --out RUN"
    )
