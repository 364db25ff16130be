"""Figures of balance: metrics over layers beside their sampling floor, and capacity."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.registry import Registry
from explorer.ui import theme
from explorer.ui.caption import Scope, site_hover, site_name
from explorer.ui.number import number


class MetricText(NamedTuple):
    """How a load metric is called.

    Attributes
    ----------
    label : str
        With unit and direction.
    meaning : str
        One sentence for a newcomer.
    """

    label: str
    meaning: str


METRIC_TEXTS: Registry[MetricText] = Registry("load metric")
for _name, _text in {
    "max_violation": MetricText(
        "MaxVio (busiest expert's excess, fair shares)",
        "How far the busiest expert is above a fair share; 0 = even, 1 = twice its share.",
    ),
    "coefficient_of_variation": MetricText(
        "coefficient of variation (standard deviation / mean load)",
        "Spread of the experts' loads around their mean; 0 = even.",
    ),
    "gini": MetricText(
        "Gini coefficient (0 = even, 1 = one expert does all)",
        "Twice the area between the Lorenz curve and the diagonal.",
    ),
    "normalized_entropy": MetricText(
        "load entropy (share of ln E; 1 = even)",
        "Entropy of the experts' shares, over its largest value.",
    ),
    "dead_experts": MetricText(
        "dead experts (count)",
        "Experts that no token chose; with few tokens some are expected.",
    ),
}.items():
    METRIC_TEXTS.add(_name)(_text)


def balance_over_layers(
    table: pd.DataFrame, metric: str, *, scope: Scope, dark: bool = False
) -> go.Figure:
    """Draw a load metric over the layers, with what uniform routing would give.

    Parameters
    ----------
    table : DataFrame
        From ``explorer.queries.balance.balance_table``.
    metric : str
        A name in ``METRIC_TEXTS``.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site].
    """
    text = METRIC_TEXTS[metric]
    several = bool((table["site"] > 0).any())
    x = np.arange(len(table))
    grey = theme.foreground(dark)
    figure = go.Figure()
    for end, fill in (("low", None), ("high", "tonexty")):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=table[f"{metric}_floor_{end}"].to_numpy(dtype=np.float64),
                mode="lines",
                line={"width": 0, "color": grey},
                fill=fill,
                fillcolor="rgba(128, 128, 128, 0.35)",
                name=f"floor, {end}",
                showlegend=False,
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=table[f"{metric}_floor"].to_numpy(dtype=np.float64),
            mode="lines",
            line={"dash": "dot", "color": grey},
            name="uniform routing of as many tokens (mean, 5–95 %)",
            hovertemplate="uniform: %{y:.3g}<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=table[metric].to_numpy(dtype=np.float64),
            customdata=table[["layer", "site"]].to_numpy(),
            mode="lines+markers",
            marker={"size": 9},
            line={"color": theme.accent(dark), "width": 2.5},
            name="measured",
            hovertemplate=site_hover(several=several) + ": %{y:.4g}<extra></extra>",
        )
    )
    step = 1 if len(table) <= 60 else -(-len(table) // 24)
    names = [
        site_name(layer, site, several=several)
        for layer, site in zip(table["layer"], table["site"], strict=True)
    ]
    figure.update_xaxes(
        title="decoder layer.router" if several else "decoder layer",
        tickmode="array",
        tickvals=x[::step],
        ticktext=names[::step],
    )
    figure.update_yaxes(title=text.label, rangemode="tozero")
    figure.update_layout(clickmode="event+select")
    return theme.finish(
        figure,
        title=f"Balance over layers: {text.label}",
        caption=scope.caption("grey: what uniform routing gives by chance (sampling floor)"),
        dark=dark,
        legend=True,
    )


def capacity_curve(
    curve: pd.DataFrame,
    *,
    layer: str,
    capacity_factor: float,
    zero_from: float,
    n_batches: int,
    scope: Scope,
    dark: bool = False,
) -> go.Figure:
    """Draw what a capacity limit drops, for both drop policies.

    Parameters
    ----------
    curve : DataFrame
        From ``explorer.queries.balance.capacity_table``.
    layer : str
    capacity_factor : float
        The chosen one, marked.
    zero_from : float
        Smallest factor that drops nothing: 1 + the largest MaxVio of a batch.
    n_batches : int
    """
    figure = go.Figure()
    position, probs = theme.hue("vermillion", dark), theme.hue("green", dark)
    lines = (
        ("assignments", "assignments dropped (both policies)", theme.accent(dark), "solid"),
        ("weight_position", "combine weight dropped, policy position", position, "dash"),
        ("weight_probs", "combine weight dropped, policy probs", probs, "dash"),
        ("tokens_position", "tokens without any expert, policy position", position, "dot"),
        ("tokens_probs", "tokens without any expert, policy probs", probs, "dot"),
    )
    for column, name, paint, dash in lines:
        figure.add_trace(
            go.Scatter(
                x=curve["capacity_factor"].to_numpy(dtype=np.float64),
                y=curve[column].to_numpy(dtype=np.float64),
                mode="lines",
                line={"color": paint, "dash": dash, "width": 2.5},
                name=name,
                hovertemplate=f"{name}<br>%{{y:.2%}} at factor %{{x:.2f}}<extra></extra>",
            )
        )
    figure.add_vline(
        capacity_factor, line={"color": theme.foreground(dark), "width": 1, "dash": "dot"}
    )
    figure.update_xaxes(title="capacity factor (× uniform load of a batch)")
    figure.update_yaxes(title="share dropped", tickformat=".1%", rangemode="tozero")
    figure.update_layout(
        legend={"orientation": "v", "x": 1, "xanchor": "right", "y": 1, "yanchor": "top"}
    )
    batches = "batch" if n_batches == 1 else "batches"
    return theme.finish(
        figure,
        title=f"What a capacity limit drops in layer {layer} (share of the total)",
        caption=scope.caption(
            f"limit per batch, {n_batches:,} {batches} (forward passes)",
            f"nothing is dropped from factor {number(zero_from, '.2f')} on; "
            "at factor 1 uniform load drops nothing",
        ),
        dark=dark,
        height=420,
    )
