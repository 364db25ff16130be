"""Time replay of many routers, forward passes with rules in the routers' place, and expert caches.

``python -m explorer.comparison.bench replay`` routes a million synthetic rows by linear routers.
``python -m explorer.comparison.bench rules demo`` prints, for some lengths, what a forward pass
takes with each router, over what it takes without, in turns, in CPU seconds. Beside them stands the
model itself with another number of experts where it can be told so: what a rule of that name would
cost for nothing.
``python -m explorer.comparison.bench caches`` runs every cache policy over a million tokens of 48
layers, and LRU over some of them in a plain dictionary.
"""

import argparse
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from capture.model.inputs import vocabulary
from capture.model.load import load_model, loading_bars
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.model.tokens import tokenize
from capture.prompts import read_prompts
from capture.swap.measure import Latency, latency
from explorer.comparison.live import LiveModel
from explorer.comparison.replay import RecordedSplit, replay_router
from explorer.comparison.text_split import FitAndReport, TokenTexts
from explorer.errors import RouterError
from explorer.metrics.cache import POLICIES, hit_rate
from explorer.router_cards import RouterSpec, parse_router, split_routers
from explorer.routers import ROUTERS, Router, RouterInputs
from explorer.routers.native import TopKRouter

# gates that are one matrix: learned by imitation, random, the model's own with other k
LINEAR = (
    *[("distilled_linear", {"seed": seed, "steps": 50}) for seed in range(6)],
    *[("frozen_random", {"seed": seed}) for seed in range(4)],
    *[("top_k", {"k": k}) for k in (1, 2, 4, 6, 8, 12)],
)


def synthetic(rows: int, layers: int, width: int, n_experts: int, top_k: int) -> RecordedSplit:
    """Make router inputs of ``layers`` layers, ``rows`` of them together, and a small fit split."""
    split = RecordedSplit({}, {}, {})
    for layer in range(layers):
        generator = torch.Generator().manual_seed(10_000 + layer)
        gate = torch.randn(n_experts, width, generator=generator) / width**0.5
        for part, n in ((split.fit, 2048), (split.held_out, rows // layers)):
            part[layer, 0] = _inputs(layer, gate, n, top_k, generator)
        names = pd.Categorical([f"domain {n % 8}" for n in range(rows // layers)])
        split.tokens[layer, 0] = pd.DataFrame({"domain": names})
    return split


def _inputs(
    layer: int, gate: torch.Tensor, n: int, top_k: int, generator: torch.Generator
) -> RouterInputs:
    hidden = torch.randn(n, gate.shape[1], generator=generator)
    position = torch.arange(n) % 256
    known = {
        "layer": layer,
        "n_experts": gate.shape[0],
        "top_k": top_k,
        "score_function": "softmax",
        "hidden": hidden,
        "logits": hidden @ gate.T * 2,
        "token_ids": torch.randint(0, 1000, (n,), generator=generator),
        "positions": position,
        "starts": position == 0,
    }
    inputs = RouterInputs(**known)  # type: ignore[arg-type]
    return RouterInputs(**known, native=TopKRouter().route(inputs))  # type: ignore[arg-type]


def time_replay(options: argparse.Namespace) -> None:
    """Print seconds for each router and for all."""
    split = synthetic(options.rows, options.layers, options.width, options.experts, options.top_k)
    routers: dict[str, Router] = {
        f"{name} {next(iter(given.values()))}": ROUTERS[name](**given) for name, given in LINEAR
    }
    begun, used = time.perf_counter(), time.process_time()
    for label, router in routers.items():
        start = time.perf_counter()
        rows = replay_router(label, router, split).rows
        took = time.perf_counter() - start
        _say(f"{label}: {took:.2f} s, agreement {rows[-1]['agreement']:.3f}")
    wall, cpu = time.perf_counter() - begun, time.process_time() - used
    _say(
        f"{len(routers)} routers on {options.rows:,} rows: {wall:.1f} s, {cpu:.1f} s of CPU "
        f"(fits included), load average {os.getloadavg()[0]:.1f}"
    )


def time_caches(options: argparse.Namespace) -> None:
    """Print the CPU seconds of each policy, and of a plain dictionary on a part of the tokens."""
    random = np.random.default_rng(0)
    taste = random.normal(size=options.experts)
    # a twentieth of the tokens, again and again: drawing them all would take longer than to count
    drawn = taste + random.gumbel(size=(options.tokens // 20, options.experts))
    ids = np.argpartition(-drawn, options.top_k, axis=1)[:, : options.top_k]
    ids = np.tile(ids, (20, 1))
    for policy in POLICIES:
        hit_rate(ids[:100], slots=options.slots, policy=policy)  # compiled
        begun, used = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(options.threads) as pool:
            rates = list(
                pool.map(
                    lambda _, policy=policy: hit_rate(ids, slots=options.slots, policy=policy),
                    range(options.layers),
                )
            )
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        _say(
            f"{policy}: {len(ids):,} tokens x {options.layers} layers, {options.slots} of "
            f"{options.experts} experts: {cpu:.1f} s of CPU, {wall:.1f} s, hit rate {rates[0]:.3f}"
        )
    part = ids[: options.tokens // 100].ravel().tolist()
    used, hits = time.process_time(), 0
    held: OrderedDict[int, None] = OrderedDict()
    for expert in part:
        if expert in held:
            hits += 1
            held.move_to_end(expert)
        else:
            if len(held) == options.slots:
                held.popitem(last=False)
            held[expert] = None
    cpu = (time.process_time() - used) * ids.size / len(part) * options.layers
    _say(f"LRU in an OrderedDict, from one token in 100 of a layer: {cpu:,.0f} s of CPU for all")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


ROUTERS_TIMED = "native, top_k, top_k(k=1), hash_random, expert_skipping, random"
FIT_TOKENS = 20_000
ROWS = 2  # texts side by side


@contextmanager
def own_top_k(sites: Sequence[Site], k: int) -> Iterator[None]:
    """Let the model's own routers choose ``k`` experts, until the block is left.

    Raises
    ------
    RouterError
        If a router does not keep this number where it reads it.
    """
    routers: list[Any] = [site.router for site in sites]
    if any(getattr(site.router, "top_k", None) != site.info.top_k for site in sites):
        raise RouterError("A router with its number of experts in `top_k` was expected.")
    for router in routers:
        router.top_k = k
    try:
        yield
    finally:
        for router, site in zip(routers, sites, strict=True):
            router.top_k = site.info.top_k


def loaded_live(name: str) -> LiveModel:
    """Load a model with texts to fit on and to run."""
    with loading_bars(shown=False):
        loaded = load_model(name)
    halves = []
    for source in ("demo-fit", "demo"):
        tokens = tokenize(
            read_prompts(source),
            loaded.tokenizer,
            vocab_size=vocabulary(loaded.model),
            max_length=256,
        )
        ids = [np.asarray(one.ids, dtype=np.int32) for one in tokens if len(one.ids) > 1]
        kept = int(np.searchsorted(np.cumsum([len(one) for one in ids]), FIT_TOKENS)) + 1
        ids = ids[:kept]
        halves.append(TokenTexts(ids, [""] * len(ids), [None] * len(ids), source))
    return LiveModel(loaded, attach(loaded.model), FitAndReport(*halves))


def timed(
    live: LiveModel, routers: Sequence[RouterSpec], n_tokens: int, repeats: int
) -> dict[str, Latency]:
    """Time every router, and the model itself with fewer experts.

    Returns
    -------
    dict of label to Latency
        CPU time of all threads.
    """
    flat = np.concatenate(live.report.sequences)[:n_tokens].astype(np.int64)
    if len(flat) < n_tokens:
        raise RouterError(f"At most {len(flat)} tokens can be timed, got {n_tokens}.")
    ids = torch.from_numpy(flat.reshape(ROWS, -1)).to(next(live.model.parameters()).device)
    found = {}
    for spec in routers:
        fitted = live.data.fit(spec, 0)
        found[spec.label] = live.time(fitted, ids=ids, repeats=repeats, clock=time.process_time)
    for k in range(1, live.sites[0].info.top_k):
        found[f"the model itself, k={k}"] = latency(
            live.model,
            ids,
            lambda k=k: own_top_k(live.sites, k),  # type: ignore[misc]
            repeats=repeats,
            clock=time.process_time,
        )
    return found


def time_rules(options: argparse.Namespace) -> None:
    """Print a line for each router and length."""
    routers = [parse_router(text) for text in split_routers(options.routers)]
    live = loaded_live(options.model)
    for n_tokens in (int(text) for text in options.tokens.split(",")):
        for label, one in timed(live, routers, n_tokens, options.repeats).items():
            _say(
                f"{n_tokens:5d} tokens  {one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})  "
                f"{one.native_ms:6.1f} -> {one.swapped_ms:6.1f} CPU ms  {label}"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(prog="python -m explorer.comparison.bench",
                                     description=__doc__.splitlines()[0])  # fmt: skip
    words = parser.add_subparsers(required=True)
    replay = words.add_parser("replay", help="linear routers on synthetic recorded rows")
    replay.set_defaults(run=time_replay, threads=2)
    replay.add_argument("--rows", type=int, default=1_000_000, help="(token, layer) rows")
    replay.add_argument("--layers", type=int, default=10)
    replay.add_argument("--width", type=int, default=128)
    replay.add_argument("--experts", type=int, default=64)
    replay.add_argument("--top-k", type=int, default=8)
    rules = words.add_parser("rules", help="forward passes with rules in the routers' place")
    rules.set_defaults(run=time_rules, threads=1)
    rules.add_argument("model", nargs="?", default="demo")
    rules.add_argument("--routers", default=ROUTERS_TIMED)
    rules.add_argument("--tokens", default="256,1024", help="of a pass, two texts side by side")
    rules.add_argument("--repeats", type=int, default=60, help="pairs; the median is reported")
    caches = words.add_parser("caches", help="caches of experts over synthetic lookups")
    caches.set_defaults(run=time_caches, threads=2)
    caches.add_argument("--tokens", type=int, default=1_000_000)
    caches.add_argument("--layers", type=int, default=48)
    caches.add_argument("--experts", type=int, default=128)
    caches.add_argument("--top-k", type=int, default=8)
    caches.add_argument("--slots", type=int, default=32)
    for command in (replay, rules, caches):
        command.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
