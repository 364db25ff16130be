"""Closing the partial file of a capture that was killed."""

from pathlib import Path

import duckdb

from capture.errors import StoreError
from capture.store import gate_sums, schema
from capture.store.accounting import check_counts
from capture.store.codec import Layout
from capture.store.files import SUFFIX, check_free, publish
from capture.store.interrupts import as_keyboard_interrupt
from capture.store.opening import check_version, connect, not_a_run
from capture.store.pairs import pairs_of_rows, store_pairs
from capture.store.records import LEVELS, SiteInfo


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
        If the file is no partial run, is still being written, or NAME exists.
    """
    partial = Path(partial)
    if not partial.name.endswith(SUFFIX) or partial.name == SUFFIX:
        raise StoreError(
            f"recover takes the {SUFFIX} file of a killed capture, got {partial}. A file without "
            "this ending is finished and needs no recovery."
        )
    out = partial.with_name(partial.name.removesuffix(SUFFIX))
    if out.is_file() and not partial.exists():
        raise StoreError(f"{partial} is not there, and {out} is: it needs no recovery. Open it.")
    check_free(out)
    connection = connect(partial, read_only=False)
    try:
        check_version(partial, connection)
        _close(connection)
    except duckdb.Error as error:
        raise not_a_run(partial, error) from error
    finally:
        connection.close()
    publish(partial, out)
    return out


def _close(connection: duckdb.DuckDBPyConnection) -> None:
    """Check what was committed and write down that the run is incomplete."""
    sites = [SiteInfo(*row) for row in connection.sql(schema.SELECT_SITES).fetchall()]
    level = connection.sql(schema.SELECT_LEVEL).fetchall()[0][0]
    layout = Layout(*connection.sql(schema.SELECT_LAYOUT).fetchall()[0])
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
        store_pairs(connection, pairs_of_rows(connection, layout, sites), schema.tables(layout))
        connection.execute("COMMIT")
    connection.execute(gate_sums.STORE)
    seconds = connection.sql(schema.LAST_SECOND).fetchall()[0][0]
    connection.execute(schema.CLOSE_RUN, [seconds, False])
    connection.execute("CHECKPOINT")
