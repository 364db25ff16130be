"""The file of a comparison, beside its run: its tables, written whole, read without torch.

One DuckDB file per run, model and settings, named ``RUN.KEY.comparison``. It may come from a
stranger, so it is attached as run files are, see ``capture.store.reader``: nothing that it brings
along is run, and its queries reach no other file.
"""

import functools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import pandas as pd
import pyarrow as pa

from capture.errors import first_line, quoted
from capture.store.check import UNREADABLE, limited
from capture.store.files import LOCKED, is_own_file
from capture.store.reader import attach, tables_in
from explorer.comparison.values import wrong_values
from explorer.errors import ComparisonError
from explorer.run import frame

Rows = dict[str, list[dict[str, Any]]]

FORMAT_VERSION = 5
# what older files lack, by the first format that has it: columns, which read as NULL, and tables,
# which read as empty
COLUMNS_SINCE: dict[tuple[str, str], int] = {
    ("results", "spanning_rate"): 2,
    ("texts", "mode"): 4,
    ("results", "loss_margin"): 5,
    ("results", "loss_se_domain"): 5,
    ("comparison", "head_flops_share"): 5,
    ("comparison", "expert_flops_share"): 5,
}
TABLES_SINCE = {"oracle": 2, "spanning": 3, "gate_values": 3}

# of one router, seed and mode; a result is computed again when its fingerprint changes
UNIT = {"router": "VARCHAR", "seed": "INTEGER", "mode": "VARCHAR"}

_AGREEMENT = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap")
_BALANCE = (
    *("max_violation", "max_violation_floor", "cv", "gini", "dead_experts", "load_entropy"),
)

_LIKENESS = dict.fromkeys(("kl", "agreement", "exact_set"), "DOUBLE")
# what conditions do (explorer.comparison.conditions); rows are named by condition or student, not
# by UNIT
CONDITION_TABLES = ("conditions", "flips", "flip_margins", "students", "student_layers")

TABLES: dict[str, dict[str, str]] = {
    "comparison": {
        "format_version": "INTEGER",
        "created_at": "VARCHAR",
        "run_name": "VARCHAR",
        "run_fingerprint": "VARCHAR",
        "model": "VARCHAR",
        "model_fingerprint": "VARCHAR",
        "architecture": "VARCHAR",
        "dtype": "VARCHAR",
        "device": "VARCHAR",
        "n_layers": "INTEGER",
        "n_experts": "INTEGER",
        "top_k": "INTEGER",
        "fit_source": "VARCHAR",
        "fit_sequences": "BIGINT",
        "fit_tokens": "BIGINT",
        "report_source": "VARCHAR",
        "report_sequences": "BIGINT",
        "report_tokens": "BIGINT",
        "native_loss": "DOUBLE",
        "seed": "INTEGER",
        "settings": "VARCHAR",
        "packages": "VARCHAR",
        "complete": "BOOLEAN",
        "head_flops_share": "DOUBLE",
        "expert_flops_share": "DOUBLE",
    },
    "routers": {
        "router": "VARCHAR",
        "name": "VARCHAR",
        "family": "VARCHAR",
        "title": "VARCHAR",
        "summary": "VARCHAR",
        "formula": "VARCHAR",
        "paper": "VARCHAR",
        "fits": "VARCHAR",
        "part": "VARCHAR",
        "causal_declared": "BOOLEAN",
        "batch_dependent_declared": "BOOLEAN",
        "variable_k": "BOOLEAN",
        "control": "VARCHAR",
        "control_of": "VARCHAR",
    },
    "results": {
        **UNIT,
        "family": "VARCHAR",
        "layer": "INTEGER",
        "site": "INTEGER",
        "condition": "VARCHAR",
        "control": "VARCHAR",
        "control_of": "VARCHAR",
        "part": "VARCHAR",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "perplexity_ratio": "DOUBLE",
        "experts_per_token": "DOUBLE",
        "parts_per_token": "DOUBLE",
        "parts_share": "DOUBLE",
        "distinct_experts": "DOUBLE",
        "flops_per_token": "DOUBLE",
        "flops_ratio": "DOUBLE",
        "expert_flops_ratio": "DOUBLE",
        "router_flops": "DOUBLE",
        "counted_flops_ratio": "DOUBLE",
        "latency_ms": "DOUBLE",
        "latency_ratio": "DOUBLE",
        "latency_low": "DOUBLE",
        "latency_high": "DOUBLE",
        "bytes_ratio": "DOUBLE",
        "energy_ratio": "DOUBLE",
        **dict.fromkeys(_AGREEMENT, "DOUBLE"),
        "js": "DOUBLE",
        "entropy": "DOUBLE",
        **dict.fromkeys(_BALANCE, "DOUBLE"),
        "causal": "BOOLEAN",
        "batch_dependent": "BOOLEAN",
        "simulated": "BOOLEAN",
        "fit_tokens": "BIGINT",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
        "fit_seconds": "DOUBLE",
        "seconds": "DOUBLE",
        "spanning_rate": "DOUBLE",
        "loss_margin": "DOUBLE",
        "loss_se_domain": "DOUBLE",
    },
    "domains": {
        **UNIT,
        "domain": "VARCHAR",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "experts_per_token": "DOUBLE",
        "agreement": "DOUBLE",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
    },
    "sequences": {
        **UNIT,
        "layer": "INTEGER",
        "sequence": "INTEGER",
        "domain": "VARCHAR",
        "tokens": "INTEGER",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
    },
    "texts": {
        "text_id": "INTEGER",
        "domain": "VARCHAR",
        "position": "INTEGER",
        "token": "INTEGER",
        "text": "VARCHAR",
        "mode": "VARCHAR",
    },
    "choices": {
        **UNIT,
        "text_id": "INTEGER",
        "position": "INTEGER",
        "layer": "INTEGER",
        "site": "INTEGER",
        "expert_ids": "SMALLINT[]",
        "weights": "FLOAT[]",
    },
    "token_losses": {
        **UNIT,
        "text_id": "INTEGER",
        "position": "INTEGER",
        "loss": "FLOAT",
    },
    "curves": {
        "router": "VARCHAR",
        "seed": "INTEGER",
        "lambda": "DOUBLE",
        "step": "INTEGER",
        "layer": "INTEGER",
        "reward": "DOUBLE",
        "policy_entropy": "DOUBLE",
        "gate_rate": "DOUBLE",
    },
    "conditions": {
        "condition": "VARCHAR",
        "name": "VARCHAR",
        "kind": "VARCHAR",
        "weights": "VARCHAR",
        "routing": "VARCHAR",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "perplexity_ratio": "DOUBLE",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
        "draws": "INTEGER",
        "draw_spread": "DOUBLE",
        "weight_bytes_ratio": "DOUBLE",
        "method": "VARCHAR",
        "calibrated": "BOOLEAN",
        "simulated": "BOOLEAN",
        "fingerprint": "VARCHAR",
    },
    "flips": {
        "condition": "VARCHAR",
        "layer": "INTEGER",
        "site": "INTEGER",
        "tokens": "BIGINT",
        "set_flips": "DOUBLE",
        "top1_flips": "DOUBLE",
        "slot_flips": "DOUBLE",
        "margin_auc": "DOUBLE",
        "first_divergence": "DOUBLE",
    },
    "flip_margins": {
        "condition": "VARCHAR",
        "layer": "INTEGER",
        "site": "INTEGER",
        "bin": "INTEGER",
        "margin_low": "DOUBLE",
        "margin_high": "DOUBLE",
        "tokens": "BIGINT",
        "set_flips": "DOUBLE",
    },
    "students": {
        "student": "VARCHAR",
        "title": "VARCHAR",
        **_LIKENESS,
        "chance": "DOUBLE",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "perplexity_ratio": "DOUBLE",
        "fit_tokens": "BIGINT",
        "tokens": "BIGINT",
        "fingerprint": "VARCHAR",
    },
    "student_layers": {
        "student": "VARCHAR",
        "layer": "INTEGER",
        "site": "INTEGER",
        **_LIKENESS,
    },
    "oracle": {
        "kind": "VARCHAR",
        "n": "INTEGER",
        "layer": "INTEGER",
        "site": "INTEGER",
        "sets": "INTEGER",
        "enumerated": "BOOLEAN",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
        "native_best": "DOUBLE",
        "native_rank": "DOUBLE",
        "loss": "DOUBLE",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
    },
    "spanning": {
        **UNIT,
        "layer": "INTEGER",
        "site": "INTEGER",
        "spanning": "BOOLEAN",
        "loss_change": "DOUBLE",
        "loss_se": "DOUBLE",
        "tokens": "BIGINT",
        "sequences": "BIGINT",
    },
    "gate_values": {
        **UNIT,
        "layer": "INTEGER",
        "low": "DOUBLE",
        "high": "DOUBLE",
        "gates": "BIGINT",
    },
    "units": {**UNIT, "fingerprint": "VARCHAR", "error": "VARCHAR"},
}


def empty_rows() -> Rows:
    """Return every table without a row."""
    return {name: [] for name in TABLES}


SUFFIX = ".comparison"
_FILE = "comparison_file"
# of all tables together: what is there often takes nearly nothing in the file
MAX_ROWS = 20_000_000
MAX_TEXT = 500 * 10**6  # bytes
SECONDS = 60.0  # what reading one may take
_MAKE = "Make one with: python -m explorer compare RUN"


class Comparison:
    """A comparison, read whole from its file; safe to share between threads.

    Parameters
    ----------
    path : Path
    tables : dict of table name to Arrow table

    Attributes
    ----------
    path : Path
    info : dict
        The one row of table ``comparison``; ``settings`` and ``packages`` as dictionaries.
    """

    def __init__(self, path: Path, tables: dict[str, pa.Table]) -> None:
        self.path = path
        self._tables = tables
        self._lock = threading.Lock()
        self._database: duckdb.DuckDBPyConnection | None = None
        self.info: dict[str, Any] = tables["comparison"].to_pylist()[0]
        for name in ("settings", "packages"):
            self.info[name] = json.loads(self.info[name])
            if not isinstance(self.info[name], dict):
                raise TypeError(f"its {name} are no JSON object")

    @property
    def table(self) -> pd.DataFrame:
        """One row per router, seed, mode and layer; ``layer`` NA = all layers."""
        return self.rows("results")

    @property
    def domains(self) -> pd.DataFrame:
        """Loss, compute and agreement of each router by domain, all layers swapped or replayed."""
        return self.rows("domains")

    @property
    def curves(self) -> pd.DataFrame:
        """Reward, policy entropy and gate rate while routers learned on the model's loss."""
        return self.rows("curves")

    def rows(self, table: str) -> pd.DataFrame:
        """Return one table of the file, see :data:`explorer.comparison.results_file.TABLES`."""
        if table not in TABLES:
            raise ComparisonError(f"Expected one of {', '.join(TABLES)}, got {quoted(table)}.")
        whole = [n for n, kind in TABLES[table].items() if kind in ("INTEGER", "BIGINT")]
        return frame(self._tables[table]).astype(dict.fromkeys(whole, "Int64"))

    def query(self, sql: str, params: Sequence[object] | None = None) -> pd.DataFrame:
        """Return the result of a SELECT on the tables; values go into ``params``, not ``sql``."""
        cursor = self._connect().cursor()
        try:
            found = cursor.sql(sql, params=params)
            if found is None:
                raise ComparisonError(f"A query must return rows, got {quoted(sql)}.")
            return frame(found.to_arrow_table())
        except duckdb.Error as error:
            raise ComparisonError(
                f"The query on {self.path.name} failed: {first_line(error)}"
            ) from error
        finally:
            cursor.close()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        """Return a database with the tables, made for the first query: most readers ask none."""
        with self._lock:
            if self._database is None:
                self._database = duckdb.connect(config=dict(LOCKED))
                for name, table in self._tables.items():
                    self._database.register("incoming", table)
                    self._database.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
                    self._database.unregister("incoming")
            return self._database

    def records(self) -> Rows:
        """Return all tables as records, to add rows and write them again."""
        return {name: table.to_pylist() for name, table in self._tables.items()}

    def close(self) -> None:
        """Free the memory; the file itself is closed already."""
        with self._lock:
            if self._database is not None:
                self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_comparison(path: str | Path) -> Comparison:
    """Read a comparison file.

    Raises
    ------
    ComparisonError
        If there is no such file, or it is none of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ComparisonError(f"Expected a comparison file at {path}, there is none. {_MAKE}")
    try:
        with attach(path, _FILE) as connection, limited(connection, SECONDS):
            # a view would be a program of a stranger's; tables are held against ours to the letter
            found = tables_in(connection, _FILE)
            versions = range(1, FORMAT_VERSION + 1)
            spelled = [[v] for v in versions if _expected(v).items() <= found.items()]
            if not spelled:
                raise ComparisonError(f"{path.name} has other tables than this code. {_MAKE}")
            rows = connection.sql(f"SELECT format_version FROM {_table('comparison')}").fetchall()
            version = [row[0] for row in rows]
            if version not in spelled:
                raise ComparisonError(f"{path.name} has another format than this code. {_MAKE}")
            there = _columns(*version)
            _check_rows(path, connection, there)
            _check_values(path, connection, there)
            tables = {n: connection.sql(f"FROM {_table(n)}").to_arrow_table() for n in there}
            return Comparison(path, {n: _completed(n, tables.get(n)) for n in TABLES})
    except ComparisonError:
        raise
    except (*UNREADABLE, TypeError, RecursionError) as error:
        reason = first_line(error)
        raise ComparisonError(f"{path.name} is no comparison file ({reason}). {_MAKE}") from error


def _table(name: str) -> str:
    """Return the whole name of a table, which nothing else in the file can have."""
    return f"{_FILE}.main.{name}"


def _check_rows(
    path: Path, connection: duckdb.DuckDBPyConnection, there: dict[str, dict[str, str]]
) -> None:
    """Refuse a file that would not fit in memory: equal rows take nearly nothing on disk."""
    counts = " UNION ALL ".join(f"SELECT count(*) AS n FROM {_table(name)}" for name in there)
    (rows,) = connection.sql(f"SELECT sum(n) FROM ({counts})").fetchall()[0]
    if rows > MAX_ROWS:
        raise ComparisonError(
            f"{path.name} holds {rows:,} rows, and a comparison is read up to {MAX_ROWS:,}. {_MAKE}"
        )
    texts = []
    for name, columns in there.items():
        written = [column for column, kind in columns.items() if kind == "VARCHAR"]
        sizes = " + ".join(f"coalesce(sum(strlen({column})), 0)" for column in written)
        if sizes:
            texts.append(f"SELECT {sizes} AS n FROM {_table(name)}")
    (size,) = connection.sql(f"SELECT sum(n) FROM ({' UNION ALL '.join(texts)})").fetchall()[0]
    if size > MAX_TEXT:
        raise ComparisonError(
            f"{path.name} holds {size / 1e6:,.0f} MB of text, and a comparison is read up to "
            f"{MAX_TEXT / 1e6:,.0f} MB. {_MAKE}"
        )


def _check_values(
    path: Path, connection: duckdb.DuckDBPyConnection, there: dict[str, dict[str, str]]
) -> None:
    for wrong in wrong_values(connection, f"{_FILE}.main.", there):
        raise ComparisonError(f"{path.name} is no comparison file (it has {wrong}). {_MAKE}")


@functools.cache
def _expected(version: int) -> dict[str, str]:
    """Return how DuckDB writes down the tables that a comparison file of a format has."""
    with duckdb.connect() as connection:
        for statement in _statements(version):
            connection.execute(statement)
        return tables_in(connection, "memory")


def _completed(name: str, table: pa.Table | None) -> pa.Table:
    """Return a table with what a file of an older format lacks: columns of NULL, or no row."""
    if table is not None and table.column_names == list(TABLES[name]):
        return table
    spelled = ", ".join(f'NULL::{kind} AS "{column}"' for column, kind in TABLES[name].items())
    with duckdb.connect() as connection:
        whole = connection.sql(f"SELECT {spelled} LIMIT 0").to_arrow_table()
        if table is None:
            return whole
        connection.register("incoming", table).register("whole", whole)
        query = "SELECT * FROM whole UNION ALL BY NAME SELECT * FROM incoming"
        return connection.sql(query).to_arrow_table()


def _columns(version: int = FORMAT_VERSION) -> dict[str, dict[str, str]]:
    """Return the tables of a format, {name: {column: SQL type}}."""
    return {
        name: {
            column: kind
            for column, kind in columns.items()
            if COLUMNS_SINCE.get((name, column), 1) <= version
        }
        for name, columns in TABLES.items()
        if TABLES_SINCE.get(name, 1) <= version
    }


def _statements(version: int = FORMAT_VERSION) -> list[str]:
    spelled = {
        name: ", ".join(f'"{column}" {kind}' for column, kind in columns.items())
        for name, columns in _columns(version).items()
    }
    return [f"CREATE TABLE {name} ({columns})" for name, columns in spelled.items()]


def comparisons_of(run: str | Path) -> list[Path]:
    """Return the comparison files that lie beside a run file, newest first."""
    run = Path(run)
    stem = run.name.removesuffix(run.suffix)
    found = [
        path
        for path in run.parent.glob(f"*{SUFFIX}")
        if is_own_file(path) and path.name.removesuffix(SUFFIX).rpartition(".")[0] == stem
    ]
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def write_comparison(path: Path, rows: Rows) -> None:
    """Write a comparison file in one step, so that a reader sees the old one or the new one.

    Parameters
    ----------
    path : Path
        Replaced if it exists.
    rows : dict of table name to list of dict
        Columns that a record lacks are NULL.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with duckdb.connect(str(partial)) as connection:
            connection.execute("BEGIN")  # each statement alone would wait for the disk
            for statement in _statements():
                connection.execute(statement)
            for name, records in rows.items():
                if records:
                    _insert(connection, name, records)
            connection.execute("COMMIT")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _insert(
    connection: duckdb.DuckDBPyConnection, name: str, records: Sequence[dict[str, Any]]
) -> None:
    unknown = sorted({key for record in records for key in record} - set(TABLES[name]))
    if unknown:
        raise ComparisonError(f"Table {name} has no column {unknown[0]}.")
    columns = [column for column in TABLES[name] if any(column in record for record in records)]
    # what is not known is NULL, never nan
    arrays = [
        pa.array([record.get(column) for record in records], from_pandas=True) for column in columns
    ]
    listed = ", ".join(f'"{column}"' for column in columns)
    connection.register("incoming", pa.table(arrays, names=columns))
    connection.execute(f"INSERT INTO {name} ({listed}) SELECT {listed} FROM incoming")
    connection.unregister("incoming")
