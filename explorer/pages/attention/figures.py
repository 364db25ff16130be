"""Figures of attention: heads, the map of one head, its tokens, and whether routing follows it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from explorer.metrics.attention import RECENT, HeadBaseline
from explorer.pages.attention.data import HAS_MAP, HeadMap
from explorer.registry import Registry
from explorer.text import counted
from explorer.ui import theme
from explorer.ui.heatmap import MAX_CELLS, Scale, clickable_heatmap, ground, ticks
from explorer.ui.wording import Scope, label, number

Floats = npt.NDArray[np.float64]

# weights span orders of magnitude: colours are log10, and the lowest takes all that is less
_LOG_LOW = -3
WEIGHT_SCALE = Scale(
    title="share of the query's attention",
    low=_LOG_LOW,
    high=0,
    ticks={-3: "≤ 0.1%", -2: "1%", -1: "10%", 0: "100%"},
)
MAX_WINDOW = 256  # tokens
# cells whose hover says both texts; more would be megabytes
_TEXT_CELLS = 10_000
# pixels of a token's label, of the window's cells, and of what is around them
_LABEL, _LOW, _HIGH, _AROUND = 10, 260, 650, 250
_LABELS_BESIDE = 84  # on a page's width
_STRIP = 0.1  # of the height
_HEAD_LABELS = 16  # beside each other on half a page


class Measure(NamedTuple):
    """A statistic of a head.

    Attributes
    ----------
    label : str
        With its unit.
    meaning : str
        One sentence for a newcomer.
    high : float or None
        Upper end of the scale where it is known beforehand.
    """

    label: str
    meaning: str
    high: float | None


MEASURES: Registry[Measure] = Registry(
    "measure of a head",
    entropy=Measure(
        "attention entropy (nats)",
        "How widely a head spreads its attention: 0 = all on one token.",
        None,
    ),
    sink_mass=Measure(
        "attention on the first token (share)",
        "Heads that have nothing to look for often rest on the prompt's first token, the sink.",
        1.0,
    ),
    mean_distance=Measure(
        "mean distance (tokens)", "How far back a head looks, on average over its attention.", None
    ),
    window_mass=Measure(
        f"attention on the last {RECENT} tokens (share)",
        f"How much of its attention stays near: on the token itself and the {RECENT - 1} before.",
        1.0,
    ),
)


def head_name(layer: int, head: int) -> str:
    """Return how a head is called."""
    return f"L{layer}.H{head}"


def head_overview(
    stats: pd.DataFrame,
    layers: pd.DataFrame,
    measure: str,
    *,
    baseline: HeadBaseline,
    scope: Scope,
    n_prompts: int,
    chosen: tuple[int, int] | None = None,
    dark: bool = False,
) -> go.Figure:
    """Draw a statistic of every head of every layer.

    Parameters
    ----------
    stats, layers : DataFrame
        From ``data.head_stats`` and ``attention_layers``.
    measure : str
        A name in ``MEASURES``.
    chosen : (layer, head), optional
        Outlined.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, head, value]; heads without one cannot be clicked.
    """
    kind = MEASURES[measure]
    rows = {int(layer): row for row, layer in enumerate(layers["layer"])}
    heads = layers["heads"].dropna()
    width = max(int(heads.max()) if len(heads) else 0, int(stats["head"].max()) + 1)
    z = np.full((len(rows), width), np.nan)
    ids = np.full((len(rows), width, 3), np.nan)
    at = stats["layer"].map(rows).to_numpy(dtype=np.int64), stats["head"].to_numpy(dtype=np.int64)
    z[at] = stats[measure].to_numpy(dtype=np.float64)
    ids[at] = stats[["layer", "head", measure]].to_numpy(dtype=np.float64)
    uniform = float(getattr(baseline, measure))
    top = np.nanmax(np.append(z, uniform)) if kind.high is None else kind.high
    figure = clickable_heatmap(
        z,
        ids=ids,
        hover="layer %{customdata[0]}, head %{customdata[1]}<br>"
        + kind.label
        + ": %{customdata[2]:.3g}",
        x_labels=[str(head) for head in range(width)],
        y_labels=[str(layer) for layer in layers["layer"]],
        x_title="attention head",
        y_title="decoder layer",
        scale=Scale(kind.label, 0.0, float(top) or 1.0),
        dark=dark,
    )
    figure.update_traces(colorbar_title_text="", selector={"type": "heatmap"})
    figure.update_xaxes(**ticks([str(head) for head in range(width)], room=_HEAD_LABELS))
    for row, mixer in enumerate(layers["kind"]):
        if mixer != HAS_MAP:
            figure.add_annotation(
                x=(width - 1) / 2,
                y=row,
                text=f"{label(mixer)}: no attention map",
                showarrow=False,
                font={"size": 10},
            )
    if chosen is not None and chosen[0] in rows:
        frame(figure, chosen[1] - 0.5, chosen[1] + 0.5, rows[chosen[0]], rows[chosen[0]], dark)
    theme.finish(
        figure,
        title=f"Every head: {kind.label}",
        caption=scope.caption(
            f"mean over {counted(n_prompts, 'prompt')}",
            f"uniform attention: {number(uniform)}",
            *(["grey: not recorded, or no attention map"] if np.isnan(z).any() else []),
        ),
        dark=dark,
        height=int(np.clip(170 + 22 * len(rows), 330, 1000)),
        caption_width=70,
    )
    return ground(figure, dark)


def head_heatmap(
    found: HeadMap, *, name: str, scope: Scope, window: range | None = None, dark: bool = False
) -> go.Figure:
    """Draw the whole pooled map of one head on one prompt.

    Parameters
    ----------
    found : HeadMap
        From ``data.head_map``.
    name : str
        Of the head.
    window : range, optional
        Tokens that are shown beside it, framed.

    Returns
    -------
    Figure
        A click returns ``customdata`` [query, key, share]: the first tokens of both blocks.
    """
    width = found.bin_width
    z, ids = cells_of(found, range(len(found.weights)))
    positions = [f"{first:,}" for first in range(len(z) * width)]
    here = "token %{customdata[0]:d}" + (" to %{customdata[3]:d}" if width > 1 else "")
    there = "token %{customdata[1]:d}" + (" to %{customdata[4]:d}" if width > 1 else "")
    figure = clickable_heatmap(
        z,
        ids=ids,
        hover=f"{here} attends to {there}:<br>%{{customdata[2]:.2%}} of its attention",
        missing_hover=f"{here}: no query used",
        x_labels=positions,
        y_labels=positions,
        x_title="key (position in the prompt)",
        y_title="query (position in the prompt)",
        scale=WEIGHT_SCALE,
        dark=dark,
        cell=width,
    )
    figure.update_xaxes(**ticks(positions, room=9))
    figure.update_yaxes(**ticks(positions, room=12))
    if window is not None and len(window) < found.tokens:
        ends = window.start - 0.5, window.stop - 0.5
        frame(figure, *ends, window.start, window.stop - 1, dark)
    blocks = "exact" if width == 1 else f"a cell = mean over {width} × {width} tokens"
    cut = [f"the first {len(positions):,} of {found.tokens:,} tokens"]
    theme.finish(
        figure,
        title=f"{name} on the whole prompt (share of a query's attention)",
        caption=scope.caption(
            *(cut if len(positions) < found.tokens else []),
            blocks,
            "rows sum to 1",
            "uniform: 1 / keys so far",
            "grey: later tokens",
        ),
        dark=dark,
        height=440,
        caption_width=70,
    )
    return ground(figure, dark)


def cells_of(found: HeadMap, blocks: range) -> tuple[Floats, Floats]:
    """Return the colours and ids of the cells of some blocks; nan for keys after the query."""
    part = slice(blocks.start, blocks.stop)
    weights = found.weights[part, part]
    if weights.size > MAX_CELLS:
        return cells_of(found, blocks[: int(MAX_CELLS**0.5)])
    width, last = found.bin_width, found.tokens - 1
    first = np.arange(blocks.start, blocks.stop) * width
    query, key = np.meshgrid(first, first, indexing="ij")
    columns = [query, key, weights]
    if width > 1:
        columns += [np.minimum(query + width - 1, last), np.minimum(key + width - 1, last)]
    ids = np.stack(columns, axis=2).astype(np.float64)
    later = key > query
    ids[later] = np.nan
    return np.where(later, np.nan, log_weight(weights)), ids


def log_weight(weights: Floats) -> Floats:
    """Return weights as the colours have them: log10 within the scale."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.log10(weights), _LOG_LOW, 0))


def frame(
    figure: go.Figure, left: float, right: float, top: float, bottom: float, dark: bool
) -> None:
    """Frame cells from one side to the other, and from the row ``top`` to the row ``bottom``."""
    figure.add_shape(
        type="rect",
        x0=left,
        x1=right,
        y0=top - 0.5,
        y1=bottom + 0.5,
        line={"color": theme.foreground(dark), "width": 2},
    )


def together_figure(
    heads: pd.DataFrame,
    *,
    attention_layer: int,
    routed: str,
    chosen: int,
    n_prompts: int,
    scope: Scope,
    dark: bool = False,
) -> go.Figure:
    """Draw how often attended keys share an expert with their query, and how often by chance.

    Parameters
    ----------
    heads : DataFrame
        The heads of ``together.routing_together``.
    attention_layer : int
        Whose heads.
    routed : str
        Name of the site whose experts.
    chosen : int
        Head that is marked.
    """
    x = np.arange(len(heads))
    share = heads["share"].to_numpy(dtype=np.float64)
    up = heads["share_high"].to_numpy(dtype=np.float64) - share
    down = share - heads["share_low"].to_numpy(dtype=np.float64)
    known = heads.assign(pairs=heads["pairs"].astype("float64"))
    mine = (heads["head"] == chosen).to_numpy()
    figure = go.Figure(
        [
            _chance(x, known, "chance_distance", "same distance", "diamond-open", dark),
            _chance(x, known, "chance_random", "any earlier token", "line-ew-open", dark),
            *(
                go.Scatter(
                    x=x[part],
                    y=share[part],
                    mode="markers",
                    marker={"size": 11, "color": color, "symbol": symbol},
                    error_y={
                        "type": "data",
                        "array": up[part],
                        "arrayminus": down[part],
                        "thickness": 1.5,
                    },
                    customdata=known.loc[part, ["head", "pairs", "lift"]].to_numpy(np.float64),
                    hovertemplate="head %{customdata[0]:d}: %{y:.1%} of the attended keys share "
                    "an expert<br>%{customdata[1]:,d} pairs; %{customdata[2]:.2f}× the same "
                    "distance<extra></extra>",
                    name=name,
                )
                for part, name, color, symbol in (
                    (~mine, "attended keys", theme.accent(dark), "circle"),
                    (
                        mine,
                        f"attended keys, head {chosen}",
                        theme.hue("vermillion", dark),
                        "square",
                    ),
                )
            ),
        ]
    )
    step = -(-len(heads) // 32) or 1
    figure.update_xaxes(
        title=f"attention head of layer {attention_layer}",
        range=[-0.6, len(heads) - 0.4],
        tickmode="array",
        tickvals=x[::step],
        ticktext=[str(head) for head in heads["head"].tolist()[::step]],
    )
    figure.update_yaxes(title="share of pairs (weighted)", tickformat=".0%")
    return theme.finish(
        figure,
        title=f"Pairs that share an expert of layer {routed} (share, weighted by attention)",
        caption=scope.caption(
            counted(n_prompts, "prompt"),
            "bars: 9 of 10 draws of prompts with replacement",
            "baselines: keys of the same prompt at the same distance, and any earlier key",
            "the query itself and the prompt's first token left out",
            f"recorded keys hold {number(heads['covered'].mean(), '.0%')} of the attention",
        ),
        dark=dark,
        height=340,
        legend=True,
    )


def _chance(
    x: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    heads: pd.DataFrame,
    column: str,
    name: str,
    symbol: str,
    dark: bool,
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=heads[column].to_numpy(dtype=np.float64),
        mode="markers",
        marker={
            "symbol": symbol,
            "size": 12,
            "color": theme.foreground(dark),
            "line": {"width": 2, "color": theme.foreground(dark)},
        },
        hovertemplate=f"by chance ({name}): %{{y:.1%}}<extra></extra>",
        name=f"by chance, {name}",
    )


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
    figure: go.Figure, window: range, names: Sequence[str], change: Floats, routed: str, dark: bool
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
