"""``python -m explorer place``: where to put experts, judged on traffic that was held out."""

import argparse
import json
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import yaml

from capture.paths import path_argument
from explorer import writing
from explorer.commands import RUN_HELP, Output, run_file
from explorer.errors import ExplorerError
from explorer.metrics import placement
from explorer.metrics.placement import HeldOut, Placement
from explorer.queries.load import WindowLoads, routing, window_loads
from explorer.run import Run, open_run

BY_DOMAIN = "domain"
WINDOWS = 8
MAX_TOKENS = 20_000  # whose experts are looked at, a layer
FORMATS = ("sglang", "tensorrt-llm", "eplb-json")
EXAMPLES = """\
examples:
  python -m explorer place runs/demo.duckdb --gpus 4 --slots 20 --windows domain
      what each placement keeps of its balance on a domain that it was not made from
  python -m explorer place runs/demo.duckdb --gpus 4 --slots 20 --out placement.json
      the best of them as a file for SGLang: --init-expert-location placement.json
  python -m explorer place runs/demo.duckdb --gpus 4 --format tensorrt-llm --out eplb.yaml
      no copies, for TensorRT-LLM: moe_config.load_balancer
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``place``."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help=RUN_HELP)
    add("--gpus", type=int, required=True, metavar="G", help="that share the experts of a layer")
    add("--nodes", type=int, default=1, metavar="N", help="servers they are in (default: 1)")
    add("--groups", type=int, metavar="N", help="of experts that stay on a node (default: nodes)")
    add(
        "--slots",
        type=int,
        metavar="S",
        help="physical experts a layer (default: no copies, where GPUs divide the experts)",
    )
    add(
        "--windows",
        default=str(WINDOWS),
        metavar="W",
        help=f"windows of consecutive prompts, or {BY_DOMAIN}; each is held out once "
        f"(default: {WINDOWS})",
    )
    add("--phase", choices=("prompt", "generated"), help="only tokens of one phase")
    add(
        "--policy",
        choices=tuple(placement.PLACEMENTS),
        help="the placement to write (default: the best on held-out windows)",
    )
    add("--out", type=path_argument, metavar="FILE", help="write it; never overwritten")
    add("--format", choices=FORMATS, default=FORMATS[0], help=f"of FILE (default: {FORMATS[0]})")
    add(
        "--model-layers",
        type=int,
        metavar="N",
        help="decoder layers of the model, for SGLang, which wants a row of each (default: up to "
        "the last one with experts)",
    )


def run(options: argparse.Namespace) -> Output:
    """Judge the placements that the sizes allow, and write one."""
    windows = _number_of_windows(options.windows)
    if options.gpus < 1:
        raise ExplorerError(f"--gpus must be 1 or more, got {options.gpus}.")
    with open_run(run_file(options.run)) as opened:
        traffic = window_loads(opened, windows, phase=options.phase)
        layers = _hidden_layers(opened, options.model_layers)
        tokens = _tokens(opened, traffic, options.phase)
    n_experts = traffic.loads.shape[-1]
    sizes = {
        "gpus": options.gpus,
        "nodes": options.nodes,
        "groups": options.groups or options.nodes,
        "replicas": options.slots or -(-n_experts // options.gpus) * options.gpus,
    }
    shown = placement.policies(
        n_experts, **{name: sizes[name] for name in ("gpus", "nodes", "groups")}
    )
    judged = {policy: placement.held_out(traffic.loads, policy, **sizes) for policy in shown}
    best = max(judged, key=lambda policy: float(np.nanmean(judged[policy].held_out)))
    chosen = options.policy or best
    if chosen not in judged:
        raise ExplorerError(
            f"The placement {chosen!r} does not exist for these sizes; there are "
            f"{', '.join(shown)}. Change --gpus, --nodes or --groups."
        )
    lines = [_header(traffic, sizes), *_table(judged, traffic.in_time), ""]
    lines.append(f"{chosen}: {placement.PLACEMENTS[chosen]}.")
    made = placement.place(traffic.loads, chosen, **sizes)
    lines += _visits(tokens, made, sizes)
    if traffic.in_time:
        lines += _ageing(traffic, chosen, sizes)
    if options.out is None:
        return Output("\n".join(lines))
    text = as_text(made, [layer for layer, _ in traffic.sites], options.format, layers)
    writing.write_new(options.out, text.encode(), what="Writing a placement")
    return Output("\n".join([*lines, str(options.out)]))


def _number_of_windows(given: str) -> int | None:
    if given == BY_DOMAIN:
        return None
    if not given.isdecimal() or int(given) < 2:
        raise ExplorerError(
            f"--windows must be {BY_DOMAIN} or a number of 2 or more, got {given!r}: one window is "
            "held out at a time."
        )
    return int(given)


def _hidden_layers(run: Run, given: int | None) -> int:
    """Return how many decoder layers the model has, as far as is known."""
    if any(site.site for site in run.sites):
        raise ExplorerError(
            "A placement file has one row a layer, and layers of this model have several routers. "
            "No engine serves such a model with expert parallelism."
        )
    least = max(run.layers) + 1
    if given is not None and given < least:
        raise ExplorerError(f"--model-layers must be at least {least}, got {given}.")
    return given or least


def _header(traffic: WindowLoads, sizes: dict[str, int]) -> str:
    kind = "consecutive prompts" if traffic.in_time else "a domain each"
    nodes = "1 node" if sizes["nodes"] == 1 else f"{sizes['nodes']} nodes"
    return (
        f"{len(traffic.names)} windows of {kind}, {len(traffic.sites)} layers of "
        f"{traffic.loads.shape[-1]} experts, {sizes['replicas']} slots on {sizes['gpus']} GPUs in "
        f"{nodes}.\nBalancedness of a window: mean over largest GPU load, summed over layers. Own: "
        "under the placement made from\nall windows; held out: under the one made from all others."
    )


def _table(judged: dict[str, HeldOut], in_time: bool) -> list[str]:
    """Return the lines of a table with 95 % intervals over windows."""
    rows = [("placement", "own", "held out", "", "worst", "slowest GPU", "minus EPLB, global", "")]
    usual = judged[placement.GLOBAL].held_out
    for policy, found in judged.items():
        mean, gain = found.held_out.mean(), found.held_out - usual
        low, high = placement.mean_interval(found.held_out, in_time=in_time)
        least, most = placement.mean_interval(gain, in_time=in_time)
        paired = policy != placement.GLOBAL
        rows.append(
            (
                policy,
                f"{found.own.mean():.3f}",
                f"{mean:.3f}",
                f"[{low:.3f}, {high:.3f}]",
                f"{found.held_out.min():.3f}",
                f"x {1 / mean:.2f}",
                f"{gain.mean():+.3f}" if paired else "",
                f"[{least:+.3f}, {most:+.3f}]" if paired else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _tokens(opened: Run, traffic: WindowLoads, phase: str | None) -> list[npt.NDArray[np.int32]]:
    """Return the experts of some tokens in each layer; none where the run keeps sums only."""
    if not opened.records_ids:
        return []
    return [
        routing(opened, layer, site=site, phase=phase, max_tokens=MAX_TOKENS).expert_ids
        for layer, site in traffic.sites
    ]


def _visits(
    tokens: list[npt.NDArray[np.int32]], made: Placement, sizes: dict[str, int]
) -> list[str]:
    """Say how many GPUs and nodes a token is sent to: what all-to-all costs."""
    gpus, nodes = [], []
    for layer, ids in enumerate(tokens):
        if len(ids):
            on_gpus, on_nodes = placement.visited(
                ids, made, layer, gpus=sizes["gpus"], nodes=sizes["nodes"]
            )
            gpus.append(on_gpus.mean())
            nodes.append(on_nodes.mean())
    if not gpus:
        return []
    several = f" in {np.mean(nodes):.2f} of {sizes['nodes']} nodes" if sizes["nodes"] > 1 else ""
    return [f"A token visits {np.mean(gpus):.2f} of {sizes['gpus']} GPUs a layer{several}."]


def _ageing(traffic: WindowLoads, policy: str, sizes: dict[str, int]) -> list[str]:
    """Say what is left of a placement some windows later, and what making it again moves."""
    later = placement.rebalanced_later(traffic.loads, policy, **sizes)
    ages = [float(np.nanmean(np.diagonal(later, age))) for age in range(len(later))]
    one_by_one = [placement.place(window[None], policy, **sizes) for window in traffic.loads]
    copies = [
        placement.moved(before, after, sizes["gpus"]).sum()
        for before, after in pairwise(one_by_one)
    ]
    total = sizes["replicas"] * len(traffic.sites)
    return [
        "Made from one window alone: predicted "
        f"{ages[0]:.3f}, realised in the windows after it "
        f"{', '.join(f'{value:.3f}' for value in ages[1:6])}.",
        f"Making it again after a window loads {np.mean(copies):,.0f} of {total:,} copies.",
    ]


def as_text(made: Placement, layers: list[int], kind: str, hidden_layers: int) -> str:
    """Return a placement as the file that an engine loads.

    Parameters
    ----------
    made : Placement
        Of L layers.
    layers : list of int
        Their numbers in the model.
    kind : str
        ``sglang``: ``{"physical_to_logical_map": [hidden layers][physical]}`` for
        ``--init-expert-location``; a layer without experts has experts in order, which no router
        reads. ``tensorrt-llm``: the YAML of ``moe_config.load_balancer``. ``eplb-json``: what
        DeepSeek's ``rebalance_experts`` returns, with the layers' numbers.
    hidden_layers : int
        Decoder layers of the model.
    """
    rows = made.phy2log.tolist()
    if kind == "sglang":
        n_experts, slots = made.logcnt.shape[1], made.phy2log.shape[1]
        table = [[slot % n_experts for slot in range(slots)] for _ in range(hidden_layers)]
        for layer, row in zip(layers, rows, strict=True):
            table[layer] = row
        return json.dumps({"physical_to_logical_map": table}) + "\n"
    if kind == "tensorrt-llm":
        settings = {
            "num_slots": made.phy2log.shape[1],
            "initial_global_assignments": dict(zip(layers, rows, strict=True)),
            "layer_updates_per_iter": 0,
        }
        return str(yaml.safe_dump(settings, default_flow_style=None, width=2**30))
    arrays = {name: getattr(made, name).tolist() for name in ("phy2log", "log2phy", "logcnt")}
    return json.dumps({"layers": layers, **arrays}) + "\n"
