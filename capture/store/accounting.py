"""The check at the end of a capture: what was handed in is what the file holds."""

from collections.abc import Mapping, Sequence

import duckdb

from capture.errors import StoreError
from capture.store import schema
from capture.store.codec import Layout
from capture.store.records import SiteInfo

_ADVICE = "The partial file stays; report this, it is a defect of the capture."


def check_counts(
    connection: duckdb.DuckDBPyConnection,
    *,
    layout: Layout,
    sites: Sequence[SiteInfo],
    routed: bool,
    n_tokens: int,
    assignments: Sequence[int],
    vectors: Mapping[str, Sequence[int]],
    attention: Mapping[str, int],
) -> None:
    """Compare the stored rows with what was handed in.

    Parameters
    ----------
    connection : DuckDBPyConnection
        Open on the file.
    layout : Layout
        Bits and slots of a packed row.
    sites : sequence of SiteInfo
    routed : bool
        Whether the level stores a row per token and site.
    n_tokens : int
        Tokens handed in.
    assignments : sequence of int
        Assignments of every site, summed while the forward passes came in.
    vectors : mapping of sequences of int
        For the tables ``score`` and ``hidden``: how many rows every site was handed.
    attention : mapping of int
        For the tables of attention: how many rows were handed in.

    Raises
    ------
    StoreError
        If a count differs; the message names the site.
    """
    rows, distinct = connection.sql(schema.COUNT_TOKENS).fetchall()[0]
    if rows != n_tokens or distinct != n_tokens:
        raise StoreError(
            f"{n_tokens} tokens were handed in, but {rows} rows with {distinct} different token "
            f"ids are stored. {_ADVICE}"
        )
    for table, expected in attention.items():
        count = connection.sql(schema.count_all(table)).fetchall()[0][0]
        if count != expected:
            raise StoreError(
                f"{expected} rows of the table {table} were handed in, and {count} are stored. "
                f"{_ADVICE}"
            )
    load = _by_site(connection, schema.COUNT_LOAD)
    expected_rows = {"route": [n_tokens if routed else 0] * len(sites), **vectors}
    for table, wanted in expected_rows.items():
        stored = _by_site(connection, schema.count_rows(table))
        for site, count in zip(sites, wanted, strict=True):
            if stored.get((site.layer, site.site), 0) != count:
                raise StoreError(
                    f"{_name(site)} was handed {count} rows of the table {table}, and "
                    f"{stored.get((site.layer, site.site), 0)} are stored. {_ADVICE}"
                )
    filled = _by_site(connection, schema.count_assignments(layout)) if routed else load
    for site, expected in zip(sites, assignments, strict=True):
        place = (site.layer, site.site)
        if not load.get(place, 0) == filled.get(place, 0) == expected:
            raise StoreError(
                f"{_name(site)} was handed {expected} assignments, but its load sums to "
                f"{load.get(place, 0)} and its rows to {filled.get(place, 0)}. {_ADVICE}"
            )


def check_diagonal(connection: duckdb.DuckDBPyConnection, sites: Sequence[SiteInfo]) -> None:
    """Compare how often an expert meets itself with its load.

    Raises
    ------
    StoreError
        If they differ; the message names the site.
    """
    load = _by_site(connection, schema.COUNT_LOAD)
    met = _by_site(connection, schema.COUNT_DIAGONAL)
    for site in sites:
        place = (site.layer, site.site)
        if load.get(place, 0) != met.get(place, 0):
            raise StoreError(
                f"{_name(site)} has {load.get(place, 0)} assignments, but its pairs cover "
                f"{met.get(place, 0)}. {_ADVICE}"
            )


def _name(site: SiteInfo) -> str:
    return f"site {site.site} of layer {site.layer} ({site.module})"


def _by_site(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[tuple[int, int], int]:
    rows = connection.sql(sql).fetchall()
    return {(layer, site): count or 0 for layer, site, count in rows}
