"""``python -m explorer cache``: what a cache of experts would hit, and which experts to pin."""

import argparse
from collections.abc import Sequence

import numpy as np

from capture.paths import path_argument
from explorer import writing
from explorer.commands import RUN_HELP, Output, run_file
from explorer.engine_files import PIN_FORMATS, pins_file
from explorer.errors import ExplorerError
from explorer.metrics.cache import LINES, LayerLookups, simulate
from explorer.metrics.placement import draft_reads
from explorer.queries.lookups import cache_lookups
from explorer.run import open_run

EXAMPLES = """\
examples:
  python -m explorer cache runs/demo.duckdb
      hit rates of LRU, LFU, pins, prefetching and the bound, by slots a layer
  python -m explorer cache runs/demo.duckdb --expert-mb 9.4 --phase generated --interleaved
      megabytes a token when requests are decoded together
  python -m explorer cache runs/demo.duckdb --budget 32 --out pins.json
      the 32 experts of all layers that are worth keeping in fast memory
  python -m explorer cache runs/demo.duckdb --budget 32 --format llama-cpp --out override.txt
      whole layers instead, as tensor overrides (-ot) for llama.cpp
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``cache``."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    add("--slots", metavar="A,B", help="experts a layer (default: 1/8, 1/4, 1/2, 3/4 of them)")
    add("--phase", choices=("prompt", "generated"), help="only tokens of one phase")
    add("--domain", metavar="NAME", help="only prompts of one domain")
    add(
        "--interleaved",
        action="store_true",
        help="requests that are decoded together, in the order of the forward passes; otherwise "
        "request after request",
    )
    add(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="requests that take turns, token by token (default: 1)",
    )
    add("--expert-mb", type=float, metavar="MB", help="weights of one expert, for MB a token")
    add("--budget", type=int, metavar="N", help="experts of all layers together, to write pins of")
    add("--out", type=path_argument, metavar="FILE", help="write the pins; never overwritten")
    kinds = tuple(PIN_FORMATS)
    add("--format", choices=kinds, default=kinds[0], help=f"of FILE (default: {kinds[0]})")


def run(options: argparse.Namespace) -> Output:
    """Simulate caches on every other prompt, and pin what the remaining ones use."""
    if (options.out is None) != (options.budget is None):
        raise ExplorerError("--budget and --out go together: pins are written for a budget.")
    if options.together < 1 or (options.together > 1 and options.interleaved):
        raise ExplorerError("--together is 1 or more requests, and --interleaved takes none.")
    parts: list[list[LayerLookups]] = []
    lines: list[str] = []
    with open_run(run_file(options.run)) as opened:
        # prefill and decode read experts differently
        phases: Sequence[str | None] = [options.phase] if options.phase else opened.phases
        for phase in phases:
            layers = cache_lookups(
                opened,
                phase=phase,
                domain=options.domain,
                interleaved=options.interleaved,
                together=options.together,
            )
            parts.append(layers)
            lines += [*([""] if lines else []), *_of_phase(layers, phase, options)]
    if options.out is None:
        return Output("\n".join(lines))
    load = np.sum([[layer.load for layer in layers] for layers in parts], axis=0)
    numbers = [layer.layer for layer in parts[0]]
    text = pins_file(load, numbers, options.budget, options.format)
    writing.write_new(options.out, text.encode(), what="Writing pins")
    return Output("\n".join([*lines, str(options.out)]))


def _of_phase(
    layers: Sequence[LayerLookups], phase: str | None, options: argparse.Namespace
) -> list[str]:
    """Return the tables of the tokens of one phase."""
    n_experts = layers[0].n_experts
    slots = _slots(options.slots, n_experts)
    top_k = float(np.mean([(layer.judged >= 0).sum(1).mean() for layer in layers]))
    rates = simulate(layers, slots)
    order = "request after request"
    if options.interleaved:
        order = "interleaved as decoded"
    elif options.together > 1:
        order = f"{options.together} requests taking turns"
    lines = [
        f"Hit rate, mean of {len(layers)} layers of {n_experts} experts, top {top_k:.3g}, over "
        f"{len(layers[0].judged):,} {phase or ''} tokens, {order}.",
        f"Pins and predictions are fitted on the other {len(layers[0].fit):,} tokens.",
        *_table(rates, slots, None),
    ]
    if options.expert_mb is not None:
        per_token = top_k * len(layers) * options.expert_mb
        lines += ["", f"MB of experts loaded a token, of {per_token:,.1f} without a cache"]
        lines += _table(rates, slots, per_token)
    if options.together == 1 and not options.interleaved:
        lines += ["", *_drafts(layers)]
    return lines


def _drafts(layers: Sequence[LayerLookups]) -> list[str]:
    """Return how many experts a draft of one request reads, and a batch of many requests."""
    tables = [draft_reads(layer.judged, layer.prompt_id, layer.n_experts) for layer in layers]
    sizes = tables[0].tokens.tolist()
    rows = ("one_request", "many_requests", "uniform")
    titles = (
        "consecutive tokens of one request",
        "tokens of different requests",
        "uniform routing",
    )
    lines = ["Different experts read together, mean of layers (speculative drafts and batches)"]
    lines.append("tokens".ljust(36) + "".join(f"{size:>9}" for size in sizes))
    for row, title in zip(rows, titles, strict=True):
        means = np.mean([getattr(table, row) for table in tables], axis=0)
        lines.append(title.ljust(36) + "".join(f"{mean:9.2f}" for mean in means))
    return lines


def _slots(given: str | None, n_experts: int) -> list[int]:
    if given is None:
        return sorted({max(1, n_experts * share // 8) for share in (1, 2, 4, 6)})
    try:
        slots = [int(part) for part in given.split(",")]
    except ValueError:
        slots = []
    if not slots or not all(1 <= slot <= n_experts for slot in slots):
        raise ExplorerError(
            f"--slots must be numbers of experts from 1 to {n_experts}, such as 2,4; got {given!r}."
        )
    return slots


def _table(
    rates: dict[str, list[tuple[float, float]]], slots: Sequence[int], per_token: float | None
) -> list[str]:
    width = max(map(len, LINES.values()))
    lines = ["slots a layer".ljust(width) + "".join(f"{size:>9}" for size in slots)]
    for name, title in LINES.items():
        cells = [
            f"{hit:9.3f}" if per_token is None else f"{loaded * per_token:9.1f}"
            for hit, loaded in rates[name]
        ]
        lines.append(title.ljust(width) + "".join(cells))
    return lines
