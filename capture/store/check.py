"""Whether a run file says the same thing everywhere.

``check_values`` asks this of a file that may come from a stranger, once for each file: what its
tables may be is the sandbox's matter, here are the values in them, see ``values``. A verdict is
remembered for as long as the file stays the same. ``check_counts`` asks it at the end of a capture:
what was handed in is what the file holds.
"""

import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from capture.errors import StoreError, quoted
from capture.store import schema, values
from capture.store.codec import Layout, unpack_ids
from capture.store.records import LEVELS, SiteInfo, describe
from capture.store.sandbox import not_a_run, open_sandbox

SECONDS = 60.0  # what a check may take; a run of 100 M rows takes a fifth of it
_DOCUMENTS = ("backends", "packages", "config", "sample", "notes")
_TEXTS = {"prompt": ("text", "domain", "source"), "token": ("text",)}
# what reading a damaged file raises: text that is none, a number or a moment that Python has not
UNREADABLE = (duckdb.Error, pa.ArrowException, ValueError, OverflowError, MemoryError)
_SALT_BITS = 62
_ROWS = 2**17  # routes that are unpacked at a time
_REMEMBERED = 1_000  # files
_lock = threading.Lock()
_verdicts: dict["Identity", StoreError | None] = {}
_ADVICE = "The partial file stays; report this, it is a defect of the capture."


class Identity(NamedTuple):
    """What changes when a file does."""

    path: str
    size: int
    changed: int
    altered: int
    inode: int
    device: int


def identity(path: Path) -> Identity:
    """Return what tells a file from another one, and from itself after a change."""
    status = os.stat(path)
    return Identity(
        str(path.absolute()),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    )


def check_run(path: str | Path, *, seconds: float = SECONDS) -> None:
    """Refuse a run file whose parts contradict each other.

    Parameters
    ----------
    seconds : float
        A file that takes longer is refused too: it would make every page wait.

    Raises
    ------
    SchemaVersionError, StoreError
        With what is wrong.
    """
    path = Path(path)
    connection = open_sandbox(path)
    try:
        check_values(path, connection, seconds=seconds)
    finally:
        connection.close()


def check_values(
    path: Path, connection: duckdb.DuckDBPyConnection, *, seconds: float = SECONDS
) -> None:
    """Refuse an open run file whose parts contradict each other; a file is looked at once.

    Raises
    ------
    StoreError
        With what is wrong.
    """
    file = identity(path)
    with _lock:
        known, verdict = file in _verdicts, _verdicts.get(file)
    if not known:
        verdict = contradiction(path, connection, seconds=seconds)
        with _lock:
            _verdicts[file] = verdict
            while len(_verdicts) > _REMEMBERED:
                del _verdicts[next(iter(_verdicts))]
    if verdict is not None:
        # a new one: an error that is raised twice keeps what the first one held
        raise type(verdict)(*verdict.args)


@contextmanager
def limited(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what the connection does when it takes longer.

    Raises
    ------
    duckdb.InterruptException
        Where the block was interrupted.
    """
    alarm = threading.Timer(seconds, connection.interrupt)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def contradiction(
    path: Path, connection: duckdb.DuckDBPyConnection, *, seconds: float = SECONDS
) -> StoreError | None:
    """Return what is wrong with the values of an open run file, None where nothing is."""
    try:
        with limited(connection, seconds):
            _check(path, connection)
    except StoreError as error:
        return error
    except duckdb.InterruptException:
        return StoreError(
            f"{path.name} could not be checked within {seconds:g} s. Record a smaller run."
        )
    except UNREADABLE as error:
        return not_a_run(path, error)
    return None


def _check(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    for question in (values.RUN, values.SITES):
        _ask(path, connection, question)
    if connection.sql("SELECT count(*) FROM packed.site").fetchall() == [(0,)]:
        raise not_a_run(path, "it has no router")
    level = _check_documents(path, connection)
    for table, wrong in connection.sql(values.TWICE).fetchall():
        if wrong:
            raise not_a_run(path, f"it has rows of packed.{table} that are there twice")
    for question in values.QUESTIONS:
        _ask(path, connection, question)
    _check_routes(path, connection, level)
    _check_text(connection)


def _ask(path: Path, connection: duckdb.DuckDBPyConnection, question: values.Question) -> None:
    counts = ", ".join(
        f"count(*) FILTER (coalesce({wrong}, true))" for wrong in question.wrong.values()
    )
    found = connection.sql(f"SELECT {counts} FROM {question.rows}").fetchall()[0]
    for what, wrong in zip(question.wrong, found, strict=True):
        if wrong:
            raise not_a_run(path, f"it has {what}, in {wrong:,} rows")


def _check_documents(path: Path, connection: duckdb.DuckDBPyConnection) -> str:
    """Refuse a level or a document that is none; return the level."""
    level, *documents = connection.sql(
        f"SELECT level, {', '.join(_DOCUMENTS)} FROM run"
    ).fetchall()[0]
    if level not in LEVELS:
        raise not_a_run(path, f"its level {quoted(level)} is none of {', '.join(LEVELS)}")
    for name, text in zip(_DOCUMENTS, documents, strict=True):
        if not _is_object(text):
            raise not_a_run(path, f"its {name} are no JSON object")
    return str(level)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_routes(path: Path, connection: duckdb.DuckDBPyConnection, level: str) -> None:
    """Refuse routes that are not one for each token and router, or that lead to no expert."""
    layout = Layout(*connection.sql(schema.SELECT_LAYOUT).fetchall()[0])
    salt = secrets.randbits(_SALT_BITS)
    n_tokens, tokens = connection.sql(
        f"SELECT count(*), {values.hashed('token_id', salt)} FROM packed.token"
    ).fetchall()[0]
    sites = [SiteInfo(*row) for row in connection.sql(schema.SELECT_SITES).fetchall()]
    known = {(site.layer, site.site) for site in sites}
    rows_of = connection.sql(values.vectors("route", salt)).fetchall()
    routed = LEVELS.index(level) >= LEVELS.index("ids") and n_tokens > 0
    for layer, site, rows, found in rows_of:
        if (layer, site) not in known:
            raise not_a_run(path, "it has choices of a router that it does not have")
        if (rows, found) != (n_tokens, tokens):
            raise not_a_run(
                path, f"layer {layer} does not have one row for each of the {n_tokens:,} tokens"
            )
    # totals alone are level stats; routes that are there all the same are held against them
    if routed or rows_of:
        if len(rows_of) != len(sites):
            raise not_a_run(path, f"its level is {level}, and {len(rows_of)} routers have routes")
        _check_experts(path, connection, layout, sites)
    for table in ("score", "hidden"):
        for layer, site, rows, found in connection.sql(values.vectors(table, salt)).fetchall():
            if (rows, found) == (n_tokens, tokens):
                continue
            if connection.execute(values.repeated(table), [layer, site]).fetchall() != [(0,)]:
                raise not_a_run(path, f"it has rows of packed.{table} that are there twice")


def _check_experts(
    path: Path,
    connection: duckdb.DuckDBPyConnection,
    layout: Layout,
    sites: Sequence[SiteInfo],
) -> None:
    """Refuse choices of experts that their router does not have, and totals that are not theirs."""
    load = {(layer, s): n or 0 for layer, s, n in connection.sql(schema.COUNT_LOAD).fetchall()}
    n_experts = np.array([site.n_experts for site in sites], np.int32)
    top_k = np.array([site.top_k for site in sites])
    filled = np.zeros(len(sites), np.int64)
    strange = False
    # all of them are read: a connection with a result that is not takes no other statement
    for batch in connection.sql(values.routes(layout)).to_arrow_reader(_ROWS):
        place = batch.column(0).to_numpy()
        words = np.stack([column.to_numpy() for column in batch.columns[1:]], axis=1)
        ids = unpack_ids(words, layout)
        is_filled = ids >= 0
        beyond = np.arange(layout.slots) >= top_k[place, None]
        strange |= bool((ids >= n_experts[place, None]).any() or (is_filled & beyond).any())
        counts = np.bincount(place, is_filled.sum(axis=1), minlength=len(sites))
        filled += counts.astype(np.int64)
    if strange:
        raise not_a_run(path, "it has choices of experts that their router does not have")
    for site, found in zip(sites, filled.tolist(), strict=True):
        if found != load.get((site.layer, site.site), 0):
            raise not_a_run(path, f"layer {site.layer} chooses experts that its totals do not know")


def _check_text(connection: duckdb.DuckDBPyConnection) -> None:
    """Read every text once: bytes that are no text raise an error."""
    for table, columns in _TEXTS.items():
        read = ", ".join(f"max(strlen(decode(encode({column}))))" for column in columns)
        connection.sql(f"SELECT {read} FROM packed.{table}").fetchall()


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
                    f"{describe(site)} was handed {count} rows of the table {table}, and "
                    f"{stored.get((site.layer, site.site), 0)} are stored. {_ADVICE}"
                )
    filled = _by_site(connection, schema.count_assignments(layout)) if routed else load
    for site, expected in zip(sites, assignments, strict=True):
        place = (site.layer, site.site)
        if not load.get(place, 0) == filled.get(place, 0) == expected:
            raise StoreError(
                f"{describe(site)} was handed {expected} assignments, but its load sums to "
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
                f"{describe(site)} has {load.get(place, 0)} assignments, but its pairs cover "
                f"{met.get(place, 0)}. {_ADVICE}"
            )


def _by_site(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[tuple[int, int], int]:
    rows = connection.sql(sql).fetchall()
    return {(layer, site): count or 0 for layer, site, count in rows}
