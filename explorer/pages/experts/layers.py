"""How specialised all experts are: a map of them, and every layer against shuffled labels."""

import pandas as pd
import streamlit as st

from explorer.metrics.specialization import MIN_COUNT
from explorer.pages.experts.figures import divergence_heatmap, layer_lines
from explorer.pages.experts.specialization import divergences, layers_of
from explorer.ui import jump
from explorer.ui.chart import chart
from explorer.ui.number import number, span
from explorer.ui.part import part
from explorer.ui.state import View, ask, is_dark


def all_experts_section(view: View) -> None:
    """Draw the section."""
    if len(view.run.domains) < 2 or view.domain is not None:
        st.info(
            "Domain specialisation compares domains: "
            + (
                "take the domain filter off to see it."
                if view.domain is not None
                else "the prompts of this run are labelled with fewer than two."
            ),
            icon=":material/info:",
        )
    else:
        _map(view)
    if not view.run.records_ids:
        st.info(
            "Vocabulary specialisation and the floors need expert ids per token; capture with "
            "`--level ids`.",
            icon=":material/info:",
        )
        return
    with st.spinner("Reading the routes of all layers"):
        table, step = ask(view, layers_of, **view.filters)
    shown = view.of_layers(table)
    left, right = st.columns(2, gap="large")
    with left:
        _vocabulary(view, shown, step)
    with right:
        _information(view, shown, step)


@part("Domain specialisation")
def _map(view: View) -> None:
    sampled = view.sampled()
    found = view.of_layers(ask(sampled, divergences, **sampled.filters))
    if found.empty:
        st.info("These tokens are of one domain. Change the filters at the side.")
        return
    chart(
        divergence_heatmap(found, scope=sampled.scope(over_layers=True), dark=is_dark()),
        key="divergence map",
        alt=f"Heatmap of {found['layer'].nunique()} layers by experts: how far the domains of "
        f"each expert's tokens are from those of all, "
        f"{span(found['divergence'], '.3f')} nats. Click: the expert.",
        table=found,
        on_click=lambda data: jump.aim(view, data),
    )


@part("Vocabulary specialisation")
def _vocabulary(view: View, table: pd.DataFrame, step: int) -> None:
    if table["vocabulary"].isna().all():
        st.info(f"No vocabulary entry occurs {MIN_COUNT} times among these tokens: too few.")
        return
    scope = view.scope(over_layers=True)._replace(step=step)
    uniform = table["top_k"] / table["n_experts"]
    chart(
        layer_lines(
            table,
            "vocabulary",
            title="Vocabulary specialisation (share of an entry's tokens)",
            y_title="share of the favourite expert",
            percent=True,
            scope=scope,
            notes=[
                "mean over entries",
                f"entries that occur at least {MIN_COUNT} times",
                f"uniform routing: top-k / experts = {uniform.min():.1%}",
            ],
            dark=is_dark(),
        ),
        key="vocabulary of layers",
        alt=f"Lines over {len(table)} routers: the mean share of a vocabulary entry's tokens that "
        f"go to its favourite expert, {span(table['vocabulary'], '.0%')}; with shuffled labels "
        f"{number(table['vocabulary_floor'].mean(), '.0%')}.",
        table=table,
    )


@part("Domain and expert")
def _information(view: View, table: pd.DataFrame, step: int) -> None:
    if table["information"].isna().all():
        return
    scope = view.scope(over_layers=True)._replace(step=step)
    chart(
        layer_lines(
            table,
            "information",
            title="Domain and expert (mutual information, nats)",
            y_title="nats",
            percent=False,
            scope=scope,
            notes=["shuffled labels: prompts swap their domains"],
            dark=is_dark(),
        ),
        key="information of layers",
        alt=f"Lines over {len(table)} routers: mutual information of domain and expert, "
        f"{span(table['information'], '.3f')} nats; with shuffled labels "
        f"{number(table['information_floor'].mean(), '.3f')}.",
        table=table,
    )
