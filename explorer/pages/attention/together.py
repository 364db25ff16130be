"""Do tokens that attend to each other route together? The answer for the heads of a layer."""

import math

import pandas as pd
import streamlit as st

from explorer.metrics.attention import MIN_PROMPTS
from explorer.pages.attention.figures import head_name
from explorer.pages.attention.together_data import HeadsTogether, routing_together
from explorer.pages.attention.together_figure import together_figure
from explorer.ui.chart import chart
from explorer.ui.number import number, span
from explorer.ui.part import part
from explorer.ui.state import View, ask, is_dark

# a difference that two decimals show
_SHOWN = 0.005


@part("Attention and routing")
def routing_together_section(view: View, head: tuple[int, int]) -> None:
    """Draw the section for the heads of the chosen head's layer."""
    st.subheader("Do tokens that attend to each other route together?", anchor=False)
    if not view.run.records_ids:
        st.info("Expert ids per token were not recorded.", icon=":material/info:")
        return
    found = ask(
        view,
        routing_together,
        attention_layer=head[0],
        layer=view.layer,
        site=view.site,
        **view.prompt_filters,
    )
    here = found.heads[found.heads["head"] == head[1]]
    if here.empty:
        st.info(
            "This run keeps no keys of this head. Capture with `--attention-top-keys 4`.",
            icon=":material/info:",
        )
        return
    st.markdown(_sentence(view, here.iloc[0], found, head))
    scope = view.scope(found.n_tokens)
    scope = scope._replace(phase="prompt" if len(view.run.phases) > 1 else None, whole_prompts=True)
    chart(
        together_figure(
            found.heads,
            attention_layer=head[0],
            routed=view.site_name,
            chosen=head[1],
            n_prompts=found.n_prompts,
            scope=scope,
            dark=is_dark(),
        ),
        key="together",
        alt=f"For {len(found.heads)} heads of layer {head[0]}: the share of attended keys that "
        f"share an expert of layer {view.site_name} with their query, "
        f"{span(found.heads['share'], '.0%')}, and by chance.",
        table=found.heads,
    )
    if found.n_prompts < found.n_all:
        st.caption(f"Computed from the first {found.n_prompts:,} of {found.n_all:,} prompts.")


def _sentence(view: View, row: pd.Series, found: HeadsTogether, head: tuple[int, int]) -> str:
    if math.isnan(row["share"]):
        return (
            f"**{head_name(*head)}** attends to nothing but the token itself and the prompt's "
            "first token here, so there is no pair to ask about."
        )
    text = (
        f"Of what **{head_name(*head)}** attends to, **{row['share']:.1%}** (weighted by "
        f"attention, {int(row['pairs']):,} pairs of {int(row['prompts']):,} prompts) shares an "
        f"expert with the query in layer {view.site_name}. By chance, tokens of the same prompt at "
        f"the same distance do so in {number(row['chance_distance'], '.1%')}"
    )
    if math.isnan(row["lift"]):
        return text + "."
    text += f": **{row['lift']:.2f} times** as often"
    if math.isnan(row["lift_low"]):
        return text + f". Fewer than {MIN_PROMPTS} prompts: no interval."
    text += f" ({row['lift_low']:.2f} to {row['lift_high']:.2f} in 9 of 10 draws of prompts)"
    if row["lift_low"] > 1 + _SHOWN:
        return text + ". So they route together more than their distance explains."
    if row["lift_high"] < 1 - _SHOWN:
        return text + ". So they route together less than their distance would suggest."
    return text + ". That is what chance gives."
