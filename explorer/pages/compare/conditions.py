"""Precision, quantisation, pruning and the like: what they cost, and what they do to routing."""

import pandas as pd
import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.pages.compare.condition_figures import (
    flip_margins,
    flips_over_layers,
    loss_two_by_two,
)
from explorer.text import plain
from explorer.ui.chart import chart, listing
from explorer.ui.problems import section
from explorer.ui.state import is_dark

_BASE = "base"
_STUDENTS = {
    "student": "Student",
    "agreement": ("Agreement", "%.4f"),
    "exact_set": ("Exact set", "%.4f"),
    "kl": ("KL to the gate (nats)", "%.4f"),
    "loss_change": ("Δ loss (nats)", "%.4f"),
    "loss_se": ("± SE", "%.4f"),
}


@section("Conditions")
def conditions_section(comparison: Comparison) -> None:
    """Draw what the comparison holds of conditions and distilled routers."""
    cells = comparison.rows("conditions")
    cells = cells[cells["condition"] != _BASE]
    if not cells.empty:
        st.subheader("Conditions", anchor=False)
        st.markdown(
            "A condition changes the weights. Its **own** routing may differ from the base "
            "model's; forcing one's routing onto the other's weights (routing replay) tells what "
            "the weights cost from what the routing costs."
        )
        tokens = int(cells["tokens"].max())
        chart(
            loss_two_by_two(cells, tokens=tokens, dark=is_dark()),
            key="conditions",
            alt=f"Change in loss of {cells['condition'].nunique()} conditions: own weights and "
            "routing, own weights with the base's routing, and the base's weights with its own.",
            table=cells,
        )
        _said(cells)
    flips = comparison.rows("flips")
    flips = flips[flips["condition"] != _BASE]
    left, right = st.columns(2, gap="medium")
    if not flips[flips["layer"] >= 0].empty:
        with left:
            chart(
                flips_over_layers(flips, dark=is_dark()),
                key="flips",
                alt="Share of tokens whose set of experts changed, by layer and condition.",
                table=flips,
            )
    margins = comparison.rows("flip_margins")
    if not margins.empty:
        with right:
            chart(
                flip_margins(margins, flips, dark=is_dark()),
                key="flip margins",
                alt="Share of tokens whose set of experts changed over the base model's margin: "
                "flips are of tokens with a small margin.",
                table=margins,
            )
    _students(comparison.rows("students"))


def _said(cells: pd.DataFrame) -> None:
    masked = cells[cells["simulated"].fillna(False).astype(bool)]["condition"].unique()
    if len(masked):
        names = plain(", ".join(map(str, masked)))
        st.caption(
            f":material/warning: **simulated**: {names} are computed and masked, not skipped."
        )
    chosen = cells[cells["method"].fillna("") != ""]
    if len(chosen):
        how = [
            f"{', '.join(dict.fromkeys(rows['condition']))}: {method}"
            for method, rows in chosen.groupby("method", sort=False)
        ]
        st.caption(f"What was done: {plain('; '.join(how))}.")


def _students(students: pd.DataFrame) -> None:
    if students.empty:
        return
    st.markdown("**Distilled routers**: learned from the model's own gate by KL divergence.")
    alt = "Routers distilled from the model's gate: agreement and change in loss"
    listing(students, _STUDENTS, alt=alt)
