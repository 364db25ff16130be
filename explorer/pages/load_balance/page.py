"""Load balance: whether the experts of a layer share the work, and what a limit would drop."""

import math

import pandas as pd
import streamlit as st

from explorer.metrics.load import Floor
from explorer.pages.load_balance.data import capacity_of
from explorer.pages.load_balance.figures import (
    METRIC_TEXTS,
    balance_over_layers,
    capacity_curve,
    domain_heatmap,
    floor_note,
    load_bars,
    lorenz,
    uniform_text,
)
from explorer.pages.load_balance.memory import memory_section
from explorer.pages.load_balance.serving import serving_section
from explorer.queries.load import (
    expert_load,
    expert_load_by_domain,
    expert_load_by_phase,
    expert_load_by_step,
    steps_of,
)
from explorer.queries.routed import left_out
from explorer.text import counted
from explorer.ui import address, problems
from explorer.ui.address import domain_key
from explorer.ui.chart import chart, tile
from explorer.ui.problems import instead, section, without_ids
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

_PLACEMENT = ("gpus", "nodes", "expert_groups", "replicas")
_TILES = {
    "max_violation": "Busiest expert",
    "coefficient_of_variation": "Coefficient of variation",
    "gini": "Gini",
    "normalized_entropy": "Load entropy",
    "dead_experts": "Dead experts",
}


def render() -> None:
    """Draw the page."""
    view = current_view().sampled()
    address.follow_jump()
    load = view.of_layers(ask(view, expert_load, weights=False, **view.filters))
    st.markdown(
        "When every expert of a layer gets the same share of the tokens, no expert waits for "
        "another and none is wasted. A finite number of tokens is never perfectly even: "
        "**by chance** is what uniform random routing of as many tokens would show."
    )
    if said := ask(view, left_out):
        st.caption(said)
    # a link to a placement shows it
    serves = any(address.read(name) for name in _PLACEMENT)
    topic = address.choose(
        st.segmented_control,
        "topic",
        "Topic",
        {
            "layers": "Layers and capacity",
            "serving": "Serving: GPUs and batches",
            "memory": "Memory: caches, drafts, calibration",
        },
        default="serving" if serves else "layers",
    )
    if topic != "layers" and not load["assignments"].sum():
        instead("These tokens have no assignment in any layer. Change the filters at the side.")
    elif topic == "serving":
        serving_section(view, load)
    elif topic == "memory":
        memory_section(view)
    else:
        _layers(view, load)


def _layers(view: View, load: pd.DataFrame) -> None:
    here = view.here(load)
    balance = balance_of(view, load)
    st.subheader(f"Layer {view.site_name}", anchor=False)
    _tiles(view, balance, here)
    if not here["assignments"].sum():
        instead("These tokens have no assignment in this layer. Change the filters at the side.")
        return
    left, right = st.columns(2, gap="medium")
    with left:
        _bars(view, here)
    with right:
        _lorenz(view, here)
    _by_part(view)
    st.subheader("All layers", anchor=False)
    _over_layers(view, balance)
    st.subheader(f"Capacity limit in layer {view.site_name}", anchor=False)
    _capacity(view)


@section("Measures of balance")
def _tiles(view: View, balance: pd.DataFrame, here: pd.DataFrame) -> None:
    row = view.here(balance).iloc[0]
    for column, (name, label) in zip(st.columns(len(_TILES)), _TILES.items(), strict=True):
        text, whole = METRIC_TEXTS[name], name == "dead_experts"
        value, floor = row[name] + text.add, row[f"{name}_floor"] + text.add
        unit = "×" if name == "max_violation" else ""
        below = [by_chance(floor, ".1f" if whole else text.form, unit)]
        if unit and math.isfinite(value):
            busiest = int(here.loc[here["assignments"].idxmax(), "expert_id"])
            below.insert(0, expert_label(view.site_name, busiest))
        tile(
            column,
            label,
            number(value, text.form)
            + unit * math.isfinite(value)
            + (f" of {int(row['n_experts'])}" if whole else ""),
            "; ".join(filter(None, below))
            if math.isfinite(value)
            else undefined_load(int(row["n_experts"])),
            about=f"{text.label}. {text.meaning}",
        )
    worst = Floor(*(1 + float(row[f"max_violation_floor{part}"]) for part in ("", "_low", "_high")))
    if math.isfinite(worst.mean):
        st.caption(f"Busiest expert (× fair share): {floor_note(worst)}.")


@section("Load of the experts")
def _bars(view: View, here: pd.DataFrame) -> None:
    chart(
        load_bars(here, scope=view.scope(), layer=view.site_name, dark=is_dark()),
        key="load bars",
        alt=f"Bars: share of assignments of each of {len(here)} experts of layer "
        f"{view.site_name}, busiest first, from {here['share'].max():.1%} to "
        f"{here['share'].min():.1%}; a fair share is {1 / len(here):.1%}. Click: its tokens.",
        table=here.drop(columns=["n_experts", "top_k"]),
        on_click=lambda data: address.jump_to_expert(view, data),
        made=view.recipe(
            expert_load, weights=False, **view.place, **view.filters, drop=("n_experts", "top_k")
        ),
    )


@section("Lorenz curve")
def _lorenz(view: View, here: pd.DataFrame) -> None:
    ordered = here.sort_values("assignments")[["expert_id", "assignments"]]
    chart(
        lorenz(here, scope=view.scope(), layer=view.site_name, dark=is_dark()),
        key="lorenz",
        alt=f"Lorenz curve of layer {view.site_name}: the least loaded half of the experts does "
        f"{_half_share(ordered['assignments']):.0%} of the work.",
        table=ordered.assign(
            cumulative_share=ordered["assignments"].cumsum() / ordered["assignments"].sum()
        ),
    )


def _half_share(ordered: "pd.Series[int]") -> float:
    return float(ordered.iloc[: len(ordered) // 2].sum() / max(1, ordered.sum()))


@section("Load by domain, phase and step")
def _by_part(view: View) -> None:
    """Draw the load of the layer in each domain and phase, where there are several."""
    if len(view.run.domains) > 1 and view.domain is None:
        load = ask(view, expert_load_by_domain, phase=view.phase, part=view.part, **view.place)
        _part(view, load, "domain")
    if len(view.run.phases) > 1 and view.phase is None:
        load = ask(view, expert_load_by_phase, **view.prompt_filters, **view.place)
        _part(view, load, "phase")
    if len(ask(view, steps_of)) > 1 and view.domain is None:
        _part(view, ask(view, expert_load_by_step, **view.place), "step")


def _part(view: View, load: pd.DataFrame, by: str) -> None:
    parts = list(dict.fromkeys(load[by]))

    def go_to(data: list[float]) -> None:
        part = parts[int(data[6])]
        if by != "step":  # which no filter has
            address.write(by, domain_key(part) if by == "domain" else part)
        address.jump_to_expert(view, data)

    chart(
        domain_heatmap(
            load,
            caption=view.scope().caption(f"1× = uniform share {uniform_text(load)}"),
            by=by,
            layer=view.site_name,
            dark=is_dark(),
        ),
        key=f"load by {by}",
        alt=f"Heatmap of {load[by].nunique()} {by}s by experts of layer {view.site_name}: share "
        f"of the {by}'s assignments over the uniform share. Click: its tokens.",
        table=load.drop(columns=["layer", "site", "n_experts"]).assign(
            **{by: [domain_name(part) for part in load[by]]}
        ),
        on_click=go_to,
    )


@section("All layers")
def _over_layers(view: View, balance: pd.DataFrame) -> None:
    metric = address.choose(st.segmented_control, "metric", "Measure", _TILES)
    columns = [metric, f"{metric}_floor", f"{metric}_floor_low", f"{metric}_floor_high"]
    if balance[metric].isna().all():
        instead(f"{_TILES[metric]}: {undefined_load(int(balance['n_experts'].max()))}.")
        return
    chart(
        balance_over_layers(balance, metric, scope=view.scope(over_layers=True), dark=is_dark()),
        key="over layers",
        alt=f"{METRIC_TEXTS[metric].label} of {counted(len(balance), 'layer')}, "
        f"{span(balance[metric] + METRIC_TEXTS[metric].add)}, with the values that uniform routing "
        "would give.",
        table=balance[["layer", "site", "n_experts", "top_k", "assignments", *columns]],
    )


@st.fragment
@section("Capacity limit")
def _capacity(view: View) -> None:
    # a part that is drawn alone is not within the page's own
    with problems.shown():
        _draw_capacity(view)


def _draw_capacity(view: View) -> None:
    if without_ids(view.run, "What a limit drops"):
        return
    phase = view.phase or (view.run.phases or ["prompt"])[0]
    if view.phase is None and len(view.run.phases) > 1:
        # a pass over prompts and a decoding step differ a hundredfold in tokens
        phase = address.choose(
            st.segmented_control,
            "batches",
            "Batches",
            {"prompt": "Passes over prompts", "generated": "Decoding steps"},
        )
    curve, zero_from, n_batches, n_tokens, n_all = ask(view, capacity_of, **view.place, phase=phase)
    if curve.empty or curve["assignments"].isna().all():
        instead("No token of this phase was recorded.")
        return
    st.markdown(
        "A **capacity factor** of 1.25 means that every expert has room for 1.25 times its fair "
        "share of a batch; assignments beyond that are dropped, as many training and serving "
        "systems do. A batch is one forward pass, as it was recorded and whatever its domain: "
        f"here {counted(n_batches, 'batch', 'batches')}, on average of "
        f"{counted(round(n_tokens / n_batches), 'token')}."
    )
    factor = _factor(curve["capacity_factor"].tolist())
    row = curve.iloc[(curve["capacity_factor"] - factor).abs().argmin()]
    st.markdown(
        f"With a capacity factor of **{factor:.2f}**, counted per batch, "
        f"**{row['assignments']:.1%}** of all assignments are dropped. If an expert keeps the "
        f"tokens that come first (policy *position*), {number(row['weight_position'], '.1%')} of "
        f"the combine weight is lost and {row['tokens_position']:.2%} of the tokens lose every "
        "expert; if it keeps those with the largest weight (policy *probs*), "
        f"{number(row['weight_probs'], '.1%')} and {row['tokens_probs']:.2%}. From "
        f"factor {zero_from:.2f} on nothing is dropped."
    )
    scope = view.scope(n_tokens).without_filters()._replace(phase=phase)
    if n_tokens < n_all:
        st.caption(f"Computed from the first {n_tokens:,} of {n_all:,} tokens, whole batches.")
    chart(
        capacity_curve(
            curve,
            layer=view.site_name,
            capacity_factor=factor,
            zero_from=zero_from,
            n_batches=n_batches,
            scope=scope,
            dark=is_dark(),
        ),
        key="capacity",
        alt=f"Share of assignments, weight and tokens dropped over capacity factors from "
        f"{curve['capacity_factor'].iloc[0]} to "
        f"{curve['capacity_factor'].iloc[-1]} in layer {view.site_name}.",
        table=curve,
    )


def _factor(factors: list[float]) -> float:
    """Draw the slider, which ends where the curve does, and is kept in the address."""
    asked = address.read("factor")
    default = min(factors, key=lambda factor: abs(factor - 1.25))
    value = next((f for f in factors if f"{f:g}" == asked), None)
    if asked and value is None:
        address.note(
            f"The link names a capacity factor that is not on the scale; showing {default:g}."
        )
        address.write("factor", "")
    key = "address:factor"
    st.session_state[key] = default if value is None else value
    st.select_slider(
        "Capacity factor",
        factors,
        key=key,
        format_func=lambda f: f"{f:.2f}",
        on_change=lambda: address.write("factor", f"{st.session_state[key]:g}"),
    )
    return float(default if value is None else value)


render()
