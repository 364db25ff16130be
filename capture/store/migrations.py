"""Bringing a run file of an older schema version up to date, step by step, into a new file."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from capture.errors import SchemaVersionError, StoreError
from capture.interrupts import as_keyboard_interrupt
from capture.paths import given_path
from capture.store import schema
from capture.store.codec import Layout
from capture.store.files import check_new, made_whole
from capture.store.records import LEVELS, SiteInfo
from capture.store.sandbox import check_old, connect
from capture.store.sums import pairs_of_rows, store_pairs


class Step(NamedTuple):
    """One change of the schema, from version ``before`` to ``before + 1``."""

    before: int
    name: str
    apply: Callable[[duckdb.DuckDBPyConnection], None]


def _add_pairs_and_attention(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the tables of version 2; pairs are counted from the rows, attention is not known."""
    for statement in schema.statements_of_version_2():
        connection.execute(statement)
    level = connection.sql(schema.SELECT_LEVEL).fetchall()[0][0]
    if LEVELS.index(level) < LEVELS.index("ids"):
        return
    sites = [SiteInfo(*row) for row in connection.sql(schema.SELECT_SITES).fetchall()]
    layout = Layout(*connection.sql(schema.SELECT_LAYOUT).fetchall()[0])
    store_pairs(connection, pairs_of_rows(connection, layout, sites), schema.tables(layout))


def _add_gate_sums(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the sums of version 3, counted from the rows."""
    for statement in (schema.GATE_SUM_TABLE, schema.GATE_SUM_VIEW, schema.STORE_GATE_SUMS):
        connection.execute(statement)


# one entry for every version that was ever released, oldest first
STEPS: tuple[Step, ...] = (
    Step(1, "add pairs and attention", _add_pairs_and_attention),
    Step(2, "add sums of the gates", _add_gate_sums),
)


@as_keyboard_interrupt()
def migrate(path: str | Path, out: str | Path, *, steps: Sequence[Step] = STEPS) -> Path:
    """Write the run at ``path`` as ``out`` with the current schema version.

    The old file is not touched. Every step runs in its own transaction and sets the version.

    Parameters
    ----------
    path, out : path
        An older run, and the name of the new one.
    steps : sequence of Step
        Known steps; the default is all there are.

    Raises
    ------
    SchemaVersionError
        If the run is newer than this code, is current already, or no step leads on.
    StoreError
        If ``path`` is no run or ``out`` exists.
    """
    path, out = (
        given_path(path, "the old run", StoreError),
        given_path(out, "the new run", StoreError),
    )
    check_new(out)
    plan = plan_steps(path, check_old(path), steps)
    with made_whole(out) as fresh:
        try:
            shutil.copyfile(path, fresh)
        except OSError as error:
            raise StoreError(f"{path} could not be copied to {out}: {error}.") from error
        _run(fresh, plan)
    return out


def plan_steps(path: Path, found: int, steps: Sequence[Step]) -> list[Step]:
    """Return the steps from version ``found`` to the current one, in order."""
    if found >= schema.SCHEMA_VERSION:
        reason = "is up to date" if found == schema.SCHEMA_VERSION else "is newer than this code"
        raise SchemaVersionError(
            f"{path} has schema version {found} and {reason} (version {schema.SCHEMA_VERSION}). "
            + ("Open it as it is." if found == schema.SCHEMA_VERSION else "Update RouteScope.")
        )
    known = {step.before: step for step in steps}
    if len(known) != len(steps):
        raise StoreError(
            f"Each version has one step, got {[step.name for step in steps]}. Remove the double."
        )
    missing = [v for v in range(found, schema.SCHEMA_VERSION) if v not in known]
    if missing:
        raise SchemaVersionError(
            f"{path} has schema version {found}, and no step leads on from version {missing[0]}. "
            "Record the run again."
        )
    return [known[version] for version in range(found, schema.SCHEMA_VERSION)]


def _run(partial: Path, plan: Sequence[Step]) -> None:
    """Apply the steps to the copy."""
    connection = connect(partial, read_only=False)
    try:
        for step in plan:
            connection.execute("BEGIN")
            try:
                step.apply(connection)
            except duckdb.Error as error:
                raise StoreError(
                    f"The migration step {step.name!r} failed: {error}. The old file is unchanged; "
                    "report this."
                ) from error
            connection.execute(schema.SET_VERSION, [step.before + 1])
            connection.execute("COMMIT")
        connection.execute("CHECKPOINT")
    finally:
        connection.close()
