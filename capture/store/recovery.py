"""Closing the partial file of a capture that was killed.

The file may be a stranger's: it is attached as run files are, so that none of its views, macros
and indexes is run, and what is written goes into tables that are ours to the letter.
"""

import os
from pathlib import Path

import duckdb

from capture.errors import StoreError
from capture.interrupts import as_keyboard_interrupt
from capture.paths import given_path
from capture.store import schema
from capture.store.check import check_counts
from capture.store.codec import Layout
from capture.store.files import SUFFIX, check_free, holds_nothing, is_own_file, publish
from capture.store.records import LEVELS, SiteInfo
from capture.store.sandbox import FILE, first_line, in_file, not_a_run, open_sandbox
from capture.store.sums import pairs_of_rows, store_pairs


@as_keyboard_interrupt()
def recover(partial: str | Path) -> Path:
    """Close ``NAME.partial`` as ``NAME``, marked incomplete, with every committed forward pass.

    Returns
    -------
    Path
        NAME.

    Raises
    ------
    StoreError
        If the file is no partial run, holds nothing, is still being written, or NAME exists.
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
            f"A run file was expected at {partial}, but it is none: it holds nothing, because its "
            f"capture was killed before it had stored anything. Record {out.name} anew."
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
        raise not_a_run(partial, f"its level is none of {', '.join(LEVELS)}")
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
