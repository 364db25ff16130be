"""A heatmap whose cells can be clicked."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from explorer.errors import ExplorerError
from explorer.ui import theme
from explorer.ui.wording import site_hover, site_name

# a browser takes seconds to draw more, and every cell is also a point of the click layer
MAX_CELLS = 60_000
# above this many, labels overlap
MAX_LABELS = 60
_LABELS_SHOWN = 16
# a click counts for the nearest marker within this many pixels, which on a grid is its own cell
_CLICK_REACH = 80


class Scale(NamedTuple):
    """Colours of a heatmap.

    Attributes
    ----------
    title : str
        Of the colour bar, with unit.
    low, high : float
        Ends of the scale; values beyond take the colour of the end.
    neutral : float or None
        Middle of a diverging scale; None for a sequential one.
    ticks : dict, optional
        Value -> label of the colour bar.
    """

    title: str
    low: float
    high: float
    neutral: float | None = None
    ticks: dict[float, str] | None = None


# log2 of a ratio; a fixed range, so that figures compare
OCTAVES = 3


def ratio_scale(title: str) -> Scale:
    """Return the colours of log2 of a ratio, neutral where it is 1."""
    names = ("≤ 1/8×", "1/4×", "1/2×", "1×", "2×", "4×", "≥ 8×")
    ticks = {place - float(OCTAVES): name for place, name in enumerate(names)}
    return Scale(title, -OCTAVES, OCTAVES, neutral=0.0, ticks=ticks)


def log_ratio(ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return log2 of a ratio within that scale; 0, an idle expert's, is at its lower end."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.log2(ratio), -OCTAVES, OCTAVES))


def clickable_heatmap(
    z: npt.NDArray[np.float64],
    *,
    ids: npt.NDArray[Any],
    hover: str,
    missing_hover: str = "nothing recorded",
    hover_text: Sequence[str] | None = None,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    x_title: str,
    y_title: str,
    scale: Scale,
    dark: bool,
    cell: int = 1,
) -> go.Figure:
    """Draw a heatmap under a layer of near-invisible markers that carry the ids of the cells.

    Streamlit gets nothing from a click on a heatmap (streamlit#8760), but does from a click on
    a marker. Axes are integer positions with tick texts, since plotly merges equal categories
    (plotly.js#1516).

    Parameters
    ----------
    z : array [Y, X]
        nan = missing, drawn as grey ground. The first row is drawn at the top.
    ids : array [Y, X, C], numbers
        What a click returns as ``customdata``. A cell whose first id is nan cannot be clicked:
        a layer may have fewer experts than another.
    hover : str
        Hover template; ``%{customdata[0]}`` and so on are the ids, ``%{text}`` the hover text.
    missing_hover : str
        The same for cells whose value is nan.
    hover_text : sequence [Y * X] of str, optional
        Escaped.
    x_labels, y_labels : sequences [X * cell], [Y * cell] of str
        Escaped.
    cell : int
        Positions of the axes that a cell is wide and high, for blocks of tokens.

    Raises
    ------
    ExplorerError
        For more cells than a browser can draw.
    """
    rows, columns = z.shape
    if z.size > MAX_CELLS:
        raise ExplorerError(
            f"Expected at most {MAX_CELLS:,} cells in a heatmap, got {rows:,} x {columns:,}. "
            "Show a part of the rows or columns."
        )
    heatmap = go.Heatmap(
        z=z,
        x=_centres(columns, cell),
        y=_centres(rows, cell),
        colorscale=theme.SEQUENTIAL if scale.neutral is None else theme.diverging(dark),
        zmin=scale.low,
        zmax=scale.high,
        hoverinfo="skip",
        colorbar=_colorbar(scale),
    )
    x_axis = {"title": x_title, "range": [-0.5, columns * cell - 0.5], **ticks(x_labels)}
    y_axis = {"title": y_title, "range": [rows * cell - 0.5, -0.5], **ticks(y_labels)}
    # plotly checks what a figure is made with once, and what is added to it several times
    return go.Figure(
        [heatmap, *_click_layers(z, ids, hover, missing_hover, hover_text, cell)],
        layout={
            "xaxis": x_axis,
            "yaxis": y_axis,
            "clickmode": "event+select",
            "dragmode": "zoom",
            "hovermode": "closest",
            "hoverdistance": _CLICK_REACH,
        },
    )


def expert_heatmap(
    rows: pd.DataFrame,
    value: str,
    columns: Sequence[str],
    *,
    hover: str,
    missing_hover: str,
    hover_text: Sequence[str] | None = None,
    scale: Scale,
    dark: bool,
    by_rank: "pd.Series[float] | None" = None,
) -> go.Figure:
    """Draw a value of every expert of every router: a row a router, a column an expert.

    Parameters
    ----------
    rows : DataFrame
        ``layer``, ``site``, ``expert_id``, the value and the columns; one row an expert.
    columns : sequence of str
        Numbers that a click and the hover know besides.
    hover, missing_hover : str
        What stands behind the names of the layer and the expert.
    hover_text : sequence [len(rows)] of str, optional
        Escaped.
    by_rank : Series, optional
        From 1 on: a router's experts in this order, not in that of their ids.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, *columns].
    """
    sites = list(dict.fromkeys(zip(rows["layer"], rows["site"], strict=True)))
    several = len({layer for layer, _ in sites}) < len(sites)
    width = int(rows["expert_id"].max()) + 1 if len(rows) else 0
    column = rows["expert_id"] if by_rank is None else by_rank - 1
    cells = (
        rows.groupby(["layer", "site"], sort=False).ngroup().to_numpy(),
        column.to_numpy(dtype=np.int64),
    )
    known = ["layer", "site", "expert_id", *columns]
    z = np.full((len(sites), width), np.nan)
    ids = np.full((*z.shape, len(known)), np.nan)
    texts = np.full(z.shape, "", dtype=object)
    z[cells] = rows[value].to_numpy(dtype=np.float64)
    ids[cells] = rows[known].to_numpy(dtype=np.float64)
    texts[cells] = "" if hover_text is None else hover_text
    here = site_hover(several=several) + ", expert %{customdata[2]}"
    return clickable_heatmap(
        z,
        ids=ids,
        hover=f"{here}<br>{hover}",
        missing_hover=f"{here}: {missing_hover}",
        hover_text=None if hover_text is None else texts.ravel().tolist(),
        x_labels=[str(place) for place in range(width)],
        y_labels=[site_name(layer, site, several=several) for layer, site in sites],
        x_title="expert" if by_rank is None else "experts of each layer by falling load (rank)",
        y_title="decoder layer.router" if several else "decoder layer",
        scale=scale,
        dark=dark,
    )


def _centres(cells: int, cell: int) -> npt.NDArray[Any]:
    """Return the middles of cells that are so many positions wide, in as few bytes as will do."""
    if cell % 2:
        return np.arange(cells) * cell + cell // 2
    return (np.arange(cells) * cell + (cell - 1) / 2).astype(np.float32)


def _click_layers(
    z: npt.NDArray[np.float64],
    ids: npt.NDArray[Any],
    hover: str,
    missing_hover: str,
    hover_text: Sequence[str] | None,
    cell: int,
) -> Iterator[go.Scatter]:
    """Yield the markers of the cells with a value, and of those without one."""
    flat = ids.reshape(z.size, ids.shape[-1]).astype(np.float64)
    # half the bytes, where every whole number stays what it is
    if np.nanmax(np.abs(flat), initial=0) < 2**24:
        flat = flat.astype(np.float32)
    exists = ~np.isnan(flat[:, 0])
    known = ~np.isnan(z.ravel())
    for name, mask, template in (
        ("cells", exists & known, hover),
        ("cells without a value", exists & ~known, missing_hover),
    ):
        cells = np.flatnonzero(mask)
        if not len(cells):
            continue
        # fully transparent markers get no clicks; by default a selection fades all others
        faint = {"opacity": 0.001}
        yield go.Scatter(
            x=_centres(z.shape[1], cell)[cells % z.shape[1]],
            y=_centres(z.shape[0], cell)[cells // z.shape[1]],
            mode="markers",
            # the nearest one takes the click, however small, and whether or not it is drawn; to
            # draw thousands takes a second, and WebGL, which browsers allow few times, as long
            marker={"size": 1, "maxdisplayed": 1, **faint},
            selected={"marker": faint},
            unselected={"marker": faint},
            customdata=flat[cells],
            text=None if hover_text is None else [hover_text[cell] for cell in cells.tolist()],
            hovertemplate=template + "<extra></extra>",
            showlegend=False,
            name=name,
        )


def ground(figure: go.Figure, dark: bool, *, diverging: bool = False) -> go.Figure:
    """Paint the ground of missing cells; call after ``theme.finish``."""
    figure.update_layout(plot_bgcolor=theme.missing(dark, sequential=not diverging))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return figure


def ticks(labels: Sequence[str], *, room: int = MAX_LABELS) -> dict[str, Any]:
    """Return tick positions and texts, thinned where more than ``room`` would overlap."""
    few = _LABELS_SHOWN if room == MAX_LABELS else room
    step = 1 if len(labels) <= room else -(-len(labels) // few)
    shown = list(range(0, len(labels), step))
    return {
        "tickmode": "array",
        "tickvals": shown,
        "ticktext": [labels[i] for i in shown],
        "tickfont": {"size": 10},
    }


def _colorbar(scale: Scale) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": scale.title, "side": "right"}, "thickness": 14}
    if scale.ticks:
        bar |= {"tickvals": list(scale.ticks), "ticktext": list(scale.ticks.values())}
    return bar
