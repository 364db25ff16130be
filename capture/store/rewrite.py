"""Run files made of other run files: recovered, brought up to date, or left without their text.

``recover`` closes the partial file of a capture that was killed. The file may be a stranger's: it
is attached as run files are, so that none of its views, macros and indexes is run, and what is
written goes into tables that are ours to the letter. ``migrate`` brings a run of an older schema
version up to date, step by step, into a new file.

``counts_only`` makes a run for people who may not read the prompts. Text can be read off more than
text. Token ids are the text in numbers, router inputs hold the token, and whoever has the model
finds the token from the experts that it visited. So nothing that says what one token did is kept:
the new run is of level ``stats``, and its tokens have a place in a prompt and in a batch, and no
more. Sums over a few tokens say what each of them did, and a domain may be the name of a person. So
there are sums only of groups of at least ``MIN_TOKENS`` tokens from at least ``MIN_PROMPTS``
prompts. In each phase the domains with less are put together under one name, with larger ones
where that is not enough, so that no difference of sums is of a smaller group either. A phase that
has less in all is left out, and with it the pairs of experts, which are counted over all phases.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa

from capture.errors import SchemaVersionError, StoreError, first_line
from capture.interrupts import as_keyboard_interrupt
from capture.paths import given_path, model_name
from capture.store import schema
from capture.store.codec import Layout
from capture.store.files import (
    SAFE,
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
from capture.store.reader import FILE, RunReader, check_old, in_file, open_sandbox
from capture.store.records import LEVELS, sites_of
from capture.store.sums import check_counts, pairs_of_rows, store_pairs, summed
from capture.store.writer import BLOCK_SIZE

# what a counts-only run says of itself in ``run.notes``
NOTE = "counts_only"
MIN_TOKENS = 100
MIN_PROMPTS = 5
_TOKENS = (
    f"SELECT token_id, prompt_id, position, phase, {schema.NO_TOKEN}::INTEGER AS token,"
    " NULL::VARCHAR AS text, NULL::FLOAT AS loss, batch_id, row_in_batch"
    " FROM packed.token ORDER BY token_id"
)
_COPIED = {
    "site": "SELECT * FROM packed.site",
    schema.SITE_FACT: f"SELECT * FROM packed.{schema.SITE_FACT}",
    "token": _TOKENS,
    "batch": "SELECT * FROM packed.batch",
    "run": "SELECT * REPLACE ('stats' AS level, '{}' AS sample, $notes AS notes, $model AS model,"
    f" {schema.SCHEMA_VERSION} AS schema_version) FROM packed.run",
}
_PAIRS = {
    "coactivation": "SELECT * FROM packed.coactivation",
    "transition": "SELECT * FROM packed.transition",
}
_PROMPTS = (
    "SELECT prompt_id, NULL::VARCHAR AS text, domain, NULL::VARCHAR AS source, n_tokens,"
    " truncated FROM packed.prompt ORDER BY prompt_id"
)
_SIZES = (
    "SELECT domain, phase, count(*) AS tokens, count(DISTINCT prompt_id) AS prompts"
    " FROM packed.token JOIN packed.prompt USING (prompt_id) GROUP BY ALL"
)


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
    return bool(connection.execute(schema.SELECT_COMPLETE).fetchall()[0][0])


def _close(partial: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Check what was committed and write down that the run is incomplete."""
    sites = sites_of(connection.execute(schema.SELECT_SITES).fetchall())
    level = connection.execute(schema.SELECT_LEVEL).fetchall()[0][0]
    layout = Layout(*connection.execute(schema.SELECT_LAYOUT).fetchall()[0])
    if level not in LEVELS:
        raise not_a_run(partial, f"its level is not one of {', '.join(LEVELS)}")
    routed = LEVELS.index(level) >= LEVELS.index("ids")
    load = {
        (layer, site): count
        for layer, site, count in connection.execute(schema.COUNT_LOAD).fetchall()
    }
    check_counts(
        connection,
        layout=layout,
        sites=sites,
        routed=routed,
        tokens=dict(connection.execute(schema.COUNT_BATCH_TOKENS).fetchall()),
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
    seconds = connection.execute(schema.LAST_SECOND).fetchall()[0][0]
    connection.execute("BEGIN")
    connection.execute(in_file(schema.STORE_GATE_SUMS))
    connection.execute(in_file(schema.STORE_DROPPED))
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
    level = connection.execute(schema.SELECT_LEVEL).fetchall()[0][0]
    if LEVELS.index(level) < LEVELS.index("ids"):
        return
    sites = sites_of(connection.execute(schema.SELECT_PACKED_SITES).fetchall())
    layout = Layout(*connection.execute(schema.SELECT_LAYOUT).fetchall()[0])
    store_pairs(connection, pairs_of_rows(connection, layout, sites), schema.tables(layout))


def _add_gate_sums(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the sums of version 3, counted from the rows."""
    for statement in (schema.GATE_SUM_TABLE, schema.GATE_SUM_VIEW, schema.STORE_GATE_SUMS):
        connection.execute(statement)


def _add_load_windows(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the table of version 4, which only runs of level counts fill."""
    for statement in schema.statements_of_version_4():
        connection.execute(statement)


def _add_site_facts(connection: duckdb.DuckDBPyConnection) -> None:
    """Add what version 5 tells of routers: not known of those that were recorded before."""
    for statement in (schema.SITE_FACT_TABLE, schema.STORE_SITE_FACTS):
        connection.execute(statement)
    shown = connection.execute(
        "SELECT sql FROM duckdb_views() WHERE view_name = 'expert_load'"
    ).fetchall()
    statements = schema.views_of_version_5()
    if "count(weight_sum)" in shown[0][0]:  # of a run whose weights are not known
        layout = Layout(*connection.execute(schema.SELECT_LAYOUT).fetchall()[0])
        statements = [*statements, *schema.views_without_weights(layout)]
    for statement in statements:
        connection.execute(statement)


# one entry for every version that was ever released, oldest first
STEPS: tuple[Step, ...] = (
    Step(1, "add pairs and attention", _add_pairs_and_attention),
    Step(2, "add sums of the gates", _add_gate_sums),
    Step(3, "add loads of windows", _add_load_windows),
    Step(4, "add sides, kinds of experts and drops", _add_site_facts),
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
        _apply(fresh, plan)
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


def _apply(partial: Path, plan: Sequence[Step]) -> None:
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


class _Size(NamedTuple):
    tokens: int = 0
    prompts: int = 0

    def plus(self, other: "_Size") -> "_Size":
        """Return the size of both; a prompt has one domain, so that none counts twice."""
        return _Size(self.tokens + other.tokens, self.prompts + other.prompts)

    @property
    def is_small(self) -> bool:
        """Whether there are tokens, and too few to give their sums."""
        return bool(self.tokens) and (self.tokens < MIN_TOKENS or self.prompts < MIN_PROMPTS)


class _Given(NamedTuple):
    """What is given of a run: the sums of each phase, and the domains that are named in them."""

    named: Mapping[str, frozenset[str | None]]  # phase -> domains that keep their names there
    left_out: frozenset[str]  # phases of which nothing is given
    lost: frozenset[str | None]  # domains that are named nowhere

    def name(self, domain: str | None) -> str | None:
        """Return what a domain of prompts is called in the new file."""
        return schema.TOGETHER if domain in self.lost else domain

    def name_in(self, phase: str, domain: str | None) -> str | None:
        """Return what a domain is called in the sums of a phase."""
        return domain if domain in self.named[phase] else schema.TOGETHER


_Sizes = Mapping[str | None, Mapping[str, _Size]]


def _decide(sizes: _Sizes) -> _Given:
    """Decide which groups are large enough."""
    every = {phase for by_phase in sizes.values() for phase in by_phase}
    small = {phase for phase in every if _size(sizes, set(sizes), phase).is_small}
    named = {phase: _named(sizes, phase) for phase in every - small}
    lost = {
        domain
        for domain, by_phase in sizes.items()
        if _all_phases(by_phase).is_small or not any(domain in known for known in named.values())
    }
    # without a name there is nothing to hide in one
    return _Given(named, frozenset(small), frozenset(lost if lost - {None} else ()))


def _named(sizes: _Sizes, phase: str) -> frozenset[str | None]:
    """Return the domains whose sums are given by themselves in a phase."""
    here = {domain: by_phase[phase] for domain, by_phase in sizes.items() if phase in by_phase}
    together = {
        domain for domain, size in here.items() if domain == schema.TOGETHER or size.is_small
    }
    others = sorted(set(here) - together, key=lambda domain: here[domain].tokens)
    while others and _size(sizes, together, phase).is_small:
        together.add(others.pop(0))
    # one domain without a name needs none
    return frozenset(here if together == {None} else set(here) - together)


def _all_phases(by_phase: Mapping[str, _Size]) -> _Size:
    # a prompt that was read and went on is one prompt
    return _Size(
        sum(size.tokens for size in by_phase.values()),
        max(size.prompts for size in by_phase.values()),
    )


def _size(sizes: _Sizes, domains: set[str | None], phase: str) -> _Size:
    found = _Size()
    for domain in domains:
        found = found.plus(sizes[domain].get(phase, _Size()))
    return found


@as_keyboard_interrupt()
def counts_only(path: str | Path, out: str | Path) -> Path:
    """Write the run at ``path`` as ``out``, without text, token ids and anything per token.

    Prompts keep their lengths, and domains their names if they have ``MIN_TOKENS`` tokens of
    ``MIN_PROMPTS`` prompts. Of the model's folder the last name is kept. The old file is not
    touched.

    Raises
    ------
    StoreError
        If ``path`` is not a run, or ``out`` exists or cannot be written.
    """
    path, out = given_path(path, "the run", StoreError), given_path(out, "the new file", StoreError)
    check_new(out)
    with RunReader.open(path, checked=True) as run, made_whole(out) as fresh:
        if run.info["level"] == "counts":
            raise StoreError(
                f"{path.name} holds sums only, as its trace did, and no text. Share the file as it "
                "is."
            )
        (layout,) = run.query(schema.SELECT_LAYOUT).to_pylist()
        try:
            _write_counts(fresh, run, Layout(**layout))
        except duckdb.Error as error:
            raise StoreError(
                f"{out} could not be written: {first_line(error)}. Choose another OUT."
            ) from error
    return out


def _write_counts(fresh: Path, run: RunReader, layout: Layout) -> None:
    sizes: dict[str | None, dict[str, _Size]] = {}
    for row in run.query(_SIZES).to_pylist():
        sizes.setdefault(row["domain"], {})[row["phase"]] = _Size(row["tokens"], row["prompts"])
    rule = _decide(sizes)
    rows = {table: run.query(sql) for table, sql in _COPIED.items() if table != "run"}
    rows["run"] = run.query(_COPIED["run"], {"notes": _notes(rule), "model": _model(run)})
    rows["prompt"] = _renamed(run.query(_PROMPTS), rule)
    rows["rollup"] = _sums(run.query("SELECT * FROM packed.rollup"), rule)
    if not rule.left_out:
        rows |= {table: run.query(sql) for table, sql in _PAIRS.items()}
    config = SAFE | {"default_block_size": str(BLOCK_SIZE)}
    with duckdb.connect(str(fresh), config=dict(config)) as connection:
        for statement in (*schema.create_statements(layout), schema.TOKENS_WITHOUT_IDS):
            connection.execute(statement)
        for table, given in rows.items():
            connection.register("rows", given)
            connection.execute(schema.insert(table))
            connection.unregister("rows")
        connection.execute("CHECKPOINT")


def _model(run: RunReader) -> str:
    return model_name(str(run.query("SELECT model FROM packed.run")["model"][0].as_py()))


def _notes(rule: _Given) -> str:
    """Say in the file what it leaves out, for ``run.notes``."""
    least = {"tokens": MIN_TOKENS, "prompts": MIN_PROMPTS}
    said = {"least": least, "together": len(rule.lost), "left_out": sorted(rule.left_out)}
    return json.dumps({NOTE: True, **said})


def _renamed(prompts: pa.Table, rule: _Given) -> pa.Table:
    place = prompts.schema.get_field_index("domain")
    names = [rule.name(domain) for domain in prompts["domain"].to_pylist()]
    return prompts.set_column(place, "domain", pa.array(names, pa.string()))


def _sums(rollup: pa.Table, rule: _Given) -> pa.Table:
    """Return the sums of the groups that are given, in the columns of ``rollup``."""
    named = (
        row | {"domain": rule.name_in(row["phase"], row["domain"])}
        for row in rollup.to_pylist()
        if row["phase"] in rule.named
    )
    rows = summed(named, ("layer", "site", "domain", "phase"))
    return pa.Table.from_pylist(rows, schema=rollup.schema)
