"""Compare: other routers in the model's place, what they cost and what they save."""

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from capture.paths import model_name
from explorer import service
from explorer.comparison.results_file import Comparison, comparisons_of, open_comparison
from explorer.comparison.verdicts import CONTROLS, reach, with_controls
from explorer.errors import ComparisonError
from explorer.pages.compare.breakdown import layers_and_domains
from explorer.pages.compare.card import router_card
from explorer.pages.compare.conditions import conditions_section
from explorer.pages.compare.figures import AXES, CURVES, badges, curves, family_name, front
from explorer.pages.compare.oracle import oracle_section
from explorer.pages.compare.replay import replay_section
from explorer.pages.compare.start import start_comparison
from explorer.pages.compare.text import two_routers
from explorer.text import ABSENT
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.shell import current_view
from explorer.ui.state import View, is_dark

_COLUMNS = {
    "router": "Router",
    "family": "Family",
    "loss_change": "Δ loss (nats)",
    "loss_se": "± SE",
    "loss_se_domain": "± SE by domain",
    "equal_compute": "Chance, on average",
    "matched_per_layer": "Chance, layer by layer",
    "harder": "Harder control",
    "experts_per_token": "Experts a token",
    "parts_share": "Heads or blocks ×",
    "flops_ratio": "FLOPs ×",
    "expert_flops_ratio": "Expert FLOPs ×",
    "latency_ratio": "Time ×",
    "bytes_ratio": "Bytes ×",
    "energy_ratio": "Energy proxy ×",
    "agreement": "Agreement",
    "jaccard": "Jaccard",
    "max_violation": "MaxVio",
    "max_violation_floor": "MaxVio by chance",
    "badges": "Badges",
    "seed": "Seed",
}
_WORDS = ("router", "family", "harder", "badges", "seed")
_AXIS_LABELS = {
    "flops_ratio": "FLOPs",
    "expert_flops_ratio": "Expert FLOPs",
    "latency_ratio": "Measured time",
    "max_violation": "Balance",
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
        address.pick("comparison", [], default="", what="comparison")
        if not service.may_write():
            st.info("No comparison was made on this run yet.", icon=":material/info:")
        return
    name = address.pick("comparison", list(files), default=next(iter(files)), what="comparison")
    if len(files) > 1:
        name = address.choose(
            st.selectbox,
            "comparison",
            "Comparison",
            list(files),
            default=next(iter(files)),
            show=lambda name: name,
            help="One file for each model and settings; newest first.",
        )
    # written even if it is the default, which changes when another comparison is made
    address.write("comparison", name)
    try:
        comparison = _opened(str(files[name]), files[name].stat().st_mtime_ns)
    except (ComparisonError, OSError) as error:
        st.error(address.plain(str(error)), icon=":material/error:")
        return
    _show(view, comparison)


@st.cache_resource(max_entries=4, show_spinner=False, on_release=lambda found: found.close())
def _opened(path: str, changed: int) -> Comparison:
    return open_comparison(Path(path))


def _show(view: View, comparison: Comparison) -> None:
    info = comparison.info
    table = comparison.table
    live = with_controls(table[(table["mode"] == "live") & table["layer"].isna()])
    if not info["complete"]:
        st.caption("Not all routers that were asked for are in this file yet.")
    st.caption(_provenance(info))
    _failed(comparison)
    if live.empty:
        st.info(
            "This comparison was made without the model, by replay. Compare live to see losses.",
            icon=":material/info:",
        )
    else:
        shown = _filtered(live)
        _front(shown, info)
        _table(shown)
        st.caption(reach(info))
        router_card(comparison, live)
        layers_and_domains(comparison, table, set(shown["router"]), info)
        _learning(comparison)
    two_routers(comparison)
    oracle_section(comparison)
    conditions_section(comparison)
    replay_section(comparison)


def _provenance(info: dict[str, Any]) -> str:
    loss = info["native_loss"]
    parts = [
        address.plain(f"{model_name(info['model'])} in {info['dtype']} on {info['device']}"),
        f"fitted on {address.plain(str(info['fit_source']))}",
        f"reported on {address.plain(str(info['report_source']))}: "
        f"{info['report_tokens'] or 0:,} tokens of {info['report_sequences'] or 0:,} sequences",
        "the two share no text",
        "" if loss is None else f"the model's own loss is {loss:.4f} nats a token",
        address.plain(str(info["created_at"])[:16].replace("T", " ")),
    ]
    return " · ".join(part for part in parts if part)


@part("What could not be compared")
def _failed(comparison: Comparison) -> None:
    units = comparison.rows("units")
    failed = units[units["error"].notna()]
    if failed.empty:
        return
    with st.expander(f"{len(failed)} could not be compared"):
        for _, row in failed.iterrows():
            st.markdown(f"**{address.plain(str(row['router']))}**: {address.plain(row['error'])}")


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
            what="family",
            selection_mode="multi",
            format_func=lambda name: address.plain(family_name(name)),
        )
        controls = address.choose(
            st.segmented_control,
            "controls",
            "Random controls",
            ["shown", "hidden"],
            default="shown",
            show=str.capitalize,
        )
    shown = live[live["family"].isin(chosen or families)]
    if controls == "hidden":
        shown = shown[shown["control"].isna()]
    return shown.reset_index(drop=True)


@part("Loss against compute")
def _front(shown: pd.DataFrame, info: dict[str, Any]) -> None:
    measured = [name for name in _AXIS_LABELS if shown[name].notna().any()]
    if shown.empty or not measured:
        st.info("Nothing to draw. Choose more families.")
        return
    axis = address.choose(
        st.segmented_control,
        "axis",
        "Loss against",
        measured,
        default=measured[0],
        show=_AXIS_LABELS.__getitem__,
    )
    st.caption(AXES[axis].meaning)

    def go_to(data: list[float]) -> None:
        address.write("router", str(shown["router"].iloc[int(data[0])]))

    chart(
        front(
            shown,
            cost=axis,
            native_loss=float(info["native_loss"]),
            tokens=int(info["report_tokens"]),
            dark=is_dark(),
        ),
        key="front",
        alt=f"Change in loss of {shown['router'].nunique()} routers against "
        f"{AXES[axis].title}; loss changes from {shown['loss_change'].min():+.3f} to "
        f"{shown['loss_change'].max():+.3f} nats a token. Click: the router's card.",
        table=shown,
        on_click=go_to,
    )


@part("Routers")
def _table(shown: pd.DataFrame) -> None:
    frame = shown.assign(
        badges=[", ".join(badges(row)) for _, row in shown.iterrows()],
        family=[family_name(family) for family in shown["family"]],
        harder=shown["harder"].map(CONTROLS),
    )[list(_COLUMNS)]
    columns: dict[str, Any] = {
        name: st.column_config.NumberColumn(title, format=_format(name))
        for name, title in _COLUMNS.items()
        if name not in _WORDS
    }
    columns |= {name: _COLUMNS[name] for name in _WORDS}

    def go_to() -> None:
        rows = st.session_state["routers"]["selection"]["rows"]
        if rows:
            address.write("router", str(frame["router"].iloc[rows[0]]))

    st.dataframe(
        frame,
        hide_index=True,
        column_config=columns,
        alt="Routers with their change in loss, compute, agreement and balance; click a title to "
        "sort, and the box of a row for its card",
        placeholder=ABSENT,
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
        "beat. Where the number of experts varies, read Jaccard: agreement alone rewards choosing "
        "more. Bytes and energy are estimates from published costs per operation, to be read "
        "relative to the model's own router only."
    )


def _format(name: str) -> str:
    if name == "loss_change":
        return "%+.4f"
    return "%.4f" if name.startswith("loss_se") else "%+.3f" if name in CONTROLS else "%.3f"


@part("How the routers learned")
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
        "Exploration and stability are the difficulty of reinforcement learning. A policy whose "
        "entropy falls at once stopped exploring; seeds that end apart were luck."
    )
    quantity = address.choose(
        st.segmented_control,
        "curve",
        "Quantity",
        list(CURVES),
        default="reward",
        show=lambda name: name.replace("_", " ").capitalize(),
    )
    chosen = address.choose(
        st.selectbox, "learner", "Router", rules, default=rules[0], show=lambda name: name
    )
    rows = rows[rule == chosen]
    chart(
        curves(rows, quantity, dark=is_dark()),
        key="curves",
        alt=f"{CURVES[quantity]} over training steps of {rows['router'].nunique()} routers.",
        table=rows,
    )


render()
