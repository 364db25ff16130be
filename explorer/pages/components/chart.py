"""A figure on a page, with its text for screen readers and the same numbers as a table."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


def chart(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    table: pd.DataFrame,
    on_click: Callable[[list[float]], None] | None = None,
) -> None:
    """Draw a figure and its table.

    Parameters
    ----------
    alt : str
        What the figure shows, in a sentence; plain text.
    table : DataFrame
        The numbers of the figure.
    on_click : callable, optional
        Called before the rerun with the ``customdata`` of a mark that was clicked.
    """

    def clicked() -> None:
        state: Any = st.session_state.get(key)
        points = state["selection"]["points"] if state else []
        if points and on_click is not None and points[0].get("customdata"):
            on_click(_numbers(points[0]["customdata"]))

    if on_click is None:
        st.plotly_chart(figure, key=key, theme=None, config=_CONFIG, alt=alt)
    else:
        st.plotly_chart(
            figure,
            key=key,
            theme=None,
            config=_CONFIG,
            alt=alt,
            on_select=clicked,
            selection_mode="points",
        )
    # the rows travel only when somebody opens it: those of a large heatmap are megabytes
    box = st.expander("Table", icon=":material/table:", key=f"table of {key}", on_change="rerun")
    if box.open:
        box.dataframe(table, hide_index=True, alt=f"Table of: {alt}", placeholder="not recorded")


def _numbers(customdata: Any) -> list[float]:
    """Return the numbers of a mark; a browser sends binary arrays as {"0": .., "1": ..}.

    A number that is missing is sent as null.
    """
    if isinstance(customdata, dict):
        customdata = [customdata[key] for key in sorted(customdata, key=int)]
    return [float("nan") if value is None else float(value) for value in customdata]
