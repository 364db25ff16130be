"""Figures of what experts are for: shares with their intervals, and all experts of all layers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.ui import theme
from explorer.ui.heatmap import Scale, expert_heatmap, ground
from explorer.ui.wording import Scope, domain_label

_ROW = 24  # pixels of a row of dots
_CAPTION_WIDTH = 75  # characters on half a page
_LABELLED = 30  # experts that are named in a figure


class DotsAxis(NamedTuple):
    """The axis of a figure of dots.

    Attributes
    ----------
    title : str
    reference : float
        Where a dotted line is drawn; nan = nowhere.
    reference_text : str
    percent : bool
        Values are shares; else ratios.
    """

    title: str
    reference: float
    reference_text: str
    percent: bool = True


def interval_dots(
    rows: pd.DataFrame,
    axis: DotsAxis,
    *,
    title: str,
    scope: Scope,
    notes: Sequence[str] = (),
    y_title: str = "",
    dark: bool = False,
) -> go.Figure:
    """Draw one dot with its interval per row, the first row at the top.

    Parameters
    ----------
    rows : DataFrame
        ``label`` and ``hover`` (escaped), ``value``, ``low``, ``high`` (missing = no interval),
        and maybe ``expected``, which is drawn as a diamond.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row].
    """
    y, known = np.arange(len(rows)), not math.isnan(axis.reference)
    value = rows["value"].to_numpy(dtype=np.float64)
    high, low = (rows[name].to_numpy(dtype=np.float64) for name in ("high", "low"))
    ids = y[:, None].astype(np.float64)
    figure = go.Figure()
    if "expected" in rows:
        figure.add_trace(
            go.Scatter(
                x=rows["expected"].to_numpy(dtype=np.float64),
                y=y,
                mode="markers",
                marker={"symbol": "diamond-open", "size": 9, "color": theme.foreground(dark)},
                name="by chance",
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=value,
            y=y,
            mode="markers",
            marker={"size": 10, "color": theme.accent(dark)},
            error_x={
                "type": "data",
                "array": np.nan_to_num(high - value).clip(0),
                "arrayminus": np.nan_to_num(value - low).clip(0),
                "thickness": 1.5,
                "width": 3,
            },
            customdata=ids,
            text=rows["hover"].tolist(),
            hovertemplate="%{text}<extra></extra>",
            name="measured",
        )
    )
    if known:
        figure.add_vline(axis.reference, line=theme.dotted(dark, 2))
    figure.update_xaxes(
        title=axis.title, rangemode="tozero", tickformat=".0%" if axis.percent else None
    )
    figure.update_yaxes(
        title=y_title,
        range=[len(rows) - 0.5, -0.5],
        tickmode="array",
        tickvals=y,
        ticktext=rows["label"].tolist(),
        showgrid=False,
    )
    figure.update_layout(
        clickmode="event+select", hovermode="closest", showlegend="expected" in rows
    )
    return theme.finish(
        figure,
        title=title,
        caption=scope.caption(*([f"dotted: {axis.reference_text}"] if known else []), *notes),
        dark=dark,
        caption_width=_CAPTION_WIDTH,
        height=int(np.clip(150 + _ROW * len(rows), 240, 900)),
        legend="expected" in rows,
    )


def divergence_heatmap(found: pd.DataFrame, *, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw how far the domains of every expert's tokens are from those of all tokens.

    Parameters
    ----------
    found : DataFrame
        From ``specialization.divergences``.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, divergence, assignments, lift].
    """
    highest = found["divergence"].max()
    figure = expert_heatmap(
        found,
        "divergence",
        ["divergence", "assignments", "lift"],
        hover="%{customdata[3]:.3f} nats from the mix of all tokens<br>most above it: %{text}, "
        "%{customdata[5]:.1f}×<br>%{customdata[4]:,d} assignments",
        missing_hover="no assignment of these tokens",
        hover_text=[domain_label(domain) for domain in found["domain"]],
        scale=Scale("nats", 0.0, 0.1 if pd.isna(highest) else max(0.1, float(highest))),
        dark=dark,
    )
    n_sites = len(found[["layer", "site"]].drop_duplicates())
    theme.finish(
        figure,
        title="Domain specialisation of every expert (KL divergence from the mix of all, nats)",
        caption=scope.caption("0 = serves the domains as they come"),
        dark=dark,
        height=int(np.clip(150 + 26 * n_sites, 300, 900)),
    )
    return ground(figure, dark)


def layer_lines(
    found: pd.DataFrame,
    measure: str,
    *,
    title: str,
    y_title: str,
    percent: bool,
    scope: Scope,
    notes: Sequence[str] = (),
    dark: bool = False,
) -> go.Figure:
    """Draw a measure of every layer beside what shuffled labels give.

    Parameters
    ----------
    found : DataFrame
        From ``specialization.layers_of``.
    measure : str
        A column that has ``_floor``, ``_floor_low`` and ``_floor_high`` beside it.
    """
    x = np.arange(len(found))
    floor = {
        part: found[f"{measure}_floor{part}"].to_numpy(float) for part in ("", "_low", "_high")
    }
    hover = "%{y:.1%}" if percent else "%{y:.3f}"
    figure = go.Figure(
        [
            theme.line(
                x,
                floor[""],
                "shuffled labels",
                form=theme.dotted(dark, 2),
                symbol="circle",
                error_y={
                    "type": "data",
                    "array": floor["_high"] - floor[""],
                    "arrayminus": floor[""] - floor["_low"],
                },
                hover=hover,
            ),
            theme.line(
                x,
                found[measure],
                "measured",
                form={"color": theme.accent(dark), "width": 3},
                symbol="circle",
                hover=hover,
            ),
        ]
    )
    theme.layer_axis(figure, found)
    figure.update_yaxes(title=y_title, rangemode="tozero", tickformat=".0%" if percent else None)
    return theme.finish(
        figure,
        title=title,
        caption=scope.caption(*notes),
        dark=dark,
        height=340,
        legend=True,
        caption_width=_CAPTION_WIDTH,
    )


LEAST_SHOWN = 1e-4  # nats a token; less is drawn here, as an axis of logarithms has no 0
_NEWS = {"": ("circle", "grey"), "rare but needed": ("diamond", "vermillion"),
         "busy but idle": ("square", "blue")}  # fmt: skip


def need_and_use(rows: pd.DataFrame, *, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw how much every expert is missed against how much it is used.

    Parameters
    ----------
    rows : DataFrame
        ``layer``, ``site``, ``expert_id``, ``expert`` (name), ``fair`` (load as a multiple of a
        fair share), ``loss_change`` (nats a token), ``news`` and ``hover`` (escaped).

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert].
    """
    figure = go.Figure()
    rows = rows.assign(shown=rows["loss_change"].clip(lower=LEAST_SHOWN))
    places = _apart(rows)
    for news, (symbol, hue) in _NEWS.items():
        part = rows[rows["news"] == news]
        color = theme.hue(hue, dark)
        figure.add_trace(
            go.Scatter(
                x=part["fair"].to_numpy(dtype=np.float64),
                y=part["shown"].to_numpy(dtype=np.float64),
                mode="markers+text" if news and len(part) <= _LABELLED else "markers",
                marker={"symbol": symbol, "size": 11 if news else 8, "color": color,
                        "line": {"width": 1, "color": theme.foreground(dark)}},
                text=part["expert"].tolist(),
                textposition=[places.get(row, "top center") for row in part.index],
                hovertext=part["hover"].tolist(),
                hovertemplate="%{hovertext}<extra></extra>",
                customdata=part[["layer", "site", "expert_id"]].to_numpy(dtype=np.float64),
                name=news or "as its load says",
            )
        )  # fmt: skip
    figure.update_xaxes(title="load (× fair share)", rangemode="tozero")
    figure.update_yaxes(
        title="loss without it (nats a token)", type="log", dtick=1, tickformat=".4~f"
    )
    figure.update_layout(clickmode="event+select", hovermode="closest")
    return theme.finish(
        figure,
        title="Need and use of every expert (change in loss, nats a token)",
        caption=scope.caption(
            f"changes below {LEAST_SHOWN:g} are drawn there",
            "news: thirds of a layer by load and by loss that do not match",
            "click a dot for the expert",
        ),
        dark=dark,
        height=460,
        legend=True,
    )


# where a label may stand, and how far its middle is from the mark, in pixels
_PLACES = {"top center": (0, 15), "bottom center": (0, -15), "middle right": (36, 0),
           "middle left": (-36, 0)}  # fmt: skip
_WIDE, _HIGH = 52, 15  # of a label, which is taken for three marks in a row
_X_PIXELS, _DECADE_PIXELS = 300, 75  # of a unit of load, and of a decade of loss


def _apart(rows: pd.DataFrame) -> dict[int, str]:
    """Return where the label of each row with news stands.

    On no other label and no other mark with news, and on the fewest of the other marks.
    """
    load, loss = rows["fair"] * _X_PIXELS, np.log10(rows["shown"]) * _DECADE_PIXELS
    marks = np.column_stack([load, loss])
    news = (rows["news"] != "").to_numpy()
    taken, cost = marks, np.where(news, len(marks), 1)
    found: dict[int, str] = {}
    for at in np.flatnonzero(news):
        labels = marks[at] + list(_PLACES.values())  # [4, 2]
        hit = (np.abs(taken - labels[:, None]) < (_WIDE / 2 + 5, _HIGH)).all(axis=2)
        hit[:, at] = False
        best = int((hit @ cost).argmin())
        found[rows.index[at]] = list(_PLACES)[best]
        taken = np.vstack([taken, labels[best], labels[best] - (20, 0), labels[best] + (20, 0)])
        cost = np.append(cost, [len(marks)] * 3)
    return found
