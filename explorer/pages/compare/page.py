"""Compare: other routers in the model's place, what they cost and what they save."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from capture.paths import model_name
from explorer import writing
from explorer.comparison.results_file import Comparison, comparisons_of, open_comparison
from explorer.comparison.verdicts import (
    CONTROLS,
    better_than_chance,
    reach,
    with_answers,
    with_controls,
)
from explorer.errors import ComparisonError
from explorer.pages.compare.conditions import conditions_section
from explorer.pages.compare.figures import (
    AXES,
    CONDITION,
    CURVES,
    badges,
    by_domain,
    by_layer,
    curves,
    family_name,
    front,
    marked,
    means_by,
    oracle_bound,
)
from explorer.pages.compare.new_comparison import start_comparison
from explorer.pages.compare.router_card import router_card
from explorer.pages.compare.two_routers import two_routers
from explorer.text import ABSENT, counted, plain
from explorer.ui import address, problems
from explorer.ui.chart import chart, listing
from explorer.ui.problems import instead, section
from explorer.ui.shell import current_view
from explorer.ui.state import Key, View, is_dark, key_of

_COLUMNS = {
    "router": "Router",
    "family": "Family",
    "loss_change": ("Δ loss (nats)", "%+.4f"),
    "loss_se": ("± SE", "%.4f"),
    "better_than_chance": "Better than chance?",
    "chance_difference": ("Δ loss to chance", "%+.4f"),
    "chance_low": ("95% from", "%+.4f"),
    "chance_high": ("95% to", "%+.4f"),
    "harder": "Harder control",
    "loss_se_domain": ("± SE by domain", "%.4f"),
    "equal_compute": ("Chance, on average", "%+.3f"),
    "matched_per_layer": ("Chance, layer by layer", "%+.3f"),
    "experts_per_token": ("Experts a token", "%.3f"),
    "parts_share": ("Heads or blocks ×", "%.3f"),
    "flops_ratio": ("FLOPs ×", "%.3f"),
    "expert_flops_ratio": ("Expert FLOPs ×", "%.3f"),
    "latency_ratio": ("Time ×", "%.3f"),
    "bytes_ratio": ("Bytes ×", "%.3f"),
    "energy_ratio": ("Energy proxy ×", "%.3f"),
    "agreement": ("Agreement", "%.3f"),
    "jaccard": ("Jaccard", "%.3f"),
    "busiest": ("Busiest expert, × fair share", "%.2f"),
    "busiest_floor": ("by chance", "%.2f"),
    "badges": "Badges",
    "seed": "Seed",
}
_REPLAYED = {
    "router": "Router",
    "agreement": ("Agreement", "%.3f"),
    "jaccard": ("Jaccard", "%.3f"),
    "exact_set": ("Exact set", "%.3f"),
    "weighted_overlap": ("Weighted overlap", "%.3f"),
    "js": ("JS (nats)", "%.3f"),
    "experts_per_token": ("Experts a token", "%.3f"),
    "busiest": ("Busiest expert, × fair share", "%.2f"),
    "busiest_floor": ("by chance", "%.2f"),
    "gini": ("Gini", "%.3f"),
    "dead_experts": ("Dead", "%.3f"),
    "badges": "Badges",
}
_AXIS_LABELS = {
    "flops_ratio": "FLOPs",
    "expert_flops_ratio": "Expert FLOPs",
    "latency_ratio": "Measured time",
    "max_violation": "Straggler factor",
    "hit_rate": "Cache hits",
    "draft_experts": "Experts of a draft",
    "agreement": "Agreement",
}
_BADGE_TEXTS = {
    "not causal": "its choice for a token depends on later tokens, or on how many there are, so "
    "that its loss is too good and cannot be compared",
    "depends on the batch": "other sequences in the batch change its choices",
    "simulated": "what it leaves out was computed and masked, not skipped: no time is saved",
}


def render() -> None:
    """Draw the page."""
    view = current_view()
    st.markdown(
        "Put another rule in the place of the model's routers, run the **real model** on text "
        "that no rule was fitted on, and see how much worse it predicts and how much less it "
        "computes. Random rules at the same compute stand beside each: what a router cannot do "
        "better than these, it did not learn."
    )
    files = {path.name: path for path in comparisons_of(view.run.path)}
    start_comparison(view, first=not files)
    if not files:
        address.pick("comparison", [], default="", what="Comparison")
        if not writing.may_write():
            instead("No comparison was made on this run yet.")
        return
    name = address.pick("comparison", list(files), default=next(iter(files)), what="Comparison")
    if len(files) > 1:
        name = address.choose(
            st.selectbox,
            "comparison",
            "Comparison",
            list(files),
            on_write=lambda chosen: address.write("comparison", chosen),
            help="One file for each model and settings; newest first.",
        )
    # written even if it is the default, which changes when another comparison is made
    address.write("comparison", name)
    try:
        comparison = _opened(key_of(files[name]))
    except (ComparisonError, OSError) as error:
        problems.show(error)
        return
    _show(view, comparison)


@st.cache_resource(max_entries=4, show_spinner=False, on_release=lambda found: found.close())
def _opened(key: Key) -> Comparison:
    return open_comparison(Path(key[0]))


@st.cache_data(max_entries=4, show_spinner=False)
def _answers(key: Key, _comparison: Comparison) -> pd.DataFrame:
    return better_than_chance(_comparison)


def _show(view: View, comparison: Comparison) -> None:
    info = comparison.info
    table = comparison.table
    live = table[(table["mode"] == "live") & table["layer"].isna()]
    if not info["complete"]:
        st.caption("Not all routers that were asked for are in this file yet.")
    st.caption(_provenance(info))
    _failed(comparison)
    if live.empty:
        instead(
            "This comparison was made without the model, by replay. Compare live to see losses."
        )
    else:
        _live(comparison, live)
    two_routers(comparison)
    oracle_section(comparison)
    conditions_section(comparison)
    replay_section(comparison)


@section("Routers in the model")
def _live(comparison: Comparison, results: pd.DataFrame) -> None:
    """Draw what the model itself said of routers; ``results`` are of all layers."""
    info = comparison.info
    answers = _answers(key_of(comparison.path), comparison)
    live = with_answers(with_controls(results), answers)
    shown = _filtered(live)
    _front(_with_conditions(shown, comparison.rows("conditions")), info)
    _table(shown)
    st.caption(reach(info))
    router_card(comparison, live)
    layers_and_domains(comparison, comparison.table, set(shown["router"]), info)
    _learning(comparison)


def _provenance(info: dict[str, Any]) -> str:
    loss, model = info["native_loss"], model_name(info["model"] or ABSENT)
    parts = [
        plain(f"{model} in {info['dtype']} on {info['device']}"),
        f"fitted on {plain(str(info['fit_source']))}",
        f"reported on {plain(str(info['report_source']))}: "
        f"{counted(info['report_tokens'] or 0, 'token')} of "
        + counted(info["report_sequences"] or 0, "text"),
        "the two share no text",
        "" if loss is None else f"the model's own loss is {loss:.4f} nats a token",
        plain(str(info["created_at"])[:16].replace("T", " ")),
    ]
    return " · ".join(part for part in parts if part)


@section("What could not be compared")
def _failed(comparison: Comparison) -> None:
    units = comparison.rows("units")
    failed = units[units["error"].notna()]
    if failed.empty:
        return
    with st.expander(f"{len(failed)} could not be compared"):
        for _, row in failed.iterrows():
            st.markdown(f"**{plain(str(row['router']))}**: {plain(row['error'])}")


def _filtered(live: pd.DataFrame) -> pd.DataFrame:
    """Leave out what the reader does not want to see."""
    families = list(dict.fromkeys(live["family"]))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = address.choose_several(
            st.pills,
            "families",
            "Families",
            families,
            default=families,
            selection_mode="multi",
            format_func=lambda name: plain(family_name(name)),
        )
        controls = address.choose(
            st.segmented_control,
            "controls",
            "Random controls",
            ["shown", "hidden"],
            show=str.capitalize,
        )
    shown = live[live["family"].isin(chosen or families)]
    if controls == "hidden":
        shown = shown[shown["control"].isna()]
    return shown.reset_index(drop=True)


def _with_conditions(shown: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Add conditions with their own routing: points where memory or balance is the cost."""
    own = cells[(cells["weights"] == "condition") & (cells["routing"] == "condition")]
    names = ["loss", "loss_change", "loss_se", "hit_rate", "draft_experts", "max_violation"]
    added = (
        own[names]
        .astype(float)
        .assign(router=own["condition"], family=CONDITION, simulated=own["simulated"])
    )
    if added[names[3:]].isna().all(axis=None):
        return shown  # measured before this was
    return pd.concat([shown, added], ignore_index=True)


@section("Loss against compute")
def _front(shown: pd.DataFrame, info: dict[str, Any]) -> None:
    measured = [name for name in _AXIS_LABELS if shown[name].notna().any()]
    if shown.empty or not measured:
        instead("Nothing to draw. Choose more families.")
        return
    axis = address.choose(
        st.segmented_control, "axis", "Loss against", measured, show=_AXIS_LABELS.__getitem__
    )
    st.caption(AXES[axis].meaning)

    def go_to(data: list[float]) -> None:
        # a condition has no card, nor has the model's own router where it was not asked for
        if data[0] >= 0 and (row := shown.iloc[int(data[0])])["family"] != CONDITION:
            address.write("router", str(row["router"]))

    chart(
        front(
            shown,
            cost=axis,
            native_loss=float(info["native_loss"]),
            tokens=int(info["report_tokens"]),
            dark=is_dark(),
        ),
        key="front",
        alt=f"Change in loss of {counted(shown['router'].nunique(), 'rule')} against "
        f"{AXES[axis].title}; loss changes from {shown['loss_change'].min():+.3f} to "
        f"{shown['loss_change'].max():+.3f} nats a token. Click: the router's card.",
        table=shown,
        on_click=go_to,
    )


@section("Routers")
def _table(shown: pd.DataFrame) -> None:
    frame = shown.assign(
        badges=[", ".join(badges(row)) for _, row in shown.iterrows()],
        family=[family_name(family) for family in shown["family"]],
        harder=shown["harder"].map(CONTROLS),
        better_than_chance=shown["better_than_chance"].fillna(ABSENT + " " + shown["no_answer"]),
        **_busiest(shown),
    )[list(_COLUMNS)]

    def go_to() -> None:
        rows = st.session_state["routers"]["selection"]["rows"]
        if rows:
            address.write("router", str(frame["router"].iloc[rows[0]]))

    listing(
        frame,
        _COLUMNS,
        alt="Routers with their change in loss, compute, agreement and balance; click a title to "
        "sort, and the box of a row for its card",
        key="routers",
        on_select=go_to,
        selection_mode="single-row",
    )
    said = [badge for badge in _BADGE_TEXTS if frame["badges"].str.contains(badge).any()]
    for badge in said:
        st.caption(f":material/warning: **{badge}**: {_BADGE_TEXTS[badge]}.")
    dashes = frame.drop(columns="seed").isna().any(axis=None)
    st.caption(
        (f"{ABSENT} = not measured, or not defined for this rule. " if dashes else "")
        + "± SE: of the differences between texts, and between domains, as texts of one domain may "
        "be alike. Chance: the change in loss of random rules that compute as much on average, or "
        "in each layer; the harder control is the one that loses less, and is what a rule has to "
        "beat. Better than chance? *yes* or *worse* where the 95% interval of the difference to "
        "it, paired by text, and by seed where rules draw, leaves out 0. Where the number of "
        "experts varies, read Jaccard: agreement alone rewards choosing more. Bytes and energy are "
        "estimates from published costs per operation, to be read relative to the model's own "
        "router only."
    )


def _busiest(rows: pd.DataFrame) -> dict[str, "pd.Series[float]"]:
    """Return the load of the busiest expert in fair shares, and that by chance: MaxVio + 1."""
    pairs = {"busiest": "max_violation", "busiest_floor": "max_violation_floor"}
    return {name: 1 + rows[of].astype(float) for name, of in pairs.items()}


@section("How the routers learned")
def _learning(comparison: Comparison) -> None:
    rows = comparison.curves
    if rows.empty:
        return
    # a router and its prices: rewards of different ones are on different scales
    rule = rows["router"].str.partition("(")[0]
    families = comparison.rows("routers").set_index("router")["family"]
    rewarded = rule[rows["router"].map(families.groupby(level=0).first()) == "rl"]
    rules = list(dict.fromkeys([*rewarded, *rule]))
    st.subheader("How the routers learned", anchor=False)
    st.markdown(
        "To explore, and to stay stable, is what is hard in reinforcement learning. A policy whose "
        "entropy falls at once stopped exploring; where seeds end far apart, the best was luck."
    )
    quantity = address.choose(
        st.segmented_control,
        "curve",
        "Quantity",
        list(CURVES),
        default="reward",
        show=lambda name: name.replace("_", " ").capitalize(),
    )
    chosen = address.choose(st.selectbox, "learner", "Router", rules)
    rows = rows[rule == chosen]
    chart(
        curves(rows, quantity, dark=is_dark()),
        key="curves",
        alt=f"{CURVES[quantity]} of {counted(rows['router'].nunique(), 'router')} over training.",
        table=rows,
    )


_MARKED = "not causal, depends on the batch, or simulated: its card says which."
_LAYER_COLUMNS = [
    *("router", "seed", "layer", "loss_change", "loss_se", "control_loss_change", "agreement"),
    "jaccard",
    *("experts_per_token", "flops_ratio", "counted_flops_ratio", "latency_ratio"),
    "max_violation",
]


@section("Layers and domains")
def layers_and_domains(
    comparison: Comparison, table: pd.DataFrame, names: set[str], info: dict[str, Any]
) -> None:
    """Draw the change in loss by layer, one swapped at a time, and by domain."""
    # the harder one of a row's controls
    table = with_controls(table)
    table = table.assign(control_loss_change=table[list(CONTROLS)].min(axis=1))
    # random rules would leave the others without colour
    table, domains = (
        rows[rows["router"].isin(names) & ~rows["router"].str.startswith("random")]
        for rows in (table, comparison.domains.query("mode == 'live'"))
    )
    called = marked(comparison.table)
    table, domains = (
        rows.assign(router=rows["router"].map(lambda name: called.get(name, name)))
        for rows in (table, domains)
    )
    single = table[(table["mode"] == "live-layer") & table["layer"].notna()]
    tokens = int(info["report_tokens"])
    if not single.empty:
        st.subheader("Layer by layer", anchor=False)
        chart(
            by_layer(single, tokens=tokens, dark=is_dark()),
            key="by layer",
            alt=f"Heatmap of {single['router'].nunique()} routers by "
            f"{single['layer'].nunique()} layers: change in loss when one layer is swapped.",
            table=single[_LAYER_COLUMNS],
            on_click=lambda data: _open_card(means_by(single, "layer"), data),
        )
    if not domains.empty:
        st.subheader("Domain by domain", anchor=False)
        chart(
            by_domain(domains, tokens=tokens, dark=is_dark()),
            key="by domain",
            alt=f"Heatmap of {domains['router'].nunique()} routers by "
            f"{domains['domain'].nunique()} domains: change in loss.",
            table=domains,
            on_click=lambda data: _open_card(means_by(domains, "domain"), data),
        )
    if any(name.endswith("†") for name in {*single["router"], *domains["router"]}):
        st.caption(f"† {_MARKED}")


def _open_card(means: pd.DataFrame, data: list[float]) -> None:
    """Show the router of the row that was clicked."""
    address.write("router", str(means.index[int(data[0])]).removesuffix(" †"))


@section("Oracle")
def oracle_section(comparison: Comparison) -> None:
    """Draw what the comparison holds of the last layer's oracle."""
    rows = comparison.rows("oracle")
    if rows.empty:
        return
    loss = rows.drop_duplicates("kind").set_index("kind")["loss"]
    first = rows.iloc[0]
    st.subheader("How far a router could go: a bound", anchor=False)
    st.markdown(
        "In the last layer a token's experts change its own prediction only, so every set of "
        "experts was tried, and the token that follows chose among them. "
        f"That gives {loss['best']:.4f} nats a token in place of {loss['model']:.4f}; a random set "
        f"gives {loss['random']:.4f}, the worst {loss['worst']:.4f}. The model's own set is the "
        f"best for {first['native_best']:.1%} of the tokens (chance: {1 / first['sets']:.1%}), at "
        f"a mean rank of {first['native_rank']:.1f} of {first['sets']:,}."
    )
    chart(
        oracle_bound(rows, dark=is_dark()),
        key="oracle",
        alt="Loss of the best of n random sets of experts in the last layer, over n, with the "
        "loss of the model's own router as a line.",
        table=rows,
    )
    st.caption(
        ":material/warning: **bound**: it reads the next token. That few random sets already beat "
        "the router says that the loss chose, not that a router could."
    )


@section("Replay")
def replay_section(comparison: Comparison) -> None:
    """Draw the tables of what was replayed."""
    table = comparison.table
    rows = table[(table["mode"] == "replay") & table["layer"].isna()]
    if rows.empty:
        return
    st.subheader("Replay: recorded inputs routed again", anchor=False)
    st.markdown(
        "Without the model: each router decides on the inputs that this run recorded. Errors do "
        "not add up from layer to layer here, and agreement is a poor predictor of loss. Weighted "
        "overlap is the mean of the tokens that have experts, JS that of those with scores."
    )
    rows = rows.assign(
        badges=[", ".join(badges(row)) for _, row in rows.iterrows()], **_busiest(rows)
    )
    alt = "Routers by replay: agreement with the model's own choice, balance and compute"
    listing(rows, _REPLAYED, alt=alt)
    if rows[list(_REPLAYED)].isna().any(axis=None):
        st.caption(f"{ABSENT} = not measured, or not defined for this rule.")
    domains = comparison.domains.query("mode == 'replay'")
    if domains["domain"].nunique() > 1:
        means = domains.pivot_table("agreement", "router", "domain", sort=False)
        listing(
            means.reset_index(),
            {"router": "Agreement by domain", **{name: (name, "%.3f") for name in means.columns}},
            alt="Agreement of routers with the model's own choice in each domain, by replay",
        )


render()
