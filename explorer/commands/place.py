"""``python -m explorer place``: where to put experts, judged on traffic that was held out."""

import argparse
from collections import Counter
from collections.abc import Mapping

import numpy as np

from capture.paths import path_argument
from explorer import writing
from explorer.commands import RUN_HELP, Output, run_file
from explorer.engine_files import PLACEMENT_FORMATS, placement_file
from explorer.errors import ExplorerError
from explorer.metrics import placement, traffic
from explorer.metrics.placement import Placement
from explorer.metrics.traffic import ChosenPolicy, HeldOut, mean_interval
from explorer.queries.load import (
    WINDOWS,
    BatchRouting,
    WindowLoads,
    hidden_layers,
    routing,
    window_loads,
)
from explorer.run import Run, open_run

BY_DOMAIN = "domain"
N_WINDOWS = 8
MAX_TOKENS = 20_000  # whose experts are looked at, a layer
EXAMPLES = """\
examples:
  python -m explorer place runs/demo.duckdb --gpus 4 --slots 20 --windows domain
      what each placement keeps of its balance on a domain that it was not made from
  python -m explorer place runs/demo.duckdb --gpus 4 --slots 20 --out placement.json
      the best of them as a file for SGLang: --init-expert-location placement.json
  python -m explorer place runs/demo.duckdb --gpus 4 --format tensorrt-llm --out eplb.yaml
      no copies, for TensorRT-LLM: moe_config.load_balancer
  python -m explorer place runs/demo.duckdb --gpus 4 --by time --expert-mb 44 --link-gbs 25
      when to make a placement again: what it saves, and from how long on it pays
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
        default=str(N_WINDOWS),
        metavar="W",
        help=f"how many, each held out once (default: {N_WINDOWS}); {BY_DOMAIN} = --by domains",
    )
    add("--by", choices=tuple(WINDOWS), default="prompts", help="what they are of (prompts)")
    add("--phase", choices=("prompt", "generated"), help="only tokens of one phase")
    add(
        "--policy",
        choices=tuple(placement.PLACEMENTS),
        help="the placement to write (default: the best on held-out windows)",
    )
    add("--out", type=path_argument, metavar="FILE", help="write it; never overwritten")
    kinds = tuple(PLACEMENT_FORMATS)
    add("--format", choices=kinds, default=kinds[0], help=f"of FILE (default: {kinds[0]})")
    add(
        "--model-layers",
        type=int,
        metavar="N",
        help="decoder layers of the model, for SGLang, which wants a row of each (default: up to "
        "the last one with experts)",
    )
    add("--expert-mb", type=float, metavar="MB", help="weights of one expert, to load a copy")
    add("--link-gbs", type=float, default=25.0, metavar="GB/S", help="to a GPU (default: 25)")


def run(options: argparse.Namespace) -> Output:
    """Judge the placements that the sizes allow, and write one."""
    by = "domains" if options.windows == BY_DOMAIN else options.by
    if options.gpus < 1:
        raise ExplorerError(f"--gpus must be 1 or more, got {options.gpus}.")
    if options.out is not None:
        _check_ending(options.format, options.out.suffix)
    with open_run(run_file(options.run)) as opened:
        found = window_loads(opened, by, _number_of_windows(options.windows), phase=options.phase)
        layers = hidden_layers(opened, options.model_layers)
        tokens = _tokens(opened, found, options.phase)
        token_bytes = placement.STATE_BYTES * int(opened.info["hidden_size"])
    n_experts = found.loads.shape[-1]
    sizes = {
        "gpus": options.gpus,
        "nodes": options.nodes,
        "groups": options.groups or options.nodes,
        "replicas": options.slots or -(-n_experts // options.gpus) * options.gpus,
    }
    shown = placement.policies(
        n_experts, **{name: sizes[name] for name in ("gpus", "nodes", "groups")}
    )
    judged = {policy: traffic.held_out(found.loads, policy, **sizes) for policy in shown}
    best = max(judged, key=lambda policy: float(np.nanmean(judged[policy].held_out)))
    policy = options.policy or best
    if policy not in judged:
        raise ExplorerError(
            f"The placement {policy!r} does not exist for these sizes; there are "
            f"{', '.join(shown)}. Change --gpus, --nodes or --groups."
        )
    chosen = traffic.choose(judged)
    lines = [_header(found, sizes), *_table(judged, chosen, found.in_time), _said(chosen), ""]
    lines.append(f"{policy}: {placement.PLACEMENTS[policy]}.")
    made = placement.place(found.loads, policy, **sizes)
    lines += _slowest_layers(judged[policy], found)
    lines += _all_to_all(tokens, made, sizes, token_bytes)
    if found.in_time:
        lines += _ageing(found, policy, sizes, options.expert_mb, options.link_gbs)
    if options.out is None:
        return Output("\n".join(lines))
    text = placement_file(made, [layer for layer, _ in found.sites], options.format, layers)
    writing.write_new(options.out, text.encode(), what="Writing a placement")
    kind = PLACEMENT_FORMATS[options.format]
    copies = sizes["replicas"] - n_experts
    how = kind.how.format(file=options.out.name, copies=copies, gpus=options.gpus)
    return Output("\n".join([*lines, f"{kind.name}: {how}", str(options.out)]))


def _check_ending(kind: str, ending: str) -> None:
    if kind == "sglang" and ending != PLACEMENT_FORMATS[kind].ending:
        raise ExplorerError(
            "SGLang reads a placement from a file whose name ends in .json, and takes any other "
            f"for the text itself; --out ends in {ending or 'nothing'}."
        )


def _number_of_windows(given: str) -> int:
    if given == BY_DOMAIN:
        return N_WINDOWS
    if not given.isdecimal() or int(given) < 2:
        raise ExplorerError(
            f"--windows must be {BY_DOMAIN} or a number of 2 or more, got {given!r}: one window is "
            "held out at a time."
        )
    return int(given)


def _header(found: WindowLoads, sizes: dict[str, int]) -> str:
    nodes = "1 node" if sizes["nodes"] == 1 else f"{sizes['nodes']} nodes"
    return (
        f"{len(found.names)} windows of {WINDOWS[found.by]}, {len(found.sites)} layers of "
        f"{found.loads.shape[-1]} experts, {sizes['replicas']} slots on {sizes['gpus']} GPUs in "
        f"{nodes}.\nBalancedness of a window: mean over largest GPU load, summed over layers. Own: "
        "under the placement made from\nall windows; held out: under the one made from all others; "
        "in brackets: 95% of bootstrap draws of "
        f"{'blocks of windows' if found.in_time else 'windows'}."
    )


def _table(judged: Mapping[str, HeldOut], chosen: ChosenPolicy | None, in_time: bool) -> list[str]:
    """Return the lines of a table with 95% intervals over windows."""
    rows = [("placement", "own", "", "held out", "", "worst", "slowest GPU", "minus EPLB", "")]
    usual = judged[placement.GLOBAL].held_out
    lines: list[tuple[str, placement.Floats | None, placement.Floats]] = [
        (name, one.own, one.held_out) for name, one in judged.items()
    ]
    if chosen is not None:
        lines.append(("the best of other windows", None, chosen.held_out))
    for policy, own, held in lines:
        paired = policy != placement.GLOBAL
        rows.append(
            (
                policy,
                "" if own is None else f"{np.nanmean(own):.3f}",
                "" if own is None else _interval(own, in_time),
                f"{np.nanmean(held):.3f}",
                _interval(held, in_time),
                f"{np.nanmin(held):.3f}",
                f"x {1 / np.nanmean(held):.2f}",
                f"{np.nanmean(held - usual):+.3f}" if paired else "",
                _interval(held - usual, in_time, "+") if paired else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _interval(values: placement.Floats, in_time: bool, sign: str = "") -> str:
    low, high = mean_interval(values, in_time=in_time)
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _said(chosen: ChosenPolicy | None) -> str:
    """Say which figure holds for the policy that won, which was chosen by these windows."""
    if chosen is None:
        return (
            "With two windows no policy can be chosen on others than it is reported on. Take three "
            "or more, or read the best line as too good."
        )
    counts = Counter(chosen.policies).most_common()
    taken = ", ".join(f"{name} {n} times" for name, n in counts)
    return (
        "To expect of the winner: the last line, where each window is judged under the policy that "
        f"was best on the\nother windows ({taken})."
    )


def _slowest_layers(judged: HeldOut, found: WindowLoads) -> list[str]:
    order = np.argsort(-np.nan_to_num(judged.stragglers))[:3]
    layers = ", ".join(f"{found.sites[at][0]} x {judged.stragglers[at]:.2f}" for at in order)
    return [
        f"Straggler factor of a layer, largest over mean GPU load, held out: mean x "
        f"{np.nanmean(judged.stragglers):.2f}; slowest layers: {layers}."
    ]


def _tokens(opened: Run, found: WindowLoads, phase: str | None) -> list[BatchRouting]:
    """Return the experts of some tokens in each layer; none where the run keeps sums only."""
    if not opened.records_ids:
        return []
    return [
        routing(opened, layer, site=site, phase=phase, max_tokens=MAX_TOKENS)
        for layer, site in found.sites
    ]


def _all_to_all(
    tokens: list[BatchRouting], made: Placement, sizes: dict[str, int], token_bytes: int
) -> list[str]:
    """Say how many GPUs and nodes a token is sent to, and what GPUs send each other."""
    g, n = sizes["gpus"], sizes["nodes"]
    gpus, nodes, sent, total = [], [], np.zeros((g, g)), 0
    for layer, one in enumerate(tokens):
        if len(one.expert_ids):
            on_gpus, on_nodes = placement.visited(one.expert_ids, made, layer, gpus=g, nodes=n)
            gpus.append(on_gpus.mean())
            nodes.append(on_nodes.mean())
            sent += placement.dispatch(
                one.expert_ids, one.prompt_id % g, made, layer, gpus=g, token_bytes=token_bytes
            )
            total = max(total, len(one.expert_ids))
    if not gpus:
        return []
    several = f" in {np.mean(nodes):.2f} of {n} nodes" if n > 1 else ""
    away = sent - np.diag(np.diag(sent))
    received = away.sum(0)
    busiest = received.max() / max(received.mean(), 1e-12)
    lines = [
        f"A token visits {np.mean(gpus):.2f} of {g} GPUs a layer{several}.",
        f"Dispatch, requests dealt to GPUs in turn, hidden states of {token_bytes:,} bytes: "
        f"{away.sum() / total / 1e3:,.2f} kB a token leave\ntheir GPU over all layers, and as much "
        f"comes back; the busiest receiver gets x {busiest:.2f} the mean.",
    ]
    if g <= 16:
        width = max(8, len(f"{sent.max() / total:,.0f}") + 1)
        lines.append(
            "from / to GPU, bytes a token".ljust(30) + "".join(f"{i:>{width}}" for i in range(g))
        )
        lines += [
            f"{i}".rjust(29) + " " + "".join(f"{v / total:>{width},.0f}" for v in row)
            for i, row in enumerate(sent)
        ]
    return lines


def _ageing(
    found: WindowLoads, policy: str, sizes: dict[str, int], expert_mb: float | None, gbs: float
) -> list[str]:
    """Say what is left of a placement some windows later, and when to make it again."""
    later = traffic.rebalanced_later(found.loads, policy, **sizes)
    ages = [float(np.nanmean(np.diagonal(later, age))) for age in range(len(later))]
    lines = [
        "",
        "Made from one window alone: predicted "
        f"{ages[0]:.3f}, realised in the windows after it "
        f"{', '.join(f'{value:.3f}' for value in ages[1:6])}.",
        "",
        "made again after     held out                  copies loaded  of the busiest GPU"
        + ("  pays from" if expert_mb else ""),
    ]
    rows = traffic.renewals(found.loads, policy, **sizes)
    total = sizes["replicas"] * len(found.sites)
    for row in rows:
        name = "never" if row.every is None else f"{row.every} window{'s' if row.every > 1 else ''}"
        held = f"{np.nanmean(row.held_out):.3f} {_interval(row.held_out, True)}"
        copies = f"{row.copies:,.0f} of {total:,}" if row.every else "0"
        line = f"{name:<20} {held:<25} {copies:<14} {row.most:>10,.1f}"
        if expert_mb and row.every:
            seconds = row.pays_from(rows[-1], expert_mb / 1e3 / gbs)
            line += " " * 10 + ("never" if np.isinf(seconds) else f"{seconds:,.3g} s")
        lines.append(line.rstrip())
    if expert_mb:
        lines.append(
            f"Pays from: seconds that the expert layers of one window take on even GPUs, beyond "
            f"which what is saved exceeds\nloading {expert_mb:g} MB an expert at {gbs:g} GB/s."
        )
    return lines
