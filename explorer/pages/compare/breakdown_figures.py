"""Where a router costs what it costs: change in loss by layer and by domain."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme
from explorer.ui.heatmap import Scale, clickable_heatmap
from explorer.ui.names import domain_labels, labels


def means_by(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the change in loss by router and layer (or domain), means over seeds.

    Returns
    -------
    DataFrame
        nats a token; one row a router, in the order of :func:`by_layer` and :func:`by_domain`.
    """
    return rows.fillna({"domain": ""}).pivot_table(
        index="router", columns=column, values="loss_change", aggfunc="mean", sort=False
    )


def by_layer(results: pd.DataFrame, *, tokens: int, dark: bool = False) -> go.Figure:
    """Draw the change in loss when one layer alone is swapped: routers by layers.

    Parameters
    ----------
    results : DataFrame
        Rows of mode ``live-layer``; ``control_loss_change``, of a random rule at the same compute
        in the same layer, is told where there is one.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row of the router, layer].
    """
    means = means_by(results, "layer")
    beside = results.pivot_table(
        index="router", columns="layer", values="control_loss_change", sort=False, dropna=False
    )
    return _changes(
        means,
        beside=beside.reindex(index=means.index, columns=means.columns),
        columns=[str(layer) for layer in means.columns],
        x_title="decoder layer that was swapped",
        hover="layer %{customdata[1]}",
        ids=means.columns.to_numpy(dtype=np.float64),
        title="Change in loss when one layer is swapped (nats a token)",
        caption=f"n = {tokens:,} held-out tokens; all other layers route as the model does; "
        "click a cell for the router",
        dark=dark,
    )


def by_domain(domains: pd.DataFrame, *, tokens: int, dark: bool = False) -> go.Figure:
    """Draw the change in loss of routers in each domain, all layers swapped.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row of the router, column of the domain].
    """
    means = means_by(domains, "domain")
    return _changes(
        means,
        columns=domain_labels(list(means.columns)),
        x_title="domain",
        hover="%{x}",
        ids=np.arange(means.shape[1], dtype=np.float64),
        title="Change in loss by domain (nats a token)",
        caption=f"n = {tokens:,} held-out tokens; all layers swapped; click a cell for the router",
        dark=dark,
    )


def _changes(
    means: pd.DataFrame,
    *,
    columns: list[str],
    x_title: str,
    hover: str,
    ids: np.ndarray[tuple[int], np.dtype[np.float64]],
    title: str,
    caption: str,
    dark: bool,
    beside: pd.DataFrame | None = None,
) -> go.Figure:
    z = means.to_numpy(dtype=np.float64)
    # one catastrophe would leave the rest without colour
    reach = float(np.nanquantile(np.abs(z), 0.9)) if np.isfinite(z).any() else 1.0
    reach = max(reach, 1e-4)
    rows = np.broadcast_to(np.arange(z.shape[0], dtype=np.float64)[:, None], z.shape)
    names = labels([str(name) for name in means.index], limit=34)
    chance = np.full_like(z, np.nan) if beside is None else beside.to_numpy(dtype=np.float64)
    texts = [
        f"{name}<br>{value:+.4f} nats" + ("" if np.isnan(other) else f" (chance {other:+.4f})")
        for name, line, others in zip(names, z, chance, strict=True)
        for value, other in zip(line, others, strict=True)
    ]
    figure = clickable_heatmap(
        z,
        ids=np.stack([rows, np.broadcast_to(ids, z.shape)], axis=-1),
        hover="%{text}<br>" + (hover if "customdata" in hover else ""),
        missing_hover="not measured",
        hover_text=texts,
        x_labels=columns,
        y_labels=names,
        x_title=x_title,
        y_title="",
        scale=Scale("nats a token", -reach, reach, neutral=0.0),
        dark=dark,
    )
    return theme.finish(
        figure,
        title=title,
        caption=f"{caption}; colours end at ± {reach:.2g}",
        dark=dark,
        height=140 + 26 * max(4, len(names)),
    )
