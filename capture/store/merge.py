"""Parts of one capture, recorded by several processes, put together as one run.

Every part says in ``run.notes`` which prompts it holds of how many, so that a merge finds out by
itself that none is missing and none is there twice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError, first_line
from capture.interrupts import as_keyboard_interrupt
from capture.paths import RUN_SUFFIX, given_path
from capture.store import schema
from capture.store.codec import Layout
from capture.store.files import SAFE, check_new, made_whole
from capture.store.reader import RunReader
from capture.store.records import LEVELS, PairSums, next_sites
from capture.store.sums import PairTotals, check_counts, check_diagonal, store_pairs, summed
from capture.store.tables import rows_table
from capture.store.writer import CONFIG, as_json

PART, PARTS = "part", "parts"  # keys of ``run.notes``: of a part, and of what parts became
# what parts of one capture have in common
_SAME = ("model", "revision", "architecture", "dtype", "level", "vocab_size", "hidden_size")
_ALSO_SAME = ("config", "sample")
_TOKEN_TABLES = ("route", "score", "hidden", "sample", "attention_key")
_PROMPT_TABLES = ("attention_prompt", "attention_head")


class PartNote(NamedTuple):
    """Which prompts a part holds: every ``of``-th of ``prompts``, from ``number`` on.

    ``capture`` is a digest of all prompts and of what decides what is recorded of them.
    """

    capture: str
    number: int
    of: int
    prompts: int

    @property
    def numbers(self) -> range:
        """The places of the part's prompts among all."""
        return range(self.number, self.prompts, self.of)


class _Part(NamedTuple):
    path: Path
    note: PartNote
    info: dict[str, Any]
    notes: dict[str, Any]


def note_of(path: Path) -> PartNote | None:
    """Return which part a whole run file is; None for what is none, is incomplete or not there."""
    try:
        with RunReader.open(path) as run:
            found = json.loads(run.info["notes"]).get(PART)
            return PartNote(**found) if run.info["complete"] and isinstance(found, dict) else None
    except (StoreError, ValueError, TypeError):
        return None


def merged_from(out: Path) -> str | None:
    """Return the digest of the capture whose parts became this run, None where that is not so."""
    try:
        with RunReader.open(out) as run:
            found = json.loads(run.info["notes"]).get(PARTS)
            return str(found["capture"]) if isinstance(found, dict) else None
    except (StoreError, ValueError, KeyError):
        return None


@as_keyboard_interrupt()
def merge(parts: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write the parts of a capture as one run, with the prompts in their original order.

    Parameters
    ----------
    parts : path, or sequence of paths
        The part files, or a folder of them. They stay.
    out : str or Path
        The run file; it must not exist.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    StoreError
        If a part is missing, there twice, incomplete, of another capture or not a part, or ``out``
        exists. Nothing of ``out`` is left then.
    """
    out = given_path(out, "the run file", StoreError)
    check_new(out)
    given = [parts] if isinstance(parts, str | Path) else list(parts)
    found = _in_order([_part(path) for path in _files(given)])
    with made_whole(out) as fresh:
        try:
            _write(fresh, found)
        except (duckdb.Error, OSError) as error:
            raise StoreError(
                f"{out} could not be written: {first_line(error)}. The parts are as they were; "
                "free disk space, or choose another OUT."
            ) from error
    return out


def _files(given: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for name in given:
        path = given_path(name, "a part", StoreError)
        inside = sorted(path.glob(f"*{RUN_SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            raise StoreError(f"{path} is a folder without a {RUN_SUFFIX} file.")
        # attempts that were cut short lie beside the parts
        files += [file for file in inside if not path.is_dir() or note_of(file) is not None]
    if not files:
        raise StoreError(
            "There is no whole part to merge. Parts are made by: python -m capture MODEL --prompts "
            "FILE --out RUN --shard 0/4"
        )
    return files


def _part(path: Path) -> _Part:
    with RunReader.open(path) as run:
        info = run.info
        notes = json.loads(info["notes"])
    note = notes.pop(PART, None)
    try:
        found = PartNote(**(note or {}))
    except TypeError:
        raise StoreError(
            f"{path} is a run of its own and no part: it was recorded without --shard and "
            "torchrun. Give parts only."
        ) from None
    if not info["complete"]:
        raise StoreError(f"{path} is incomplete. Record the part again, with the same command.")
    return _Part(path, found, info, notes)


def _in_order(parts: Sequence[_Part]) -> list[_Part]:
    """Return the parts by their place; refuse one too many, one too few and one of another kind."""
    first = parts[0]
    by_number: dict[int, _Part] = {}
    for part in parts:
        same = part.note._replace(number=first.note.number) == first.note and all(
            part.info[name] == first.info[name] for name in (*_SAME, *_ALSO_SAME)
        )
        if not same:
            raise StoreError(
                f"{part.path.name} and {first.path.name} are parts of two captures: of other "
                "prompts, another model, other options or another number of parts. Give the parts "
                "of one."
            )
        if part.note.number in by_number:
            twice = by_number[part.note.number].path.name
            raise StoreError(f"{part.path.name} and {twice} are the same part. Give one of them.")
        by_number[part.note.number] = part
    of = first.note.of
    missing = [number for number in range(of) if number not in by_number]
    if missing:
        shown = ", ".join(f"{number}/{of}" for number in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise StoreError(
            f"{len(missing)} of {of} parts are missing: {shown}{more}. Record each with the same "
            f"command and --shard {missing[0]}/{of}."
        )
    return [by_number[number] for number in range(of)]


def _write(fresh: Path, parts: Sequence[_Part]) -> None:
    with duckdb.connect(str(fresh), config=CONFIG | SAFE) as connection:
        readers = [RunReader.open(part.path) for part in parts]
        try:
            _Merge(connection, parts, readers).run()
        finally:
            for reader in readers:
                reader.close()
        connection.execute("CHECKPOINT")


class _Merge:
    """Fills an empty file with the rows of parts.

    A reader holds every part's tables against ours; rows go from file to file, by their whole
    names, and none of a part's views is read.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        parts: Sequence[_Part],
        readers: Sequence[RunReader],
    ) -> None:
        self._connection = connection
        self._parts = parts
        self._readers = readers
        self._sites = readers[0].sites
        self._layout = Layout(*readers[0].query(schema.SELECT_LAYOUT).to_pylist()[0].values())
        self._tables = schema.tables(self._layout)
        self._routed = LEVELS.index(parts[0].info["level"]) >= LEVELS.index("ids")
        self._batches = 0

    def run(self) -> None:
        """Write every table, and check the sums."""
        for statement in schema.create_statements(self._layout):
            self._connection.execute(statement)
        tokens, first = self._prompts()
        generated = int(first[-1])
        for part, reader, lengths in zip(self._parts, self._readers, tokens, strict=True):
            if reader.sites != self._sites:
                raise StoreError(
                    f"{part.path.name} has other routers than {self._parts[0].path.name}."
                )
            starts = first[:-1][part.note.number :: part.note.of]
            n_generated = int(part.info["n_generated"])
            places = [np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]
            places.append(np.arange(generated, generated + n_generated))
            self._copy(part, np.concatenate(places).astype(np.int32))
            generated += n_generated
        self._sums()
        self._run_row()
        self._check()

    def _insert(self, table: str, rows: pa.Table) -> None:
        self._connection.register("rows", rows)
        self._connection.execute(schema.insert(table))
        self._connection.unregister("rows")

    def _prompts(self) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        """Write the prompts in their order; return each part's lengths, and where each begins."""
        whole = self._parts[0].note.prompts
        rows, lengths = [], np.zeros(whole, np.int64)
        for part, reader in zip(self._parts, self._readers, strict=True):
            table = reader.query("SELECT * FROM packed.prompt ORDER BY prompt_id")
            if table.num_rows != len(part.note.numbers):
                raise StoreError(
                    f"{part.path.name} says that it holds {len(part.note.numbers)} prompts, and "
                    f"has {table.num_rows}. Record the part again."
                )
            lengths[part.note.number :: part.note.of] = table["n_tokens"].to_numpy()
            numbers = pa.array(part.note.numbers, pa.int32())
            rows.append(table.set_column(0, "prompt_id", numbers))
        self._insert("prompt", pa.concat_tables(rows).sort_by("prompt_id"))
        for table in ("site", schema.SITE_FACT):
            self._insert(table, self._readers[0].query(f"SELECT * FROM packed.{table}"))
        layers = self._readers[0].query("SELECT * FROM packed.attention_layer")
        self._insert("attention_layer", layers)
        of_part = [lengths[p.note.number :: p.note.of].tolist() for p in self._parts]
        return of_part, np.concatenate([[0], np.cumsum(lengths)])

    def _copy(self, part: _Part, new: npt.NDArray[np.int32]) -> None:
        """Copy the rows of a part; its token ``i`` becomes ``new[i]``."""
        execute = self._connection.execute
        name = str(part.path.absolute()).replace("'", "''")
        execute(f"ATTACH '{name}' AS part (READ_ONLY)")
        places = {
            "token_id": pa.array(np.arange(len(new), dtype=np.int32)),
            "new": pa.array(new),
        }
        self._connection.register("places", pa.table(places))
        execute("CREATE TEMP TABLE place AS SELECT * FROM places")
        prompt = f"(prompt_id * {part.note.of} + {part.note.number})::INTEGER"
        moved = "JOIN place AS p ON p.token_id = t.token_id"
        execute(
            "INSERT INTO packed.token SELECT t.* REPLACE (p.new AS token_id,"
            f" {prompt} AS prompt_id, (t.batch_id + {self._batches})::INTEGER AS batch_id)"
            f" FROM part.packed.token AS t {moved}"
        )
        for table in _TOKEN_TABLES:
            execute(
                f"INSERT INTO packed.{table} SELECT t.* REPLACE (p.new AS token_id)"
                f" FROM part.packed.{table} AS t {moved}"
            )
        first = ", p.new AS first_token"
        for table in _PROMPT_TABLES:
            starts = table == "attention_prompt"
            join = " JOIN place AS p ON p.token_id = t.first_token" if starts else ""
            execute(
                f"INSERT INTO packed.{table} SELECT t.* REPLACE ({prompt} AS prompt_id"
                f"{first if starts else ''}) FROM part.packed.{table} AS t{join}"
            )
        execute(
            "INSERT INTO packed.batch SELECT * REPLACE"
            f" ((batch_id + {self._batches})::INTEGER AS batch_id) FROM part.packed.batch"
        )
        (self._batches,) = execute(schema.count_all("batch")).fetchall()[0]
        execute("DROP TABLE place")
        self._connection.unregister("places")
        execute("DETACH part")

    def _sums(self) -> None:
        """Add up what the parts added up."""
        sums = [r.query("SELECT * FROM packed.rollup").to_pylist() for r in self._readers]
        rows = summed((row for part in sums for row in part), ("layer", "site", "domain", "phase"))
        columns = self._tables["rollup"]
        listed = [[row[column.name] for column in columns] for row in rows]
        self._insert("rollup", rows_table(columns, listed))
        totals = PairTotals(self._sites)
        for reader in self._readers:
            totals.add(_pairs(reader))
        store_pairs(self._connection, totals, self._tables)
        self._connection.execute(schema.STORE_GATE_SUMS)
        self._connection.execute(schema.STORE_DROPPED)

    def _run_row(self) -> None:
        """Write the facts: those that parts share, and of the others what holds for all."""
        (row,) = self._readers[0].query("SELECT * FROM packed.run").to_pylist()
        infos = [part.info for part in self._parts]
        row["device"] = ", ".join(dict.fromkeys(str(info["device"]) for info in infos))
        row["started_at"] = min(info["started_at"] for info in infos)
        row["seconds"] = max(info["seconds"] for info in infos)
        row["schema_version"] = schema.SCHEMA_VERSION
        row["notes"] = as_json(_notes(self._parts))
        names = self._connection.table("packed.run").columns
        marks = ", ".join("?" * len(names))
        self._connection.execute(
            f"INSERT INTO packed.run VALUES ({marks})", [row[name] for name in names]
        )

    def _check(self) -> None:
        """Hold what is stored against the sums of the parts."""
        assignments = [0] * len(self._sites)
        vectors = {table: [0] * len(self._sites) for table in ("score", "hidden")}
        place = {(site.layer, site.site): n for n, site in enumerate(self._sites)}
        attention = dict.fromkeys(schema.ATTENTION_TABLES, 0)
        for reader in self._readers:
            for row in reader.query(schema.COUNT_LOAD).to_pylist():
                layer, site, count = row.values()
                assignments[place[layer, site]] += count
            for table, counts in vectors.items():
                for row in reader.query(schema.count_rows(table)).to_pylist():
                    layer, site, count = row.values()
                    counts[place[layer, site]] += count
            for table in attention:
                (counted,) = reader.query(schema.count_all(table)).to_pylist()
                attention[table] += next(iter(counted.values()))
        check_counts(
            self._connection,
            layout=self._layout,
            sites=self._sites,
            routed=self._routed,
            tokens={
                "prompt": sum(p.info["n_tokens"] - p.info["n_generated"] for p in self._parts),
                "generated": sum(part.info["n_generated"] for part in self._parts),
            },
            assignments=assignments,
            vectors=vectors,
            attention=attention,
        )
        check_diagonal(self._connection, self._sites)


def _pairs(reader: RunReader) -> list[PairSums]:
    """Return the pairs and transitions that a part counted."""
    pairs = {
        (row["layer"], row["site"]): row["tokens"]
        for row in reader.query("SELECT * FROM packed.coactivation").to_pylist()
    }
    transitions = {
        row["layer"]: row["tokens"]
        for row in reader.query("SELECT * FROM packed.transition").to_pylist()
    }
    found = []
    for index, following in enumerate(next_sites(reader.sites)):
        site = reader.sites[index]
        counts = np.asarray(pairs[site.layer, site.site], np.int64)
        leads = None
        if following is not None:
            leads = np.asarray(transitions[site.layer], np.int64).reshape(site.n_experts, -1)
        found.append(PairSums(index, counts.reshape(site.n_experts, -1), leads, following))
    return found


def _notes(parts: Sequence[_Part]) -> Mapping[str, Any]:
    """Put the notes of the parts together: counts are added, all else is said once."""
    notes: dict[str, Any] = {}
    for part in parts:
        for name, value in part.notes.items():
            if name in ("forward_passes", "sampled_tokens"):
                notes[name] = notes.get(name, 0) + value
            elif name == "seconds_before_recording":
                notes[name] = max(notes.get(name, 0), value)
            else:
                notes.setdefault(name, value)
    whole = parts[0].note
    return notes | {PARTS: {"capture": whole.capture, "of": whole.of}}
