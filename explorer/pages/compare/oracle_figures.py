"""Figure of the last layer's oracle: what choosing experts by the answer would give."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme


def oracle_bound(rows: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw the loss of the best of n random sets of experts beside the model's own.

    Parameters
    ----------
    rows : DataFrame
        Table ``oracle`` of a comparison.
    """
    by_kind = rows.drop_duplicates("kind").set_index("kind")
    sets = int(rows["sets"].iloc[0])
    drawn = rows[rows["kind"].isin(("random", "best of n", "best"))]
    drawn = drawn.assign(n=drawn["n"].fillna(drawn["kind"].map({"random": 1, "best": sets})))
    drawn = drawn.sort_values("n")
    blue, bound = theme.accent(dark), theme.hue("vermillion", dark)
    figure = go.Figure(
        go.Scatter(
            x=drawn["n"].to_numpy(dtype=np.float64),
            y=drawn["loss"].to_numpy(dtype=np.float64),
            mode="lines+markers",
            marker={
                "size": 9,
                "color": [bound if kind == "best" else blue for kind in drawn["kind"]],
                "symbol": ["diamond" if k == "best" else "circle" for k in drawn["kind"]],
            },
            line={"color": blue, "width": 1},
            hovertemplate="best of %{x:,} sets: %{y:.4f} nats<extra></extra>",
            showlegend=False,
        )
    )
    own = float(by_kind.loc["model", "loss"])
    figure.add_hline(
        own,
        line={"color": theme.foreground(dark), "dash": "dot", "width": 1},
        annotation={"text": f"the model's own router {own:.4f}", "yanchor": "bottom"},
    )
    figure.update_xaxes(title="random sets of experts to choose the best of", type="log", dtick=1)
    figure.update_yaxes(title="loss (nats a token)")
    which = "all" if bool(rows["enumerated"].iloc[0]) else "random"
    return theme.finish(
        figure,
        title=f"A bound: experts of layer {int(rows['layer'].iloc[0])} chosen by the answer",
        caption=f"n = {int(rows['tokens'].iloc[0]):,} held-out tokens; {which} {sets:,} sets; the "
        "last point sees the next token: no router can",
        dark=dark,
    )
