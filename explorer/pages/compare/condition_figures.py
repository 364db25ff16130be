"""Figures of conditions: the 2 x 2 of weights and routing, and where routing flips."""

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from capture.swap.losses import critical
from explorer.ui import theme
from explorer.ui.wording import label, labels

# (weights, routing) -> name, hue, form
_CELLS = {
    ("condition", "condition"): ("own weights, own routing", "blue", "circle"),
    ("condition", "base"): ("own weights, base routing", "orange", "square"),
    ("base", "condition"): ("base weights, own routing", "green", "diamond"),
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_LINES = 8
_CAPTION = 60
_HEIGHT = 460  # pixels, names under the plot included


def loss_two_by_two(cells: pd.DataFrame, *, tokens: int, dark: bool = False) -> go.Figure:
    """Draw the change in loss of conditions, by whose weights and whose routing.

    Parameters
    ----------
    cells : DataFrame
        Table ``conditions`` of a comparison, without the base.
    """
    names = list(dict.fromkeys(cells["condition"]))
    figure = go.Figure()
    for (weights, routing), (name, color, symbol) in _CELLS.items():
        rows = cells[(cells["weights"] == weights) & (cells["routing"] == routing)]
        figure.add_trace(
            go.Scatter(
                x=rows["loss_change"].to_numpy(dtype=np.float64),
                y=[names.index(one) for one in rows["condition"]],
                error_x={"array": _margins(rows), "width": 3},
                mode="markers",
                marker={"color": theme.hue(color, dark), "symbol": symbol, "size": 9},
                name=name,
                hovertemplate="%{x:+.4f} nats<extra>%{fullData.name}</extra>",
            )
        )
    figure.add_vline(0.0, line=theme.dotted(dark))
    figure.update_xaxes(title="change in loss (nats a token; 0 = the base model)")
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=labels(names, limit=44),
        range=[len(names) - 0.5, -0.5],
    )
    return theme.finish(
        figure,
        title="What conditions cost, and how much of it is routing",
        caption=f"n = {tokens:,} held-out tokens; bars: 95% interval of the paired "
        "difference over texts",
        dark=dark,
        height=150 + 26 * max(4, len(names)),
        legend=True,
    )


def _margins(rows: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Return half of the 95% intervals: Student's t over as many texts as there are."""
    degrees = rows["sequences"].fillna(0) - 1
    return np.asarray(degrees.map(critical) * rows["loss_se"], dtype=np.float64)


def flips_over_layers(flips: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw the share of tokens whose set of experts changed, layer by layer.

    Parameters
    ----------
    flips : DataFrame
        Table ``flips`` of a comparison; layer -1 is any layer.
    """
    rows = flips[flips["layer"] >= 0]
    figure = _lines(
        rows.sort_values(["layer", "site"]), "layer", "set_flips", dark, "layer %{x}: %{y:.2%}"
    )
    figure.update_xaxes(title="decoder layer", dtick=1 if rows["layer"].nunique() < 25 else None)
    figure.update_yaxes(title="tokens with another set (share)", tickformat=".1%")
    theme.finish(
        figure,
        title="Routing flips by layer (share of tokens)",
        caption=f"n = {int(rows['tokens'].max()):,} tokens; set of experts against the base's; "
        "grey: conditions with fewer flips",
        dark=dark,
        height=_HEIGHT,
        caption_width=_CAPTION,
    )
    return _legend_below(figure)


def flip_margins(margins: pd.DataFrame, flips: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw the share of flipped tokens over the base model's margin, layers together.

    Parameters
    ----------
    margins, flips : DataFrame
        Tables ``flip_margins`` and ``flips`` of a comparison.
    """
    known = margins[margins["layer"] >= 0].assign(
        flipped=lambda table: table["set_flips"] * table["tokens"]
    )
    sums = known.groupby(["condition", "bin"], sort=False)[["flipped", "tokens"]].sum()
    middle = known.groupby("bin")["margin_high"].median()
    table = sums.reset_index()
    table = table.assign(
        set_flips=table["flipped"] / table["tokens"].replace(0, np.nan),
        margin=table["bin"].map(middle),
    )
    figure = _lines(table.sort_values("bin"), "margin", "set_flips", dark, "%{y:.2%}")
    whole = flips[(flips["layer"] == -1) & flips["margin_auc"].notna()]
    layers = flips[(flips["layer"] >= 0) & flips["margin_auc"].notna()]
    auc = (whole if len(whole) else layers)["margin_auc"]
    figure.update_xaxes(title="margin of the base model's choice (upper end of the bin)")
    figure.update_yaxes(title="tokens with another set (share)", tickformat=".0%")
    theme.finish(
        figure,
        title="Flips are of unsure tokens",
        caption="all layers together"
        + ("" if auc.empty else f"; margin tells flips from the rest with AUC {auc.median():.3f}"),
        dark=dark,
        height=_HEIGHT,
        caption_width=_CAPTION,
    )
    return _legend_below(figure)


def _legend_below(figure: go.Figure) -> go.Figure:
    """Put the names under the plot: on half a page they need several lines."""
    lines = -(-sum(trace.showlegend for trace in figure.data) // 2)
    return figure.update_layout(
        legend={"yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        margin={"b": 64 + 20 * lines},
    )


def _lines(rows: pd.DataFrame, x: str, y: str, dark: bool, hover: str) -> go.Figure:
    """Draw one line a condition, the ones with most flips in colour."""
    order = rows.groupby("condition")[y].mean().sort_values(ascending=False)
    figure = go.Figure()
    for place, condition in enumerate(order.index):
        line = rows[rows["condition"] == condition]
        colored = place < _LINES - 1
        form = {
            "color": theme.hues(dark)[place if colored else -1],
            "dash": _DASHES[place % len(_DASHES)],
        }
        name = label(str(condition), limit=30)
        figure.add_trace(
            theme.line(
                line[x], line[y], name, form=form, symbol="circle", showlegend=colored, hover=hover
            )
        )
    return figure
