"""Figures for serving: GPUs under placements, what decode batches read, coverage."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme
from explorer.ui.wording import Scope

# characters of a caption line on half a page
_CAPTION = 60
_DASHES = {"in order": "dot", "EPLB, by node": "dash", "EPLB, global": "solid"}
_PATTERNS = {"in order": "/", "EPLB, by node": ".", "EPLB, global": ""}
_HUES = {"in order": "grey", "EPLB, by node": "orange", "EPLB, global": "blue"}


def gpu_bars(table: pd.DataFrame, *, layer: str, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw the load of each GPU in one layer, under each placement.

    Parameters
    ----------
    table : DataFrame
        Rows of one site of ``data.gpu_table``.
    """
    figure = go.Figure()
    for policy, rows in table.groupby("policy", sort=False):
        figure.add_trace(
            go.Bar(
                x=rows["gpu"].to_numpy(),
                y=rows["ratio"].to_numpy(dtype=np.float64),
                customdata=rows["load"].to_numpy(dtype=np.float64),
                marker={
                    "color": theme.hue(_HUES[str(policy)], dark),
                    "pattern": {"shape": _PATTERNS[str(policy)], "solidity": 0.25},
                },
                name=str(policy),
                hovertemplate="GPU %{x}: × %{y:.3f}, %{customdata:,.0f} assignments"
                "<extra>%{fullData.name}</extra>",
            )
        )
    figure.add_hline(1.0, line=theme.dotted(dark))
    figure.update_xaxes(title="GPU", dtick=1 if table["gpu"].max() < 33 else None)
    figure.update_yaxes(title="load (× mean of the GPUs)", rangemode="tozero")
    return theme.finish(
        figure,
        title=f"Load of each GPU in layer {layer} (× mean)",
        caption=scope.caption("1 = even; the tallest bar is how long the layer takes"),
        dark=dark,
        legend=True,
        caption_width=_CAPTION,
    )


def balancedness_lines(table: pd.DataFrame, *, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw the balancedness of every layer under each placement.

    Parameters
    ----------
    table : DataFrame
        From ``data.balance_of_gpus``.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site].
    """
    figure = go.Figure()
    for policy, rows in table.groupby("policy", sort=False):
        name = str(policy)
        figure.add_trace(
            theme.line(
                np.arange(len(rows)),
                rows["balancedness"],
                name,
                form={"color": theme.hue(_HUES[name], dark), "dash": _DASHES[name]},
                symbol="circle",
                customdata=np.column_stack([rows[["layer", "site"]], rows["straggler"]]),
                hover="layer %{customdata[0]}: %{y:.3f}, straggler × %{customdata[2]:.2f}",
            )
        )
    theme.layer_axis(figure, table[["layer", "site"]].drop_duplicates())
    figure.update_yaxes(title="balancedness (mean / largest GPU load)", range=[0, 1.04])
    figure.update_layout(clickmode="event+select")
    return theme.finish(
        figure,
        title="Balancedness of the GPUs over layers (1 = even)",
        caption=scope.caption("its inverse is the straggler factor"),
        dark=dark,
        legend=True,
        caption_width=_CAPTION,
    )


def decode_reads(
    table: pd.DataFrame,
    *,
    n_experts: int,
    layer: str,
    scope: Scope,
    notes: tuple[str, ...],
    dark: bool = False,
) -> go.Figure:
    """Draw how many different experts a decode batch reads.

    Parameters
    ----------
    table : DataFrame
        From ``data.decode_reads``.
    notes : tuple of str
        What else the caption says of the tokens: how the batches were put together.
    """
    x = table["batch"].to_numpy()
    uniform = theme.dotted(dark, 2)
    figure = go.Figure(
        [
            *theme.band(x, table["low"], table["high"]),
            theme.line(x, table["uniform"], "uniform routing", form=uniform, hover="%{y:.1f}"),
            theme.line(
                x,
                table["measured"],
                "measured (grey: 5th to 95th percentile)",
                form={"color": theme.accent(dark), "width": 2.5},
                symbol="circle",
                customdata=table["batches"].to_numpy(),
                hover="%{x} tokens: %{y:.1f} experts, mean of %{customdata:,} batches",
            ),
        ]
    )
    figure.update_xaxes(title="tokens decoded together", type="log", tickvals=x, ticktext=x)
    figure.update_yaxes(title=f"different experts (of {n_experts})", rangemode="tozero")
    return theme.finish(
        figure,
        title=f"Experts that a decode batch reads in layer {layer} (count)",
        caption=scope.caption(*notes),
        dark=dark,
        legend=True,
        caption_width=_CAPTION,
    )


def coverage(
    table: pd.DataFrame,
    *,
    layer: str,
    scope: Scope,
    notes: tuple[str, ...] = (),
    dark: bool = False,
) -> go.Figure:
    """Draw which share of a layer's experts the first tokens touched.

    Parameters
    ----------
    table : DataFrame
        From ``data.coverage_curve``.
    notes : tuple of str
        What else the caption says of the tokens.
    """
    figure = go.Figure()
    for name, column, dash, color in (
        ("uniform routing", "uniform", "dot", theme.foreground(dark)),
        ("measured", "share", "solid", theme.accent(dark)),
    ):
        form = {"color": color, "dash": dash, "shape": "hv"}
        hover = "%{x:,} tokens: %{y:.1%}"
        figure.add_trace(theme.line(table["tokens"], table[column], name, form=form, hover=hover))
    figure.update_xaxes(title="tokens, in the order of the forward passes", type="log", dtick=1)
    figure.update_yaxes(title="experts touched (share)", tickformat=".0%", range=[0, 1.04])
    return theme.finish(
        figure,
        title=f"Coverage: experts touched so far in layer {layer} (share)",
        caption=scope.caption(
            *notes, "what is soon touched by all traffic cannot be left out of memory"
        ),
        dark=dark,
        legend=True,
        caption_width=_CAPTION,
    )
