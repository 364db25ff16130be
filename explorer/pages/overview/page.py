"""Overview: what this run is, its key figures, and the load of every expert."""

import pandas as pd
import streamlit as st

from capture.paths import model_name
from explorer.findings import findings
from explorer.pages.load_balance.figures import load_heatmap
from explorer.queries.load import expert_load, steps_of
from explorer.queries.overview import domain_counts, gate_means, noted, prompt_count
from explorer.queries.routed import left_out
from explorer.text import ABSENT, counted, plain, visible
from explorer.ui import address
from explorer.ui.chart import chart, listing, tile
from explorer.ui.glossary import help_text
from explorer.ui.problems import instead, section
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, balance_of, is_dark
from explorer.ui.wording import (
    by_chance,
    domain_name,
    expert_label,
    number,
    span,
    undefined_load,
)

_ORDERS = {"expert": "by id", "load": "by load"}


def render() -> None:
    """Draw the page."""
    view = current_view().sampled()
    address.follow_jump()
    st.markdown(_introduction(view))
    worth_knowing = st.container()  # drawn last: it takes longer than the rest
    load = view.of_layers(ask(view, expert_load, weights=False, **view.filters))
    _key_figures(view, load)
    _load_map(view, load)
    details, domains = st.columns([3, 2], gap="large")
    with details:
        _about(view)
    with domains:
        _domains(view)
    with worth_knowing:
        _findings(view)


@section("Worth knowing")
def _findings(view: View) -> None:
    if not view.run.records_ids:
        return  # the level is said below
    with st.spinner("Testing what is worth knowing in this run."):
        found = ask(view, findings)
    with st.container(border=True):
        st.subheader("Worth knowing", anchor=False)
        for one in found.found:
            line, link = st.columns([12, 1], vertical_alignment="center")
            line.markdown(f"- {plain(one.sentence)} n = {counted(one.n, 'prompt')}.")
            there = dict(one.address)
            if "domain" in there:
                there["domain"] = address.domain_key(there["domain"])
            link.page_link(
                f"explorer/pages/{one.page.replace('-', '_')}/page.py",
                label="Show",
                help=f"p = {one.p:.2g}, corrected for {len(found.tested)} tests {one.q:.2g}",
                query_params={"run": view.name} | there,
            )
        if found.tested and not found.found:
            st.markdown("Nothing in this run goes beyond chance.")
        st.caption(f"{found.summary} Of the whole run, without filters.")


def _introduction(view: View) -> str:
    sites = view.run.sites
    first = sites[0]
    same = len({(s.n_experts, s.top_k) for s in sites}) == 1
    layers = len(view.run.layers)
    each = f"each of {layers} layers" if layers > 1 else f"layer {first.layer}"
    if same:
        many = f"**{first.top_k} of {first.n_experts} experts** in {each}"
    else:
        fewest, most = min(s.n_experts for s in sites), max(s.n_experts for s in sites)
        many = f"a few of {fewest} to {most} experts in {each}"
    shared = (
        " Shared experts, which every token visits, are not counted here."
        if any(s.n_shared_experts for s in sites)
        else ""
    )
    first_of = {site.side: site.layer for site in reversed(sites)}
    sides = (
        f" Layers before {first_of['decoder']} are the encoder's, which reads the prompts; from "
        "there on they are the decoder's, which reads what it writes (phase *generated*)."
        if {"encoder", "decoder"} <= set(first_of)
        else ""
    )
    without = ask(view, left_out)
    return (
        f"Each token visits {many}; a small **router** in every layer chooses which. This page "
        "shows how the work was shared: click a cell to see what that expert is for."
        f"{shared}{sides}{' ' if without else ''}{without}"
    )


@section("Key figures")
def _key_figures(view: View, load: pd.DataFrame) -> None:
    scope = view.scope()
    balance = balance_of(view, load)
    gates = view.of_layers(ask(view, gate_means, statistics=("entropy",), **view.filters))
    tiles = st.columns(5)
    tile(
        tiles[0],
        "Tokens",
        f"{scope.n_tokens:,}",
        "assignments over top k"
        if view.run.sums_only
        else f"of {counted(ask(view, prompt_count, **view.prompt_filters), 'prompt')}",
        about="Real tokens behind the figures; padding is never recorded.",
    )
    worst = balance.dropna(subset=["max_violation"])
    why = undefined_load(int(balance["n_experts"].max()) if len(worst) else 0)
    if len(worst):
        row = worst.loc[worst["max_violation"].idxmax()]
        chance = by_chance(1 + row["max_violation_floor"], ".2f", "×")
        layer, site = int(row["layer"]), int(row["site"])
        there = load[(load["layer"] == layer) & (load["site"] == site)]
        expert = int(there.loc[there["assignments"].idxmax(), "expert_id"])
        tile(
            tiles[1],
            "Busiest expert",
            f"{1 + row['max_violation']:.2f}× fair share",
            "; ".join(filter(None, (expert_label(view.named(layer, site), expert), chance))),
            about=help_text("load", "by_chance"),
        )
    else:
        tile(tiles[1], "Busiest expert", ABSENT, why, about=help_text("load", "by_chance"))
    even, uniform = (worst[f"normalized_entropy{part}"].mean() for part in ("", "_floor"))
    tile(
        tiles[2],
        "Load entropy",
        number(even, ".1%"),
        why if pd.isna(even) else by_chance(uniform, ".1%"),
        about=help_text("load_entropy")
        + "  \nHere the mean over layers of the entropy of the shares, over its largest value.",
    )
    routed = balance.dropna(subset=["dead_experts"])
    tile(
        tiles[3],
        "Dead experts",
        f"{int(routed['dead_experts'].sum())} of {int(routed['n_experts'].sum())}",
        by_chance(routed["dead_experts_floor"].sum(), ".1f"),
        about=help_text("dead_expert") + "  \nHere of all layers together.",
    )
    entropy = gates["normalized_entropy"].mean()
    alone = int(balance["n_experts"].max()) == 1
    tile(
        tiles[4],
        "Gate entropy",
        ABSENT if alone else "not recorded" if pd.isna(entropy) else f"{entropy:.0%}",
        undefined_load(1) if alone else "" if pd.isna(entropy) else "0% = sure",
        about=help_text("gate_entropy")
        + "  \nHere the mean over tokens and layers, over its largest value, ln(experts).",
    )


@section("Load of every expert")
def _load_map(view: View, load: pd.DataFrame) -> None:
    order = address.choose(
        st.segmented_control,
        "order",
        "Order of the experts",
        _ORDERS,
        help="By id, or each layer's experts from the busiest to the idlest.",
    )
    figure = load_heatmap(load, scope=view.scope(over_layers=True), order=order, dark=is_dark())
    chart(
        figure,
        key="load map",
        alt=f"Heatmap of {counted(load['layer'].nunique(), 'layer')} by experts: share of the "
        f"layer's assignments over the uniform share, {span(load['ratio'], '.2f')} times.",
        table=load.drop(columns=["n_experts", "top_k"]),
        on_click=lambda data: address.jump_to_expert(view, data),
        made=view.recipe(
            expert_load,
            weights=False,
            **view.filters,
            drop=("n_experts", "top_k"),
            over_layers=True,
        ),
    )


@section("About this run")
def _about(view: View) -> None:
    info, sites = view.run.info, view.run.sites
    experts = sorted({s.n_experts for s in sites})
    cut = info["n_truncated_prompts"]
    rows = {
        "Model": f"{model_name(info['model'])} ({info['architecture']})",
        "Routers": f"{len(sites)} in {counted(len(view.run.layers), 'layer')}, each choosing "
        f"{_range([s.top_k for s in sites])} of {_range(experts)} experts"
        + (f", {_range([s.n_shared_experts for s in sites])} shared" if _shared(view) else ""),
        "Score function": ", ".join(sorted({s.score_function for s in sites})),
        "Recorded": _recorded(view),
        "Level": f"{info['level']} ({_LEVELS.get(info['level'], '')})",
        **_imported(view),
        "Cut prompts": "no prompts"
        if view.run.sums_only
        else f"{cut:,}, longer than the model's context"
        if cut
        else "none",
        "Complete": "yes" if info["complete"] else "no: the capture was stopped or killed",
        "Ran on": f"{info['device']}, {info['dtype']}, {_duration(info['seconds'])}, "
        f"{info['started_at']:%Y-%m-%d %H:%M} UTC",
        "File": f"{view.run.path.name}, {view.key[2] / 1e6:,.1f} MB",
    }
    st.subheader("About this run", anchor=False)
    frame = pd.DataFrame({"what": list(rows), "value": [visible(str(v)) for v in rows.values()]})
    st.dataframe(
        frame,
        hide_index=True,
        alt="What is known of this run",
        column_config={
            "what": st.column_config.TextColumn("What", width=110),
            "value": st.column_config.TextColumn("Value", width="large"),
        },
    )
    if said := noted(view.run):
        st.caption(plain(said))


def _recorded(view: View) -> str:
    info = view.run.info
    if view.run.sums_only:
        steps = counted(len(ask(view, steps_of)), "step")
        return f"{counted(info['n_tokens'], 'token')} as counts, in {steps} of time"
    return (
        f"{counted(info['n_tokens'], 'token')} of {counted(info['n_prompts'], 'prompt')} "
        f"({info['n_generated']:,} generated)"
    )


def _imported(view: View) -> dict[str, str]:
    """Return what is known of how another program's trace became this run."""
    note = view.run.notes.get("import")
    if not isinstance(note, dict):
        return {}
    # notes of a stranger's file may hold anything
    warm_up, gaps, unfilled = (
        note[name] if isinstance(note.get(name), int) else 0
        for name in ("warm_up", "missing", "unfilled")
    )
    if view.run.sums_only:
        missing = ["sums only: no tokens, weights, scores, text or loss"]
        missing += [f"{unfilled:,} steps of its ring were not filled"] if unfilled else []
        if note.get("rotated") is True:
            missing.append("its ring was full, so that its first step may be any")
    else:
        missing = ["no scores, text or loss"]
        if not note.get("slots_by_weight"):
            missing.append("no weights, so that slots are in no order")
    missing += [f"{gaps:,} (token, layer) not recorded"] if gaps else []
    left_out = note.get("left_out")
    if isinstance(left_out, list) and left_out:
        missing.append(f"left out: {'; '.join(map(str, left_out))[:300]}")
    left_out = f"; {warm_up:,} rows of warm-up left out" if warm_up else ""
    return {"Imported": f"from {note.get('format')}: {', '.join(missing)}{left_out}"}


_LEVELS = {
    "counts": "sums that another program counted",
    "stats": "totals per expert",
    "ids": "experts and weights of every token",
    "scores": "every expert's score for every token",
    "attention": "scores, and attention maps of some prompts",
}


def _duration(seconds: float | None) -> str:
    return "time not recorded" if seconds is None else f"in {seconds:.0f} s"


def _shared(view: View) -> bool:
    return any(s.n_shared_experts for s in view.run.sites)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


@section("Prompts by domain")
def _domains(view: View) -> None:
    counts = ask(view, domain_counts)
    st.subheader("Prompts by domain, without filters", anchor=False)
    if view.run.sums_only:
        instead("Counts are of no prompts.")
        return
    shown = counts.assign(domain=[domain_name(d) for d in counts["domain"]])
    columns = {
        "domain": "Domain",
        "prompts": "Prompts",
        "tokens": ("Tokens", "localized"),
        "mean_loss": ("Loss (nats/token)", "%.2f"),
    }
    listing(shown, columns, alt="Prompts, tokens and loss of each domain")
    if shown["mean_loss"].isna().any():
        st.caption(f"{ABSENT} = not recorded, or every prompt of the domain is one token.")


render()
