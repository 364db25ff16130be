"""Routers by replay: recorded inputs routed again, without the model."""

import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.pages.compare.figures import badges
from explorer.text import ABSENT
from explorer.ui.part import part


@part("Replay")
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
    rows = rows.assign(badges=[", ".join(badges(row)) for _, row in rows.iterrows()])
    names = {
        "router": "Router",
        "agreement": "Agreement",
        "jaccard": "Jaccard",
        "exact_set": "Exact set",
        "weighted_overlap": "Weighted overlap",
        "js": "JS (nats)",
        "experts_per_token": "Experts a token",
        "max_violation": "MaxVio",
        "max_violation_floor": "MaxVio by chance",
        "gini": "Gini",
        "dead_experts": "Dead",
        "badges": "Badges",
    }
    st.dataframe(
        rows[list(names)],
        hide_index=True,
        column_config={
            name: title
            if name in ("router", "badges")
            else st.column_config.NumberColumn(title, format="%.3f")
            for name, title in names.items()
        },
        alt="Routers by replay: agreement with the model's own choice, balance and compute",
        placeholder=ABSENT,
    )
    if rows[list(names)].isna().any(axis=None):
        st.caption(f"{ABSENT} = not measured, or not defined for this rule.")
    domains = comparison.domains.query("mode == 'replay'")
    if domains["domain"].nunique() > 1:
        means = domains.pivot_table("agreement", "router", "domain", sort=False)
        share = st.column_config.NumberColumn(format="%.3f")
        st.dataframe(
            means.reset_index(),
            hide_index=True,
            column_config={"router": "Agreement by domain", **dict.fromkeys(means.columns, share)},
            alt="Agreement of routers with the model's own choice in each domain, by replay",
        )
