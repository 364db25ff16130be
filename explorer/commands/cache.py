"""``python -m explorer cache``: what a cache of experts would hit, and which experts to pin."""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from capture.paths import path_argument
from explorer import writing
from explorer.commands import RUN_HELP, Output, run_file
from explorer.engine_files import PIN_FORMATS, pins_file
from explorer.errors import ExplorerError
from explorer.metrics.cache import (
    POLICIES,
    hit_rate,
    likely_next,
    pinned_hit_rate,
    pins,
    prefetched,
)
from explorer.queries.load import Lookups, trace
from explorer.run import Run, open_run

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
LINES = {
    "lru": "LRU",
    "lfu": "LFU",
    "pins": "pins, slots a layer",
    "pins_shared": "pins, shared budget",
    "prefetch": "LRU + prefetch",
    "belady": "Belady (bound)",
}


class Layer(NamedTuple):
    """One layer's lookups: of the prompts that pins are fitted on, and of the others."""

    layer: int
    n_experts: int
    fit: npt.NDArray[np.int64]
    judged: npt.NDArray[np.int64]

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """Lookups of every expert in the prompts to fit on, [E]."""
        return np.bincount(self.fit[self.fit >= 0], minlength=self.n_experts).astype(np.float64)


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
    add("--expert-mb", type=float, metavar="MB", help="weights of one expert, for MB a token")
    add("--budget", type=int, metavar="N", help="experts of all layers together, to write pins of")
    add("--out", type=path_argument, metavar="FILE", help="write the pins; never overwritten")
    kinds = tuple(PIN_FORMATS)
    add("--format", choices=kinds, default=kinds[0], help=f"of FILE (default: {kinds[0]})")


def run(options: argparse.Namespace) -> Output:
    """Simulate caches on every other prompt, and pin what the remaining ones use."""
    if (options.out is None) != (options.budget is None):
        raise ExplorerError("--budget and --out go together: pins are written for a budget.")
    with open_run(run_file(options.run)) as opened:
        layers = _layers(opened, options)
    n_experts = min(layer.n_experts for layer in layers)
    slots = _slots(options.slots, n_experts)
    top_k = np.mean([(layer.judged >= 0).sum(1).mean() for layer in layers])
    rates = simulate(layers, slots)
    order = "interleaved as decoded" if options.interleaved else "request after request"
    lines = [
        f"Hit rate, mean of {len(layers)} layers of {n_experts} experts, top {top_k:.3g}, over "
        f"{len(layers[0].judged):,} tokens, {order}.",
        f"Pins and predictions are fitted on the other {len(layers[0].fit):,} tokens.",
        *_table(rates, slots, None),
    ]
    if options.expert_mb is not None:
        per_token = top_k * len(layers) * options.expert_mb
        lines += ["", f"MB of experts loaded a token, of {per_token:,.1f} without a cache"]
        lines += _table(rates, slots, per_token)
    if options.out is None:
        return Output("\n".join(lines))
    load = np.stack([layer.load for layer in layers])
    text = pins_file(load, [layer.layer for layer in layers], options.budget, options.format)
    writing.write_new(options.out, text.encode(), what="Writing pins")
    return Output("\n".join([*lines, str(options.out)]))


def _layers(opened: Run, options: argparse.Namespace) -> list[Layer]:
    if len({(one.n_experts, one.site) for one in opened.sites}) > 1:
        raise ExplorerError(
            "The layers of this run have different numbers of experts, or several routers. A "
            "budget that they share counts experts of one size."
        )
    layers = []
    for info in opened.sites:
        found = trace(
            opened,
            info.layer,
            phase=options.phase,
            domain=options.domain,
            interleaved=options.interleaved,
        )
        fit, judged = _halves(found)
        layers.append(Layer(info.layer, info.n_experts, fit, judged))
    return layers


def _halves(found: Lookups) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a trace into every other prompt, and the rest."""
    number = np.unique(found.prompt_id, return_inverse=True)[1]
    even = number % 2 == 0
    if even.all():
        raise ExplorerError(
            "Pins are judged on prompts that they were not made from, and there are not two "
            "prompts with such tokens. Take other filters, or record more prompts."
        )
    return found.expert_ids[even], found.expert_ids[~even]


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


def simulate(layers: Sequence[Layer], slots: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """Run every kind of cache on the judged half.

    Returns
    -------
    dict
        For each name of ``LINES``, and each number of slots a layer: the hit rate, and the share
        of lookups that are loaded, which prefetching raises above 1 - hit rate.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    loads = np.stack([layer.load for layer in layers])
    predictions = _predictions(layers)
    for size in slots:
        for name in POLICIES:
            rates = [hit_rate(layer.judged, slots=size, policy=name) for layer in layers]
            found[name].append(_of(float(np.mean(rates))))
        apart = [pinned_hit_rate(layer.judged, pins(layer.load, size)) for layer in layers]
        found["pins"].append(_of(float(np.mean(apart))))
        kept = pins(loads, size * len(layers))
        shared = [pinned_hit_rate(layer.judged, kept[at]) for at, layer in enumerate(layers)]
        found["pins_shared"].append(_of(float(np.mean(shared))))
        hits, fetched = [], []
        for layer, predicted in zip(layers, predictions, strict=True):
            one = prefetched(layer.judged, predicted[:, :size], slots=size)
            hits.append(one.hit_rate)
            fetched.append(one.loads / (layer.judged >= 0).sum(1).mean())
        found["prefetch"].append((float(np.mean(hits)), float(np.mean(fetched))))
    return found


def _of(rate: float) -> tuple[float, float]:
    return rate, 1 - rate


def _predictions(layers: Sequence[Layer]) -> list[npt.NDArray[np.int64]]:
    """Predict each layer's experts from those of the layer before; nothing for the first."""
    found = [np.empty((len(layers[0].judged), 0), np.int64)]
    for before, layer in pairwise(layers):
        counts = np.zeros((before.n_experts, layer.n_experts))
        for here in before.fit.T:
            for there in layer.fit.T:
                both = (here >= 0) & (there >= 0)
                np.add.at(counts, (here[both], there[both]), 1)
        found.append(likely_next(before.judged, counts, layer.judged.shape[1]))
    return found


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
