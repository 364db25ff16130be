"""Traces that count how often each expert was chosen and keep no tokens, a reader for each.

Layouts were read from the programs' sources in November 2026. A layer that nobody counted in is a
layer without a router.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from capture.errors import TraceError, first_line, quoted
from capture.traces.sequences import MAX_TOP_K, Record, first_record, is_choice, records
from capture.traces.tables import ALIASES, bounded, columns_of, reader_of

Counts = npt.NDArray[np.int64]
COUNT_ALIASES = {
    "layer": ALIASES["layer"],
    "expert": ALIASES["expert"],
    "count": ("count", "assignments", "tokens", "load", "hits", "n"),
    "step": ("step", "iteration", "iter", "window", "pass", "forward_pass_id"),
    "domain": ("domain", "dataset", "task"),
}
MAX_EXPERTS = 65_534
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(\w*)exps\.weight\.counts")
_SHARES = "Shares do not say how many tokens they are of"


class CountsPart(NamedTuple):
    """Counts that belong together.

    Attributes
    ----------
    counts : array [L, E]
    step : int or None
        Of a recorder or a training; parts come in its order.
    domain : str or None
    """

    counts: Counts
    step: int | None = None
    domain: str | None = None


class CountTrace(NamedTuple):
    """Counts that can be read as often as needed.

    Attributes
    ----------
    format : str
    parts : callable
        Returns them in the order of their steps.
    layers : tuple of int
        Decoder layer of each of the L.
    top_k : int or None
        Where the trace says it.
    facts : mapping
        What else is known; plain JSON. ``step`` is what the trace calls a window of time.
    close : callable
    """

    format: str
    parts: Callable[[], Iterator[CountsPart]]
    layers: tuple[int, ...]
    top_k: int | None = None
    model: str | None = None
    facts: Mapping[str, Any] = {}
    close: Callable[[], None] = lambda: None


def whole(values: Any, where: str) -> Counts:
    """Return counts as whole numbers.

    Raises
    ------
    TraceError
        If one is negative, no number, or a share.
    """
    try:
        given = np.asarray(values, np.float64)
    except (ValueError, TypeError):
        raise TraceError(f"{where}: expected counts, got {quoted(values)}.") from None
    wrong = given[~((given >= 0) & (given == np.floor(given)) & (given < 2**53))]
    if wrong.size:
        raise TraceError(
            f"{where}: counts are whole numbers of 0 or more, got {wrong.flat[0]:g}. {_SHARES}."
        )
    return given.astype(np.int64)


def _fixed(
    parts: Sequence[CountsPart], format: str, layers: Iterable[int], **more: Any
) -> CountTrace:
    return CountTrace(format, lambda: iter(parts), tuple(layers), **more)


# --- tables ---------------------------------------------------------------------------------------


def count_columns(columns: Sequence[str]) -> dict[str, str] | None:
    """Return which column of a table is what; None where it is no table of counts."""
    names = {column.lower(): column for column in columns}
    found = {
        ours: f'"{names[name]}"'
        for ours, known in COUNT_ALIASES.items()
        for name in known[::-1]
        if name in names
    }
    return found if {"layer", "expert", "count"} <= found.keys() else None


def count_table(path: Path, columns: Mapping[str, str], source: str) -> CountTrace:
    """Read rows of (layer, expert, count), which may have a step and a domain, in any order.

    Parameters
    ----------
    columns : mapping
        From :func:`count_columns`.
    source : str
        What reads the table, in SQL, of ``$path``.
    """
    step, domain = (columns.get(name, "NULL") for name in ("step", "domain"))
    connection = bounded()
    try:
        connection.execute(
            f"CREATE TABLE counted AS SELECT {step}::BIGINT AS step, {domain}::VARCHAR AS domain,"
            f" {columns['layer']}::INTEGER AS layer, {columns['expert']}::INTEGER AS expert,"
            f" sum({columns['count']}::DOUBLE) AS count, count(*) AS times"
            f" FROM {source} GROUP BY ALL",
            {"path": str(path)},
        )
        wrong, twice, steps, most = connection.execute(
            "SELECT count(*) FILTER (layer IS NULL OR expert IS NULL OR layer < 0 OR expert < 0 OR"
            " count IS NULL), count(*) FILTER (times > 1), count(step), max(expert) FROM counted"
        ).fetchall()[0]
    except duckdb.Error as error:
        connection.close()
        raise TraceError(f"{path.name} could not be read: {first_line(error)}.") from error
    if wrong or twice or most is None or most >= MAX_EXPERTS:
        connection.close()
        raise TraceError(
            f"{path.name} has {wrong:,} rows without a layer, an expert or a count."
            if wrong
            else f"{path.name} counts the same layer and expert {twice:,} times over. Add the rows "
            "up, or tell them apart by a column step or domain."
            if twice
            else f"{path.name} has no rows with experts 0 to {MAX_EXPERTS - 1}."
        )
    layers = [
        row[0]
        for row in connection.execute("SELECT DISTINCT layer FROM counted ORDER BY 1").fetchall()
    ]
    read = partial(_table_parts, connection, path.name, layers, int(most) + 1)
    facts = {"step": columns["step"].strip('"')} if steps else {}
    return CountTrace("table of counts", read, tuple(layers), facts=facts, close=connection.close)


def _table_parts(
    connection: duckdb.DuckDBPyConnection, name: str, layers: Sequence[int], n_experts: int
) -> Iterator[CountsPart]:
    place = {layer: index for index, layer in enumerate(layers)}
    cursor = connection.cursor()
    rows = cursor.execute(
        "SELECT step, domain, layer, list(expert), list(count) FROM counted GROUP BY ALL"
        " ORDER BY step, domain, layer"
    )
    read = iter(lambda: rows.fetchone(), None)
    for (step, domain), group in groupby(read, lambda row: row[:2]):
        counts = np.zeros((len(layers), n_experts), np.int64)
        for _, _, layer, experts, found in group:
            counts[place[layer], experts] = whole(found, f"{name}, layer {layer}")
        yield CountsPart(counts, step, domain)


def count_json(path: Path, document: Record) -> CountTrace | None:
    """Read {layer: counts}, or {domain: {layer: counts}}; None where it is neither.

    Counts are a list over experts, or {expert: count}.
    """
    inside = document.get("counts", document)
    if not isinstance(inside, Mapping) or not inside:
        return None
    by_domain = {None: inside} if all(str(key).isdecimal() for key in inside) else inside
    tables = [one for one in by_domain.values() if isinstance(one, Mapping) and one]
    if len(tables) < len(by_domain) or not all(str(k).isdecimal() for one in tables for k in one):
        return None
    layers = sorted({int(key) for one in tables for key in one})
    sizes = {_size(counts) for one in tables for counts in one.values()}
    if len(sizes) > 1 and all(isinstance(c, list) for one in tables for c in one.values()):
        raise TraceError(
            f"{path.name} counts {', '.join(map(str, sorted(sizes)))} experts. One run holds one "
            "model: take its part of the file."
        )
    parts = []
    for domain, table in by_domain.items():
        counts = np.zeros((len(layers), max(sizes)), np.int64)
        for key, given in table.items():
            values = whole(
                list(given.values()) if isinstance(given, Mapping) else given,
                f"{path.name}, {domain or 'counts'}, layer {key}",
            )
            at = [int(e) for e in given] if isinstance(given, Mapping) else slice(len(values))
            counts[layers.index(int(key)), at] = values
        parts.append(CountsPart(counts, domain=domain))
    return _fixed(parts, "counts by layer", layers)


def _size(counts: Any) -> int:
    if isinstance(counts, Mapping):
        return 1 + max((int(key) for key in counts), default=0)
    return len(counts) if isinstance(counts, list) else 0


def expert_location(path: Path, document: Record) -> CountTrace:
    """Read SGLang's ``logical_count`` [layers, E], or [steps, layers, E]."""
    if "logical_count" not in document:
        raise TraceError(
            f"{path.name} is a placement of experts, which holds no counts. Import what it was "
            "made from."
        )
    counts = _three(whole(document["logical_count"], f"{path.name}, logical_count"), path.name)
    steps = [None] if len(counts) == 1 else range(len(counts))
    return _fixed(
        [CountsPart(one, step) for one, step in zip(counts, steps, strict=True)],
        "SGLang expert location",
        range(counts.shape[1]),
        facts={} if len(counts) == 1 else {"step": "step"},
    )


def _three(counts: Counts, name: str) -> Counts:
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not counts.size or counts.shape[2] > MAX_EXPERTS:
        raise TraceError(f"{name}: expected counts [layers, experts], got {list(counts.shape)}.")
    return counts


def heat(path: Path, document: Record) -> CountTrace:
    """Read ``layers[].heat`` of a co-activation table; its pairs leave out the rare ones."""
    tables = document["layers"]
    layers = [int(one.get("layer", number)) for number, one in enumerate(tables)]
    rows = [whole(one["heat"], f"{path.name}, layers[{n}].heat") for n, one in enumerate(tables)]
    if len({len(row) for row in rows}) != 1:
        raise TraceError(f"{path.name}: the layers count different numbers of experts.")
    part = CountsPart(np.stack(rows))
    facts = {"left_out": ["pairs, of which the table has the frequent ones only"]}
    return _fixed([part], "co-activation table", layers, facts=facts)


# --- engines and training -------------------------------------------------------------------------


def load_pt(path: Path) -> Any:
    """Return what ``torch.save`` wrote: tensors, numbers and texts, and nothing that would run.

    Raises
    ------
    TraceError
        If the file holds anything else.
    """
    import torch  # takes seconds, and only files of torch need it

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        raise TraceError(
            f"{path.name} is no file of tensors alone: {first_line(error)}. What a pickle would "
            "run is never loaded."
        ) from None


def recorder(files: Sequence[Path]) -> CountTrace:
    """Read dumps of SGLang's expert distribution recorder, or of REAP's observer."""
    dumps = [load_pt(file) for file in files]
    first = dumps[0]
    if not isinstance(first, Mapping):
        raise TraceError(f"{files[0].name}: expected a dump of counts, got {quoted(first)}.")
    if all("logical_count" in dump for dump in dumps):
        return _statistics(files, dumps)
    if all("records" in dump for dump in dumps):
        return _passes(files, dumps)
    if len(dumps) == 1 and all(isinstance(key, int) for key in first):
        return _reap(files[0], first)
    raise TraceError(
        f"{files[0].name} holds {', '.join(map(str, list(first)[:8]))}; known are logical_count "
        "and records of SGLang's recorder, and expert_frequency by layer of REAP's observer."
    )


def _statistics(files: Sequence[Path], dumps: Sequence[Any]) -> CountTrace:
    """Read ``logical_count`` [steps, layers, E]: a ring of steps, zeros where it is not filled."""
    # ranks reduce their counts before they write: equal dumps are one, and one rank writes again
    # and again
    kept: list[tuple[str, Any]] = []
    for file, dump in zip(files, dumps, strict=True):
        counts = dump["logical_count"].numpy()
        counts = counts[None] if counts.ndim == 2 else counts
        if not any(np.array_equal(counts, other) for _, other in kept):
            kept.append((file.name, counts))
    shapes = {counts.shape[1:] for _, counts in kept}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise TraceError(
            f"logical_count must be [steps, layers, experts], alike in all files; got "
            f"{', '.join(str(list(counts.shape)) for _, counts in kept)}."
        )
    filled = [counts.any(axis=(1, 2)) for _, counts in kept]
    if not any(one.any() for one in filled):
        raise TraceError(f"{files[0].name}: every step of the recorder is empty.")

    def parts() -> Iterator[CountsPart]:
        before = 0
        for (name, counts), used in zip(kept, filled, strict=True):
            for step in np.flatnonzero(used):
                yield CountsPart(whole(counts[step], f"{name}, step {step}"), before + int(step))
            before += len(counts)

    # a ring that is full goes on at its beginning: its first step may be any
    rotated = any(len(used) > 1 and used.all() for used in filled)
    facts = {
        "step": "step of the recorder",
        "unfilled": int(sum((~used).sum() for used in filled)),
        "rotated": rotated,
        "files": len(kept),
    }
    layers = range(next(iter(shapes))[0])
    return CountTrace("SGLang recorder, stat", parts, tuple(layers), facts=facts)


def _passes(files: Sequence[Path], dumps: Sequence[Any]) -> CountTrace:
    """Read ``records`` of ``global_physical_count`` [layers, physical], a file a rank."""
    where: dict[int, list[tuple[int, int]]] = {}
    most = n_experts = 0
    for number, dump in enumerate(dumps):
        to_logical = dump["last_physical_to_logical_map"].numpy()
        n_experts = max(n_experts, int(to_logical.max()) + 1)
        for at, record in enumerate(dump["records"]):
            where.setdefault(int(record["forward_pass_id"]), []).append((number, at))
            if "topk_ids_of_layer" in record:
                ids = record["topk_ids_of_layer"].numpy()
                chosen = is_choice(ids)
                most = max(most, int((ids >= 0).sum(-1)[chosen].max(initial=0)))
    if not where:
        raise TraceError(f"{files[0].name}: the recorder holds no pass.")
    n_layers = len(dumps[0]["last_physical_to_logical_map"])

    def parts() -> Iterator[CountsPart]:
        for step in sorted(where):
            seen: set[bytes] = set()
            total = np.zeros((n_layers, n_experts), np.int64)
            for number, at in where[step]:
                counts = dumps[number]["records"][at]["global_physical_count"].numpy()
                # ranks that hold the same tokens count the same
                if counts.tobytes() not in seen:
                    seen.add(counts.tobytes())
                    name = f"{files[number].name}, pass {step}"
                    total += _logical(
                        whole(counts, name),
                        dumps[number]["last_physical_to_logical_map"].numpy(),
                        n_experts,
                        name,
                    )
            yield CountsPart(total, step)

    kind = "per_token" if most else "per_pass"
    facts: dict[str, Any] = {"step": "forward pass", "files": len(files)}
    if most:
        facts["left_out"] = ["choices of tokens: requests cannot be told apart while decoding"]
    return CountTrace(
        f"SGLang recorder, {kind}", parts, tuple(range(n_layers)), top_k=most or None, facts=facts
    )


def _logical(physical: Counts, to_logical: npt.NDArray[Any], n_experts: int, name: str) -> Counts:
    """Add up the copies of each expert."""
    if physical.shape != to_logical.shape:
        raise TraceError(
            f"{name}: counts {list(physical.shape)} do not fit the placement "
            f"{list(to_logical.shape)}."
        )
    cells = np.arange(len(physical))[:, None] * n_experts + to_logical
    return (
        np.bincount(cells.ravel(), physical.ravel(), minlength=len(physical) * n_experts)
        .astype(np.int64)
        .reshape(len(physical), n_experts)
    )


def _reap(path: Path, dump: Mapping[int, Any]) -> CountTrace:
    """Read {layer: {total_tokens, expert_frequency [E]}}."""
    layers = sorted(dump)
    rows = [
        whole(np.asarray(dump[layer]["expert_frequency"]), f"{path.name}, layer {layer}")
        for layer in layers
    ]
    tokens = [int(dump[layer]["total_tokens"]) for layer in layers]
    return _fixed(
        [CountsPart(np.stack(rows))],
        "REAP observer",
        layers,
        top_k=_per_token([int(row.sum()) for row in rows], tokens),
        facts={
            "left_out": ["pairwise_expert_frequency, which sums two experts and counts no pair"]
        },
    )


def _per_token(assignments: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return how many experts a token has, where counts and tokens say so alike."""
    found = {a / t for a, t in zip(assignments, tokens, strict=True) if t and a}
    only = found.pop() if len(found) == 1 else 0.0
    return int(only) if only.is_integer() and 1 <= only <= MAX_TOP_K else None


def tensorrt_llm(files: Sequence[Path]) -> CountTrace:
    """Read ``meta_info.json`` and ``rank*.safetensors`` with keys ITERATION_LAYER; ranks add up."""
    folder = files[0].parent
    about = json.loads((folder / "meta_info.json").read_text(encoding="utf-8"))
    ranks = sorted(one for one in folder.glob("rank*.safetensors") if "_raw" not in one.stem)
    if not ranks:
        raise TraceError(f"{folder.name} has a meta_info.json and no rank*.safetensors.")
    total: dict[tuple[int, int], Counts] = {}
    for rank in ranks:
        for key, values in load_file(rank).items():
            step, _, layer = key.partition("_")
            if not (step.isdecimal() and layer.isdecimal()):
                raise TraceError(f"{rank.name}: expected keys ITERATION_LAYER, got {quoted(key)}.")
            place, counts = (int(step), int(layer)), whole(values, f"{rank.name}, {key}").ravel()
            if total and len(counts) != len(next(iter(total.values()))):
                raise TraceError(f"{rank.name}, {key}: got {len(counts)} experts.")
            total[place] = total.get(place, 0) + counts
    layers = sorted({layer for _, layer in total})
    parts = [
        CountsPart(np.stack([total[at, layer] for layer in layers]), at)
        for at in sorted({at for at, _ in total})
    ]
    k = about.get("num_experts_per_token")
    return _fixed(
        parts,
        "TensorRT-LLM statistics",
        layers,
        top_k=k if isinstance(k, int) and 1 <= k <= MAX_TOP_K else None,
        facts={"step": "iteration", "files": len(ranks)},
    )


def tokens_per_expert(files: Sequence[Path], n_experts: int | None) -> CountTrace:
    """Read Megatron's ``tpe`` [micro-batch][local expert], lines of (iter, block, layer).

    Each file is a rank and counts the experts that it holds. Ranks of one expert-parallel group
    follow each other, as Megatron numbers them without tensor parallelism.
    """
    if len(files) > 1 and n_experts is None:
        raise TraceError(
            f"{len(files)} ranks of Megatron count the experts that each of them holds. Say how "
            "many a layer has in all with --experts."
        )
    total: dict[tuple[int, tuple[str, int]], dict[int, Counts]] = {}
    width = 0
    for rank, file in enumerate(files):
        for number, line in records(file):
            where = f"{file.name}, line {number}"
            counts = whole(line["tpe"], where)
            counts = counts[None] if counts.ndim == 1 else counts
            if counts.ndim != 2 or (width and counts.shape[1] != width):
                raise TraceError(f"{where}: expected tpe [micro-batch][{width or 'expert'}].")
            width = counts.shape[1]
            place = (str(line.get("block", "")), int(line["layer"]))
            ranks = total.setdefault((int(line["iter"]), place), {})
            ranks[rank] = ranks.get(rank, 0) + counts.sum(0)
    places = sorted({place for _, place in total})
    layers = [layer for _, layer in places]
    if len(set(layers)) < len(layers):
        layers = list(range(len(places)))

    def parts() -> Iterator[CountsPart]:
        for step in sorted({step for step, _ in total}):
            counts = np.zeros((len(places), parallel, width), np.int64)
            for at, place in enumerate(places):
                for rank, found in total.get((step, place), {}).items():
                    counts[at, rank % parallel] += found
            yield CountsPart(counts.reshape(len(places), -1), step)

    parallel, rest = divmod(n_experts or width, width)
    if rest or not parallel or len(files) % parallel:
        raise TraceError(
            f"{n_experts} experts in all do not divide among {len(files)} ranks that count "
            f"{width} each. Pass the files of all ranks, and the right --experts."
        )
    facts = {"step": "iteration", "ranks": len(files), "local_experts": width}
    return CountTrace("Megatron tokens per expert", parts, tuple(layers), facts=facts)


def imatrix(path: Path) -> CountTrace:
    """Read the counts of an imatrix of llama.cpp: ``blk.LAYER.ffn_*_exps.weight.counts`` [1, E]."""
    try:
        gguf = importlib.import_module("gguf")  # an optional requirement
    except ImportError:
        raise TraceError(
            f"{path.name} is a GGUF file, which the package gguf reads. Install it: pip install "
            "gguf"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a damaged file fails in many ways
        raise TraceError(f"{path.name} could not be read: {first_line(error)}.") from None
    kind = reader.fields.get("general.type")
    if kind is None or kind.contents() != "imatrix":
        raise TraceError(f"{path.name} is a GGUF file, but no imatrix. It holds no counts.")
    rows: dict[int, Counts] = {}
    for tensor in reader.tensors:
        if match := _EXPERTS.fullmatch(tensor.name):
            counts = whole(np.asarray(tensor.data).ravel(), f"{path.name}, {tensor.name}")
            # the projections of one block see the same tokens
            rows.setdefault(int(match[1]), counts)
    if not rows or len({len(row) for row in rows.values()}) > 1:
        raise TraceError(
            f"{path.name} has no counts of experts: no tensor ..ffn_*_exps.weight.counts."
        )
    layers = sorted(rows)
    chunks, size = (
        int(field.contents()) if (field := reader.fields.get(f"imatrix.chunk_{name}")) else 0
        for name in ("count", "size")
    )
    sums = [int(rows[layer].sum()) for layer in layers]
    return _fixed(
        [CountsPart(np.stack([rows[layer] for layer in layers]))],
        "llama.cpp imatrix",
        layers,
        top_k=_per_token(sums, [chunks * size] * len(sums)),
    )


def recognised_counts(path: Path, record: Record) -> str | None:
    """Return the format of a JSON file of counts by its first object; None if it is none."""
    if {"logical_count", "physical_to_logical_map"} & record.keys():
        return "expert-location"
    if path.name == "meta_info.json":
        return "tensorrt-llm"
    if "tpe" in record:
        return "tokens-per-expert"
    layers = record.get("layers")
    if isinstance(layers, list) and all(
        isinstance(one, Mapping) and "heat" in one for one in layers[:1] or [0]
    ):
        return "coactivation"
    return "counts" if count_json(path, record) else None


def _counts(files: Sequence[Path], n_experts: int | None) -> CountTrace:
    path = files[0]
    with path.open("rb") as file:
        is_object = file.read(1) == b"{"
    if is_object and (found := count_json(path, first_record(path))):
        return found
    columns = count_columns(columns_of(path))
    if columns is None:
        raise TraceError(
            f"{path.name} needs columns layer, expert and count (and may have step and domain), "
            f"got {', '.join(columns_of(path))[:200]}."
        )
    return count_table(path, columns, reader_of(path))


COUNT_FORMATS: dict[str, Callable[[list[Path], int | None], CountTrace]] = {
    "counts": _counts,
    "expert-location": lambda files, _: expert_location(files[0], first_record(files[0])),
    "sglang-recorder": lambda files, _: recorder(files),
    "tensorrt-llm": lambda files, _: tensorrt_llm(files),
    "tokens-per-expert": tokens_per_expert,
    "imatrix": lambda files, _: imatrix(files[0]),
    "coactivation": lambda files, _: heat(files[0], first_record(files[0])),
}
