"""Loads of two runs, A and B, and what both have in every layer."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st
from streamlit.runtime.scriptrunner import add_script_run_ctx, get_script_run_ctx

from explorer.metrics.load import max_violation
from explorer.pages.compare_runs.figures import over_layers
from explorer.queries.load import expert_load
from explorer.queries.overview import gate_means
from explorer.ui.caption import Caption
from explorer.ui.chart import chart
from explorer.ui.part import part
from explorer.ui.state import View, ask, is_dark

Options = dict[str, Any]


class Both(NamedTuple):
    """Answers about both runs, of the layers shown, by the name of the side."""

    loads: dict[str, pd.DataFrame]
    gates: dict[str, pd.DataFrame]


def loads_and_gates(sides: dict[str, View]) -> Both:
    """Return the load of every expert and the mean gate entropy, asked for at the same time."""

    def answer(side: View, question: Callable[..., pd.DataFrame], options: Options) -> pd.DataFrame:
        return side.of_layers(ask(side, question, **options, **side.filters))

    # the cache of answers asks which page run a thread belongs to
    context = (None, get_script_run_ctx())
    with ThreadPoolExecutor(4, initializer=add_script_run_ctx, initargs=context) as pool:
        loads, gates = (
            {name: pool.submit(answer, side, question, options) for name, side in sides.items()}
            for question, options in (
                (expert_load, {"weights": False}),
                (gate_means, {"statistics": ("entropy",)}),
            )
        )
    return Both(*({name: one.result() for name, one in some.items()} for some in (loads, gates)))


def caption_of(sides: dict[str, View], *notes: str) -> Caption:
    """Return which tokens of each run are behind a figure over layers, with notes at the end."""
    scopes = {name: side.scope(over_layers=True) for name, side in sides.items()}
    # a line for each run: captions are broken at their semicolons
    said = {name: scope.caption().replace("; ", ", ") for name, scope in scopes.items()}
    parts = [*(f"{name.upper()}: {text}" for name, text in said.items()), *notes]
    filters = {
        f"{what}_{name}": value
        for name, scope in scopes.items()
        for what, value in scope.filter_values().items()
    }
    return Caption("; ".join(parts), filters)


@part("Balance and gate entropy")
def lines_section(both: Both, caption: str) -> None:
    """Draw the balance and the gate entropy of both runs over their layers."""
    balance = {
        name: load.groupby(["layer", "site"], as_index=False).agg(
            max_violation=("assignments", max_violation)
        )
        for name, load in both.loads.items()
    }
    left, right = st.columns(2, gap="medium")
    for column, tables, quantity, title in (
        (left, balance, "max_violation", "MaxVio (busiest expert's excess, fair shares)"),
        (right, both.gates, "normalized_entropy", "Gate entropy (share of ln E)"),
    ):
        with column:
            if all(table[quantity].isna().all() for table in tables.values()):
                st.info(
                    f"{title}: not recorded in these runs, or not defined: one expert, "
                    "or no assignment."
                )
                continue
            chart(
                over_layers(tables, quantity, title=title, caption=caption, dark=is_dark()),
                key=f"both {quantity}",
                alt=f"{title} over the layers of A and B.",
                table=pd.concat(
                    [
                        table[["layer", "site", quantity]].assign(run=name.upper())
                        for name, table in tables.items()
                    ]
                ),
            )
