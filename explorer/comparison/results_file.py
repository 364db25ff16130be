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
from capture.store.check import UNREADABLE
from capture.store.files import LOCKED, is_own_file, limited
from capture.store.reader import attach, tables_in
from explorer.comparison.values import wrong_values
from explorer.errors import ComparisonError
from explorer.run import frame

TableRows = dict[str, list[dict[str, Any]]]

FORMAT_VERSION = 6
# what older files lack, by the first format that has it: columns, which read as NULL, and tables,
# which read as empty
COLUMNS_SINCE: dict[tuple[str, str], int] = {
    ("results", "spanning_rate"): 2,
    ("texts", "mode"): 4,
    ("results", "loss_margin"): 5,
    ("results", "loss_se_domain"): 5,
    ("comparison", "head_flops_share"): 5,
    ("comparison", "expert_flops_share"): 5,
    ("results", "hit_rate"): 6,
    ("results", "draft_experts"): 6,
    ("conditions", "hit_rate"): 6,
    ("conditions", "draft_experts"): 6,
    ("conditions", "max_violation"): 6,
}
TABLES_SINCE = {"oracle": 2, "spanning": 3, "gate_values": 3}

# of one router, seed and mode; a result is computed again when its fingerprint changes
UNIT = {"router": "VARCHAR", "seed": "INTEGER", "mode": "VARCHAR"}

# what conditions do (explorer.comparison.conditions); rows are named by condition or student, not
# by UNIT
CONDITION_TABLES = ("conditions", "flips", "flip_margins", "students", "student_layers")


def _typed(text: str) -> dict[str, str]:
    """Read the columns of a table in their order: a type, and after it the names that have it."""
    found, kind = {}, ""
    for word in text.split():
        if word.endswith(":"):
            kind = word[:-1]
        else:
            found[word] = kind
    return found


TABLES: dict[str, dict[str, str]] = {
    "comparison": _typed("""
        INTEGER: format_version
        VARCHAR: created_at run_name run_fingerprint model model_fingerprint architecture dtype
            device
        INTEGER: n_layers n_experts top_k
        VARCHAR: fit_source
        BIGINT: fit_sequences fit_tokens
        VARCHAR: report_source
        BIGINT: report_sequences report_tokens
        DOUBLE: native_loss
        INTEGER: seed
        VARCHAR: settings packages
        BOOLEAN: complete
        DOUBLE: head_flops_share expert_flops_share
    """),
    "routers": _typed("""
        VARCHAR: router name family title summary formula paper fits part
        BOOLEAN: causal_declared batch_dependent_declared variable_k
        VARCHAR: control control_of
    """),
    "results": UNIT | _typed("""
        VARCHAR: family
        INTEGER: layer site
        VARCHAR: condition control control_of part
        DOUBLE: loss loss_change loss_se perplexity_ratio experts_per_token parts_per_token
            parts_share distinct_experts flops_per_token flops_ratio expert_flops_ratio router_flops
            counted_flops_ratio latency_ms latency_ratio latency_low latency_high bytes_ratio
            energy_ratio agreement jaccard exact_set top_1 weighted_overlap js entropy max_violation
            max_violation_floor cv gini dead_experts load_entropy
        BOOLEAN: causal batch_dependent simulated
        BIGINT: fit_tokens tokens sequences
        DOUBLE: fit_seconds seconds spanning_rate loss_margin loss_se_domain hit_rate draft_experts
    """),
    "domains": UNIT | _typed("""
        VARCHAR: domain
        DOUBLE: loss_change loss_se experts_per_token agreement
        BIGINT: tokens sequences
    """),
    "sequences": UNIT | _typed("""
        INTEGER: layer sequence
        VARCHAR: domain
        INTEGER: tokens
        DOUBLE: loss loss_change
    """),
    "texts": _typed("""
        INTEGER: text_id
        VARCHAR: domain
        INTEGER: position token
        VARCHAR: text mode
    """),
    "choices": UNIT | _typed("""
        INTEGER: text_id position layer site
        SMALLINT[]: expert_ids
        FLOAT[]: weights
    """),
    "token_losses": UNIT | _typed("INTEGER: text_id position FLOAT: loss"),
    "curves": _typed("""
        VARCHAR: router
        INTEGER: seed
        DOUBLE: lambda
        INTEGER: step layer
        DOUBLE: reward policy_entropy gate_rate
    """),
    "conditions": _typed("""
        VARCHAR: condition name kind weights routing
        DOUBLE: loss loss_change loss_se perplexity_ratio
        BIGINT: tokens sequences
        INTEGER: draws
        DOUBLE: draw_spread weight_bytes_ratio
        VARCHAR: method
        BOOLEAN: calibrated simulated
        VARCHAR: fingerprint
        DOUBLE: hit_rate draft_experts max_violation
    """),
    "flips": _typed("""
        VARCHAR: condition
        INTEGER: layer site
        BIGINT: tokens
        DOUBLE: set_flips top1_flips slot_flips margin_auc first_divergence
    """),
    "flip_margins": _typed("""
        VARCHAR: condition
        INTEGER: layer site bin
        DOUBLE: margin_low margin_high
        BIGINT: tokens
        DOUBLE: set_flips
    """),
    "students": _typed("""
        VARCHAR: student title
        DOUBLE: kl agreement exact_set chance loss_change loss_se perplexity_ratio
        BIGINT: fit_tokens tokens
        VARCHAR: fingerprint
    """),
    "student_layers": _typed("""
        VARCHAR: student
        INTEGER: layer site
        DOUBLE: kl agreement exact_set
    """),
    "oracle": _typed("""
        VARCHAR: kind
        INTEGER: n layer site sets
        BOOLEAN: enumerated
        BIGINT: tokens sequences
        DOUBLE: native_best native_rank loss loss_change loss_se
    """),
    "spanning": UNIT | _typed("""
        INTEGER: layer site
        BOOLEAN: spanning
        DOUBLE: loss_change loss_se
        BIGINT: tokens sequences
    """),
    "gate_values": UNIT | _typed("""
        INTEGER: layer
        DOUBLE: low high
        BIGINT: gates
    """),
    "units": UNIT | _typed("VARCHAR: fingerprint error"),
}  # fmt: skip


def empty_rows() -> TableRows:
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
        self._frames: dict[str, pd.DataFrame] = {}
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
        if table not in self._frames:  # a page asks for some twenty times
            whole = [n for n, kind in TABLES[table].items() if kind in ("INTEGER", "BIGINT")]
            made = frame(self._tables[table]).astype(dict.fromkeys(whole, "Int64"))
            self._frames[table] = made
        return self._frames[table].copy(deep=False)

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

    def records(self) -> TableRows:
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
            rows = connection.execute(
                f"SELECT format_version FROM {_table('comparison')}"
            ).fetchall()
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
    (rows,) = connection.execute(f"SELECT sum(n) FROM ({counts})").fetchall()[0]
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
    (size,) = connection.execute(f"SELECT sum(n) FROM ({' UNION ALL '.join(texts)})").fetchall()[0]
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
    return files_beside(run, SUFFIX)


def files_beside(run: str | Path, suffix: str) -> list[Path]:
    """Return the files ``RUN.KEY`` with a suffix that lie beside a run file, newest first."""
    run = Path(run)
    stem = run.name.removesuffix(run.suffix)
    found = [
        path
        for path in run.parent.glob(f"*{suffix}")
        if is_own_file(path) and path.name.removesuffix(suffix).rpartition(".")[0] == stem
    ]
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def write_comparison(path: Path, rows: TableRows) -> None:
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
