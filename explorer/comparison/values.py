"""What the values of a comparison file keep to, as conditions of a row that does not.

The page Compare counts on each of these: a number that is one, a share from 0 to 1, an expert that
the model has. A comparison writes nothing else; a stranger's file may hold anything that its
columns can. What is not known is NULL, which is right everywhere but where it says so.
"""

from collections.abc import Collection, Iterator, Mapping

import duckdb

from capture.prompts import MAX_SOURCE
from capture.store.check import (
    MAX_DOCUMENT,
    MAX_LAYER,
    MAX_LOSS,
    MAX_NAME,
    MAX_NUMBER,
    long,
    number,
    numbers,
)

MAX_COUNT = 10**15
MAX_ID = 2**31 - 1
MAX_FAMILIES = 100  # each is a button
_ROUNDING = 1e-6
# rows of what a page shows whole; what it asks for piece by piece may be longer
_MOST = dict.fromkeys(("routers", "students", "conditions"), 10_000) | dict.fromkeys(
    ("results", "domains", "units", "flips", "flip_margins", "student_layers", "oracle"), 200_000
)
_SHARES = frozenset({
    *("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap", "gini", "parts_share"),
    *("head_flops_share", "expert_flops_share", "spanning_rate", "set_flips", "top1_flips"),
    *("slot_flips", "margin_auc", "native_best", "gate_rate", "low", "high", "chance", "hit_rate"),
})  # fmt: skip
_LOSSES = frozenset({"loss", "loss_change", "native_loss"})
_SIGNED = frozenset({"reward", "margin_low", "margin_high", "lambda"})
_LONG = {
    **{("comparison", name): MAX_DOCUMENT for name in ("settings", "packages")},
    **{("routers", name): MAX_SOURCE for name in ("summary", "formula", "fits", "paper")},
    ("units", "error"): MAX_SOURCE,
    ("conditions", "method"): MAX_SOURCE,
}
# a layer of a mean over all of them
_ALL_LAYERS = frozenset({"flips", "flip_margins"})
_FIRST, _LAST = "1970-01-01", "2200-01-01"


def wrong_values(
    connection: duckdb.DuckDBPyConnection, prefix: str, tables: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """Yield what is wrong, as in "it has ...".

    Parameters
    ----------
    prefix : str
        Before the name of a table, where the file is attached.
    tables : mapping of table name to columns and their types
        That the file has: older ones lack some.
    """
    for table, columns in tables.items():
        conditions = {name: _wrong(table, name, kind) for name, kind in columns.items()}
        conditions |= _of_rows(table, columns)
        counted = ", ".join(
            f"count(*) FILTER (coalesce({condition}, false))" for condition in conditions.values()
        )
        rows, *found = connection.execute(
            f"SELECT count(*), {counted} FROM {prefix}{table}"
        ).fetchall()[0]
        if rows > _MOST.get(table, rows):
            yield f"{rows:,} rows of {table}, where up to {_MOST[table]:,} are shown"
        for name, wrong in zip(conditions, found, strict=True):
            if wrong:
                yield f"values of {table}.{name} that cannot be, in {wrong:,} rows"
    if "results" in tables:
        yield from _of_families(connection, prefix)


def _wrong(table: str, column: str, kind: str) -> str:
    """Write the condition of a value that cannot be; of NULL it is never true."""
    quoted = f'"{column}"'
    if kind == "VARCHAR":
        return long(quoted, _LONG.get((table, column), MAX_NAME))
    if kind == "BOOLEAN":
        return "false"
    if kind == "SMALLINT[]":
        return f"len({quoted}) <> list_count({quoted}) OR list_min({quoted}) < -1"
    if kind == "FLOAT[]":
        return numbers(quoted)
    if kind in ("INTEGER", "BIGINT"):
        return f"{quoted} NOT BETWEEN {_range(table, column, kind)}"
    if column in _LOSSES:
        return number(quoted, -MAX_LOSS, MAX_LOSS)
    if column in _SHARES:
        return number(quoted, -_ROUNDING, 1 + _ROUNDING)
    return number(quoted, -MAX_NUMBER if column in _SIGNED else -_ROUNDING, MAX_NUMBER)


def _range(table: str, column: str, kind: str) -> str:
    if column in ("layer", "site"):
        return f"{-1 if table in _ALL_LAYERS else 0} AND {MAX_LAYER}"
    if column in ("n_layers", "n_experts", "top_k"):
        return f"1 AND {MAX_LAYER}"
    if column == "token":
        return f"-1 AND {MAX_ID}"
    return f"0 AND {MAX_ID if kind == 'INTEGER' else MAX_COUNT}"


def _of_rows(table: str, known: Collection[str]) -> dict[str, str]:
    """Return what else a row must not be, by a column that it is told by."""
    found = {}
    if {"router", "seed", "mode"} <= set(known):
        found["router and mode"] = "router IS NULL OR mode IS NULL"
    if table == "choices":
        found["expert_ids and weights"] = "len(expert_ids) <> len(weights)"
        found["text_id and position"] = "text_id IS NULL OR position IS NULL OR layer IS NULL"
    if table == "comparison":
        moment = "try_cast(created_at AS TIMESTAMP)"
        found["created_at as a date"] = (
            f"created_at IS NOT NULL AND ({moment} IS NULL OR NOT isfinite({moment})"
            f" OR {moment} NOT BETWEEN '{_FIRST}' AND '{_LAST}')"
        )
        found["top_k and n_experts"] = "top_k > n_experts"
    return found


def _of_families(connection: duckdb.DuckDBPyConnection, prefix: str) -> Iterator[str]:
    """Yield that there is too much to choose from."""
    (families,) = connection.execute(
        f"SELECT count(DISTINCT family) FROM {prefix}results"
    ).fetchall()[0]
    if families > MAX_FAMILIES:
        yield f"{families:,} families of routers, where up to {MAX_FAMILIES} are shown"
