"""Rows of (request, token, layer) in any order, put in order by DuckDB in bounded memory.

Per-token logs, tables of chosen experts and the like differ only in how one row is written; each is
brought to the columns ``request, token, layer, ids, weights`` in the order of the file, and what
follows is the same for all.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import TraceError, first_line
from capture.traces.sequences import MAX_TOP_K, Sequence

MEMORY = "2GB"
_BATCH = 65_536  # rows that are held at a time

# names that columns of a table have, the first one is ours
ALIASES = {
    "request": ("request", "prompt", "prompt_id", "request_id", "req_id", "sequence", "seq"),
    "token": ("token", "token_idx", "position", "pos", "token_index", "token_pos"),
    "layer": ("layer", "layer_id", "layer_idx"),
    "slot": ("slot", "rank", "k"),
    "expert": ("expert", "expert_id", "expert_idx"),
    "weight": ("weight", "gate", "gate_weight", "prob", "score", "topk_weight"),
}


class OrderedRows(NamedTuple):
    """Rows in a temporary database.

    Attributes
    ----------
    layers : tuple of int
        As the rows name them.
    """

    connection: duckdb.DuckDBPyConnection
    folder: "tempfile.TemporaryDirectory[str]"
    layers: tuple[int, ...]
    top_k: int
    weighted: bool

    def close(self) -> None:
        """Remove the temporary database."""
        self.connection.close()
        self.folder.cleanup()

    def sequences(self) -> Iterator[Sequence]:
        """Return the requests in the order in which they begin, one at a time."""
        reader = (
            self.connection.cursor()
            .sql(
                "SELECT request, part, token, list_position($layers, layer) - 1 AS place, ids,"
                " weights FROM ordered ORDER BY started, part, token, place",
                params={"layers": list(self.layers)},
            )
            .to_arrow_reader(_BATCH)
        )
        held: list[pa.RecordBatch] = []
        for batch in reader:
            held.append(batch)
            table = pa.Table.from_batches(held)
            ends = _ends(table)
            for start, stop in zip([0, *ends[:-1]], ends, strict=False):
                yield self._sequence(table.slice(start, stop - start))
            held = table.slice(ends[-1] if ends else 0).to_batches()
        if held:
            yield self._sequence(pa.Table.from_batches(held))

    def _sequence(self, rows: pa.Table) -> Sequence:
        token = rows["token"].to_numpy().astype(np.int64)
        first = int(token[0])
        shape = (int(token[-1]) - first + 1, len(self.layers), self.top_k)
        at = (token - first, rows["place"].to_numpy())
        ids = np.full(shape, -1, np.int32)
        ids[at] = _padded(rows["ids"], self.top_k, -1).astype(np.int32)
        weights = None
        if self.weighted:
            weights = np.zeros(shape, np.float32)
            weights[at] = _padded(rows["weights"], self.top_k, 0.0).astype(np.float32)
        name = rows["request"][0].as_py()
        part = rows["part"][0].as_py()
        return Sequence(f"{name}" + (f", part {part + 1}" if part else ""), ids, weights, first)


def _ends(table: pa.Table) -> list[int]:
    """Return where a sequence ends within the rows; the last one may go on."""
    if len(table) < 2:
        return []
    request, part = table["request"].to_numpy(), table["part"].to_numpy()
    return (np.flatnonzero((request[1:] != request[:-1]) | (part[1:] != part[:-1])) + 1).tolist()


def _padded(lists: pa.ChunkedArray, width: int, filler: float) -> npt.NDArray[np.float64]:
    """Return lists as rows of equal length."""
    array = lists.combine_chunks()
    lengths = np.diff(array.offsets.to_numpy())
    rows = np.full((len(array), width), filler)
    rows[np.arange(width) < lengths[:, None]] = array.flatten().to_numpy(zero_copy_only=False)
    return rows


def bounded(path: Path | None = None) -> duckdb.DuckDBPyConnection:
    """Return a temporary database that takes so much memory, and prints no bar of its progress."""
    connection = duckdb.connect(path or ":memory:", config={"memory_limit": MEMORY})
    connection.execute("SET enable_progress_bar = false")
    return connection


def read_table(path: Path, select: str, *, in_order: bool) -> OrderedRows:
    """Put rows in order.

    Parameters
    ----------
    path : Path
        For messages.
    select : str
        A query of ``request, token, layer, ids, weights`` in the order of the file; it may use
        ``$path``.
    in_order : bool
        Whether a request that begins again at an earlier token is another one: engines profile
        under the number of the first request. Otherwise rows may come in any order.

    Raises
    ------
    TraceError
        With what DuckDB says, or what the rows lack.
    """
    folder = tempfile.TemporaryDirectory(prefix="routing-")
    connection = bounded(Path(folder.name) / "rows.duckdb")
    try:
        layers, top_k, weighted = _ordered(connection, path, select, in_order=in_order)
    except BaseException:
        connection.close()
        folder.cleanup()
        raise
    return OrderedRows(connection, folder, layers, top_k, weighted)


def _ordered(
    connection: duckdb.DuckDBPyConnection, path: Path, select: str, *, in_order: bool
) -> tuple[tuple[int, ...], int, bool]:
    """Make the table ``ordered`` and return its layers, its top k, and whether it has weights."""
    run = partial(_run, connection, path)
    run(f"CREATE TABLE rows AS SELECT row_number() OVER () AS n, * FROM ({select})", path=str(path))
    run(
        """
        CREATE TABLE ordered AS SELECT *, min(n) OVER (PARTITION BY request) AS started,
            sum(again::INTEGER) OVER (PARTITION BY request, layer ORDER BY n) AS part
        FROM (
            SELECT *, $in_order AND coalesce(
                token <= lag(token) OVER (PARTITION BY request, layer ORDER BY n), false
            ) AS again FROM rows
        )
    """,
        in_order=in_order,
    )
    missing, negative, top_k, ragged, weighted, unweighted = run("""
        SELECT count(*) FILTER (
                token IS NULL OR layer IS NULL OR coalesce(len(ids) <> list_count(ids), true)
            ),
            count(*) FILTER (token < 0 OR layer < 0), max(len(ids)),
            count(*) FILTER (weights IS NOT NULL AND len(weights) <> len(ids)),
            count(weights), count(*) FILTER (weights IS NULL) FROM ordered
    """)[0]
    if not weighted + unweighted:
        raise TraceError(f"{path.name} holds no rows.")
    for count, what in (
        (missing, "without a token, a layer or experts"),
        (negative, "with a negative token or layer"),
        (ragged, "with another number of weights than experts"),
    ):
        if count:
            raise TraceError(f"{path.name} has {count:,} rows {what}. Each row is one choice.")
    # a table has one row a slot: a choice that stands in it twice would read as a larger top k
    twice = run("""
        SELECT count(*) FILTER (len(list_distinct(ids)) < len(ids) AND list_max(ids) > 0)
        FROM ordered
    """)[0][0]
    if twice and not in_order:
        raise TraceError(
            f"{path.name} names an expert twice for one token and layer, {twice:,} times. Leave "
            "repeated rows out, or tell prompts apart by a column prompt."
        )
    if not 1 <= top_k <= MAX_TOP_K:
        raise TraceError(f"{path.name}: a token has 1 to {MAX_TOP_K} experts, got {top_k}.")
    if weighted and unweighted:
        raise TraceError(
            f"{path.name} has weights in {weighted:,} rows and none in {unweighted:,}. Leave them "
            "out, or give all."
        )
    layers = tuple(row[0] for row in run("SELECT DISTINCT layer FROM ordered ORDER BY layer"))
    return layers, int(top_k), bool(weighted)


def _run(
    connection: duckdb.DuckDBPyConnection, source: Path, sql: str, **params: object
) -> list[tuple[Any, ...]]:
    try:
        return connection.execute(sql, params or None).fetchall()
    except duckdb.Error as error:
        raise TraceError(f"{source.name} could not be read: {first_line(error)}.") from error


def select_columns(columns: list[str], source: str) -> str | None:
    """Return the query of a table of chosen experts, one row a slot; None if it is no such table.

    Parameters
    ----------
    columns : list of str
        Those of the table, in any case.
    source : str
        What reads it, in SQL.
    """
    names = {column.lower(): column for column in columns}
    found = {
        ours: next((f'"{names[name]}"' for name in known if name in names), None)
        for ours, known in ALIASES.items()
    }
    if found["token"] is None or found["layer"] is None or found["expert"] is None:
        return None
    request = found["request"] or "0"
    slot = found["slot"] or "n"
    weights = f"list({found['weight']} ORDER BY {slot})" if found["weight"] else "NULL::DOUBLE[]"
    return (
        f"SELECT request, token, layer, ids, weights FROM (SELECT {request}::VARCHAR AS request,"
        f" {found['token']}::BIGINT AS token, {found['layer']}::INTEGER AS layer, min(n) AS first,"
        f" list({found['expert']}::INTEGER ORDER BY {slot}) AS ids, {weights} AS weights FROM"
        f" (SELECT *, row_number() OVER () AS n FROM {source}) GROUP BY ALL ORDER BY first)"
    )


def reader_of(path: Path) -> str:
    """Return what reads a table, in SQL, of ``$path``."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return "read_parquet($path)"
    return "read_json($path)" if head.lstrip()[:1] in (b"{", b"[") else "read_csv($path)"


def columns_of(path: Path) -> list[str]:
    """Return the columns of a table."""
    try:
        with duckdb.connect(":memory:") as connection:
            rows = connection.execute(
                f"DESCRIBE SELECT * FROM {reader_of(path)}", {"path": str(path)}
            ).fetchall()
    except duckdb.Error as error:
        raise TraceError(f"{path.name} could not be read: {first_line(error)}.") from error
    return [row[0] for row in rows]
