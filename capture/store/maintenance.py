"""What becomes of a file that is not a finished run of today: ``recover`` and ``migrate``.

A partial file may be a stranger's: it is attached as run files are, so that none of its views,
macros and indexes is run, and what is written goes into tables that are ours to the letter. An
older run is brought up to date step by step, into a new file.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from capture.errors import SchemaVersionError, StoreError, first_line
from capture.interrupts import as_keyboard_interrupt
from capture.paths import given_path
from capture.store import schema
from capture.store.codec import Layout
from capture.store.files import (
    SUFFIX,
    check_free,
    check_new,
    connect,
    holds_nothing,
    is_own_file,
    made_whole,
    not_a_run,
    publish,
)
from capture.store.reader import FILE, check_old, in_file, open_sandbox
from capture.store.records import LEVELS, SiteInfo
from capture.store.sums import check_counts, pairs_of_rows, store_pairs


@as_keyboard_interrupt()
def recover(partial: str | Path) -> Path:
    """Close ``NAME.partial`` as ``NAME``, marked incomplete, with every committed forward pass.

    Raises
    ------
    StoreError
        If the file is not a partial run, holds nothing, is still being written, or NAME exists.
        Whatever fails, such as a full disk, leaves the file as it was.
    """
    partial = given_path(partial, "the file to recover", StoreError)
    if not partial.name.endswith(SUFFIX) or partial.name == SUFFIX:
        raise StoreError(
            f"recover takes the {SUFFIX} file of a killed capture, got {partial}. A file without "
            "this ending is finished and needs no recovery."
        )
    out = partial.with_name(partial.name.removesuffix(SUFFIX))
    if out.is_file() and not partial.exists():
        raise StoreError(f"{partial} is not there, and {out} is: it needs no recovery. Open it.")
    if os.path.lexists(partial) and not is_own_file(partial):
        raise StoreError(
            f"A file was expected at {partial}, which is a link out of its folder, a folder or a "
            "device. Recover the file itself, where it is."
        )
    if out.is_file() and out.samefile(partial):
        partial.unlink()  # a capture that was killed between its last two steps
        return out
    check_free(out)
    if holds_nothing(partial):
        raise StoreError(
            f"A run file was expected at {partial}, but it is not one: it holds nothing, because "
            f"its capture was killed before it had stored anything. Record {out.name} again."
        )
    connection = open_sandbox(partial, read_only=False, oldest=schema.SCHEMA_VERSION)
    try:
        if not _is_closed(connection):
            _close(partial, connection)
    except (duckdb.IOException, duckdb.FatalException, duckdb.OutOfMemoryException) as error:
        raise StoreError(
            f"{partial} could not be closed: {first_line(error)}. What was recorded is still in "
            "it; free disk space or memory, then recover it again."
        ) from error
    except duckdb.Error as error:
        raise not_a_run(partial, error) from error
    finally:
        connection.close()
    publish(partial, out)
    return out


def _is_closed(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether the capture came to its end, and only the file's name is not what it should be."""
    return bool(connection.sql(schema.SELECT_COMPLETE).fetchall()[0][0])


def _close(partial: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Check what was committed and write down that the run is incomplete."""
    sites = [SiteInfo(*row) for row in connection.sql(schema.SELECT_SITES).fetchall()]
    level = connection.sql(schema.SELECT_LEVEL).fetchall()[0][0]
    layout = Layout(*connection.sql(schema.SELECT_LAYOUT).fetchall()[0])
    if level not in LEVELS:
        raise not_a_run(partial, f"its level is not one of {', '.join(LEVELS)}")
    routed = LEVELS.index(level) >= LEVELS.index("ids")
    load = {
        (layer, site): count for layer, site, count in connection.sql(schema.COUNT_LOAD).fetchall()
    }
    check_counts(
        connection,
        layout=layout,
        sites=sites,
        routed=routed,
        n_tokens=connection.sql(schema.COUNT_BATCH_TOKENS).fetchall()[0][0],
        assignments=[load[site.layer, site.site] for site in sites],
        vectors={},
        attention={},
    )
    if routed:
        # pairs are handed over seldom: what was committed lags behind the rows
        connection.execute("BEGIN")
        pairs = pairs_of_rows(connection, layout, sites)
        store_pairs(connection, pairs, schema.tables(layout), rewrite=in_file)
        connection.execute("COMMIT")
    seconds = connection.sql(schema.LAST_SECOND).fetchall()[0][0]
    connection.execute("BEGIN")
    connection.execute(in_file(schema.STORE_GATE_SUMS))
    connection.execute(in_file(schema.CLOSE_RUN), [seconds, False])
    connection.execute("COMMIT")
    connection.execute(f"CHECKPOINT {FILE}")


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

    Raises
    ------
    SchemaVersionError
        If the run is newer than this code, is current already, or no step leads on.
    StoreError
        If ``path`` is not a run or ``out`` exists.
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
            f"Each version has one step, got {[step.name for step in steps]}. Remove one of two."
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
