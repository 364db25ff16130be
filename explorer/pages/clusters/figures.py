"""Figures of maps: points, density, and what is over-represented in a region."""

import html
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from explorer.maps.point_table import Density, Region
from explorer.metrics.specialization import Lift
from explorer.ui import theme

Floats = npt.NDArray[np.float64]

HEIGHT = 620
COLORED = 24  # categories with a colour and a mark of their own; the rest are grey together
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_LEVELS = 255  # steps of a colour scale: one byte per bin
_BARS = 12  # of what is over-represented
_NAMED = 0.01  # of the points; a smaller category has no name on the map
_GRID = 48  # bins along each axis, to find where a category is densest
_CHARACTER, _LETTERS = 1 / 110, 1 / 26  # of a map's width and height, that a name takes
_AXES = {"showgrid": False, "showticklabels": False, "ticks": ""}


class Group(NamedTuple):
    """Points that are drawn alike.

    Attributes
    ----------
    name : str
        Escaped.
    mask : array [N], bool
    rest : bool
        Not one thing, such as all other experts: in grey.
    """

    name: str
    mask: npt.NDArray[np.bool_]
    rest: bool = False


class Amount(NamedTuple):
    """A quantity that points are coloured by.

    Attributes
    ----------
    title : str
        With unit, escaped.
    values : array [N]
        nan = not recorded.
    low, high : float
        Ends of the scale.
    """

    title: str
    values: Floats
    low: float
    high: float


def map_points(
    x: Floats,
    y: Floats,
    shown: npt.NDArray[np.bool_],
    *,
    texts: Sequence[str],
    ids: npt.NDArray[Any],
    color: Sequence[Group] | Amount,
    title: str,
    caption: str,
    extent: tuple[float, float, float, float],
    region: Region | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw every point; those that the filters leave out stay as grey ground.

    Parameters
    ----------
    x, y, shown : arrays [N]
    texts : sequence [N] of str
        Hover text, escaped.
    ids : array [N, C], numbers
        What a click on a point returns as ``customdata``.
    color : sequence of Group, or Amount
        Groups in the order of the legend; beyond ``COLORED`` in grey.
    title, caption : str
        Escaped.
    extent : (float, float, float, float)
        Least and greatest x and y of the picture.
    region : Region, optional
        Outlined.
    """
    figure = go.Figure()
    if not shown.all():
        figure.add_trace(_ground(x[~shown], y[~shown], dark))
    size = float(np.clip(9 - np.log10(max(1, len(x))) * 1.4, 3, 8))
    if isinstance(color, Amount):
        _add_amount(figure, x, y, shown, texts, ids, color, size, dark)
    else:
        drawn = [(group.rest or i >= COLORED, i, group) for i, group in enumerate(color)]
        colors = theme.categories(dark)
        # what has a colour of its own lies over what has none
        for rest, place, group in sorted(drawn, key=lambda one: not one[0]):
            here = np.flatnonzero(group.mask & shown)
            figure.add_trace(
                go.Scattergl(
                    x=x[here],
                    y=y[here],
                    mode="markers",
                    marker={
                        "size": size,
                        "color": theme.hues(dark)[-1] if rest else colors[place % len(colors)],
                        "symbol": "circle" if rest else _SYMBOLS[place % len(_SYMBOLS)],
                        "opacity": 0.35 if rest else 0.8,
                    },
                    text=[texts[i] for i in here.tolist()],
                    customdata=ids[here],
                    hovertemplate=f"%{{text}}<br>{group.name}<extra></extra>",
                    name=f"{group.name} ({len(here):,})",
                    legendrank=1000 + place,
                )
            )
        named = [group for rest, _, group in drawn if not rest]
        for annotation in _names(x, y, shown, named, extent, dark):
            figure.add_annotation(annotation)
    return _finish(figure, extent, region, title, caption, dark, legend=True)


def _names(
    x: Floats,
    y: Floats,
    shown: npt.NDArray[np.bool_],
    groups: Sequence[Group],
    extent: tuple[float, float, float, float],
    dark: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the names of categories where each is densest, without those that would overlap."""
    left, right, low, high = extent
    taken: list[tuple[float, float, float]] = []
    for group in groups:
        here = group.mask & shown
        if here.sum() <= _NAMED * shown.sum():
            continue
        counts, xs, ys = np.histogram2d(x[here], y[here], _GRID, [[left, right], [low, high]])
        column, row = np.unravel_index(counts.argmax(), counts.shape)
        at = float(xs[column : column + 2].mean()), float(ys[row : row + 2].mean())
        across, up = (at[0] - left) / (right - left), (at[1] - low) / (high - low)
        half = len(html.unescape(group.name)) * _CHARACTER / 2
        if any(
            abs(across - other) < half + width and abs(up - height) < _LETTERS
            for other, height, width in taken
        ):
            continue
        taken.append((across, up, half))
        yield {
            "x": at[0],
            "y": at[1],
            "text": group.name,
            "showarrow": False,
            "bgcolor": theme.ground(dark),
            "opacity": 0.85,
            "borderpad": 1,
        }


def _add_amount(
    figure: go.Figure,
    x: Floats,
    y: Floats,
    shown: npt.NDArray[np.bool_],
    texts: Sequence[str],
    ids: npt.NDArray[Any],
    color: Amount,
    size: float,
    dark: bool,
) -> None:
    known = shown & ~np.isnan(color.values)
    unknown = np.flatnonzero(shown & ~known)
    if len(unknown):
        figure.add_trace(_ground(x[unknown], y[unknown], dark, name="not recorded"))
    here = np.flatnonzero(known)
    figure.add_trace(
        go.Scattergl(
            x=x[here],
            y=y[here],
            mode="markers",
            marker={
                "size": size,
                "color": color.values[here].astype(np.float32),
                "colorscale": theme.marks_scale(dark),
                "cmin": color.low,
                "cmax": color.high,
                "colorbar": {"title": {"text": color.title, "side": "right"}, "thickness": 14},
            },
            text=[texts[i] for i in here.tolist()],
            customdata=ids[here],
            hovertemplate="%{text}<br>%{marker.color:.3g}<extra></extra>",
            name=f"{len(here):,} points",
            showlegend=False,
        )
    )


def _ground(x: Floats, y: Floats, dark: bool, name: str = "left out by filters") -> go.Scattergl:
    return go.Scattergl(
        x=x,
        y=y,
        mode="markers",
        marker={"size": 3, "color": theme.missing(dark), "opacity": 0.5},
        hoverinfo="skip",
        name=f"{name} ({len(x):,})",
    )


def map_density(
    density: Density,
    *,
    value_title: str | None = None,
    low: float = 0.0,
    high: float = 1.0,
    title: str,
    caption: str,
    extent: tuple[float, float, float, float],
    region: Region | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw how many points each bin has, or the mean value of its points.

    Parameters
    ----------
    value_title : str, optional
        With unit, escaped; None = draw counts, on a logarithmic scale.
    low, high : float
        Ends of the scale of values.
    """
    none = density.counts == 0
    if value_title is None or density.values is None:
        top = max(1.0, float(np.log10(max(1, int(density.counts.max(initial=1))))))
        with np.errstate(divide="ignore"):
            part = np.log10(density.counts, where=~none, out=np.zeros(none.shape)) / top
        powers = range(int(top) + 1)
        ticks = {power / top: f"{10**power:,}" for power in powers}
        bar_title = "points per bin"
    else:
        part = (density.values - low) / max(high - low, 1e-12)
        none = none | np.isnan(density.values)
        ticks = {p: f"{low + p * (high - low):.2g}" for p in (0.0, 0.25, 0.5, 0.75, 1.0)}
        bar_title = value_title
    # one byte per bin; 0 is kept for bins without a point, which show the ground
    steps = 1 + np.rint(np.clip(np.nan_to_num(part), 0, 1) * (_LEVELS - 1))
    z = np.where(none, 0, steps).astype(np.uint8)
    left, right, bottom, top_y = extent
    figure = go.Figure(
        [
            go.Heatmap(
                z=z,
                x0=density.x0,
                dx=density.dx,
                y0=density.y0,
                dy=density.dy,
                zmin=0,
                zmax=_LEVELS,
                colorscale=_with_ground(dark),
                hoverinfo="skip",
                colorbar={
                    "title": {"text": bar_title, "side": "right"},
                    "thickness": 14,
                    "tickvals": [1 + p * (_LEVELS - 1) for p in ticks],
                    "ticktext": list(ticks.values()),
                },
            ),
            # a selection needs marks: two that nobody sees
            go.Scattergl(
                x=[left, right],
                y=[bottom, top_y],
                mode="markers",
                marker={"opacity": 0.001},
                hoverinfo="skip",
                showlegend=False,
            ),
        ]
    )
    return _finish(figure, extent, region, title, caption, dark, legend=False)


def _with_ground(dark: bool) -> list[tuple[float, str]]:
    """Return the scale of marks with the ground's colour for 0."""
    ground, scale = theme.ground(dark), theme.marks_scale(dark)
    first = 0.5 / _LEVELS
    return [
        (0.0, ground),
        (first, ground),
        *((first + part * (1 - first), color) for part, color in scale),
    ]


def _finish(
    figure: go.Figure,
    extent: tuple[float, float, float, float],
    region: Region | None,
    title: str,
    caption: str,
    dark: bool,
    *,
    legend: bool,
) -> go.Figure:
    if region is not None:
        xs, ys = region.outline()
        corners = "L".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
        figure.add_shape(type="path", path=f"M{corners}Z", line=theme.dotted(dark, 2))
    left, right, low, high = extent
    figure.update_xaxes(range=[left, right], **_AXES)
    # each axis by itself, so that the points fill the space
    figure.update_yaxes(range=[low, high], **_AXES)
    figure.update_layout(dragmode="pan", hovermode="closest")
    theme.finish(figure, title=title, caption=caption, dark=dark, height=HEIGHT, legend=legend)
    if legend:
        # below the plot: a dozen names need several lines
        figure.update_layout(
            legend={"y": -0.02, "yanchor": "top", "itemsizing": "constant"}, margin={"b": 110}
        )
    return figure


def lift_bars(
    found: Lift,
    names: Sequence[str],
    ids: npt.NDArray[Any],
    *,
    title: str,
    caption: str,
    dark: bool = False,
) -> go.Figure:
    """Draw what is over-represented, most first, with intervals.

    Parameters
    ----------
    names : sequence [M] of str
        Escaped.
    ids : array [M, C], numbers
        What a click returns as ``customdata``.
    title, caption : str
        Escaped.
    """
    order = [i for i in np.argsort(-np.nan_to_num(found.lift)) if found.lift[i] > 0][:_BARS]
    y = np.arange(len(order))[::-1]
    ratio = found.lift[order]
    figure = go.Figure(
        go.Bar(
            x=ratio,
            y=y,
            orientation="h",
            marker={"color": theme.accent(dark)},
            error_x={
                "type": "data",
                "array": np.maximum(found.high[order] - ratio, 0),
                "arrayminus": np.maximum(ratio - found.low[order], 0),
                "color": theme.foreground(dark),
                "thickness": 1.5,
            },
            customdata=np.asarray(ids)[order].astype(np.float64),
            text=[f"{names[i]}: {found.part[i]:,.0f} of {found.whole[i]:,.0f}" for i in order],
            textposition="none",
            hovertemplate="%{text}<br>%{x:.2f}× as often as in all<extra></extra>",
            name="lift",
        )
    )
    figure.add_vline(1, line=theme.dotted(dark, 2))
    figure.update_xaxes(title="share here / share in all (×)", rangemode="tozero")
    figure.update_yaxes(
        tickmode="array",
        tickvals=y,
        ticktext=[names[i] for i in order],
        showgrid=False,
        range=[-0.6, len(order) - 0.4],
    )
    figure.update_layout(clickmode="event+select", showlegend=False)
    return theme.finish(
        figure,
        title=title,
        caption=caption,
        dark=dark,
        height=int(np.clip(150 + 26 * len(order), 260, 480)),
        caption_width=52,
    )
