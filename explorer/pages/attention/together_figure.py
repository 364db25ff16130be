"""The figure of attention beside routing: whether attended tokens share experts."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme
from explorer.ui.caption import Scope
from explorer.ui.number import number


def together_figure(
    heads: pd.DataFrame,
    *,
    attention_layer: int,
    routed: str,
    chosen: int,
    n_prompts: int,
    scope: Scope,
    dark: bool = False,
) -> go.Figure:
    """Draw how often attended keys share an expert with their query, and how often by chance.

    Parameters
    ----------
    heads : DataFrame
        The heads of ``together.routing_together``.
    attention_layer : int
        Whose heads.
    routed : str
        Name of the site whose experts.
    chosen : int
        Head that is marked.
    """
    x = np.arange(len(heads))
    share = heads["share"].to_numpy(dtype=np.float64)
    up = heads["share_high"].to_numpy(dtype=np.float64) - share
    down = share - heads["share_low"].to_numpy(dtype=np.float64)
    known = heads.assign(pairs=heads["pairs"].astype("float64"))
    mine = (heads["head"] == chosen).to_numpy()
    figure = go.Figure(
        [
            _chance(x, known, "chance_distance", "same distance", "diamond-open", dark),
            _chance(x, known, "chance_random", "any earlier token", "line-ew-open", dark),
            *(
                go.Scatter(
                    x=x[part],
                    y=share[part],
                    mode="markers",
                    marker={"size": 11, "color": color, "symbol": symbol},
                    error_y={
                        "type": "data",
                        "array": up[part],
                        "arrayminus": down[part],
                        "thickness": 1.5,
                    },
                    customdata=known.loc[part, ["head", "pairs", "lift"]].to_numpy(np.float64),
                    hovertemplate="head %{customdata[0]:d}: %{y:.1%} of the attended keys share "
                    "an expert<br>%{customdata[1]:,d} pairs; %{customdata[2]:.2f}× the same "
                    "distance<extra></extra>",
                    name=name,
                )
                for part, name, color, symbol in (
                    (~mine, "attended keys", theme.accent(dark), "circle"),
                    (
                        mine,
                        f"attended keys, head {chosen}",
                        theme.hue("vermillion", dark),
                        "square",
                    ),
                )
            ),
        ]
    )
    step = -(-len(heads) // 32) or 1
    figure.update_xaxes(
        title=f"attention head of layer {attention_layer}",
        range=[-0.6, len(heads) - 0.4],
        tickmode="array",
        tickvals=x[::step],
        ticktext=[str(head) for head in heads["head"].tolist()[::step]],
    )
    figure.update_yaxes(title="share of pairs (weighted)", tickformat=".0%")
    return theme.finish(
        figure,
        title=f"Pairs that share an expert of layer {routed} (share, weighted by attention)",
        caption=scope.caption(
            f"{n_prompts:,} prompts",
            "bars: 9 of 10 draws of prompts with replacement",
            "baselines: keys of the same prompt at the same distance, and any earlier key",
            "the query itself and the prompt's first token left out",
            f"recorded keys hold {number(heads['covered'].mean(), '.0%')} of the attention",
        ),
        dark=dark,
        height=340,
        legend=True,
    )


def _chance(
    x: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    heads: pd.DataFrame,
    column: str,
    name: str,
    symbol: str,
    dark: bool,
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=heads[column].to_numpy(dtype=np.float64),
        mode="markers",
        marker={
            "symbol": symbol,
            "size": 12,
            "color": theme.foreground(dark),
            "line": {"width": 2, "color": theme.foreground(dark)},
        },
        hovertemplate=f"by chance ({name}): %{{y:.1%}}<extra></extra>",
        name=f"by chance, {name}",
    )
