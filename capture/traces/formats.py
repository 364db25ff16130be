"""Which program wrote a trace, and the reader for each.

Layouts were read from the programs' sources in November 2026; a file is recognised by what it
holds. Nothing here loads a pickle.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from capture.errors import TraceError, first_line, quoted
from capture.paths import given_path
from capture.traces.counts import (
    COUNT_FORMATS,
    CountTrace,
    count_columns,
    load_pt,
    recognised_counts,
)
from capture.traces.sequences import (
    Ids,
    Record,
    Sequence,
    Trace,
    first_record,
    is_choice,
    records,
    top_k_of,
    without_fakes,
)
from capture.traces.tables import columns_of, read_table, reader_of, select_columns

_ESFT_FILE = re.compile(r"expert_weights_(\d+)\.txt")
_HEAD = 1 << 20  # bytes that are looked at
# files of a folder, by name; the first that there are
_KNOWN: tuple[Callable[[str], object], ...] = (
    _ESFT_FILE.fullmatch,
    "meta_info.json".__eq__,
    re.compile(r".*\.jsonl").fullmatch,
    re.compile(r".*\.pt").fullmatch,
)
_ENTRY = 200  # bytes that hold the name of an archive's first file
Item = TypeVar("Item")
_JSON_ROWS = "read_json($path, format='newline_delimited', ignore_errors=false, {columns})"


def open_trace(
    source: Any, format: str | None, top_k: int | None, n_experts: int | None
) -> Trace | CountTrace:
    """Return a trace of whatever people have; see ``import_routing``."""
    if isinstance(source, Trace):
        return source
    if isinstance(source, (str, Path)):
        source = [source]
    if isinstance(source, np.ndarray):
        source = [source]
    items = list(source)
    if not items:
        raise TraceError("The source is empty. Pass a file, outputs of an engine, or arrays.")
    if all(isinstance(item, (str, Path)) for item in items):
        paths = [given_path(item, "the trace", TraceError) for item in items]
        return _of_files(paths, format, top_k, n_experts)
    if all(isinstance(item, np.ndarray) for item in items):
        return _of_arrays({f"array {n}": item for n, item in enumerate(items)})
    if all(hasattr(item, "outputs") for item in items):
        return Trace("vLLM outputs", lambda: _vllm_outputs(items))
    if all(isinstance(item, Mapping) for item in items):
        return _of_responses(lambda: enumerate(items, 1), items[0], "the responses", top_k)
    raise TraceError(
        f"Expected files, arrays [tokens, layers, top k], responses as dicts or vLLM's outputs, "
        f"got {type(items[0]).__name__}."
    )


def _of_files(
    paths: list[Path], name: str | None, top_k: int | None, n_experts: int | None
) -> Trace | CountTrace:
    files = _listed(paths)
    name = name or _recognised(files[0])
    if name not in NAMES:
        raise TraceError(f"The format must be one of {', '.join(NAMES)}, got {quoted(name)}.")
    if len(files) > 1 and name not in SEVERAL:
        raise TraceError(f"{name} is one file, got {len(files)}. Import each as a run of its own.")
    with _reading(files[0].name):
        if name in COUNT_FORMATS:
            counts = COUNT_FORMATS[name](files, n_experts)
            return counts._replace(parts=lambda: _guarded(counts.parts, files[0].name))
        trace = FORMATS[name](files, top_k)
    return trace._replace(sequences=lambda: _guarded(trace.sequences, files[0].name))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say which file it was where a record is not as its format has it."""
    try:
        yield
    except KeyError as error:
        raise TraceError(f"{name}: a record lacks the key {error}.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TraceError(f"{name} could not be read: {first_line(error)}.") from error


def _guarded(read: Callable[[], Iterator[Item]], name: str) -> Iterator[Item]:
    with _reading(name):
        yield from read()


def _listed(paths: list[Path]) -> list[Path]:
    """Return the files that are meant: those of a folder in the order of their numbers."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [one for one in path.iterdir() if one.is_file()]
            known = next(filter(None, ([f for f in inside if p(f.name)] for p in _KNOWN)), None)
            if known is None:
                raise TraceError(
                    f"The folder {path.name} holds no trace: expected expert_weights_LAYER.txt, "
                    ".jsonl, .pt, or meta_info.json beside rank*.safetensors. Name the file itself."
                )
            files += sorted(known, key=lambda one: [int(n) for n in re.findall(r"\d+", one.name)])
        elif path.is_file():
            files.append(path)
        else:
            raise TraceError(f"Expected a trace at {path}, but there is no such file.")
    return files


def _recognised(path: Path) -> str:
    """Return the format of a file by what it holds."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return _recognised_table(columns_of(path)) or "table"
    if head.startswith(b"PK"):
        if b"/data.pkl" not in head[:_ENTRY]:
            return "npz"
        saved = load_pt(path)
        return "slime" if isinstance(saved, Mapping) and "samples" in saved else "sglang-recorder"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"GGUF"):
        return "imatrix"
    if _ESFT_FILE.fullmatch(path.name):
        return "esft"
    text = head.decode("utf-8", "replace").lstrip("\ufeff \n")
    if text.startswith("{"):
        return _recognised_json(path, first_record(path))
    if name := _recognised_table(columns_of(path)):
        return name
    raise TraceError(
        f"{path.name} is no trace that is known. Known are {', '.join(NAMES)}; a table needs "
        "columns token, layer and expert (and prompt, slot, weight), or layer, expert and count. "
        "Say which one it is with --format."
    )


def _recognised_json(path: Path, record: Record) -> str:
    keys = set(record)
    if name := recognised_counts(path, record):
        return name
    if "choices" in keys:
        return "vllm"
    if "meta_info" in keys:
        return "sglang"
    if "top_indices" in keys:
        return "megatron"
    if record.get("type") in ("meta", "route"):
        return "token-log"
    if {"p", "t", "l", "e"} <= keys or "policy" in keys or "moe_policylang" in str(record):
        return "policylang"
    if name := _recognised_table(list(keys)):
        return name
    raise TraceError(
        f"{path.name} begins with the keys {', '.join(sorted(keys)[:8])}, of no trace that is "
        f"known. Known are {', '.join(NAMES)}."
    )


def _recognised_table(columns: list[str]) -> str | None:
    if select_columns(columns, "x") is not None:
        return "table"
    return "counts" if count_columns(columns) else None


# --- engines --------------------------------------------------------------------------------------


def _vllm(files: list[Path], top_k: int | None) -> Trace:
    path = files[0]
    return _of_responses(lambda: records(path), first_record(path), path.name, top_k)


def _of_responses(
    records: Callable[[], Iterable[tuple[int, Record]]],
    first: Record,
    name: str,
    top_k: int | None,
) -> Trace:
    if "choices" in first:
        return Trace(
            "vLLM responses", lambda: _vllm_responses(records(), name), model=first.get("model")
        )
    sizes = _sglang_top_k(records(), name) if top_k is None else top_k
    return Trace("SGLang responses", lambda: _sglang_responses(records(), name, sizes))


def _vllm_responses(records: Iterable[tuple[int, Record]], name: str) -> Iterator[Sequence]:
    """Read base64 of a .npy file [tokens - 1, layers, k] in each choice."""
    for number, record in records:
        for choice in record.get("choices", []):
            where = f"{name}, line {number}, choice {choice.get('index', 0)}"
            coded = choice.get("routed_experts")
            if coded is None:
                raise TraceError(
                    f"{where}: has no routed_experts. Start vLLM with "
                    "--enable-return-routed-experts."
                )
            try:
                data = base64.b64decode(coded, validate=True)
                ids = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, TypeError, EOFError) as error:
                raise TraceError(
                    f"{where}: routed_experts must be base64 of a .npy file: {first_line(error)}."
                ) from None
            prompt = choice.get("prompt_token_ids") or record.get("prompt_token_ids")
            usage = record.get("usage") or {}
            n_prompt = len(prompt) if prompt else usage.get("prompt_tokens")
            tokens = None
            if prompt and choice.get("token_ids"):
                tokens = np.array([*prompt, *choice["token_ids"]], np.int32)
            start = _start(record, len(ids), n_prompt, usage.get("completion_tokens"))
            message = choice.get("message") or {}
            yield Sequence(
                where,
                _as_ids(ids, where),
                first=start,
                n_prompt=n_prompt,
                tokens=tokens,
                text=choice.get("text") or message.get("content"),
            )


def _start(record: Record, rows: int, n_prompt: int | None, generated: int | None) -> int:
    """Return the position of the first row: a prefix may be left out; the last token has none."""
    if isinstance(said := record.get("routed_experts_prompt_start"), int):
        return said
    if n_prompt is None or generated is None:
        return 0
    return max(0, n_prompt + generated - 1 - rows)


def _vllm_outputs(outputs: list[Any]) -> Iterator[Sequence]:
    """Read ``RequestOutput`` objects: ``outputs[i].routed_experts`` [tokens - 1, layers, k]."""
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            where = f"output {number}, completion {getattr(completion, 'index', 0)}"
            ids = getattr(completion, "routed_experts", None)
            if ids is None:
                raise TraceError(
                    f"{where}: has no routed_experts. Make the engine with "
                    "enable_return_routed_experts=True."
                )
            before = getattr(output, "prompt_routed_experts", None)
            if before is not None:  # older versions have prompt and completion apart
                ids = np.concatenate([np.asarray(before), np.asarray(ids)])
            prompt = list(output.prompt_token_ids or [])
            tokens = np.array([*prompt, *completion.token_ids], np.int32)
            yield Sequence(
                where,
                _as_ids(np.asarray(ids), where),
                first=max(0, len(tokens) - 1 - len(ids)),
                n_prompt=len(prompt),
                tokens=tokens,
                text=output.prompt,
            )


def _sglang(files: list[Path], top_k: int | None) -> Trace:
    return _vllm(files, top_k)


def _sglang_flat(record: Record, where: str) -> tuple[Ids, int]:
    """Return the ids of a response in one row, and how many a token has over all layers."""
    about = record.get("meta_info") or {}
    coded = about.get("routed_experts")
    if coded is None:
        raise TraceError(
            f"{where}: has no meta_info.routed_experts. Ask with return_routed_experts: true, and "
            "start SGLang with --enable-return-routed-experts."
        )
    try:
        flat = np.frombuffer(base64.b64decode(coded, validate=True), "<i4")
        tokens = int(about["prompt_tokens"]) + int(about["completion_tokens"]) - 1
    except (ValueError, TypeError, KeyError) as error:
        raise TraceError(
            f"{where}: expected base64 of 32-bit numbers with prompt_tokens and completion_tokens "
            f"beside it: {first_line(error)}."
        ) from None
    rows = tokens - int(about.get("routed_experts_start", 0))
    if rows < 1 or len(flat) % rows:
        raise TraceError(f"{where}: {len(flat)} ids do not divide among {rows} tokens.")
    return flat, len(flat) // rows


def _sglang_top_k(records: Iterable[tuple[int, Record]], name: str) -> int:
    flats, width = [], 0
    for number, record in records:
        flat, width = _sglang_flat(record, f"{name}, line {number}")
        flats.append(flat)
        if sum(map(len, flats)) > 100_000:
            break
    return top_k_of(np.concatenate(flats), width)


def _sglang_responses(
    records: Iterable[tuple[int, Record]], name: str, top_k: int
) -> Iterator[Sequence]:
    """Read base64 of raw little-endian int32 [tokens - 1 - start, layers, k]."""
    for number, record in records:
        where = f"{name}, line {number}"
        flat, width = _sglang_flat(record, where)
        if width % top_k:
            raise TraceError(f"{where}: {width} ids a token do not divide by top k {top_k}.")
        about = record["meta_info"]
        yield Sequence(
            where,
            flat.reshape(-1, width // top_k, top_k).astype(np.int32),
            first=int(about.get("routed_experts_start", 0)),
            n_prompt=int(about["prompt_tokens"]),
            text=record.get("text"),
        )


def _as_ids(values: "np.ndarray[Any, Any]", where: str) -> Ids:
    if values.ndim != 3 or not np.issubdtype(values.dtype, np.integer):
        raise TraceError(
            f"{where}: expected whole numbers [tokens, layers, top k], got {values.dtype} of shape "
            f"{list(values.shape)}."
        )
    if values.size and int(values.max()) > 2**16 - 1:
        raise TraceError(f"{where}: got expert {int(values.max())}; ids end at 65534.")
    return values.astype(np.int32)


# --- training -------------------------------------------------------------------------------------


def _megatron(files: list[Path], top_k: int | None) -> Trace:
    """Read Megatron-core's router traces, one line a layer and micro-batch, a file a rank."""
    places = sorted(
        {(one["stage"], one["block"], one["layer"]) for file in files for _, one in records(file)}
    )
    numbers = [layer for *_, layer in places]
    layers = tuple(numbers) if len(set(numbers)) == len(numbers) else None
    return Trace("Megatron router trace", lambda: _megatron_steps(files, places), layers=layers)


def _megatron_steps(files: list[Path], places: list[Any]) -> Iterator[Sequence]:
    seen: set[tuple[int, int]] = set()
    for file in files:
        held: dict[Any, Any] = {}
        step = None
        for number, line in records(file):
            place = (line["stage"], line["block"], line["layer"])
            if place in held or (step is not None and line["step"] != step):
                yield from _megatron_step(held, places, seen, f"{file.name}, step {step}")
                held = {}
            step = line["step"]
            ids = np.array(line["top_indices"], np.int32)
            if ids.ndim != 2 or len(ids) != line.get("num_tokens", len(ids)):
                raise TraceError(
                    f"{file.name}, line {number}: top_indices must be [{line.get('num_tokens')}, "
                    f"top k], got shape {list(ids.shape)}."
                )
            held[place] = ids
        yield from _megatron_step(held, places, seen, f"{file.name}, step {step}")


def _megatron_step(
    held: dict[Any, Ids], places: list[Any], seen: set[tuple[int, int]], name: str
) -> Iterator[Sequence]:
    if not held:
        return
    usual = next(iter(held.values()))
    ids = np.full((len(usual), len(places), usual.shape[1]), -1, np.int32)
    for place, one in held.items():
        if one.shape != usual.shape:
            raise TraceError(f"{name}: layers have {len(usual)} and {len(one)} tokens.")
        ids[:, places.index(place)] = one
    key = (hash(name.split(", ")[-1]), hash(ids.tobytes()))
    if key in seen:  # ranks of one tensor-parallel group hold the same tokens
        return
    seen.add(key)
    yield Sequence(name, ids)


# --- logs, files and arrays -----------------------------------------------------------------------


def _token_log(files: list[Path], top_k: int | None) -> Trace:
    """Read a per-token log: a line ``meta``, then lines ``route``."""
    path = files[0]
    about = first_record(path)
    columns = (
        "columns={type: 'VARCHAR', req_id: 'VARCHAR', token_idx: 'BIGINT', layer: 'INTEGER',"
        " topk_ids: 'INTEGER[]', topk_weights: 'DOUBLE[]'}"
    )
    table = read_table(
        path,
        "SELECT req_id AS request, token_idx AS token, layer, topk_ids AS ids, topk_weights AS"
        f" weights FROM {_JSON_ROWS.format(columns=columns)} WHERE type = 'route'",
        in_order=True,
    )
    n_experts = about.get("num_experts") or about.get("n_experts")
    return Trace(
        "per-token log",
        table.sequences,
        layers=table.layers,
        n_experts=n_experts,
        model=about.get("model_id") or about.get("model"),
        close=table.close,
    )


def _policylang(files: list[Path], top_k: int | None) -> Trace:
    """Read moe-policylang's lines: pass, token, layer, experts, scores."""
    columns = "columns={p: 'BIGINT', t: 'BIGINT', l: 'INTEGER', e: 'INTEGER[]', s: 'DOUBLE[]'}"
    table = read_table(
        files[0],
        "SELECT 'trace' AS request, t AS token, l AS layer, e AS ids, s AS weights"
        f" FROM {_JSON_ROWS.format(columns=columns)} WHERE t IS NOT NULL",
        in_order=True,
    )
    return Trace("moe-policylang log", table.sequences, layers=table.layers, close=table.close)


def _table(files: list[Path], top_k: int | None) -> Trace:
    """Read rows of (prompt, token, layer, slot, expert, weight)."""
    path = files[0]
    select = select_columns(columns_of(path), reader_of(path))
    if select is None:
        raise TraceError(
            f"{path.name} needs columns token, layer and expert (and may have prompt, slot and "
            f"weight), got {', '.join(columns_of(path))[:200]}."
        )
    table = read_table(path, select, in_order=False)
    return Trace("table of choices", table.sequences, layers=table.layers, close=table.close)


def _esft(files: list[Path], top_k: int | None) -> Trace:
    """Read ESFT's text files, one a layer: ids of all tokens, a blank, as many weights."""
    numbers = [_ESFT_FILE.fullmatch(file.name) for file in files]
    if None in numbers:
        raise TraceError("ESFT files are named expert_weights_LAYER.txt, by decoder layer.")
    layers = tuple(int(number[1]) for number in numbers if number is not None)
    if top_k is None:
        with files[0].open(encoding="utf-8") as file:
            top_k = top_k_of(_esft_line(next(file), f"{files[0].name}, line 1")[0])
    return Trace("ESFT", lambda: _esft_texts(files, top_k), layers=layers, facts={"top_k": top_k})


def _esft_texts(files: list[Path], top_k: int) -> Iterator[Sequence]:
    opened = [file.open(encoding="utf-8") for file in files]
    try:
        for number, lines in enumerate(zip(*opened, strict=True), 1):
            ids, weights = [], []
            for file, line in zip(files, lines, strict=True):
                where = f"{file.name}, line {number}"
                flat, values = _esft_line(line, where)
                if len(flat) % top_k or len(values) != len(flat):
                    raise TraceError(
                        f"{where}: {len(flat)} ids and {len(values)} weights are not {top_k} each "
                        "a token."
                    )
                ids.append(flat.reshape(-1, top_k))
                weights.append(values.reshape(-1, top_k))
            if len({len(one) for one in ids}) > 1:
                raise TraceError(f"Line {number}: the layers have different numbers of tokens.")
            yield Sequence(f"line {number}", np.stack(ids, 1), np.stack(weights, 1))
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise TraceError("The files of the layers have different numbers of lines.") from None
    finally:
        for one in opened:
            one.close()


def _esft_line(line: str, where: str) -> tuple[Ids, "np.ndarray[Any, np.dtype[np.float32]]"]:
    try:
        ids, weights = line.rstrip("\n").split("\t\t")
        return (
            np.array(ids.split("\t"), np.int32),
            np.array(weights.rstrip("\t").split("\t"), np.float32),
        )
    except ValueError:
        raise TraceError(
            f"{where}: expected ids, two tabs and weights, separated by tabs."
        ) from None


def _npz(files: list[Path], top_k: int | None) -> Trace:
    """Read the arrays of one prompt: topk_indices [T, L, K], topk_weights, token_ids."""
    found, unread = {}, []
    with np.load(files[0], allow_pickle=False) as archive:
        for key in archive.files:
            try:
                found[key] = archive[key]
            except ValueError:  # an array of objects, which only a pickle holds
                unread.append(key)
    ids = next(
        (found[key] for key in ("topk_indices", "topk_ids", "routed_experts") if key in found), None
    )
    if ids is None:
        raise TraceError(
            f"{files[0].name}: expected an array topk_indices [tokens, layers, top k], got "
            f"{', '.join(found) or 'none'}."
        )
    where = files[0].name
    weights = found.get("topk_weights")
    tokens = found.get("token_ids")
    layers = found.get("moe_layer_indices")
    scores = found.get("scores")
    sequence = Sequence(
        where,
        _as_ids(ids, where),
        None if weights is None else weights.astype(np.float32),
        tokens=None if tokens is None else tokens.astype(np.int32).ravel(),
    )
    return Trace(
        "npz",
        lambda: iter([sequence]),
        layers=None if layers is None else tuple(layers.astype(int).tolist()),
        n_experts=None if scores is None else int(scores.shape[-1]),
        facts={"not_readable": unread} if unread else {},
    )


def _npy(files: list[Path], top_k: int | None) -> Trace:
    """Read arrays [tokens, layers, top k] or [batch, tokens, layers, top k], a file or several."""
    return _of_arrays({file.name: np.load(file, allow_pickle=False) for file in files})


def _of_arrays(arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> Trace:
    def sequences() -> Iterator[Sequence]:
        for name, array in arrays.items():
            if (
                array.ndim == 4
            ):  # rollouts: padding is rows of zeros or of -1 at either end, or fakes
                for row, one in enumerate(array):
                    ids = without_fakes(_as_ids(one, name))
                    used = np.flatnonzero(is_choice(ids).any(1))
                    if len(used):
                        yield Sequence(f"{name}, row {row}", ids[used[0] : used[-1] + 1])
            else:
                yield Sequence(name, _as_ids(array, name))

    return Trace("arrays", sequences)


def _slime(files: list[Path], top_k: int | None) -> Trace:
    """Read rollouts of slime: samples with tokens and rollout_routed_experts [tokens - 1, L, K]."""
    samples = load_pt(files[0])["samples"]

    def sequences() -> Iterator[Sequence]:
        for number, sample in enumerate(samples):
            where = f"{files[0].name}, sample {number}"
            ids = _as_ids(np.asarray(sample["rollout_routed_experts"]), where)
            tokens = np.asarray(sample["tokens"], np.int32)
            answer = sample.get("response_length")
            yield Sequence(
                where,
                without_fakes(ids[: max(0, len(tokens) - 1)]),
                n_prompt=None if answer is None else len(tokens) - int(answer),
                tokens=tokens,
            )

    return Trace("slime rollouts", sequences)


FORMATS: dict[str, Callable[[list[Path], int | None], Trace]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "megatron": _megatron,
    "token-log": _token_log,
    "policylang": _policylang,
    "esft": _esft,
    "npz": _npz,
    "slime": _slime,
    "npy": _npy,
    "table": _table,
}
SEVERAL = ("esft", "megatron", "npy", "sglang-recorder", "tokens-per-expert", "tensorrt-llm")
NAMES = (*FORMATS, *COUNT_FORMATS)
