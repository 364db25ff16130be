"""What ``python -m explorer`` does for each command about routers."""

import argparse
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from capture.errors import quoted

if TYPE_CHECKING:
    import pandas as pd

    from explorer.comparison.results_file import Comparison

COMPARE_EXAMPLES = """\
examples:
  python -m explorer compare demo
      some routers of every family, live in the embedded model, with random controls
  python -m explorer compare runs/mine.duckdb --routers "top_k(k=1), kmeans(n_clusters=128)"
      replay of what the run recorded; no model is loaded
  python -m explorer compare runs/mine.duckdb --routers gru_recurrent,top_p --layers --seeds 0,1,2
      in the model, in all layers and in one layer at a time, three seeds
  python -m explorer compare demo --routers my_router --router-file my_router.py --live
      a router of your own; the file's code runs
"""


class Output(NamedTuple):
    """What a command has to say.

    Attributes
    ----------
    text : str
        For standard output.
    notes : list of str
        For standard error.
    """

    text: str
    notes: list[str] = []  # noqa: RUF012


SHOWN = (
    *("router", "family", "mode", "layer", "loss_change", "loss_se", "loss_se_domain"),
    *("experts_per_token", "flops_ratio", "latency_ratio", "agreement", "jaccard"),
    *("max_violation", "max_violation_floor", "equal_compute", "matched_per_layer", "harder"),
    "badges",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare``."""
    parser.epilog = COMPARE_EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="a run file, or demo")
    add(
        "--routers",
        metavar="A,B",
        help="names, with arguments where they differ from the defaults: top_k(k=1). "
        "Default: some of every family, live",
    )
    add("--live", action="store_true", default=None, help="run the model with each router")
    add("--layers", action="store_true", help="also with one layer at a time; implies --live")
    add("--no-replay", action="store_true", help="leave out the replay of recorded inputs")
    add("--seeds", default="0", metavar="0,1", help="of routers that are stochastic (default: 0)")
    add("--tokens", type=int, default=10_000, metavar="N", help="to report on (default: 10000)")
    add("--fit-tokens", type=int, default=20_000, metavar="N", help="to fit on (default: 20000)")
    add("--skip", choices=("block", "layer"), default="block", help="what layer rules skip")
    add(
        "--oracle",
        action="store_true",
        help="also let the loss choose among all sets of experts in the last layer: a bound",
    )
    add(
        "--pick",
        type=float,
        metavar="SHARE",
        help="of rules named with several settings compare only the one that loses least at SHARE "
        "of the experts' operations, chosen on a part of the fit split",
    )
    add("--no-controls", action="store_true", help="leave out the random controls")
    add("--against", metavar="ROUTER", help="also set every router beside this one, by text")
    add("--no-latency", action="store_true", help="leave out the timings")
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add("--router-file", action="append", default=[], metavar="FILE.py", help="runs its code")
    add("--json", action="store_true", help="print all rows and columns as JSON")
    add("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> Output:
    """Compare, and return the rows of the routers asked for."""
    from explorer.comparison.compare import compare
    from explorer.comparison.router_names import load_router_file, split_routers
    from explorer.comparison.verdicts import reach, with_controls
    from explorer.errors import ComparisonError

    for path in options.router_file:
        load_router_file(path)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ComparisonError(
            f"Expected --seeds such as 0,1,2, got {quoted(options.seeds)}."
        ) from None
    names = None if options.routers is None else split_routers(options.routers)
    picked = _pick(options, names, seeds)
    if picked is not None:
        names = picked[0]
    if options.against is not None and names is not None:
        names.append(options.against)
    with compare(
        options.run,
        names,
        live=options.live,
        layers=options.layers,
        replay=not options.no_replay,
        seeds=seeds,
        tokens=options.tokens,
        fit_tokens=options.fit_tokens,
        skip=options.skip,
        controls=not options.no_controls,
        latency=not options.no_latency,
        oracle=options.oracle,
        model=options.model,
        progress=not options.quiet,
    ) as comparison:
        table = _asked(with_controls(comparison.table), names)
        pairs = _paired(comparison, table, options.against)
        domains = comparison.domains
        domains = domains[domains["router"].isin(table["router"])]
        between = comparison.rows("spanning")
        between = between[between["router"].isin(table["router"])]
        bound = comparison.rows("oracle") if options.oracle else None
        failed = _failed(comparison, names)
        path = str(comparison.path)
        info = comparison.info
    notes = [f"{r['router']} ({r['mode']}) is missing: {r['error']}" for r in failed]
    notes += picked[1] if picked else []
    if options.json:
        rows = json.loads(table.to_json(orient="records"))
        paired = json.loads(pairs.to_json(orient="records"))
        spanning = json.loads(between.to_json(orient="records"))
        found = {"file": path, "info": info, "rows": rows, "paired": paired, "spanning": spanning}
        found["domains"] = json.loads(domains.to_json(orient="records"))
        if bound is not None:
            found["oracle"] = json.loads(bound.to_json(orient="records"))
        return Output(json.dumps(found, indent=1, default=str), notes)
    parts = [as_text(table)]
    if (table["mode"] != "replay").any():
        parts.append(reach(info))
    if len(pairs):
        parts.append(
            "Loss of each router minus that of another, nats a token, paired by text, and by seed "
            "where rules were drawn. The verdict is that of the 95 % interval, difference ± "
            "margin. Of two controls the harder one is the one to beat:"
        )
        parts.append(_plain(pairs))
    if len(between):
        parts.append("One layer swapped: tokens that lie between clusters (spanning), the others:")
        alone = [] if (between["site"] > 0).any() else ["site"]
        parts.append(_plain(between.drop(columns=["mode", "sequences", *alone])))
    if bound is not None:
        parts.append(
            f"Last layer, {bound['sets'][0]:,} sets of experts: a bound that sees the next token; "
            f"the model's own set is the best for {bound['native_best'][0]:.1%} of the tokens."
        )
        parts.append(_plain(bound[["kind", "n", "loss", "loss_change", "loss_se"]]))
    return Output("\n\n".join([*parts, path]), notes)


def _pick(
    options: argparse.Namespace, names: list[str] | None, seeds: list[int]
) -> tuple[list[str], list[str]] | None:
    """Return one setting of each rule and what to say of the choice, None if nobody asked."""
    from explorer.comparison.compare import pick
    from explorer.errors import ComparisonError

    if options.pick is None:
        return None
    if names is None:
        raise ComparisonError("--pick chooses among settings that --routers names.")
    chosen, picked = pick(
        options.run,
        names,
        budget=options.pick,
        seeds=seeds,
        tokens=options.tokens,
        fit_tokens=options.fit_tokens,
        skip=options.skip,
        model=options.model,
        progress=not options.quiet,
    )
    return chosen, [str(one) for one in picked]


def _asked(table: "pd.DataFrame", names: list[str] | None) -> "pd.DataFrame":
    """Return the rows of the routers asked for and of their controls."""
    from explorer.comparison.session import read_specs

    labels = {spec.label for spec in read_specs(names)} | {"random"}
    return table[table["router"].isin(labels) | table["control_of"].isin(labels)]


def _paired(comparison: "Comparison", table: "pd.DataFrame", against: str | None) -> "pd.DataFrame":
    """Return the routers of a table beside their controls and beside one that was named."""
    import pandas as pd

    from explorer.comparison.router_names import parse_router
    from explorer.comparison.verdicts import against_controls, paired

    live = table[(table["mode"] == "live") & table["layer"].isna()]
    found = against_controls(comparison)
    found = found[found["router"].isin(live["router"])]
    if against is not None:
        other = parse_router(against).label
        named = live[live["control"].isna() & (live["router"] != other)]["router"].unique()
        beside = [paired(comparison, router, other) for router in named]
        rows = [{**each._asdict(), "verdict": each.verdict} for each in beside]
        found = pd.concat([found, pd.DataFrame(rows)], ignore_index=True)
    return found


def _failed(comparison: "Comparison", names: list[str] | None) -> list[dict[str, Any]]:
    """Return what was asked for and could not be compared."""
    from explorer.comparison.session import read_specs

    labels = {spec.label for spec in read_specs(names)}
    units = comparison.rows("units")
    units = units[units["error"].notna() & units["router"].isin(labels)]
    return [{str(k): v for k, v in row.items()} for row in units.to_dict("records")]


def as_text(table: "pd.DataFrame") -> str:
    """Return the table for a terminal: rows about all layers, and those with one layer swapped."""
    whole = table[table["layer"].isna() | (table["mode"] == "live-layer")].copy()
    whole["badges"] = [_badges(row) for row in whole.to_dict("records")]
    whole["layer"] = whole["layer"].astype("string").fillna("all")
    # seeds and shares of heads or blocks only where there are some
    seed, parts = ([n] if whole[n].notna().any() else [] for n in ("seed", "parts_share"))
    return _plain(whole[[*SHOWN[:4], *seed, *SHOWN[4:8], *parts, *SHOWN[8:]]])


def _plain(table: "pd.DataFrame") -> str:
    text: str = table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4f}")
    return text


def _badges(row: dict[str, Any]) -> str:
    found = [] if row["causal"] else ["not causal"]
    found += ["batch dependent"] if row["batch_dependent"] else []
    found += ["simulated"] if row["simulated"] else []
    return ", ".join(found)
