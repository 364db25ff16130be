"""How open the gates of a router stood."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme


def gate_histogram(rows: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw how often the gates of each layer had which value.

    Parameters
    ----------
    rows : DataFrame
        Of table ``gate_values`` of a comparison, of one router; seeds are added up.
    """
    counts = rows.pivot_table(index="layer", columns="low", values="gates", aggfunc="sum")
    table = counts.to_numpy(dtype=np.float64)
    share = table / table.sum(axis=1, keepdims=True)
    width = float((rows["high"] - rows["low"]).iloc[0])
    figure = go.Figure(
        go.Heatmap(
            z=share,
            x=counts.columns.to_numpy(dtype=np.float64) + width / 2,
            y=[str(layer) for layer in counts.index],
            colorscale=theme.SEQUENTIAL,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "share of the gates"}, "tickformat": ".0%"},
            hovertemplate="layer %{y}, gates of about %{x:.3f}: %{z:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="gate: 0 = the part is skipped, 1 = used whole", range=[0, 1])
    figure.update_yaxes(title="decoder layer", type="category", autorange="reversed")
    return theme.finish(
        figure,
        title="Where the gates of each layer stood (share of their values)",
        caption=f"n = {int(table.sum(axis=1).min()):,} gates a layer, of held-out tokens",
        dark=dark,
        height=180 + 24 * len(counts),
    )
