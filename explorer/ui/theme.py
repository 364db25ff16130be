"""Colours and templates of all figures, for light and dark ground.

Sequential scales are cividis; scales with a neutral middle run from purple (less) over the ground
to orange (more); named things have a hue, at most eight at a time. All of them can be told apart
with the common colour vision deficiencies, and hues are seen on their ground (3:1 at least).
"""

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from explorer.ui.wording import Caption, escaped, site_name

SEQUENTIAL = "cividis"
# ColorBrewer PuOr, turned so that more is orange; on dark ground its middle is dark, so that the
# cells that stand out are the ones far from neutral on either ground
_DIVERGING = {
    False: ["#2d004b", "#8073ac", "#d8daeb", "#f7f7f7", "#fee0b6", "#e08214", "#7f3b08"],
    True: ["#c5b9f5", "#8073ac", "#4a3a75", "#2a2a32", "#7f3b08", "#e08214", "#ffc870"],
}
# On dark ground the colours of Okabe and Ito 2008, with light grey for black. Most of them are too
# light for white: there, hues near theirs that are dark enough, searched for the greatest CIEDE2000
# distance of the nearest pair under simulated deuteranopia, protanopia and tritanopia.
_HUES = {
    "orange": ("#985B00", "#E69F00"),
    "sky": ("#0394BA", "#56B4E9"),
    "green": ("#28834D", "#009E73"),
    "yellow": ("#9E8C00", "#F0E442"),
    "blue": ("#0764CD", "#0072B2"),
    "vermillion": ("#872817", "#D55E00"),
    "purple": ("#EF3D77", "#CC79A7"),
    "grey": ("#8A8A8A", "#C8C8C8"),
}
N_HUES = len(_HUES)
_FIRST = ("blue", "orange", "green", "purple", "sky", "vermillion", "yellow")
_MIXED = {
    False: (0.5, ("blue", "green", "purple", "sky", "vermillion")),
    True: (0.6, ("orange", "green", "purple", "sky", "vermillion")),
}
_MISSING = {False: "#d9d9d9", True: "#4d4d4d"}
# the middle of a sequential scale is such a grey, too
_MISSING_SEQUENTIAL = {False: "#e3e3e6", True: "#2b2e36"}
_TEXT = {False: "#1b2430", True: "#e6ebf2"}
_GROUND = {False: "#ffffff", True: "#0e1117"}
_GRID = {False: "#e6e6ea", True: "#31333f"}

# as the app's; of these, the app brings Source Sans along
_FONT = "Inter, 'Source Sans', 'Segoe UI', system-ui, sans-serif"

# pixels above the plot: title and one line of caption, each further line, a legend
_TOP, _LINE, _LEGEND = 64, 16, 26
# layers whose names fit beside each other on half a page
_LAYERS_NAMED = 30
# characters that fit beside each other on half a page
CAPTION_WIDTH = 95

# beside the plot, where a legend has many names
LEGEND_RIGHT = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}

PIXELS_PER_INCH = 96
# of a title and of a caption on paper, in pixels across
_TITLE_CHARACTER, _CAPTION_CHARACTER = 7, 5

PinKey = tuple[int, int, int]  # layer, site, expert


def diverging(dark: bool) -> list[tuple[float, str]]:
    """Return the colour scale for values around a neutral one."""
    colors = _DIVERGING[dark]
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]


def tints(dark: bool) -> list[tuple[float, str]]:
    """Return the colour scale from the ground to the colour of a single series."""
    return [(0.0, _GROUND[dark]), (1.0, accent(dark))]


def marks(n: int, dark: bool) -> list[str]:
    """Return n colours of the sequential scale that marks and lines are seen in on the ground.

    One end of the whole scale is hard to see on either ground; cells of a heatmap, which touch,
    have the whole.
    """
    ends = (0.38, 1.0) if dark else (0.0, 0.6)
    places = [ends[0] + (ends[1] - ends[0]) * i / max(1, n - 1) for i in range(n)]
    return [str(color) for color in sample_colorscale(SEQUENTIAL, places)]


def marks_scale(dark: bool) -> list[tuple[float, str]]:
    """Return ``marks`` as the colour scale of marks that do not touch."""
    colors = marks(9, dark)
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]


def color_at(part: float, dark: bool) -> tuple[int, int, int]:
    """Return red, green and blue (0..255) of the diverging scale at ``part`` (0..1) of it."""
    colors = _DIVERGING[dark]
    place = min(max(part, 0.0), 1.0) * (len(colors) - 1)
    lower = min(int(place), len(colors) - 2)
    pairs = zip(_channels(colors[lower]), _channels(colors[lower + 1]), strict=True)
    red, green, blue = (round(a + (b - a) * (place - lower)) for a, b in pairs)
    return red, green, blue


def _channels(color: str) -> list[int]:
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]


def missing(dark: bool, *, sequential: bool = False) -> str:
    """Return the ground of heatmaps with a diverging or sequential scale, seen without a value."""
    return (_MISSING_SEQUENTIAL if sequential else _MISSING)[dark]


def ground(dark: bool) -> str:
    """Return the colour that figures are drawn on."""
    return _GROUND[dark]


def accent(dark: bool) -> str:
    """Return the colour of a single series."""
    return hue("sky" if dark else "blue", dark)


def hue(name: str, dark: bool) -> str:
    """Return a hue by its name."""
    return _HUES[name][dark]


def hues(dark: bool) -> tuple[str, ...]:
    """Return the hues of named things; the last, grey, is for what stays unnamed."""
    return tuple(color[dark] for color in _HUES.values())


def categories(dark: bool) -> tuple[str, ...]:
    """Return twelve colours of like things; they need a second mark, such as a number.

    No twelve hues can be told apart well with every colour vision: the last five are hues mixed
    with the colour of text, those five whose nearest pair is farthest apart (CIEDE2000, as above).
    """
    part, names = _MIXED[dark]
    mixed = [
        "#" + "".join(f"{round((1 - part) * a + part * b):02x}" for a, b in zip(*pair, strict=True))
        for pair in ((_channels(hue(name, dark)), _channels(_TEXT[dark])) for name in names)
    ]
    return (*(hue(name, dark) for name in _FIRST), *mixed)


def text_on(color: str, opacity: float, dark: bool) -> str:
    """Return black or white: which of them is read on a colour that the ground shines through."""
    mixed = [
        opacity * upper + (1 - opacity) * lower
        for upper, lower in zip(_channels(color), _channels(_GROUND[dark]), strict=True)
    ]
    # WCAG: beyond this luminance, black has more contrast than white
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def foreground(dark: bool) -> str:
    """Return the colour of text and reference lines."""
    return _TEXT[dark]


def pin_colors(pins: Sequence[PinKey], dark: bool) -> dict[PinKey, str]:
    """Return a colour for each pinned (layer, site, expert), in the order of pinning.

    From the ninth pin on there is no colour left; such pins are not in the result.
    """
    return dict(zip(dict.fromkeys(pins), hues(dark), strict=False))


@functools.cache
def template(dark: bool) -> go.layout.Template:
    """Return the plotly template; figures carry it, so that an export looks like the screen."""
    axis = {
        "gridcolor": _GRID[dark],
        "linecolor": _GRID[dark],
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8},
        # the first labels of both axes meet in the corner
        "ticklabelstandoff": 4,
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "color": _TEXT[dark]},
            "title": {
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 12, "l": 4},
                "font": {"size": 15},
            },
            "paper_bgcolor": _GROUND[dark],
            "plot_bgcolor": _GROUND[dark],
            "colorway": list(hues(dark)),
            "margin": {"l": 60, "r": 20, "t": _TOP, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        }
    )


def finish(
    figure: go.Figure,
    *,
    title: str,
    caption: str,
    dark: bool,
    height: int = 380,
    legend: bool = False,
    caption_width: int = CAPTION_WIDTH,
) -> go.Figure:
    """Set what every figure has: title with unit, caption, template, and a steady zoom.

    Parameters
    ----------
    title, caption : str
        Already escaped where they hold text from outside. The caption is broken at "; ".
    height : int, pixels
        Without the lines that a long caption adds.
    legend : bool
        Leave room for a legend between caption and plot.
    caption_width : int, characters
        Of a line; less for a narrow figure.
    """
    layout = figure.layout  # set attribute by attribute: `update_layout` takes five times as long
    if isinstance(caption, Caption):
        # exports say what chose their numbers
        filters = {name: escaped(value) for name, value in caption.filters.items()}
        layout.meta = {"filters": filters}
    lines = wrapped(caption, caption_width)
    extra = _LINE * (len(lines) - 1) + (_LEGEND if legend else 0)
    layout.template = template(dark)
    layout.title = {"text": title, "subtitle": {"text": "<br>".join(lines), "font": {"size": 12}}}
    layout.height = height + extra
    layout.margin = layout.margin.to_plotly_json() | {"t": _TOP + extra}
    # without it, plotly forgets the zoom whenever a page is drawn again
    layout.uirevision = "keep"
    return figure


def for_paper(figure: go.Figure, inches: float, source: str) -> go.Figure:
    """Return a figure as wide as a column of a paper, with standard fonts and nothing cut off.

    Parameters
    ----------
    inches : float
        Width in print.
    source : str
        What it is of, for the end of its caption; escaped.
    """
    width = round(inches * PIXELS_PER_INCH)
    title = figure.layout.title
    caption = str(title.subtitle.text or "").split("<br>")
    titles = textwrap.wrap(str(title.text or ""), width // _TITLE_CHARACTER)
    lines = textwrap.wrap("; ".join([*caption, source]), width // _CAPTION_CHARACTER)
    # what is left above the plot, such as for a legend, stays
    more = int(figure.layout.margin.t or _TOP) - _TOP - _LINE * (len(caption) - 1)
    top = _LINE * (len(titles) + 1) + 13 * len(lines) + max(0, more)
    below = int(figure.layout.height or 380) - int(figure.layout.margin.t or _TOP)
    paper = go.Figure(figure)
    paper.update_layout(
        width=width,
        height=below + top,
        autosize=False,
        margin={"t": top, "r": 12},
        font={"family": "Arial, Helvetica, sans-serif", "size": 10},
        title={
            "text": "<br>".join(titles),
            "font": {"size": 12},
            "subtitle": {"text": "<br>".join(lines), "font": {"size": 10}},
        },
        legend_font_size=9,
    )
    return paper


def dotted(dark: bool, width: float = 1) -> dict[str, Any]:
    """Return the form of a reference line."""
    return {"color": foreground(dark), "width": width, "dash": "dot"}


def line(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    name: str,
    *,
    form: dict[str, Any],
    hover: str = "%{y:.3g}",
    symbol: str | int | None = None,
    **options: Any,
) -> go.Scatter:
    """Return a series of a figure; under the mouse it says its value and, beside it, its name.

    Parameters
    ----------
    name : str
        Escaped.
    form : dict
        Colour, width and dash of the line, as plotly has them.
    symbol : str or int, optional
        Form of a mark at each value; None = no marks.
    """
    return go.Scatter(
        x=np.asarray(x),
        y=np.asarray(y, dtype=np.float64),
        mode="lines" if symbol is None else "lines+markers",
        line={"width": 2} | form,
        marker={"symbol": symbol, "size": 8},
        name=name,
        hovertemplate=hover + "<extra>%{fullData.name}</extra>",
        **options,
    )


def band(x: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> list[go.Scatter]:
    """Return the grey ground between two series."""
    ends = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    grey = {"fill": "tonexty", "fillcolor": "rgba(128, 128, 128, 0.35)"}
    return [
        go.Scatter(x=np.asarray(x), y=np.asarray(y, dtype=np.float64), name=name, **ends, **fill)
        for name, y, fill in (("low", low, {}), ("high", high, grey))
    ]


def layer_axis(figure: go.Figure, sites: pd.DataFrame, *, title: str = "") -> None:
    """Name the positions 0, 1, ... of the axis x after the sites of some rows.

    Parameters
    ----------
    sites : DataFrame
        ``layer``, ``site``; one row a position.
    """
    several = bool((sites["site"] > 0).any())
    names = [site_name(row.layer, row.site, several=several) for row in sites.itertuples()]
    step = max(1, -(-len(names) // _LAYERS_NAMED))
    figure.update_xaxes(
        title=title or ("decoder layer.router" if several else "decoder layer"),
        tickmode="array",
        tickvals=list(range(0, len(names), step)),
        ticktext=names[::step],
    )


def wrapped(caption: str, width: int = CAPTION_WIDTH) -> list[str]:
    """Break a caption between its parts, since plotly does not."""
    lines = [""]
    for part in caption.split("; "):
        joined = f"{lines[-1]}; {part}" if lines[-1] else part
        if lines[-1] and len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    return lines
