"""Time rules in the routers' place against the unchanged model, in turns, in CPU seconds.

``python -m explorer.comparison.bench_rules demo`` prints, for some lengths, what a forward pass
takes with each router, over what it takes without. Beside them stands the model itself with
another number of experts where it can be told so: what a rule of that name would cost for nothing.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from capture.model.load import load_model, loading_bars
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.model.tokens import tokenize
from capture.prompts.reading import read_prompts
from capture.swap.measure import Latency, latency
from explorer.comparison.lab import Lab
from explorer.comparison.names import RouterSpec, parse_router, split_routers
from explorer.comparison.texts import Split, Texts
from explorer.errors import RouterError

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


def laboratory(name: str) -> Lab:
    """Load a model with texts to fit on and to run."""
    with loading_bars(shown=False):
        loaded = load_model(name)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    halves = []
    for source in ("demo-fit", "demo"):
        tokens = tokenize(
            read_prompts(source), loaded.tokenizer, vocab_size=vocabulary, max_length=256
        )
        ids = [np.asarray(one.ids, dtype=np.int32) for one in tokens if len(one.ids) > 1]
        kept = int(np.searchsorted(np.cumsum([len(one) for one in ids]), FIT_TOKENS)) + 1
        ids = ids[:kept]
        halves.append(Texts(ids, [""] * len(ids), [None] * len(ids), source))
    return Lab(loaded, attach(loaded.model), Split(*halves))


def timed(
    lab: Lab, routers: Sequence[RouterSpec], n_tokens: int, repeats: int
) -> dict[str, Latency]:
    """Time every router, and the model itself with fewer experts.

    Returns
    -------
    dict of label to Latency
        CPU time of all threads.
    """
    flat = np.concatenate(lab.report.sequences)[:n_tokens].astype(np.int64)
    if len(flat) < n_tokens:
        raise RouterError(f"At most {len(flat)} tokens can be timed, got {n_tokens}.")
    ids = torch.from_numpy(flat.reshape(ROWS, -1)).to(next(lab.model.parameters()).device)
    found = {}
    for spec in routers:
        fitted = lab.data.fit(spec, 0)
        found[spec.label] = lab.time(fitted, ids=ids, repeats=repeats, clock=time.process_time)
    for k in range(1, lab.sites[0].info.top_k):
        found[f"the model itself, k={k}"] = latency(
            lab.model,
            ids,
            lambda k=k: own_top_k(lab.sites, k),  # type: ignore[misc]
            repeats=repeats,
            clock=time.process_time,
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each router and length."""
    parser = argparse.ArgumentParser(prog="python -m explorer.comparison.bench_rules",
                                     description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--routers", default=ROUTERS_TIMED)
    parser.add_argument("--tokens", default="256,1024", help="of a pass, two texts side by side")
    parser.add_argument("--repeats", type=int, default=60, help="pairs; the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    routers = [parse_router(text) for text in split_routers(options.routers)]
    lab = laboratory(options.model)
    for n_tokens in (int(text) for text in options.tokens.split(",")):
        for label, one in timed(lab, routers, n_tokens, options.repeats).items():
            sys.stdout.write(
                f"{n_tokens:5d} tokens  {one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})  "
                f"{one.native_ms:6.1f} -> {one.swapped_ms:6.1f} CPU ms  {label}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
