"""Figures of two runs against each other."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.text import counted
from explorer.ui import theme
from explorer.ui.heatmap import expert_heatmap, ratio_scale
from explorer.ui.wording import Scope, label, site_name

SIDES = {"a": ("A", "blue", "circle"), "b": ("B", "vermillion", "square")}


def change_heatmap(change: pd.DataFrame, *, caption: str, dark: bool = False) -> go.Figure:
    """Draw how each expert's share of its layer changed from A to B.

    Parameters
    ----------
    change : DataFrame
        From ``explorer.pages.compare_runs.data.load_change``.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, share A, share B].
    """
    figure = expert_heatmap(
        change,
        "change",
        ["share_a", "share_b"],
        hover="share A %{customdata[3]:.2%}, share B %{customdata[4]:.2%}",
        missing_hover="not in both runs",
        scale=ratio_scale("share in B / share in A"),
        dark=dark,
    )
    n_sites = len(change[["layer", "site"]].drop_duplicates())
    return theme.finish(
        figure,
        title="Where the load went: share in B over share in A (log2)",
        caption=caption,
        dark=dark,
        height=150 + 22 * max(8, n_sites),
    )


def over_layers(
    tables: dict[str, pd.DataFrame], column: str, *, title: str, caption: str, dark: bool = False
) -> go.Figure:
    """Draw a quantity over the layers of both runs, on the same axes.

    Parameters
    ----------
    tables : dict
        ``"a"`` and ``"b"``: rows with ``layer, site`` and the column, in order.
    """
    figure = go.Figure()
    several = any(bool((table["site"] > 0).any()) for table in tables.values())
    for side, table in tables.items():
        name, color, symbol = SIDES[side]
        names = [site_name(row.layer, row.site, several=several) for row in table.itertuples()]
        form = {"color": theme.hue(color, dark), "dash": "solid" if side == "a" else "dash"}
        figure.add_trace(
            theme.line(
                np.arange(len(table)),
                table[column],
                name,
                form=form,
                symbol=symbol,
                customdata=names,
                hover="layer %{customdata}: %{y:.4g}",
            )
        )
    longest = max(tables.values(), key=len)
    theme.layer_axis(figure, longest, title="decoder layer (n-th with a router)")
    # the figure's title has the name; both are too long for the height
    figure.update_yaxes(title=title.partition(" (")[2].rstrip(")") or title, rangemode="tozero")
    return theme.finish(
        figure, title=title, caption=caption, dark=dark, legend=True, caption_width=60
    )


def divergence_over_layers(table: pd.DataFrame, *, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw how often the same tokens keep their experts, layer by layer.

    Parameters
    ----------
    table : DataFrame
        From ``explorer.pages.compare_runs.data.token_divergence``.
    scope : Scope
        Of the first run's tokens.
    """
    tokens, common = int(table["tokens"].max()), int(table["common"].max())
    spread = f"{tokens:,} of {common:,} common tokens, evenly spread"
    figure = go.Figure()
    lines = {
        "jaccard": ("Jaccard of the sets", theme.hue("blue", dark), "solid", "circle"),
        "exact_set": ("same set", theme.hue("orange", dark), "dash", "square"),
        "top_1": ("same first expert", theme.hue("green", dark), "dot", "diamond"),
        "chance": ("Jaccard of random sets", theme.foreground(dark), "dot", "line-ew"),
    }
    if "js" in table:
        name = "divergence of the weights (Jensen-Shannon, nats)"
        lines["js"] = (name, theme.hue("purple", dark), "dashdot", "triangle-up")
    for column, (name, color, dash, symbol) in lines.items():
        form = {"color": color, "dash": dash}
        figure.add_trace(
            theme.line(np.arange(len(table)), table[column], name, form=form, symbol=symbol)
        )
    theme.layer_axis(figure, table)
    figure.update_yaxes(title="share of tokens, or mean", range=[0, 1.04])
    return theme.finish(
        figure,
        title="The same tokens in both runs: how far their experts agree (0 to 1)",
        caption=scope.caption(
            "at the same place of the same prompts", *([spread] if tokens < common else [])
        ),
        dark=dark,
        legend=True,
    )


def mismatch_over_layers(table: pd.DataFrame, *, caption: str, dark: bool = False) -> go.Figure:
    """Draw the share of tokens whose experts differ between two sides, layer by layer.

    Parameters
    ----------
    table : DataFrame
        ``layer, site, mismatched``.
    """
    figure = go.Figure(
        theme.line(
            np.arange(len(table)),
            table["mismatched"],
            "experts differ",
            form={"color": theme.hue("vermillion", dark)},
            symbol="circle",
        )
    )
    theme.layer_axis(figure, table)
    figure.update_yaxes(title="share of tokens", rangemode="tozero", tickformat=".1%")
    title = "Where the two sides part: tokens whose experts differ, by layer"
    return theme.finish(figure, title=title, caption=caption, dark=dark, height=300)


def against(
    stretches: pd.DataFrame,
    quantity: str,
    *,
    title: str,
    scope: Scope,
    prompts: str,
    dark: bool = False,
) -> go.Figure:
    """Draw a quantity of model B over that of model A, one point a stretch of text.

    Parameters
    ----------
    stretches : DataFrame
        From ``explorer.pages.compare_runs.data.two_models``.
    quantity : {"entropy", "margin", "loss"}
    scope : Scope
        Of the first run's tokens.
    prompts : str
        How many there are.
    """
    known = stretches.dropna(subset=[f"{quantity}_a", f"{quantity}_b"])
    tokens = known[["tokens_a", "tokens_b"]].sum()
    shown = known.iloc[:: max(1, -(-len(known) // 4000))]
    figure = go.Figure(
        go.Scattergl(
            x=shown[f"{quantity}_a"].to_numpy(dtype=np.float64),
            y=shown[f"{quantity}_b"].to_numpy(dtype=np.float64),
            mode="markers",
            marker={"size": 5, "color": theme.accent(dark), "opacity": 0.45},
            hovertext=[label(text, limit=40, spaces=True) for text in shown["text"]],
            hovertemplate="%{hovertext}<br>A %{x:.3f}, B %{y:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title=f"{title} in A")
    figure.update_yaxes(title=f"{title} in B")
    notes = [
        f"n is of A, and {int(tokens['tokens_b']):,} in B",
        f"{counted(len(known), 'stretch', 'stretches')} of {prompts}",
        *([f"drawn: {len(shown):,} of them"] if len(shown) < len(known) else []),
        *(
            [f"{len(stretches) - len(known):,} without a value"]
            if len(known) < len(stretches)
            else []
        ),
        "sums over the tokens of a stretch" if quantity == "loss" else "means over layers",
    ]
    return theme.finish(
        figure,
        title=f"{title[:1].upper()}{title[1:]}: both models on the same stretches",
        caption=scope._replace(n_tokens=int(tokens["tokens_a"])).caption(*notes),
        dark=dark,
        caption_width=60,
    )
