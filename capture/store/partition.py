"""A run whose rows lie in Parquet files beside it, for more rows than one file should hold.

``NAME.duckdb`` then holds what a run says of itself, its prompts and its sums, and the folder
``NAME.parquet`` the rows that grow with the tokens: ``TABLE/part=N/rows.parquet``, a part for so
many tokens. It opens as any other run does, under its own name. ``views.sql`` in the folder makes
the documented views for other programs that read Parquet through DuckDB.
"""

import json
import shutil
import tempfile
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from capture.errors import StoreError, first_line
from capture.interrupts import as_keyboard_interrupt
from capture.paths import given_path
from capture.store import schema
from capture.store.check import check_values
from capture.store.codec import Layout
from capture.store.files import PARTITIONED, SAFE, check_new, made_whole, rows_folder
from capture.store.reader import (
    ROW_TABLES,
    expected_tables,
    open_sandbox,
    view_script,
)
from capture.store.writer import BLOCK_SIZE

TOKENS = 2**19  # of a part
_BATCH = 2**17  # rows in memory


@as_keyboard_interrupt()
def partition(path: str | Path, out: str | Path, *, tokens: int = TOKENS) -> Path:
    """Write the run at ``path`` as ``out``, with its rows in partitioned Parquet beside it.

    The old file is not touched. Memory does not grow with the run.

    Parameters
    ----------
    path, out : str or Path
        ``out`` names the new run file; the folder has its name with the ending ``.parquet``.
    tokens : int
        Tokens of a part.

    Raises
    ------
    StoreError
        If ``path`` is not a run, or ``out`` or its folder exists or cannot be written.
    """
    path, out = given_path(path, "the run", StoreError), given_path(out, "the new run", StoreError)
    check_new(out)
    folder = rows_folder(out)
    if folder.exists():
        raise StoreError(f"{folder} already exists and is not overwritten. Choose another OUT.")
    if tokens < 1:
        raise StoreError(f"A part has at least 1 token, got {tokens}.")
    connection = open_sandbox(path)
    try:
        check_values(path, connection)
        layout = Layout(*connection.execute(schema.SELECT_LAYOUT).fetchall()[0])
        # a name that no other call has, in the same file system
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for table in ROW_TABLES:
                _write_rows(connection, table, fresh / table, tokens)
            (fresh / "views.sql").write_text(view_script(layout, out.name), encoding="utf-8")
            with made_whole(out) as file:
                _write_rest(connection, layout, file)
                fresh.chmod(0o755)  # temporary folders are for their owner alone
                fresh.rename(folder)
        except BaseException:
            shutil.rmtree(fresh if fresh.exists() else folder, ignore_errors=True)
            raise
    except (duckdb.Error, OSError) as error:
        raise StoreError(
            f"{out} could not be written: {first_line(error)}. Choose another OUT."
        ) from error
    finally:
        connection.close()
    return out


def _write_rows(
    connection: duckdb.DuckDBPyConnection, table: str, folder: Path, tokens: int
) -> None:
    """Write the rows of a table, a file for every ``tokens`` tokens; an empty one makes a file."""
    (most,) = connection.execute(
        f"SELECT coalesce(max(token_id), 0) FROM packed.{table}"
    ).fetchall()[0]
    for part in range(most // tokens + 1):
        rows = connection.sql(
            f"SELECT * FROM packed.{table} WHERE token_id >= {part * tokens}"
            f" AND token_id < {(part + 1) * tokens}"
        ).to_arrow_reader(_BATCH)
        place = folder / f"part={part:05d}"
        place.mkdir(parents=True)
        with pq.ParquetWriter(place / "rows.parquet", rows.schema, compression="zstd") as file:
            for batch in rows:
                file.write_batch(batch)


def _write_rest(connection: duckdb.DuckDBPyConnection, layout: Layout, file: Path) -> None:
    """Write the tables that do not grow with the tokens, and the note of where the others are."""
    (notes,) = connection.execute("SELECT notes FROM packed.run").fetchall()[0]
    config = SAFE | {"default_block_size": str(BLOCK_SIZE)}
    with duckdb.connect(str(file), config=dict(config)) as target:
        for statement in schema.create_statements(layout):
            target.execute(statement)
        for table in expected_tables(layout):
            if table not in ROW_TABLES:
                target.register("rows", connection.sql(f"SELECT * FROM packed.{table}").arrow())
                target.execute(schema.insert(table))
                target.unregister("rows")
        said = json.dumps(json.loads(notes or "{}") | {PARTITIONED: True})
        target.execute("UPDATE packed.run SET notes = ?, schema_version = ?",
                       [said, schema.SCHEMA_VERSION])  # fmt: skip
        target.execute("CHECKPOINT")
