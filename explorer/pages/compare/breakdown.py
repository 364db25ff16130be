"""Where the loss of routers goes: layer by layer, and domain by domain."""

from typing import Any

import pandas as pd
import streamlit as st

from explorer.comparison.results_file import Comparison
from explorer.comparison.verdicts import CONTROLS, with_controls
from explorer.pages.compare.breakdown_figures import by_domain, by_layer, means_by
from explorer.pages.compare.figures import marked
from explorer.ui import address
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.state import is_dark

_MARKED = "not causal, depends on the batch, or simulated: its card says which."
_LAYER_COLUMNS = [
    *("router", "seed", "layer", "loss_change", "loss_se", "control_loss_change", "agreement"),
    "jaccard",
    *("experts_per_token", "flops_ratio", "counted_flops_ratio", "latency_ratio"),
    "max_violation",
]


@part("Layers and domains")
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
