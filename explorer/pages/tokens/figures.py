"""Figures of tokens: a prompt's tokens over the layers, and one token's experts and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from explorer.errors import ExplorerError
from explorer.pages.tokens.data import Quantity
from explorer.ui import theme
from explorer.ui.heatmap import MAX_CELLS, MAX_LABELS, Scale, clickable_heatmap, ground
from explorer.ui.wording import Scope, label, labels, number, site_hover, site_name

# more tokens than this are too narrow to be clicked, and slow to draw
MAX_TOKENS = 256
# of a score vector, more bars than this have no room for ids
_LABELLED_BARS = 40
# characters of a caption's line in the panel of a token
_NARROW = 50
# of a bar of many layers
_ROW, _LOW_ROW, _MANY_ROWS = 26, 18, 24  # pixels, pixels, layers


def tokens_shown(n_tokens: int, n_sites: int, *, start: int = 0) -> range:
    """Return which tokens of a prompt fit in a heatmap, from ``start`` on."""
    width = min(MAX_TOKENS, MAX_CELLS // max(1, n_sites))
    start = max(0, min(start, n_tokens - width))
    return range(start, min(n_tokens, start + width))


def expert_groups(values: pd.DataFrame, sizes: Mapping[tuple[int, int], int]) -> "pd.Series[float]":
    """Return which of ``theme.categories`` each token's expert has, within its own router.

    Parameters
    ----------
    values : DataFrame
        From ``data.token_quantity`` of ``expert``.
    sizes : mapping (layer, site) -> number of experts
        Few experts have the colour of their id; of many, the most frequent in these rows have
        one, and the others share the number behind the last.

    Returns
    -------
    Series [len(values)]
        nan where no expert was chosen.
    """
    most = len(theme.categories(dark=False))
    place = ["layer", "site"]
    counts = values.groupby([*place, "value"], as_index=False).size()
    counts = counts.sort_values([*place, "size", "value"], ascending=[True, True, False, True])
    ranks = counts.groupby(place).cumcount()
    few = np.array(
        [sizes[key] <= most for key in zip(counts["layer"], counts["site"], strict=True)]
    )
    counts["group"] = np.where(few, counts["value"], ranks.clip(upper=most))
    joined = values[[*place, "value"]].merge(counts, how="left", on=[*place, "value"])
    return joined["group"].set_axis(values.index)


def expert_colors(dark: bool) -> tuple[str, ...]:
    """Return the colours of ``expert_groups``, the shared one last."""
    return (*theme.categories(dark), theme.hue("grey", dark))


def token_layer_heatmap(
    values: pd.DataFrame,
    quantity: Quantity,
    *,
    scope: Scope,
    groups: "pd.Series[float] | None" = None,
    start: int = 0,
    missing: str = "not recorded",
    dark: bool = False,
) -> go.Figure:
    """Draw a quantity of every token of a prompt at every layer.

    Parameters
    ----------
    values : DataFrame
        From ``data.token_quantity``.
    groups : Series, optional
        From ``expert_groups``: the values are experts, in these colours.
    start : int
        First token shown, for prompts that do not fit; the caption says how many are shown.
    missing : str
        Why a cell has no value.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, token_id, position, value].
    """
    sites = list(dict.fromkeys(zip(values["layer"], values["site"], strict=True)))
    several = any(site > 0 for _, site in sites)
    n_tokens = len(values) // len(sites) if sites else 0
    shown = tokens_shown(n_tokens, len(sites), start=start)
    window = slice(shown.start, shown.stop)
    columns = ["layer", "site", "token_id", "position", "value"]
    ids = values[columns].to_numpy(dtype=np.float64)
    ids = ids.reshape(len(sites), n_tokens, len(columns))[:, window]
    texts = [label(text, spaces=True) for text in values["text"].iloc[:n_tokens]][window]
    named = len(texts) <= MAX_LABELS and values["text"].notna().any()
    ticks = texts if named else [f"{int(p)}" for p in ids[0, :, 3]]
    where = "token %{customdata[3]}: %{text}<br>" + site_hover(several=several)
    z = ids[:, :, 4]
    if groups is not None:
        z = groups.to_numpy().reshape(len(sites), n_tokens)[:, window]
    figure = clickable_heatmap(
        z,
        ids=ids,
        hover=f"{where}<br>" + quantity.label.replace("%", "&#37;") + ": %{customdata[4]:.4g}",
        missing_hover=f"{where}<br>{missing}",
        hover_text=texts * len(sites),
        x_labels=ticks,
        y_labels=[site_name(layer, site, several=several) for layer, site in sites],
        x_title="token" if ticks is texts else "position of the token in the prompt",
        y_title="decoder layer.router" if several else "decoder layer",
        scale=quantity_scale(values["value"], quantity),
        dark=dark,
    )
    if ticks is texts:
        figure.update_xaxes(tickangle=-60)
    form: dict[str, Any] = {"colorscale": theme.tints(dark)}
    if groups is not None:
        form = _of_groups(ids[:, :, 4], dark, numbered=len(shown) <= MAX_LABELS)
    figure.update_traces(form, selector={"type": "heatmap"})
    part = f"tokens {shown.start + 1:,} to {shown.stop:,} of {n_tokens:,} shown"
    theme.finish(
        figure,
        title=f"Each token at each layer: {quantity.label}",
        caption=scope.caption(
            *([] if len(shown) == n_tokens else [part]),
            *([quantity.uniform] if quantity.uniform else []),
            *([] if groups is None else ["every layer has experts, and so colours, of its own"]),
            *([f"grey: {missing}"] if values["value"].isna().any() else []),
        ),
        dark=dark,
        height=int(np.clip(200 + 24 * len(sites), 340, 900)),
    )
    return ground(figure, dark)


def _of_groups(experts: npt.NDArray[np.float64], dark: bool, *, numbered: bool) -> dict[str, Any]:
    """Return the form of a heatmap whose cells are experts in the colours of their groups."""
    colors = expert_colors(dark)
    ends = np.repeat(np.arange(len(colors) + 1) / len(colors), 2)[1:-1]
    form: dict[str, Any] = {
        "colorscale": list(zip(ends.tolist(), np.repeat(colors, 2).tolist(), strict=True)),
        "zmin": -0.5,
        "zmax": len(colors) - 0.5,
        "showscale": False,
    }
    if numbered:
        names = [["" if np.isnan(expert) else f"{expert:.0f}" for expert in row] for row in experts]
        form |= {"text": names, "texttemplate": "%{text}"}
    return form


def quantity_scale(values: "pd.Series[float]", quantity: Quantity) -> Scale:
    """Return the colours of a quantity, from the least to the greatest of the values."""
    known = values.dropna()
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return Scale(quantity.label, low, high if high > low else low + 1.0)


def score_bars(
    scores: pd.DataFrame,
    *,
    layer: str,
    token_text: str | None,
    unit: str,
    baseline: float | None = None,
    column: str = "score",
    dark: bool = False,
) -> go.Figure:
    """Draw every expert's score of one token at one layer, the chosen experts marked.

    Parameters
    ----------
    scores : DataFrame
        From ``data.token_scores``; must hold scores.
    layer : str
    token_text : str or None
        As recorded; escaped here.
    unit : str
        What the scores are, such as "logit" or "probability".
    baseline : float, optional
        Value at which all experts would be equal, drawn as a line.
    column : str
        The column to draw; a page may add one with probabilities.

    Returns
    -------
    Figure
        A click returns ``customdata`` [expert, weight].
    """
    if not scores["recorded"].any():
        raise ExplorerError(
            "The scores of this token were not recorded, so there is nothing to draw. "
            "Record with --level scores, or with a larger --sample-tokens."
        )
    rows = scores.sort_values([column, "expert_id"], ascending=[False, True])
    position = np.arange(len(rows))
    figure = go.Figure()
    chosen = rows["slot"].notna().to_numpy()
    for mask, name, color in (
        (chosen, "chosen", theme.hue("orange", dark)),
        (~chosen, "not chosen", theme.accent(dark)),
    ):
        part = rows[mask]
        weight = part["weight"].to_numpy(dtype=np.float64)
        weighed = "<br>combine weight %{customdata[1]:.3f}" if name == "chosen" else ""
        figure.add_trace(
            go.Bar(
                x=position[mask],
                width=0.85,
                y=part[column].to_numpy(dtype=np.float64),
                customdata=np.stack([part["expert_id"].to_numpy(dtype=np.float64), weight], 1),
                marker={"color": color},
                name=name,
                hovertemplate=f"expert %{{customdata[0]}} ({name})<br>{unit} %{{y:.4g}}{weighed}"
                "<extra></extra>",
            )
        )
    if baseline is not None:
        figure.add_hline(
            baseline, line=theme.dotted(dark, 2), annotation_text=f"all equal: {number(baseline)}"
        )
    step = 1 if len(rows) <= _LABELLED_BARS else -(-len(rows) // 16)
    experts = rows["expert_id"].tolist()
    figure.update_xaxes(
        title="expert, highest score first",
        range=[-0.6, len(rows) - 0.4],
        tickmode="array",
        tickvals=position[::step],
        ticktext=[str(expert) for expert in experts[::step]],
    )
    figure.update_yaxes(title=unit)
    figure.update_layout(barmode="overlay")
    return theme.finish(
        figure,
        # the panel is narrow, and the axis says the unit in full
        title=f"Scores in layer {layer} ({unit.partition(' (')[0]})",
        caption=f"n = 1 token: {label(token_text, spaces=True)}; {int(chosen.sum())} chosen",
        dark=dark,
        caption_width=_NARROW,
        height=320,
        legend=True,
    )


def token_routes(
    experts: pd.DataFrame,
    *,
    token_text: str | None,
    pins: Sequence[theme.PinKey] = (),
    dark: bool = False,
) -> go.Figure:
    """Draw the experts of one token layer by layer, as bars of their share of the weight.

    Parameters
    ----------
    experts : DataFrame
        From ``data.token_experts``.

    Returns
    -------
    Figure
        A click returns ``customdata`` [layer, site, expert, weight].
    """
    known = bool(experts["weight"].notna().any()) or experts.empty
    if not known:  # a trace of ids alone: equal bars, in no order
        each = experts.groupby(["layer", "site"])["slot"].transform("size")
        experts = experts.assign(weight_share=1 / each)
    sites = list(dict.fromkeys(zip(experts["layer"], experts["site"], strict=True)))
    several = any(site > 0 for _, site in sites)
    row_of = {place: row for row, place in enumerate(sites)}
    colors = theme.pin_colors(pins, dark)
    figure = go.Figure()
    for slot, part in experts.groupby("slot"):
        places = list(zip(part["layer"], part["site"], strict=True))
        keys = list(zip(part["layer"], part["site"], part["expert_id"], strict=True))
        paint = [colors.get(key, theme.accent(dark)) for key in keys]
        opacity = max(0.35, 0.95 - 0.12 * int(slot)) if known else 0.65
        figure.add_trace(
            go.Bar(
                y=[row_of[place] for place in places],
                x=part["weight_share"].to_numpy(dtype=np.float64),
                orientation="h",
                text=[str(expert) for expert in part["expert_id"]],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                insidetextfont={"color": [theme.text_on(color, opacity, dark) for color in paint]},
                customdata=part[["layer", "site", "expert_id", "weight"]].to_numpy(dtype=float),
                marker={
                    "color": paint,
                    "opacity": opacity,
                    "line": {
                        "width": [3 if key in colors else 1 for key in keys],
                        "color": theme.foreground(dark),
                    },
                },
                name=f"choice {int(slot) + 1}",
                hovertemplate=site_hover(several=several)
                + ", expert %{customdata[2]}<br>"
                + (
                    "combine weight %{customdata[3]:.4f} (%{x:.1%} of the token's)"
                    if known
                    else "combine weight not recorded"
                )
                + "<extra></extra>",
                showlegend=False,
            )
        )
    figure.update_xaxes(
        title="share of the token's combine weight" if known else "chosen experts, weights unknown",
        tickformat=".0%",
        showticklabels=known,
    )
    figure.update_yaxes(
        title="decoder layer.router" if several else "decoder layer",
        tickmode="array",
        tickvals=list(range(len(sites))),
        ticktext=[site_name(layer, site, several=several) for layer, site in sites],
        autorange="reversed",
    )
    figure.update_layout(barmode="stack", bargap=0.12, clickmode="event+select")
    return theme.finish(
        figure,
        title="Experts of one token, layer by layer (share of its combine weight)",
        caption=f"n = 1 token: {label(token_text, spaces=True)}; numbers are expert ids; "
        + ("equal bars = all chosen experts alike" if known else "weights were not recorded"),
        dark=dark,
        caption_width=_NARROW,
        height=int(
            np.clip(130 + (_ROW if len(sites) <= _MANY_ROWS else _LOW_ROW) * len(sites), 260, 1400)
        ),
    )


def loss_lines(losses: pd.DataFrame, *, place: int, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw the loss of predicting every token, before and after a change of the routing.

    Parameters
    ----------
    losses : DataFrame
        ``position``, ``text`` (as recorded), ``before``, ``after`` (nats).
    place : int
        The chosen token, whose next token's loss is marked.
    """
    names = [f"token {row.position}: {label(row.text, spaces=True)}" for row in losses.itertuples()]
    figure = go.Figure(
        [
            theme.line(
                losses["position"], losses[name], name, form=form,
                hover="%{text}<br>%{y:.3f} nats", text=names,
            )
            for name, form in (
                ("before", theme.dotted(dark, 2)),
                ("after", {"color": theme.accent(dark)}),
            )
        ]
    )  # fmt: skip
    figure.add_vline(place + 1, line=theme.dotted(dark))
    figure.update_xaxes(title="position of the token that is predicted")
    figure.update_yaxes(title="nats", rangemode="tozero")
    figure.update_layout(hovermode="x unified")
    return theme.finish(
        figure,
        title="Loss of each token, before and after (nats)",
        caption=scope.caption("dotted line: the token after the chosen one"),
        dark=dark,
        height=320,
        legend=True,
    )


def next_token_bars(rows: pd.DataFrame, *, scope: Scope, dark: bool = False) -> go.Figure:
    """Draw the likeliest next tokens before and after a change of the routing.

    Parameters
    ----------
    rows : DataFrame
        ``text``, ``before``, ``after`` (probabilities), most likely first.
    """
    y = np.arange(len(rows))
    names = labels(rows["text"].tolist(), limit=18, spaces=True)
    figure = go.Figure(
        [
            go.Bar(
                x=rows[name],
                y=y,
                orientation="h",
                name=name,
                marker={"color": color},
                text=names,
                textposition="none",
                hovertemplate="%{text}: %{x:.1%}<extra>%{fullData.name}</extra>",
            )
            for name, color in (
                ("after", theme.accent(dark)),
                ("before", theme.hue("grey", dark)),
            )
        ]
    )
    figure.update_xaxes(title="probability", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5], tickmode="array", tickvals=y, ticktext=names, showgrid=False
    )
    figure.update_layout(barmode="group", bargap=0.25, legend_traceorder="reversed")
    return theme.finish(
        figure,
        title="Next token after the chosen one (probability)",
        caption=scope.caption(),
        dark=dark,
        height=int(np.clip(150 + _ROW * len(rows), 260, 560)),
        legend=True,
        caption_width=_NARROW,
    )


def changed_routing(
    changed: pd.DataFrame, *, scope: Scope, start: int = 0, dark: bool = False
) -> go.Figure:
    """Draw which tokens went to other experts at which layers after a change of the routing.

    Parameters
    ----------
    changed : DataFrame
        ``layer``, ``site``, ``token_id``, ``position``, ``text``, ``value`` (share of the token's
        experts that are others now), site after site.
    """
    quantity = Quantity("share of experts that changed", "", "", "")
    figure = token_layer_heatmap(changed, quantity, scope=scope, start=start, dark=dark)
    figure.update_traces(colorbar_title_text="", selector={"type": "heatmap"})
    figure.update_layout(title_text="Which routing changed (share of a token's experts)")
    return figure
