"""``python -m explorer compare``: what routers cost in a model's place, as text or JSON."""

import argparse
import json
from typing import Any

import pandas as pd

from capture.errors import quoted
from explorer.commands import Output
from explorer.comparison.compare import compare, pick
from explorer.comparison.results_file import Comparison
from explorer.comparison.session import read_specs
from explorer.comparison.verdicts import (
    against_controls,
    better_than_chance,
    paired,
    reach,
    with_answers,
    with_controls,
)
from explorer.errors import ComparisonError
from explorer.router_cards import parse_router, split_routers
from explorer.routers.by_name import load_router_file

SHOWN = (
    *("router", "family", "mode", "layer", "loss_change", "loss_se", "loss_se_domain"),
    *("better_than_chance", "chance_difference", "chance_low", "chance_high"),
    *("experts_per_token", "flops_ratio", "latency_ratio", "agreement", "jaccard"),
    *("max_violation", "max_violation_floor", "equal_compute", "matched_per_layer", "harder"),
    "badges",
)


def run(options: argparse.Namespace) -> Output:
    """Compare, and return the rows of the routers asked for."""
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
        table = with_answers(with_controls(comparison.table), better_than_chance(comparison))
        table = _asked(table, names)
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
        found = {"file": path, "info": info, "rows": rows}
        found["paired"] = json.loads(pairs.to_json(orient="records"))
        found["spanning"] = json.loads(between.to_json(orient="records"))
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
            "where rules were drawn. The verdict is that of the 95% interval, difference ± "
            "margin. Of two controls the harder one is the one to beat:"
        )
        parts.append(plain_table(pairs))
    if len(between):
        parts.append("One layer swapped: tokens that lie between clusters (spanning), the others:")
        alone = [] if (between["site"] > 0).any() else ["site"]
        parts.append(plain_table(between.drop(columns=["mode", "sequences", *alone])))
    if bound is not None:
        parts.append(
            f"Last layer, {bound['sets'][0]:,} sets of experts: a bound that sees the next token; "
            f"the model's own set is the best for {bound['native_best'][0]:.1%} of the tokens."
        )
        parts.append(plain_table(bound[["kind", "n", "loss", "loss_change", "loss_se"]]))
    return Output("\n\n".join([*parts, path]), notes)


def _pick(
    options: argparse.Namespace, names: list[str] | None, seeds: list[int]
) -> tuple[list[str], list[str]] | None:
    """Return one setting of each rule and what to say of the choice, None if nobody asked."""
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


def _asked(table: pd.DataFrame, names: list[str] | None) -> pd.DataFrame:
    """Return the rows of the routers asked for and of their controls."""
    labels = {spec.label for spec in read_specs(names)} | {"random"}
    return table[table["router"].isin(labels) | table["control_of"].isin(labels)]


def _paired(comparison: Comparison, table: pd.DataFrame, against: str | None) -> pd.DataFrame:
    """Return the routers of a table beside their controls and beside one that was named."""
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


def _failed(comparison: Comparison, names: list[str] | None) -> list[dict[str, Any]]:
    """Return what was asked for and could not be compared."""
    labels = {spec.label for spec in read_specs(names)}
    units = comparison.rows("units")
    units = units[units["error"].notna() & units["router"].isin(labels)]
    return [{str(k): v for k, v in row.items()} for row in units.to_dict("records")]


def as_text(table: pd.DataFrame) -> str:
    """Return the table for a terminal: rows about all layers, and those with one layer swapped."""
    whole = table[table["layer"].isna() | (table["mode"] == "live-layer")].copy()
    whole["badges"] = [_badges(row) for row in whole.to_dict("records")]
    whole["layer"] = whole["layer"].astype("string").fillna("all")
    # seeds and shares of heads or blocks only where there are some
    seed, parts = ([n] if whole[n].notna().any() else [] for n in ("seed", "parts_share"))
    return plain_table(whole[[*SHOWN[:4], *seed, *SHOWN[4:12], *parts, *SHOWN[12:]]])


def plain_table(table: pd.DataFrame) -> str:
    """Return all rows and columns for a terminal, numbers with four digits."""
    text: str = table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4f}")
    return text


def _badges(row: dict[str, Any]) -> str:
    found = [] if row["causal"] else ["not causal"]
    found += ["batch dependent"] if row["batch_dependent"] else []
    found += ["simulated"] if row["simulated"] else []
    return ", ".join(found)
