"""Figures of load: who gets how much work, and what serving it asks of GPUs and batches."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.metrics.load import Floor, lorenz_curve
from explorer.registry import Registry
from explorer.text import counted
from explorer.ui import theme
from explorer.ui.heatmap import clickable_heatmap, expert_heatmap, ground, log_ratio, ratio_scale
from explorer.ui.wording import Scope, domain_labels, number, site_hover, site_name

_RATIO = ratio_scale("× uniform share")
_CELL_HOVER = (
    "%{customdata[4]:,d} assignments<br>share %{customdata[3]:.3%} = %{customdata[5]:.2f}× uniform"
)
# characters of a caption line on half a page
HALF_PAGE = 60
# hue, dash, pattern of each placement
_LOOKS = {
    "in order": ("grey", "dot", "/"),
    "EPLB, by node": ("orange", "dash", "."),
    "EPLB, global": ("blue", "solid", ""),
    "across windows": ("green", "dashdot", "x"),
}


def load_heatmap(
    load: pd.DataFrame,
    *,
    scope: Scope,
    order: str = "expert",
    caption_width: int = theme.CAPTION_WIDTH,
    dark: bool = False,
) -> go.Figure:
    """Draw how much work every expert of every layer got, against a fair share.

    Parameters
    ----------
    load : DataFrame
        From ``queries.load.expert_load``.
    order : {"expert", "load"}
        Experts by id, or each layer's experts by falling load.
    caption_width : int, characters
        Of a line; less on half a page.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, share, assignments, ratio, rank].
    """
    rank = load.groupby(["layer", "site"], sort=False)["assignments"].rank(
        method="first", ascending=False
    )
    figure = expert_heatmap(
        load.assign(rank=rank, log_ratio=log_ratio(load["ratio"].to_numpy(dtype=np.float64))),
        "log_ratio",
        ["share", "assignments", "ratio", "rank"],
        hover=_CELL_HOVER + "<br>rank %{customdata[6]} in its layer",
        missing_hover="no assignment of these tokens",
        scale=_RATIO,
        dark=dark,
        by_rank=rank if order == "load" else None,
    )
    widths = load.groupby(["layer", "site"])["expert_id"].size()
    uniform = uniform_text(load)
    absent = ["grey: no such expert"] if widths.nunique() > 1 else []
    theme.finish(
        figure,
        title="Load of every expert (share of its layer's assignments / uniform share)",
        caption=scope.caption(f"1× = uniform share {uniform}", *absent),
        dark=dark,
        height=int(np.clip(150 + 26 * len(widths), 300, 900)),
        caption_width=caption_width,
    )
    return ground(figure, dark, diverging=True)


def load_bars(
    load: pd.DataFrame, *, scope: Scope, layer: str = "", dark: bool = False
) -> go.Figure:
    """Draw the shares of one site's experts, most loaded first, with the uniform share as a line.

    Parameters
    ----------
    load : DataFrame
        From ``queries.load.expert_load`` for one layer and site.
    layer : str, optional
        How the site is called; by default as the load says.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, share, assignments, ratio].
    """
    rows = load.sort_values(["assignments", "expert_id"], ascending=[False, True])
    columns = ["layer", "site", "expert_id", "share", "assignments", "ratio"]
    fair = 1 / len(rows) if len(rows) else float("nan")
    position = np.arange(len(rows))
    figure = go.Figure(
        go.Bar(
            x=position,
            y=rows["share"].to_numpy(dtype=np.float64),
            customdata=rows[columns].to_numpy(dtype=np.float64),
            marker={"color": theme.accent(dark)},
            hovertemplate="expert %{customdata[2]}<br>" + _CELL_HOVER + "<extra></extra>",
            name="share of assignments",
        )
    )
    figure.add_hline(
        fair,
        line=theme.dotted(dark, 2),
        annotation_text=f"uniform share {fair:.2%}",
        annotation_position="top right",
    )
    step = 1 if len(rows) <= 60 else -(-len(rows) // 32)
    experts = rows["expert_id"].tolist()
    figure.update_xaxes(
        title="expert id, most loaded first",
        range=[-0.6, len(rows) - 0.4],
        tickmode="array",
        tickvals=position[::step],
        ticktext=[str(expert) for expert in experts[::step]],
        tickangle=0 if len(rows) <= 32 else -90,
    )
    figure.update_yaxes(title="share of assignments", tickformat=".1%", rangemode="tozero")
    figure.update_layout(clickmode="event+select", showlegend=False)
    return theme.finish(
        figure,
        title=f"Load of the experts of layer {layer or _layer(load)} (share of assignments)",
        caption=scope.caption(f"dotted: uniform share {fair:.2%}"),
        dark=dark,
    )


def lorenz(load: pd.DataFrame, *, scope: Scope, layer: str = "", dark: bool = False) -> go.Figure:
    """Draw the Lorenz curve of one site: how much work the least loaded experts do together."""
    curve = lorenz_curve(load["assignments"])
    figure = go.Figure(
        [
            go.Scatter(
                x=[0, 1],
                y=[0, 1],
                mode="lines",
                line=theme.dotted(dark, 2),
                name="uniform",
                hoverinfo="skip",
            ),
            go.Scatter(
                x=curve.experts,
                y=curve.load,
                mode="lines",
                line={"color": theme.accent(dark), "width": 3},
                fill="tonexty",
                name="measured",
                hovertemplate="the least loaded %{x:.0%} of the experts<br>do %{y:.1%} of the work"
                "<extra></extra>",
            ),
        ]
    )
    # inside, so that the plot is as high as the bars beside it
    figure.update_layout(legend={"orientation": "v", "x": 0.02, "y": 0.98, "yanchor": "top"})
    figure.update_xaxes(title="share of experts, least loaded first", tickformat=".0%")
    figure.update_yaxes(title="share of assignments", tickformat=".0%")
    return theme.finish(
        figure,
        title=f"Lorenz curve of layer {layer or _layer(load)} (cumulative share of assignments)",
        # as long as that of the bars beside it, so that both plots begin at one height
        caption=scope.caption(f"dotted: uniform share {1 / max(1, len(load)):.2%}"),
        dark=dark,
    )


def domain_heatmap(
    load: pd.DataFrame, *, caption: str, by: str = "domain", layer: str = "", dark: bool = False
) -> go.Figure:
    """Draw the load of one site's experts in each domain (or phase), against a fair share.

    Parameters
    ----------
    load : DataFrame
        From ``queries.load.expert_load_by_domain``, ``_by_phase`` or ``_by_step``, or several of
        ``queries.load.expert_load``.
    by : {"domain", "phase", "step", "checkpoint"}
        The column that makes the rows.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, share, assignments, ratio, row].
    """
    parts = list(dict.fromkeys(load[by]))
    width = int(load["n_experts"].max()) if len(load) else 0
    columns = ["layer", "site", "expert_id", "share", "assignments", "ratio"]
    ids = load[columns].to_numpy(dtype=np.float64).reshape(len(parts), width, len(columns))
    rows = np.broadcast_to(np.arange(len(parts))[:, None, None], (len(parts), width, 1))
    ids = np.concatenate([ids, rows], axis=2)
    totals = load.groupby(by, sort=False)["assignments"].sum()
    names = domain_labels(parts)
    figure = clickable_heatmap(
        log_ratio(ids[:, :, 5]),
        ids=ids,
        hover="%{text}, expert %{customdata[2]}<br>" + _CELL_HOVER,
        missing_hover="%{text}: no assignment",
        hover_text=[name for name in names for _ in range(width)],
        x_labels=[str(column) for column in range(width)],
        y_labels=[
            f"{name} ({_short(int(totals[part]))})" for name, part in zip(names, parts, strict=True)
        ],
        x_title="expert",
        y_title=f"{by} (assignments)",
        scale=_RATIO,
        dark=dark,
    )
    theme.finish(
        figure,
        title=f"Load by {by} in layer {layer or _layer(load)} "
        f"(share of the {by}'s assignments / uniform share)",
        caption=caption,
        dark=dark,
        height=int(np.clip(150 + 26 * len(parts), 300, 900)),
    )
    return ground(figure, dark, diverging=True)


def floor_note(floor: Floor) -> str:
    """Return what uniform routing of the same tokens gives, for captions and help texts."""
    return (
        f"uniform routing of as many tokens gives {number(floor.mean)} "
        f"({number(floor.low)} to {number(floor.high)} in 9 of 10 draws)"
    )


def _layer(load: pd.DataFrame) -> str:
    if load.empty:
        return "–"
    layer, site = int(load["layer"].iloc[0]), int(load["site"].iloc[0])
    return site_name(layer, site, several=site > 0)


def uniform_text(load: pd.DataFrame) -> str:
    """Return the share of each expert where all have the same, for captions."""
    widths = sorted(set(load["n_experts"]))
    return " or ".join(f"1/{width}" for width in widths)


def _short(count: int) -> str:
    """Return a count in at most four digits."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


class MetricText(NamedTuple):
    """How a load metric is called.

    Attributes
    ----------
    label : str
        With unit and direction.
    meaning : str
        One sentence for a newcomer.
    add : float
        To the metric, for what pages show.
    form : str
        Of the number.
    """

    label: str
    meaning: str
    add: float = 0.0
    form: str = ".3f"


METRIC_TEXTS: Registry[MetricText] = Registry(
    "load metric",
    max_violation=MetricText(
        "busiest expert (× fair share)",
        "Load of the busiest expert; 1 = even, 2 = twice its share. MaxVio is this less 1.",
        add=1.0,
        form=".2f",
    ),
    coefficient_of_variation=MetricText(
        "coefficient of variation (standard deviation / mean load)",
        "Spread of the experts' loads around their mean; 0 = even.",
    ),
    gini=MetricText(
        "Gini coefficient (0 = even, 1 = one expert does all)",
        "Twice the area between the Lorenz curve and the diagonal.",
    ),
    normalized_entropy=MetricText(
        "load entropy (100% = even)",
        "Entropy of the experts' shares, over its largest value.",
        form=".1%",
    ),
    dead_experts=MetricText(
        "dead experts (count)",
        "Experts that no token chose; with few tokens some are expected.",
        form=".0f",
    ),
)


def balance_over_layers(
    table: pd.DataFrame, metric: str, *, scope: Scope, dark: bool = False
) -> go.Figure:
    """Draw a load metric over the layers, with what uniform routing would give.

    Parameters
    ----------
    table : DataFrame
        From ``explorer.queries.load.balance_table``.
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
    uniform = "uniform routing of as many tokens (mean, 5–95%)"
    floor, low, high = (table[f"{metric}_floor{part}"] + text.add for part in ("", "_low", "_high"))
    figure = go.Figure(
        [
            *theme.band(x, low, high),
            theme.line(x, floor, uniform, form=theme.dotted(dark, 2)),
            theme.line(
                x,
                table[metric] + text.add,
                "measured",
                form={"color": theme.accent(dark), "width": 2.5},
                symbol="circle",
                customdata=table[["layer", "site"]].to_numpy(),
                hover=site_hover(several=several) + f": %{{y:{text.form}}}",
            ),
        ]
    )
    theme.layer_axis(figure, table)
    percent = ".0%" if text.form.endswith("%") else None
    figure.update_yaxes(title=text.label, rangemode="tozero", tickformat=percent)
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
        From ``data.capacity_table``.
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
    hover = "%{y:.2%} at factor %{x:.2f}"
    for column, name, paint, dash in lines:
        form = {"color": paint, "dash": dash, "width": 2.5}
        figure.add_trace(
            theme.line(curve["capacity_factor"], curve[column], name, form=form, hover=hover)
        )
    figure.add_vline(capacity_factor, line=theme.dotted(dark))
    figure.update_xaxes(title="capacity factor (× uniform load of a batch)")
    figure.update_yaxes(title="share dropped", tickformat=".1%", rangemode="tozero")
    figure.update_layout(
        legend={"orientation": "v", "x": 1, "xanchor": "right", "y": 1, "yanchor": "top"}
    )
    return theme.finish(
        figure,
        title=f"What a capacity limit drops in layer {layer} (share of the total)",
        caption=scope.caption(
            f"limit per batch (forward pass), of {counted(n_batches, 'batch', 'batches')}",
            f"nothing is dropped from factor {number(zero_from, '.2f')} on; "
            "at factor 1 uniform load drops nothing",
        ),
        dark=dark,
        height=420,
    )


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
                    "color": theme.hue(_LOOKS[str(policy)][0], dark),
                    "pattern": {"shape": _LOOKS[str(policy)][2], "solidity": 0.25},
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
        caption_width=HALF_PAGE,
    )


def balancedness_lines(
    table: pd.DataFrame, *, scope: Scope, held_out: bool = False, dark: bool = False
) -> go.Figure:
    """Draw the balancedness of every layer under each placement, or its straggler factor.

    Parameters
    ----------
    table : DataFrame
        From ``data.balance_of_gpus``; of windows that were held out ``data.Judgement.stragglers``,
        whose straggler factors are drawn.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site].
    """
    figure = go.Figure()
    y = "straggler" if held_out else "balancedness"
    for policy, rows in table.groupby("policy", sort=False):
        name = str(policy)
        figure.add_trace(
            theme.line(
                np.arange(len(rows)),
                rows[y],
                name,
                form={"color": theme.hue(_LOOKS[name][0], dark), "dash": _LOOKS[name][1]},
                symbol="circle",
                customdata=np.column_stack([rows[["layer", "site"]], rows["straggler"]]),
                hover="layer %{customdata[0]}: %{y:.3f}, straggler × %{customdata[2]:.2f}",
            )
        )
    theme.layer_axis(figure, table[["layer", "site"]].drop_duplicates())
    figure.update_layout(clickmode="event+select")
    if held_out:
        figure.update_yaxes(title="largest / mean GPU load")
        title, note = "Straggler factor of layers (1 = even)", "mean of windows that were held out"
    else:
        figure.update_yaxes(title="balancedness (mean / largest GPU load)", range=[0, 1.04])
        title = "Balancedness of the GPUs over layers (1 = even)"
        note = "its inverse is the straggler factor"
    return theme.finish(
        figure,
        title=title,
        caption=scope.caption(note),
        dark=dark,
        legend=True,
        caption_width=HALF_PAGE,
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
        caption_width=HALF_PAGE,
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
        caption_width=HALF_PAGE,
    )
