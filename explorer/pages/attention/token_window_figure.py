"""The figure of attention among the tokens of a window, and of where routing changes there."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from explorer.pages.attention.data import HeadMap
from explorer.pages.attention.figures import WEIGHT_SCALE, cells_of, frame, log_weight
from explorer.ui import theme
from explorer.ui.heatmap import clickable_heatmap, ground, ticks
from explorer.ui.wording import Scope, label

Floats = npt.NDArray[np.float64]

MAX_WINDOW = 256  # tokens
# cells whose hover says both texts; more would be megabytes
_TEXT_CELLS = 10_000
# pixels of a token's label, of the window's cells, and of what is around them
_LABEL, _LOW, _HIGH, _AROUND = 10, 260, 650, 250
_LABELS_BESIDE = 84  # on a page's width
_STRIP = 0.1  # of the height


def token_window(
    found: HeadMap,
    window: range,
    texts: Sequence[str | None],
    change: Floats,
    *,
    name: str,
    routed: str,
    scope: Scope,
    keys: pd.DataFrame | None = None,
    token: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw the attention among the tokens of a window, and below it where routing changes.

    Parameters
    ----------
    found : HeadMap
        From ``data.head_map``.
    window : range
        Positions in the prompt, from the beginning of a block on; at most ``MAX_WINDOW``.
    texts : sequence of str or None
        Of the window's tokens, as recorded; escaped here.
    change : array [len(window)], 0..1
        From ``metrics.pairs.routing_change``, for the window.
    name, routed : str
        Of the head, and of the layer whose experts ``change`` is about.
    keys : DataFrame, optional
        From ``data.prompt_keys``: draw these instead of the map's blocks.
    token : int, optional
        Position of the token whose row is framed.

    Returns
    -------
    Figure
        A click returns ``customdata`` whose first number is a position of a query; a bar of the
        strip returns its token.
    """
    width = found.bin_width if keys is None else 1
    names = [_token_name(text) for text in texts]
    if keys is None:
        figure = _block_window(found, window, names, dark)
        blocks = "exact" if width == 1 else f"a cell = mean over {width} × {width} tokens"
        notes = [blocks, "grey: later tokens"]
    else:
        figure = _key_window(keys, window, names, dark)
        notes = ["exact; only the heaviest keys of a token were recorded"]
    side = int(np.clip(len(window) * _LABEL, _LOW, _HIGH))
    figure.update_xaxes(
        range=[-0.5, len(window) - 0.5],
        tickangle=-90,
        anchor="y2",
        **ticks(names, room=_LABELS_BESIDE),
    )
    figure.update_yaxes(
        range=[len(window) - 0.5, -0.5],
        domain=[_STRIP + 0.03, 1],
        **ticks(names, room=side // _LABEL),
    )
    _change_strip(figure, window, names, change, routed, dark)
    if token is not None and token in window:
        frame(figure, -0.5, len(window) - 0.5, token - window.start, token - window.start, dark)
    part = f"tokens {window.start:,} to {window.stop - 1:,} of {found.tokens:,}"
    theme.finish(
        figure,
        title=f"{name} among tokens (share of a query's attention), and where routing changes",
        caption=scope.caption(
            part,
            *notes,
            "uniform: 1 / keys so far",
            f"bars: 1 − Jaccard similarity of a token's experts in layer {routed} with those of "
            "the token before",
            "click a row for its token",
        ),
        dark=dark,
        height=side + _AROUND,
    )
    return ground(figure, dark)


def _token_name(text: str | None) -> str:
    # a token in the middle of a character, whose text is on the token before
    return "⋯" if text == "" else label(text, limit=14, spaces=True)


def _block_window(found: HeadMap, window: range, names: Sequence[str], dark: bool) -> go.Figure:
    """Draw the part of the map that covers a window."""
    width = found.bin_width
    blocks = range(window.start // width, -(-window.stop // width))
    z, ids = cells_of(found, blocks)
    hover_text = None
    if z.size <= _TEXT_CELLS:
        spans = ["".join(names[at : at + width]) for at in range(0, len(names), width)]
        spans = spans if width == 1 else [f"{text} (block)" for text in spans]
        hover_text = [f"{a} → {b}" for a in spans for b in spans]
    where = "%{text}<br>" if hover_text else ""
    here = "token %{customdata[0]:d}" + (" to %{customdata[3]:d}" if width > 1 else "")
    there = "token %{customdata[1]:d}" + (" to %{customdata[4]:d}" if width > 1 else "")
    return clickable_heatmap(
        z,
        ids=ids,
        hover=f"{where}{here} attends to {there}:<br>%{{customdata[2]:.2%}} of its attention",
        missing_hover=f"{here}: no query used",
        hover_text=hover_text,
        x_labels=[""] * (len(blocks) * width),
        y_labels=[""] * (len(blocks) * width),
        x_title="key (token attended to)",
        y_title="query (token that attends)",
        scale=WEIGHT_SCALE,
        dark=dark,
        cell=width,
    )


def _key_window(keys: pd.DataFrame, window: range, names: Sequence[str], dark: bool) -> go.Figure:
    """Draw the recorded keys of a window's tokens, one mark each."""
    inside = keys[keys["query"].isin(window) & keys["key"].isin(window)]
    query = inside["query"].to_numpy(dtype=np.int64)
    key = inside["key"].to_numpy(dtype=np.int64)
    weight = inside["weight"].to_numpy(dtype=np.float64)
    mark = {
        "symbol": "square",
        "size": float(np.clip(600 / max(1, len(window)), 3, 12)),
        "color": log_weight(weight),
        "colorscale": theme.marks_scale(dark),
        "cmin": WEIGHT_SCALE.low,
        "cmax": WEIGHT_SCALE.high,
        "colorbar": {
            "title": {"text": WEIGHT_SCALE.title, "side": "right"},
            "thickness": 14,
            "tickvals": list(WEIGHT_SCALE.ticks or {}),
            "ticktext": list((WEIGHT_SCALE.ticks or {}).values()),
        },
    }
    first = window.start
    figure = go.Figure(
        go.Scattergl(
            x=key - first,
            y=query - first,
            mode="markers",
            marker=mark,
            selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            customdata=np.stack([query, key, weight], axis=1),
            text=[
                f"{names[q]} → {names[k]}"
                for q, k in zip((query - first).tolist(), (key - first).tolist(), strict=True)
            ],
            hovertemplate="%{text}<br>token %{customdata[0]:d} attends to token "
            "%{customdata[1]:d}:<br>%{customdata[2]:.2%} of its attention<extra></extra>",
            showlegend=False,
            name="heaviest keys",
        )
    )
    figure.update_xaxes(title="key (token attended to)")
    figure.update_yaxes(title="query (token that attends)")
    figure.update_layout(clickmode="event+select", dragmode="zoom", hovermode="closest")
    return figure


def _change_strip(
    figure: go.Figure,
    window: range,
    names: Sequence[str],
    change: Floats,
    routed: str,
    dark: bool,
) -> None:
    """Draw a bar for each token of the window, under the map and on its axis."""
    known = ~np.isnan(change)
    position = np.arange(len(window))
    figure.add_trace(
        go.Bar(
            x=position[known],
            y=change[known],
            width=0.9,
            yaxis="y2",
            marker={"color": theme.hue("vermillion", dark)},
            customdata=(position[known] + window.start)[:, None].astype(np.float64),
            text=[names[at] for at in position[known].tolist()],
            textposition="none",
            hovertemplate="%{text} (token %{customdata[0]:d}): "
            f"%{{y:.0%}} of the experts in layer {routed} changed<extra></extra>",
            showlegend=False,
            name="routing change",
        )
    )
    figure.update_layout(
        yaxis2={
            "domain": [0, _STRIP],
            "range": [0, 1],
            "tickvals": [0, 1],
            "ticktext": ["same", "all new"],
            "tickfont": {"size": 10},
            "anchor": "x",
        },
        bargap=0,
    )
