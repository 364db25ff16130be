"""How fast routing rows reach a run file, and what one row takes on disk, against plain lists."""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from capture.bench import say
from capture.store import (
    ForwardRows,
    PromptInfo,
    RunInfo,
    RunReader,
    RunWriter,
    SiteInfo,
    SiteRows,
    TokenRows,
)
from capture.store.sums import count_pairs

PROMPT_TOKENS = 512
# forward passes that differ; each is a domain of its own
DOMAINS = 4


class Shape(NamedTuple):
    """Size of the routing that is written: layers L, experts E, slots K, tokens a forward pass."""

    layers: int
    experts: int
    slots: int
    tokens: int


class WriteTime(NamedTuple):
    """One timed write: (token, layer) rows, seconds until the file is closed, bytes on disk.

    ``busy`` are the seconds that all threads computed; unlike ``seconds`` they do not grow when
    other programs use the machine.
    """

    rows: int
    seconds: float
    busy: float
    size: int


def store_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`store` reads."""
    parser.add_argument("--rows", type=int, default=4_000_000, help="(token, layer) rows to write")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=2560, help="tokens a forward pass")
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the last run file in --folder")


def store(options: argparse.Namespace) -> None:
    """Write routing rows packed, and as plain lists (the baseline); rows/s and bytes/row."""
    shape = Shape(options.layers, options.experts, options.top_k, options.batch_tokens)
    n_forwards = max(1, round(options.rows / (shape.layers * shape.tokens)))
    say(f"{shape.layers} layers x {shape.experts} experts, top-{shape.slots}; {n_forwards} forward")
    say(f"passes of {shape.tokens} tokens; zipf tokens, seed {options.seed}; same rows for both")
    pool = make_forwards(shape, count=min(n_forwards, DOMAINS), seed=options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        results: dict[str, list[WriteTime]] = {"packed (RunWriter)": [], "lists (baseline)": []}
        for repeat in range(options.repeats):
            out = folder / f"packed{repeat}.duckdb"
            results["packed (RunWriter)"].append(write_run(out, shape, pool, n_forwards))
            say_queries(out, shape, n_forwards) if repeat == options.repeats - 1 else None
            if options.keep and repeat == options.repeats - 1:
                out.rename(Path(options.folder or ".") / "bench.duckdb")
            out.unlink(missing_ok=True)
            out = folder / f"lists{repeat}.duckdb"
            results["lists (baseline)"].append(write_lists(out, shape, pool, n_forwards))
            out.unlink()
    say(f"median of {options.repeats}:")
    for name, timed in results.items():
        rows = timed[0].rows
        seconds = statistics.median(result.seconds for result in timed)
        busy = statistics.median(result.busy for result in timed)
        size = statistics.median(result.size for result in timed)
        say(
            f"{name:18s} {rows:>9d} rows  {seconds:6.2f} s  {rows / seconds / 1e6:5.2f} M rows/s  "
            f"{rows / busy / 1e6:5.2f} M rows/CPU s  {size / rows:5.1f} bytes/row"
        )


def make_forwards(shape: Shape, *, count: int, seed: int) -> list[ForwardRows]:
    """Make forward passes whose experts depend on the token, with token ids from 0 in each.

    The tokens are the same for every ``seed``; what the routers make of them is not.
    """
    random, reader = np.random.default_rng(seed), np.random.default_rng(0)
    taste = random.standard_normal((512, shape.experts), np.float32)
    forwards = []
    for domain in range(count):
        token = (reader.zipf(1.2, shape.tokens) - 1 + 100 * domain) % 50_000
        sites = [_make_site(layer, token, taste, shape, random) for layer in range(shape.layers)]
        n_tokens = np.arange(shape.tokens, dtype=np.uint32)
        loss = np.ma.MaskedArray(
            reader.random(shape.tokens, np.float32), mask=n_tokens % PROMPT_TOKENS == 0
        )
        rows = TokenRows(
            token_id=n_tokens,
            prompt_id=n_tokens // PROMPT_TOKENS,
            position=n_tokens % PROMPT_TOKENS,
            token=token.astype(np.int32),
            text=[f" t{t}" for t in token],
            loss=loss,
            phase="prompt",
        )
        forwards.append(ForwardRows(rows, [f"domain {domain}"], sites))
    return forwards


def _make_site(
    layer: int,
    token: "np.typing.NDArray[np.int64]",
    taste: "np.typing.NDArray[np.float32]",
    shape: Shape,
    random: np.random.Generator,
) -> SiteRows:
    logits = taste[(token * 31 + layer) % len(taste)]
    logits = logits + random.standard_normal(logits.shape, np.float32)  # [N, E]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(-probs, axis=1)[:, : shape.slots + 1]
    best = np.take_along_axis(probs, order, axis=1)
    ids, weights = order[:, : shape.slots].astype(np.int32), best[:, : shape.slots].copy()
    weight_sum = np.zeros(shape.experts)
    np.add.at(weight_sum, ids, weights)
    return SiteRows(
        site_index=layer,
        assignments=np.bincount(ids.ravel(), minlength=shape.experts)[None],
        weight_sum=weight_sum[None],
        prob_sum=probs.sum(axis=0, dtype=np.float64)[None],
        expert_ids=ids,
        weights=weights,
        entropy=-(probs * np.log(probs)).sum(axis=1),
        margin=best[:, -2] - best[:, -1],
        logsumexp=np.log(np.exp(logits).sum(axis=1)),
        topk_mass=weights.sum(axis=1),
    )


def _forward(pool: Sequence[ForwardRows], index: int, n_forwards: int) -> ForwardRows:
    """Return forward pass ``index``: one of the pool, with token ids and prompts of its own.

    The prompts are dealt to the forward passes in turn, as batching by length does, so that a
    forward pass does not hold neighbouring token ids.
    """
    forward = pool[index % len(pool)]
    tokens = forward.tokens
    prompt_id = tokens.prompt_id * np.uint32(n_forwards) + np.uint32(index)
    text = list(tokens.text or [])
    for first in np.flatnonzero(tokens.position == 0):
        text[first] = f"{prompt_id[first]}:"  # no two prompts have one text
    # token ids follow each other from prompt to prompt, and the last prompts may be shorter
    last, length = tokens.prompt_id[-1], tokens.position[-1] + np.uint32(1)
    start = np.where(
        tokens.prompt_id < last,
        prompt_id * np.uint32(PROMPT_TOKENS),
        last * np.uint32(n_forwards * PROMPT_TOKENS) + np.uint32(index) * length,
    )
    moved = TokenRows(
        token_id=start.astype(np.uint32) + tokens.position,
        prompt_id=prompt_id,
        position=tokens.position,
        token=tokens.token,
        text=text,
        loss=tokens.loss,
        phase="prompt",
    )
    return ForwardRows(moved, forward.domains, forward.sites)


def _prompts(pool: Sequence[ForwardRows], n_forwards: int) -> list[PromptInfo]:
    found: dict[int, PromptInfo] = {}
    for forward in (_forward(pool, index, n_forwards) for index in range(n_forwards)):
        pieces = list(forward.tokens.text or [])
        starts = np.append(np.flatnonzero(forward.tokens.position == 0), len(pieces))
        for start, end in itertools.pairwise(starts):
            number = int(forward.tokens.prompt_id[start])
            text = "".join(piece or "" for piece in pieces[start:end])
            found[number] = PromptInfo(text, forward.domains[0], None, int(end - start), 0)
    return [found[number] for number in range(len(found))]


def write_run(out: Path, shape: Shape, pool: Sequence[ForwardRows], n_forwards: int) -> WriteTime:
    """Time a whole run through :class:`RunWriter`, its checks and the final rename included."""
    sites = [
        SiteInfo(layer, 0, f"layers.{layer}.mlp", shape.experts, shape.slots, 0, "softmax")
        for layer in range(shape.layers)
    ]
    info = RunInfo("bench", None, "none", "float32", "cpu", "ids", 50_000, 0)
    prompts = _prompts(pool, n_forwards)
    # a capture counts pairs while the model runs, by kernels.coactivation
    pairs = [
        count_pairs(
            {layer: np.asarray(s.expert_ids, np.int32) for layer, s in enumerate(forward.sites)},
            sites,
        )
        for forward in pool
    ]
    started, busy = time.perf_counter(), time.process_time()
    writer = RunWriter.create(out, info, sites, prompts)
    for index in range(n_forwards):
        writer.append(_forward(pool, index, n_forwards))
        writer.append_pairs(pairs[index % len(pool)])
    writer.finish(seconds=time.perf_counter() - started)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return WriteTime(n_forwards * shape.layers * shape.tokens, seconds, busy, out.stat().st_size)


def write_lists(out: Path, shape: Shape, pool: Sequence[ForwardRows], n_forwards: int) -> WriteTime:
    """Time the plain layout: lists of ids and FLOAT weights, FLOAT statistics, no check at all."""
    started, busy = time.perf_counter(), time.process_time()
    connection = duckdb.connect(str(out))
    connection.execute(
        "CREATE TABLE route (token_id UINTEGER, layer USMALLINT, entropy FLOAT, margin FLOAT, "
        "logsumexp FLOAT, topk_mass FLOAT, expert_ids UTINYINT[], weights FLOAT[])"
    )
    pending = []
    for index in range(n_forwards):
        pending.append(_list_rows(_forward(pool, index, n_forwards), shape))
        if len(pending) * shape.layers * shape.tokens >= 8 * 122_880 or index == n_forwards - 1:
            connection.register("rows", pa.concat_tables(pending))
            connection.execute("INSERT INTO route SELECT * FROM rows")
            connection.unregister("rows")
            pending = []
    connection.execute("CHECKPOINT")
    connection.close()
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    return WriteTime(n_forwards * shape.layers * shape.tokens, seconds, busy, out.stat().st_size)


def _list_rows(forward: ForwardRows, shape: Shape) -> pa.Table:
    sites, n_rows = forward.sites, shape.layers * shape.tokens
    offsets = np.arange(0, (n_rows + 1) * shape.slots, shape.slots, dtype=np.int32)
    ids = np.concatenate([site.expert_ids for site in sites if site.expert_ids is not None])
    weights = np.concatenate([site.weights for site in sites if site.weights is not None])
    columns = {
        "token_id": np.tile(forward.tokens.token_id, shape.layers),
        "layer": np.repeat(np.arange(shape.layers, dtype=np.uint16), shape.tokens),
        "entropy": np.concatenate([np.asarray(site.entropy) for site in sites]),
        "margin": np.concatenate([np.asarray(site.margin) for site in sites]),
        "logsumexp": np.concatenate([np.asarray(site.logsumexp) for site in sites]),
        "topk_mass": np.concatenate([np.asarray(site.topk_mass) for site in sites]),
        "expert_ids": pa.ListArray.from_arrays(offsets, ids.astype(np.uint8).ravel()),
        "weights": pa.ListArray.from_arrays(offsets, weights.ravel()),
    }
    return pa.table(columns)


def say_queries(path: Path, shape: Shape, n_forwards: int) -> None:
    """Print how long typical questions take on the file just written."""
    token = n_forwards // 2 * PROMPT_TOKENS
    questions = {
        "load of every expert (rollup)": "SELECT * FROM expert_load",
        "all slots of one token": f"SELECT * FROM assignments WHERE token_id = {token}",
        "statistics of one token": f"SELECT * FROM gates WHERE token_id = {token}",
        "top-1 of one layer": "SELECT expert_id, count(*) FROM assignments"
        " WHERE layer = 7 AND slot = 0 GROUP BY ALL",
        "tokens of one expert": "SELECT token_id, weight FROM assignments"
        " WHERE layer = 7 AND expert_id = 5 ORDER BY weight DESC LIMIT 50",
        "load from every row": "SELECT layer, expert_id, count(*), sum(weight) FROM assignments"
        " GROUP BY ALL",
    }
    with RunReader.open(path) as run:
        for name, sql in questions.items():
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                run.query(sql)
                seconds.append(time.perf_counter() - started)
            say(f"  {name:30s} {statistics.median(seconds) * 1e3:8.1f} ms")
