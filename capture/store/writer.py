"""Writing a run file: forward passes in, one finished DuckDB file out."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError, first_line, quoted
from capture.interrupts import as_keyboard_interrupt
from capture.store import schema
from capture.store.codec import layout_for
from capture.store.files import (
    check_new,
    give_name,
    partial_of,
    publish,
    remove_partial,
    unnamed,
)
from capture.store.records import (
    LEVELS,
    AttentionLayer,
    ForwardRows,
    PairSums,
    PromptAttention,
    PromptInfo,
    RunInfo,
    SiteInfo,
)
from capture.store.sums import (
    PairTotals,
    Rollup,
    check_counts,
    check_diagonal,
    pairs_of_rows,
    store_pairs,
)
from capture.store.tables import (
    AttentionBuilder,
    RowBuilder,
    clean,
    layer_rows,
    rows_table,
    strings,
)

_log = logging.getLogger(__name__)

# DuckDB's row group; transactions of several of them are appended without the log
ROW_GROUP = 122_880
COMMIT_ROWS = 8 * ROW_GROUP
COMMIT_BYTES = 256 * 2**20
# a killed capture loses what came since; a commit takes about 20 ms
COMMIT_SECONDS = 1.0
# smaller than DuckDB's 256 KiB: a short run stays small and a row takes 31.5 bytes, not 35.3; with
# 16 KiB DuckDB leaves token_id uncompressed (python -m capture.bench store)
BLOCK_SIZE = 32_768
# the model needs the memory more than the cache of a file that is only written
MEMORY = "2GiB"
# a checkpoint rewrites the last row group of every table and leaves its old blocks behind: at
# DuckDB's 16 MB a slow capture with a sample ends up half as large again
CHECKPOINT_MB = 256
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "default_block_size": BLOCK_SIZE,
    "memory_limit": MEMORY,
    "checkpoint_threshold": f"{CHECKPOINT_MB}MB",
}


def as_json(value: object) -> str:
    """Return valid JSON text; what JSON does not know becomes its ``str``.

    Raises
    ------
    StoreError
        If a number is nan or infinite.
    """
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"Facts of a run must be plain JSON, got {quoted(value)}: {first_line(error)}. "
            "Use None where a number is missing."
        ) from error


class RunWriter:
    """Fills the partial file of one run; use from one thread at a time.

    Attributes
    ----------
    out, partial : Path
        The run, and the file that it is until it is finished.
    stored_tokens : int
        How many tokens are on the disk, whatever happens to this process; any thread may ask.
    """

    def __init__(
        self,
        out: Path,
        info: RunInfo,
        sites: list[SiteInfo],
        attention_layers: Sequence[AttentionLayer] = (),
    ) -> None:
        self.out = out
        self.partial = partial_of(out)
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._sites = sites
        layout = layout_for(max(s.n_experts for s in sites), max(s.top_k for s in sites))
        self._layout = layout
        self._tables = schema.tables(layout)
        self._builder = RowBuilder(info.level, sites, layout, self._tables)
        self._rollup = Rollup(sites)
        # with ids in the rows, pairs can be counted again: stored once, or each copy would stay in
        # the file
        self._routed = LEVELS.index(info.level) >= LEVELS.index("ids")
        self._pairs, self._new_pairs = PairTotals(sites), False
        self._new_load = False
        self._n_prompts, self._new_prompts = 0, list[PromptInfo]()
        self._attention = AttentionBuilder(attention_layers, self._tables)
        self._attention_counts = dict.fromkeys(schema.ATTENTION_TABLES, 0)
        self._pending: list[dict[str, pa.Table]] = []
        self._pending_rows = self._pending_bytes = 0
        self._n_batches = 0
        self._tokens: dict[str, int] = {}
        self._has_unknown_tokens = self._has_unknown_weights = False
        self.stored_tokens = 0
        self._vectors = {"score": [0] * len(sites), "hidden": [0] * len(sites)}
        self._started = self._committed = time.monotonic()

    @classmethod
    @as_keyboard_interrupt()
    def create(
        cls,
        out: Path,
        info: RunInfo,
        sites: Sequence[SiteInfo],
        prompts: Sequence[PromptInfo],
        attention_layers: Sequence[AttentionLayer] = (),
    ) -> Self:
        """Start a run in ``OUT.partial``.

        ``attention_layers`` are all decoder layers at level attention, otherwise none.

        Raises
        ------
        StoreError
            If ``out`` or its partial file exists, cannot be created, or a fact is not storable.
        """
        out = Path(out)
        check_new(out)
        _check_facts(info, sites)
        writer = cls(out, info, list(sites), attention_layers)
        try:
            with unnamed(writer.partial) as fresh:
                writer._connection = duckdb.connect(str(fresh), config=CONFIG)
                try:
                    writer._start(info, prompts, attention_layers)
                finally:
                    writer.abandon()
                give_name(fresh, writer.partial)
            writer._reopen()
        except FileExistsError as error:
            raise StoreError(
                f"{writer.partial} appeared while this capture began: another one writes it. "
                "Choose another name."
            ) from error
        except (duckdb.Error, OSError) as error:
            raise StoreError(
                f"{writer.partial} cannot be created: {first_line(error)}. Choose a folder that "
                "can be written to and has room."
            ) from error
        return writer

    def _reopen(self) -> None:
        """Open the partial file, which has all its tables."""
        try:
            self._connection = duckdb.connect(str(self.partial), config=CONFIG)
            # closing a large run takes seconds, which DuckDB would fill with a bar on stdout
            self._connection.execute("SET enable_progress_bar = false")
        except BaseException:
            remove_partial(self.out)
            raise

    def _start(
        self, info: RunInfo, prompts: Sequence[PromptInfo], layers: Sequence[AttentionLayer]
    ) -> None:
        """Create tables and views and store what is known before the first token."""
        documents = [as_json(v) for v in (info.backends, info.packages, info.config, info.sample)]
        texts = [info.model, info.revision, info.architecture, info.dtype, info.device, info.level]
        facts = [*map(clean, texts), info.vocab_size, info.hidden_size, *documents, *self._layout]
        started_at = datetime.now(UTC).replace(tzinfo=None)
        connection = self._open()
        connection.execute("BEGIN")  # each of fifty statements alone would wait for the disk
        for statement in schema.create_statements(self._layout):
            connection.execute(statement)
        connection.execute(schema.INSERT_RUN, [*facts, started_at, schema.SCHEMA_VERSION])
        connection.executemany(schema.INSERT_SITES, [list(site[:7]) for site in self._sites])
        facts_of = [[s.layer, s.site, s.side, s.expert_kinds] for s in self._sites]
        connection.executemany(schema.INSERT_SITE_FACTS, facts_of)
        if layers:
            connection.executemany(schema.INSERT_ATTENTION_LAYERS, layer_rows(layers))
        if prompts:
            self._insert(schema.insert("prompt"), self._numbered(prompts))
        connection.execute("COMMIT")

    def _open(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            raise StoreError(
                f"{self.partial} is closed already. Start another run with RunWriter.create."
            )
        return self._connection

    def append(self, forward: ForwardRows) -> None:
        """Add one forward pass; it is stored whole or not at all.

        Arrays of a :class:`SiteBlock` are kept, all others are copied. Rows reach the disk in large
        transactions, at the latest with the first append ``COMMIT_SECONDS`` after the last one;
        whoever appends seldom calls :meth:`flush` when the writer :attr:`is_due`.

        Raises
        ------
        StoreError
            If a number is nan, an id is out of range or a site is missing.
        """
        self._open()
        now = time.monotonic()
        blocks = self._builder.blocks(forward)
        tables = self._builder.build(forward, blocks, self._n_batches, now - self._started)
        self._rollup.add(forward, blocks)
        self._n_batches += 1
        phase, n_tokens = forward.tokens.phase, len(forward.tokens.token_id)
        self._tokens[phase] = self._tokens.get(phase, 0) + n_tokens
        self._has_unknown_tokens |= bool((forward.tokens.token == schema.NO_TOKEN).any())
        for block in blocks:
            self._has_unknown_weights |= bool(np.isnan(block.weight_sum).all())
            for table, given in (("score", block.scores), ("hidden", block.hidden)):
                for index in block.site_indices:
                    self._vectors[table][index] += 0 if given is None else len(given[0])
        if self._new_prompts:
            tables["prompt"] = self._numbered(self._new_prompts)
            self._new_prompts = []
        self._hold(tables)
        full = self._pending_rows >= COMMIT_ROWS or self._pending_bytes >= COMMIT_BYTES
        if full or self.is_due:
            self.flush()

    def append_prompts(self, prompts: Sequence[PromptInfo]) -> None:
        """Add prompts that were not known at the start, numbered on; before their tokens.

        They are stored with the tokens that are appended next.
        """
        self._new_prompts += prompts

    def _numbered(self, prompts: Sequence[PromptInfo]) -> pa.Table:
        """Return rows of the table ``prompt``, numbered on from those before."""
        first = self._n_prompts
        self._n_prompts += len(prompts)
        text, domain, source, n_tokens, truncated = zip(*prompts, strict=True)
        arrays = [
            pa.array(range(first, self._n_prompts), pa.int32()),
            *(strings(values) for values in (text, domain, source)),
            *(pa.array(values, pa.int32()) for values in (n_tokens, truncated)),
        ]
        return pa.Table.from_arrays(arrays, names=list(schema.PROMPT_COLUMNS))

    @property
    def is_due(self) -> bool:
        """Whether ``COMMIT_SECONDS`` have passed since the last commit."""
        return time.monotonic() - self._committed >= COMMIT_SECONDS

    def append_attention(self, rows: PromptAttention) -> None:
        """Add the attention of one prompt, stored with the forward pass that is appended next.

        Raises
        ------
        StoreError
            If a layer is missing, a shape does not fit or a number is not finite.
        """
        self._open()
        tables = self._attention.build(rows)
        for name, table in tables.items():
            self._attention_counts[name] += table.num_rows
        self._hold(tables)

    def append_pairs(self, pairs: Sequence[PairSums]) -> None:
        """Add the experts that met since the last call.

        They are stored with the next forward pass at level stats; at deeper levels at the end, and
        counted from the rows when a capture is killed before.

        Raises
        ------
        StoreError
            If a matrix does not fit its site.
        """
        self._open()
        self._pairs.add(pairs)
        self._new_pairs = not self._routed

    def append_load(
        self, assignments: Sequence[npt.NDArray[np.int64]], *, domain: str | None = None
    ) -> None:
        """Add how often every expert was chosen, [E] a site, in a run of level counts.

        Raises
        ------
        StoreError
            If a site is missing, or what is given are not counts.
        """
        self._check_load(assignments)
        self._rollup.add_load(domain, assignments)
        self._has_unknown_weights = self._new_load = True

    def append_window(self, step: int, assignments: Sequence[npt.NDArray[np.int64]]) -> None:
        """Add the part of the loads that belongs to one step of a recorder; each step once.

        Raises
        ------
        StoreError
            As :meth:`append_load`.
        """
        self._check_load(assignments)
        rows = [
            [step, site.layer, site.site, counts]
            for site, counts in zip(self._sites, assignments, strict=True)
        ]
        name = schema.LOAD_WINDOW
        self._hold({name: rows_table(self._tables[name], rows)})
        if self._pending_rows >= COMMIT_ROWS or self._pending_bytes >= COMMIT_BYTES:
            self.flush()

    def _check_load(self, assignments: Sequence[npt.NDArray[np.int64]]) -> None:
        self._open()
        sizes = [counts.shape for counts in assignments]
        if sizes != [(site.n_experts,) for site in self._sites]:
            raise StoreError(
                f"Loads are one array [E] for each of the {len(self._sites)} sites, got {sizes}."
            )
        if any(counts.min() < 0 for counts in assignments):
            raise StoreError("A load is a count of 0 or more, got a negative one.")

    def _hold(self, tables: dict[str, pa.Table]) -> None:
        """Keep rows for the next transaction."""
        self._pending.append(tables)
        self._pending_rows += sum(table.num_rows for table in tables.values())
        self._pending_bytes += sum(table.nbytes for table in tables.values())

    def flush(self) -> None:
        """Commit every forward pass handed in so far."""
        self._open()
        if self._pending or self._new_pairs or self._new_load:
            with self._transaction():
                for name in ("prompt", *self._tables):
                    parts = [tables[name] for tables in self._pending if name in tables]
                    if parts:
                        self._insert(schema.insert(name), pa.concat_tables(parts).combine_chunks())
                # the sums so far, not their change: a killed run needs no addition to be right
                self._open().execute(schema.CLEAR_ROLLUP)
                self._insert(schema.insert("rollup"), self._rollup.table(self._tables["rollup"]))
                if self._new_pairs:
                    store_pairs(self._open(), self._pairs, self._tables)
                    self._new_pairs = False
            self._pending.clear()
            self._pending_rows = self._pending_bytes = 0
            self._new_load = False
            self.stored_tokens = sum(self._tokens.values())
        self._committed = time.monotonic()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what the block wrote, or none of it."""
        connection = self._open()
        try:
            connection.execute("BEGIN")
            yield
            connection.execute("COMMIT")
        except BaseException as error:
            # after a failed COMMIT there is nothing left to roll back
            with suppress(duckdb.Error):
                connection.execute("ROLLBACK")
            if not isinstance(error, duckdb.Error):
                raise
            raise StoreError(
                f"{self.partial} could not be written: {first_line(error)}. Free disk space or "
                f"choose another folder; python -m capture recover '{self.partial}' keeps the rest."
            ) from error

    def _insert(self, statement: str, rows: pa.Table) -> None:
        connection = self._open()
        connection.register("rows", rows)
        try:
            connection.execute(statement)
        finally:
            connection.unregister("rows")

    @as_keyboard_interrupt()
    def finish(
        self,
        *,
        seconds: float,
        complete: bool = True,
        backends: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Check that everything handed in is stored, close the file and give it its name.

        Parameters
        ----------
        seconds : float
            How long the capture took.
        complete : bool
            False when the capture was cut short on purpose.
        backends : mapping, optional
            Backend that ran, by kernel; replaces what ``create`` was told.
        notes : mapping, optional
            Whatever else a reader of the run should know; plain JSON.

        Raises
        ------
        StoreError
            If the stored rows do not add up. The partial file stays.
        """
        self.flush()
        connection = self._open()
        check_counts(
            connection,
            layout=self._layout,
            sites=self._sites,
            routed=self._routed,
            tokens=self._tokens,
            assignments=self._rollup.assignments(),
            vectors=self._vectors,
            attention=self._attention_counts,
        )
        if self._routed:
            # where a capture was cut short, the last forward pass may have come without its pairs
            if not (complete and self._pairs):
                self._pairs = pairs_of_rows(connection, self._layout, self._sites)
            with self._transaction():
                store_pairs(connection, self._pairs, self._tables)
        if complete and self._pairs:
            check_diagonal(connection, self._sites)
        with self._transaction():
            connection.execute(schema.STORE_GATE_SUMS)
            connection.execute(schema.STORE_DROPPED)
            if self._has_unknown_tokens:
                connection.execute(schema.TOKENS_WITHOUT_IDS)
            if self._has_unknown_weights:
                for statement in schema.views_without_weights(self._layout):
                    connection.execute(statement)
            connection.execute(schema.CLOSE_RUN, [float(seconds), complete])
            if backends is not None:
                connection.execute(schema.SET_BACKENDS, [as_json(dict(backends))])
            if notes is not None:
                connection.execute(schema.SET_NOTES, [as_json(dict(notes))])
        try:
            connection.execute("CHECKPOINT")
        except duckdb.Error as error:
            raise StoreError(
                f"{self.partial} could not be closed: {first_line(error)}. Free disk space, then "
                f"python -m capture recover '{self.partial}'."
            ) from error
        self.abandon()
        publish(self.partial, self.out)
        _log.info("%s holds %d tokens", self.out, sum(self._tokens.values()))
        return self.out

    def abandon(self) -> None:
        """Close the connection and leave the partial file as the last commit left it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def discard(self) -> None:
        """Close the connection and remove the partial file, of a run without a token."""
        self.abandon()
        remove_partial(self.out)


def _check_facts(info: RunInfo, sites: Sequence[SiteInfo]) -> None:
    """Refuse an unknown level, a run without sites and two sites of one name."""
    if info.level not in LEVELS:
        raise StoreError(f"level must be one of {', '.join(LEVELS)}, got {quoted(info.level)}.")
    places = [(site.layer, site.site) for site in sites]
    if not places or len(set(places)) != len(places):
        raise StoreError(
            f"A run needs one or more sites with different (layer, site), got {places}. Count "
            "site from 0 within a layer."
        )
    for site in sites:
        if not 1 <= site.top_k <= site.n_experts <= 2**16 - 1:
            raise StoreError(
                f"{site.module} must have 1 <= top_k <= n_experts <= 65535, got top_k="
                f"{site.top_k} and n_experts={site.n_experts}. Check how the site was found."
            )
