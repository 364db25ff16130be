"""Figures of flow: experts from layer to layer, and experts that serve the same token."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from explorer.metrics.coactivation import MIN_EXPECTED, Uplift
from explorer.ui import theme
from explorer.ui.heatmap import MAX_CELLS, clickable_heatmap, ground, log_ratio, ratio_scale
from explorer.ui.wording import Scope

Floats = npt.NDArray[np.float64]

# a side of the largest square heatmap
MAX_SIDE = int(MAX_CELLS**0.5)
# flows that are not drawn one by one are drawn as one only where they do not bury the others
_REST_DRAWN_BELOW = 0.85
_UPLIFT = ratio_scale("measured / expected by chance")
# pixels between the nodes of a column
_NODE_PAD = 12
# pixels of margin above and below them
_AROUND = 80


class Pairs(NamedTuple):
    """Two groups of experts and how often they met.

    Attributes
    ----------
    tokens : array [A, B]
    uplift : Uplift
        Of the same shape.
    first, second : str
        Names of the two sites; equal for pairs within one site.
    """

    tokens: npt.NDArray[np.int64]
    uplift: Uplift
    first: str
    second: str

    @property
    def within(self) -> bool:
        """Whether both experts are of the same site."""
        return self.first == self.second


class Flow(NamedTuple):
    """One band of the Sankey figure; expert -1 is the rest of its layer."""

    hop: int
    source: int
    target: int
    tokens: int
    ratio: float


def pair_heatmap(
    pairs: Pairs, *, scope: Scope, chosen: tuple[int, int] | None = None, dark: bool = False
) -> go.Figure:
    """Draw how often two experts serve the same token, against chance.

    Parameters
    ----------
    chosen : (expert, expert), optional
        Framed.

    Returns
    -------
    Figure
        A click returns ``customdata`` [expert, expert, tokens, ratio].
    """
    rows = _busiest(pairs.tokens.sum(axis=1))
    columns = rows if pairs.within else _busiest(pairs.tokens.sum(axis=0))
    cut = np.ix_(rows, columns)
    ratio, tokens = pairs.uplift.ratio[cut], pairs.tokens[cut]
    first, second = np.meshgrid(rows, columns, indexing="ij")
    ids = np.stack([first, second, tokens, ratio], axis=2).astype(np.float64)
    title, here, y_title, x_title = _words(pairs)
    figure = clickable_heatmap(
        log_ratio(ratio),
        ids=ids,
        hover=f"{here}<br>%{{customdata[2]:,d}} tokens = %{{customdata[3]:.2f}}× chance",
        missing_hover=f"{here}<br>%{{customdata[2]:,d}} tokens; no ratio here",
        x_labels=[str(expert) for expert in columns],
        y_labels=[str(expert) for expert in rows],
        x_title=x_title,
        y_title=y_title,
        scale=_UPLIFT,
        dark=dark,
    )
    if chosen is not None and chosen[0] in rows and chosen[1] in columns:
        x, y = int(np.searchsorted(columns, chosen[1])), int(np.searchsorted(rows, chosen[0]))
        line = {"color": theme.foreground(dark), "width": 2}
        figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line=line)
    notes = [
        "1× = chance: "
        + ("the same loads, partners at random" if pairs.within else "the product of both loads"),
        f"grey: chance gives fewer than {MIN_EXPECTED:g} tokens"
        + (", and the diagonal" if pairs.within else ""),
    ]
    if len(rows) < len(pairs.tokens) or len(columns) < pairs.tokens.shape[1]:
        notes.append(f"the {MAX_SIDE} busiest experts of each side")
    theme.finish(
        figure,
        title=title,
        caption=scope.caption(*notes),
        dark=dark,
        height=int(np.clip(190 + 20 * len(rows), 420, 760)),
        caption_width=75,
    )
    return ground(figure, dark, diverging=True)


def _words(pairs: Pairs) -> tuple[str, str, str, str]:
    """Return the title, the hover, and the titles of the axes y and x."""
    if pairs.within:
        return (
            f"Experts of layer {pairs.first} that serve the same token (measured / chance)",
            f"layer {pairs.first}: expert %{{customdata[0]:d}} with expert %{{customdata[1]:d}}",
            f"expert of layer {pairs.first}",
            f"expert of layer {pairs.first}",
        )
    return (
        f"From layer {pairs.first} to layer {pairs.second} (measured / chance)",
        f"L{pairs.first}.E%{{customdata[0]:d}} → L{pairs.second}.E%{{customdata[1]:d}}",
        f"expert of layer {pairs.first}",
        f"expert of layer {pairs.second}",
    )


def _busiest(load: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which experts fit in a heatmap, by id."""
    return np.sort(np.argsort(-load, kind="stable")[:MAX_SIDE])


def top_flows(hops: Sequence[Pairs], n_flows: int) -> list[Flow]:
    """Return the largest flows of every hop, and the rest of their experts folded.

    Parameters
    ----------
    hops : sequence of Pairs
        From layer to layer, in order.
    n_flows : int
        Of each hop.

    Returns
    -------
    list of Flow
        Of every hop first its largest flows, then what each of their sources sends elsewhere
        (target -1), then what is left (source and target -1); together all tokens of the hop.
    """
    found: list[Flow] = []
    # an expert that a flow ends in has a node: what leaves it is shown as its own
    reached: set[int] = set()
    for number, hop in enumerate(hops):
        order = np.argsort(-hop.tokens, axis=None, kind="stable")[:n_flows]
        kept = [divmod(int(cell), hop.tokens.shape[1]) for cell in order]
        kept = [(a, b) for a, b in kept if hop.tokens[a, b]]
        found += [
            Flow(number, a, b, int(hop.tokens[a, b]), float(hop.uplift.ratio[a, b]))
            for a, b in kept
        ]
        rest = hop.tokens.sum(axis=1)
        for a, b in kept:
            rest[a] -= hop.tokens[a, b]
        sources = sorted(reached | {a for a, _ in kept})
        found += [Flow(number, a, -1, int(rest[a]), float("nan")) for a in sources if rest[a]]
        left = int(rest.sum() - rest[sources].sum())
        if left:
            found.append(Flow(number, -1, -1, left, float("nan")))
        reached = {b for _, b in kept}
    return found


def sankey(hops: Sequence[Pairs], *, n_flows: int, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw the largest flows of tokens between the experts of several layers.

    Parameters
    ----------
    hops : sequence of Pairs
        From layer to layer, in order.
        At least one of them has tokens.
    n_flows : int
        Drawn one by one, of each hop; the others are folded.

    Notes
    -----
    A token that chose K experts here and K2 there is in K x K2 flows.
    """
    flows = top_flows(hops, n_flows)
    whole = sum(flow.tokens for flow in flows)
    single = sum(flow.tokens for flow in flows if flow.target >= 0)
    rest = 1 - single / whole if whole else 0.0
    folded = rest <= _REST_DRAWN_BELOW
    if not folded:
        flows = [flow for flow in flows if flow.target >= 0]
    layers = [hops[0].first, *(hop.second for hop in hops)]
    height = int(np.clip(120 + 24 * _tallest(flows, len(layers)), 360, 860))
    nodes, x, y = _places(flows, len(layers), _NODE_PAD / (height - _AROUND))
    place = {node: number for number, node in enumerate(nodes)}
    names = [_node_name(layers[column], expert) for column, expert in nodes]
    figure = go.Figure(
        go.Sankey(
            arrangement="fixed",
            node={
                "label": names,
                "x": x,
                "y": y,
                "pad": _NODE_PAD,
                "thickness": 14,
                "color": [
                    theme.missing(dark) if expert < 0 else theme.accent(dark) for _, expert in nodes
                ],
                "line": {"width": 0},
                "hovertemplate": "%{label}: %{value:,d} token pairs<extra></extra>",
            },
            link={
                "source": [place[flow.hop, flow.source] for flow in flows],
                "target": [place[flow.hop + 1, flow.target] for flow in flows],
                "value": [flow.tokens for flow in flows],
                "color": [_band_color(flow, dark) for flow in flows],
                "customdata": [
                    "folded"
                    if flow.target < 0
                    else "too few expected for a ratio"
                    if np.isnan(flow.ratio)
                    else f"{flow.ratio:.2f}× chance"
                    for flow in flows
                ],
                "hovertemplate": "%{source.label} → %{target.label}: %{value:,d} tokens, "
                "%{customdata}<extra></extra>",
            },
            textfont={"size": 11, "color": theme.foreground(dark), "shadow": "none"},
        )
    )
    notes = [
        f"the {n_flows:,} largest flows of each step hold {1 - rest:.0%} of all",
        "the rest is folded into grey" if folded else "the rest is not drawn",
        "width = tokens; a token is in one flow for each pair of its experts",
        "orange: more than the product of the loads gives, purple: less",
    ]
    figure.update_layout(margin={"b": 16})
    return theme.finish(
        figure,
        title=f"Experts from layer {layers[0]} to layer {layers[-1]} (tokens)",
        caption=scope.caption(*notes),
        dark=dark,
        height=height,
    )


def _node_name(layer: str, expert: int) -> str:
    return f"L{layer} rest" if expert < 0 else f"L{layer}.E{expert}"


def _tallest(flows: Sequence[Flow], columns: int) -> int:
    nodes = {(flow.hop, flow.source) for flow in flows}
    nodes |= {(flow.hop + 1, flow.target) for flow in flows}
    return max((sum(at == column for at, _ in nodes) for column in range(columns)), default=0)


def _places(
    flows: Sequence[Flow], columns: int, pad: float
) -> tuple[list[tuple[int, int]], list[float], list[float]]:
    """Return the nodes (column, expert) and where they stand, by id from top to bottom.

    ``pad`` is the gap between nodes as a share of the height. Plotly scales the nodes so that
    the fullest column just fits; the same is done here, since it takes middles only.
    """
    out: dict[tuple[int, int], int] = {}
    into: dict[tuple[int, int], int] = {}
    for flow in flows:
        out[flow.hop, flow.source] = out.get((flow.hop, flow.source), 0) + flow.tokens
        there = flow.hop + 1, flow.target
        into[there] = into.get(there, 0) + flow.tokens
    size = {node: max(out.get(node, 0), into.get(node, 0)) for node in out | into}
    nodes = sorted(size, key=lambda node: (node[0], node[1] < 0, node[1]))
    standing = [[node for node in nodes if node[0] == column] for column in range(columns)]
    scale = min(
        ((1 - pad * (len(column) - 1)) / sum(size[node] for node in column))
        for column in standing
        if column
    )
    x, y = [], []
    for number, column in enumerate(standing):
        top = 0.0
        for node in column:
            height = scale * size[node]
            # plotly ignores positions of exactly 0 and 1
            x.append(float(np.clip(number / max(1, columns - 1), 1e-3, 1 - 1e-3)))
            y.append(float(np.clip(top + height / 2, 1e-3, 1 - 1e-3)))
            top += height + pad
    return nodes, x, y


def _band_color(flow: Flow, dark: bool) -> str:
    """Return the colour of a band: how far from chance it is, on the scale of the heatmap."""
    if flow.target < 0:
        return "rgba(128, 128, 128, 0.18)"
    if np.isnan(flow.ratio):
        return "rgba(128, 128, 128, 0.45)"
    low, high = _UPLIFT.low, _UPLIFT.high
    part = (float(log_ratio(np.array([flow.ratio]))[0]) - low) / (high - low)
    # the neutral middle of the scale is the ground, on which a band would vanish
    part = min(part, 0.4) if part < 0.5 else max(part, 0.6)
    red, green, blue = theme.color_at(part, dark)
    return f"rgba({red}, {green}, {blue}, 0.65)"
