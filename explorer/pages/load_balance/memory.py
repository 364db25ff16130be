"""Fast memory: what caches of experts hit, what drafts read, and which experts texts leave out."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from explorer.engine_files import PIN_FORMATS
from explorer.errors import RunError
from explorer.metrics.cache import LINES
from explorer.pages.load_balance import data
from explorer.pages.load_balance.figures import HALF_PAGE
from explorer.pages.load_balance.placements import PATIENCE
from explorer.queries.load import calibration
from explorer.text import counted
from explorer.ui import address, theme
from explorer.ui.chart import chart, listing
from explorer.ui.heatmap import Scale, clickable_heatmap
from explorer.ui.problems import instead, section, without_ids
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Scope, domain_labels, domain_name, span

# hue and dash of each kind of cache
_LOOKS = {
    "lru": ("blue", "solid"),
    "lfu": ("orange", "dash"),
    "pins": ("green", "dot"),
    "pins_shared": ("vermillion", "dashdot"),
    "prefetch": ("purple", "longdash"),
    "belady": ("grey", "solid"),
}
_AT_LEAST = ("64", "256", "1024", "4096")
_MB = 1.0


def memory_section(view: View) -> None:
    """Draw what a run says to people with less fast memory than experts."""
    st.subheader("Memory", anchor=False)
    _caches(view)
    _calibration(view)


@section("Caches of experts")
def _caches(view: View) -> None:
    if without_ids(view.run, "What a cache of experts hits"):
        return
    seconds = data.seconds_to_cache(view.run)
    if seconds > PATIENCE and not st.toggle(
        f"Simulate caches (about {seconds:,.0f} s)", key="simulate caches"
    ):
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        requests = address.choose(
            st.segmented_control,
            "requests",
            "Requests",
            data.REQUESTS,
            help="The order in which tokens of requests reach the cache; as recorded: in the order "
            "of the forward passes.",
        )
        loaded = address.choose(
            st.segmented_control, "loaded", "Show", {"rate": "Hit rate", "mb": "MB a token"}
        )
        size = st.number_input(
            "MB of one expert", min_value=0.001, value=_MB, key="expert MB", width=160
        )
    phases = [view.phase] if view.phase is not None else view.run.phases or ["prompt"]
    columns = st.columns(2, gap="medium")
    for place, phase in enumerate(phases):
        with st.spinner("Simulating caches."):
            try:
                found = ask(view, data.cached, phase=phase, domain=view.domain, requests=requests)
            except RunError as error:
                instead(str(error))
                continue
        scope = view.scope(found.tokens)._replace(phase=phase, step=1, search=None, slice=None)
        rates = found.rates.assign(mb=found.rates["loaded"] * size)
        # prefill and decode stand side by side; of one phase the drafts take the other half
        with columns[place]:
            _cache_lines(rates, found, scope, phase, "mb" if loaded == "mb" else "hit_rate")
            if len(phases) > 1 and not found.drafts.empty:
                _drafts(found, scope, phase)
        if len(phases) == 1 and not found.drafts.empty:
            with columns[1]:
                _drafts(found, scope, phase)
        _pins(view, found, phase)


def _cache_lines(
    rates: pd.DataFrame, found: data.CacheTables, scope: Scope, phase: str, column: str
) -> None:
    dark = is_dark()
    form = ".1%" if column == "hit_rate" else ",.2f"
    figure = go.Figure(
        [
            theme.line(
                rows["slots"],
                rows[column],
                LINES[str(name)],
                form={"color": theme.hue(_LOOKS[str(name)][0], dark), "dash": _LOOKS[str(name)][1]},
                symbol="circle",
                hover=f"%{{x}} slots: %{{y:{form}}}",
            )
            for name, rows in rates.groupby("cache", sort=False)
        ]
    )
    figure.update_xaxes(title=f"slots a layer (of {found.n_experts} experts)")
    unit = "lookups that hit" if column == "hit_rate" else "MB of experts loaded a token"
    percent = ".0%" if column == "hit_rate" else None
    figure.update_yaxes(title=unit, tickformat=percent, rangemode="tozero")
    theme.finish(
        figure,
        title=f"Caches of experts, {phase} tokens ({unit})",
        caption=scope.caption(
            f"mean of layers; pins and predictions fitted on {found.fitted:,} tokens of the other "
            "prompts"
        ),
        dark=dark,
        caption_width=HALF_PAGE,
    )
    # where the lines leave room
    figure.update_layout(legend=_legend(0.0 if column == "hit_rate" else 1.0), showlegend=True)
    lru = rates[rates["cache"] == "lru"]["hit_rate"]
    chart(
        figure,
        key=f"cache {phase}",
        alt=f"Lines over slots a layer for {counted(len(LINES), 'kind')} of caches of {phase} "
        f"tokens; LRU hits {span(lru, '.0%')}.",
        table=rates.assign(cache=rates["cache"].map(LINES)),
    )


def _legend(y: float) -> dict[str, Any]:
    """Put the names into the lower or the upper right corner of the plot."""
    anchor = "top" if y else "bottom"
    return {"orientation": "v", "x": 1, "xanchor": "right", "y": y, "yanchor": anchor}


def _drafts(found: data.CacheTables, scope: Scope, phase: str) -> None:
    rows, dark = found.drafts, is_dark()
    lines = (
        ("uniform", "uniform routing", theme.dotted(dark, 2)),
        ("many_requests", "a batch of many requests", {"color": theme.hue("orange", dark)}),
        ("one_request", "a draft of one request", {"color": theme.accent(dark), "width": 2.5}),
    )
    figure = go.Figure(
        [
            theme.line(
                rows["tokens"],
                rows[name],
                title,
                form=form,
                symbol="circle",
                hover="%{x} tokens: %{y:.2f} experts",
            )
            for name, title, form in lines
        ]
    )
    figure.update_xaxes(title="tokens that are checked together", tickvals=rows["tokens"].tolist())
    figure.update_yaxes(title=f"different experts (of {found.n_experts})", rangemode="tozero")
    theme.finish(
        figure,
        title="Experts that a draft window reads (count, mean of layers)",
        caption=scope.caption("speculative decoding checks a draft of one request in one pass"),
        dark=dark,
        caption_width=HALF_PAGE,
    )
    figure.update_layout(legend=_legend(0.0), showlegend=True)
    chart(
        figure,
        key=f"drafts {phase}",
        alt=f"Different experts read by {rows['tokens'].iloc[-1]:.0f} tokens together: "
        f"{rows['one_request'].iloc[-1]:.1f} of one request, {rows['many_requests'].iloc[-1]:.1f} "
        "of many.",
        table=rows,
    )


def _pins(view: View, found: data.CacheTables, phase: str) -> None:
    """Offer the experts that are worth keeping in fast memory, as files."""
    budgets = [str(budget) for budget in found.pins]
    budget = (
        address.choose(
            st.select_slider,
            "budget",
            f"Experts of all layers to keep in fast memory, by their load in {phase} tokens",
            budgets,
            default=budgets[len(budgets) // 2],
        )
        if phase == (view.phase or view.run.phases[0])
        else address.read("budget")
    )
    files = found.pins.get(int(budget or budgets[len(budgets) // 2]), {})
    with st.container(horizontal=True):
        for kind, text in files.items():
            of = PIN_FORMATS[kind]
            name = f"{view.name}-{phase}-{budget}-{kind}{of.ending}"
            st.download_button(
                f"Pins for {phase} tokens: {of.name}",
                text,
                file_name=name,
                icon=":material/download:",
                on_click="ignore",
                key=f"save pins {phase} {kind}",
                help=of.how.format(file=name),
            )


@section("Calibration coverage")
def _calibration(view: View) -> None:
    if view.run.sums_only:
        return  # no text is known
    st.subheader("Calibration coverage", anchor=False)
    at_least = int(
        address.choose(
            st.segmented_control,
            "at_least",
            "Tokens that an expert needs",
            _AT_LEAST,
            default="256",
            help="Of fewer, statistics for quantisation or pruning are worth little.",
        )
    )
    table = view.of_layers(ask(view, calibration, at_least=at_least, phase=view.phase))
    domains = view.run.domains
    whole = table[table["domain"].isna()]
    poor = whole[whole["missing"] > 0]
    each = len(whole)
    said = (
        f"**{len(poor):,} of {each:,} experts** are reached by fewer than {at_least:,} tokens of "
        f"these {counted(int(whole['texts'].iloc[0]), 'text')}"
    )
    if len(poor):
        most = poor.loc[poor["more_texts"].idxmax()]
        said += (
            f"; for all of them {int(most['more_texts']):,} more texts like these would be needed"
            + (", at least, as some were never reached" if poor["unseen"].any() else "")
        )
    st.markdown(said + ".")
    rows = table.dropna(subset=["domain"])
    sites = whole[["layer", "site"]].drop_duplicates()
    names = [view.named(int(layer), int(site)) for layer, site in sites.itertuples(index=False)]
    counts = (
        rows.assign(poor=rows["missing"] > 0)
        .pivot_table(index="domain", columns=["layer", "site"], values="poor", aggfunc="sum")
        .reindex(domains)
        .to_numpy(dtype=np.float64)
    )
    grid = np.stack([*np.indices(counts.shape), counts], axis=-1).astype(np.float64)
    labels = domain_labels(domains)
    figure = clickable_heatmap(
        counts,
        ids=grid,
        hover="%{text}<br>%{customdata[2]:.0f} experts under the limit",
        hover_text=[f"{label}, layer {name}" for label in labels for name in names],
        x_labels=names,
        y_labels=labels,
        x_title="decoder layer",
        y_title="domain",
        scale=Scale("experts", 0.0, float(max(site.n_experts for site in view.run.sites))),
        dark=is_dark(),
    )
    theme.finish(
        figure,
        title=f"Experts with fewer than {at_least:,} tokens in a domain (count)",
        caption=view.scope(over_layers=True).without_filters().caption(),
        dark=is_dark(),
        height=int(np.clip(150 + 26 * len(domains), 300, 900)),
    )
    chart(
        figure,
        key="calibration",
        alt=f"Heatmap of {counted(len(domains), 'domain')} by {counted(len(names), 'layer')}: "
        f"experts with fewer than {at_least:,} tokens, {span(counts, '.0f')}.",
        table=table.assign(
            domain=["all" if d is None else domain_name(d) for d in table["domain"]]
        ),
    )
    if poor.empty:
        return
    listed = poor.sort_values("tokens", kind="stable").reset_index(drop=True)

    def go_to() -> None:
        chosen = st.session_state["calibration experts"]["selection"]["rows"]
        if chosen:
            place = listed.loc[chosen[0], ["layer", "site", "expert_id"]]
            address.jump_to_expert(view, place.astype(float).tolist())

    listing(
        listed,
        {
            "layer": "Layer",
            "expert_id": "Expert",
            "tokens": ("Tokens", "localized"),
            "missing": ("Missing tokens", "localized"),
            "more_texts": ("More texts like these", "localized"),
        },
        alt="Experts that too few tokens reach; click the box of a row for its expert",
        key="calibration experts",
        on_select=go_to,
        selection_mode="single-row",
        height=320,
    )
