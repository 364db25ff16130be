"""How fast traces of other programs become run files, and in how much memory."""

import argparse
import base64
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np

from capture.bench import say
from capture.traces import import_routing

ROOT = Path(__file__).parents[2]
MB = 10**6
SEQUENCE = 256  # tokens
WARM_UP = 512  # equal rows at the head of a log, as engines write them
_COLUMNS = (
    *("format", "MB", "rows in", "rows stored", "missing", "warm-up"),
    *("s", "CPU s", "rows/CPU s", "peak MB"),
)


def import_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`import_rate` reads."""
    add = parser.add_argument
    add("--mb", type=int, default=1_000, help="size of each generated source (default: 1000)")
    add("--formats", nargs="+", choices=tuple(SOURCES), default=["token-log"], metavar="NAME")
    add("--layers", type=int, default=16)
    add("--experts", type=int, default=64)
    add("--top-k", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="where the files go (default: a temporary one)")


def import_rate(options: argparse.Namespace) -> None:
    """Import a generated trace of each format; rows, seconds, rows/s of CPU time, peak memory."""
    say(f"{options.layers} layers x {options.experts} experts, top-{options.top_k}; a row is one")
    say("(token, layer), of counts one (step, layer, expert); each import in a process of its own")
    say("| " + " | ".join(_COLUMNS) + " |")
    say("|" + "---|" * len(_COLUMNS))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for name in options.formats:
            source = Path(temporary) / f"{name}.{'csv' if name in ('table', 'counts') else 'jsonl'}"
            rows = _write(source, SOURCES[name], options)
            found = _in_a_process(source, options)
            cells = (
                *(name, f"{source.stat().st_size / MB:,.0f}", f"{rows:,}"),
                *(f"{found[key]:,}" for key in ("stored", "missing", "warm_up")),
                *(f"{found['seconds']:.0f}", f"{found['busy']:.0f}"),
                *(f"{rows / found['busy']:,.0f}", f"{found['peak'] / MB:,.0f}"),
            )
            say("| " + " | ".join(cells) + " |")
            source.unlink()


def _write(
    path: Path, lines: Callable[..., Iterator[tuple[str, int]]], options: argparse.Namespace
) -> int:
    """Write a source of at least the size that is asked for, and return its rows."""
    random, rows = np.random.default_rng(options.seed), 0
    with path.open("w", encoding="utf-8") as file:
        for text, found in lines(random, options.layers, options.experts, options.top_k):
            rows += found
            file.write(text)
            if rows and file.tell() >= options.mb * MB:
                return rows
    return rows


def _choices(
    random: np.random.Generator, layers: int, experts: int, top_k: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.intp]]":
    scores = random.random((SEQUENCE, layers, experts), np.float32)
    return np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]


def _log(
    random: np.random.Generator, layers: int, experts: int, top_k: int
) -> Iterator[tuple[str, int]]:
    yield json.dumps({"type": "meta", "model_id": "bench", "num_experts": experts}) + "\n", 0
    weights = (np.arange(top_k, 0, -1) / 100).round(3).tolist()
    same = list(range(top_k))
    for number in count():
        ids = _choices(random, layers, experts, top_k).tolist()
        head = WARM_UP if number == 0 else 0
        # an engine profiles under the number of the first request, which begins again after it
        tokens = [*((token, None) for token in range(head)), *enumerate(ids)]
        lines = [
            f'{{"type":"route","req_id":"r{number}","token_idx":{token},"layer":{layer},'
            f'"topk_ids":{row[layer] if row else same},"topk_weights":{weights}}}\n'
            for token, row in tokens
            for layer in range(layers)
        ]
        yield "".join(lines), len(lines)


def _responses(
    random: np.random.Generator, layers: int, experts: int, top_k: int
) -> Iterator[tuple[str, int]]:
    while True:
        file = io.BytesIO()
        np.save(file, _choices(random, layers, experts, top_k).astype(np.uint8))
        choice = {"index": 0, "routed_experts": base64.b64encode(file.getvalue()).decode()}
        usage = {"prompt_tokens": SEQUENCE // 2, "completion_tokens": SEQUENCE // 2 + 1}
        record = {"model": "bench", "choices": [choice], "usage": usage}
        yield json.dumps(record) + "\n", SEQUENCE * layers


def _table(
    random: np.random.Generator, layers: int, experts: int, top_k: int
) -> Iterator[tuple[str, int]]:
    yield "prompt,token,layer,slot,expert,weight\n", 0
    for number in count():
        ids = _choices(random, layers, experts, top_k)
        lines = [
            f"{number},{token},{layer},{slot},{expert},0.{9 - slot % 9}\n"
            for (token, layer, slot), expert in np.ndenumerate(ids)
        ]
        yield "".join(lines), SEQUENCE * layers


def _counts(
    random: np.random.Generator, layers: int, experts: int, top_k: int
) -> Iterator[tuple[str, int]]:
    yield "step,layer,expert,count\n", 0
    for step in count():
        found = random.integers(0, 1_000, (layers, experts))
        lines = [f"{step},{at},{expert},{n}\n" for (at, expert), n in np.ndenumerate(found)]
        yield "".join(lines), layers * experts


SOURCES: dict[str, Callable[..., Iterator[tuple[str, int]]]] = {
    "token-log": _log,
    "vllm": _responses,
    "table": _table,
    "counts": _counts,
}


def _in_a_process(source: Path, options: argparse.Namespace) -> dict[str, float]:
    call = (
        f"from capture.bench import import_rate as b; b.measure({str(source)!r}, {options.top_k})"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(source: str, top_k: int) -> None:
    """Import a source in this process, and print what the whole process took as JSON."""
    started, out = time.monotonic(), Path(source).with_suffix(".duckdb")
    made = import_routing(source, out, top_k=top_k)
    out.unlink()
    stored = (made.tokens or made.windows * made.n_experts) * made.layers - made.missing
    found = {
        "seconds": time.monotonic() - started,
        "busy": time.process_time(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "stored": stored,
        "missing": made.missing,
        "warm_up": made.warm_up * made.layers,
    }
    say(json.dumps(found))
