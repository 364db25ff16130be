"""Figures of a comparison of routers: fronts, and how routers learned."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from explorer.comparison.verdicts import CONTROLS, NATIVE
from explorer.registry import Registry
from explorer.ui import theme
from explorer.ui.heatmap import Scale, clickable_heatmap
from explorer.ui.wording import domain_labels, label, labels

# colour and form of a family: told apart without colour as well
FAMILIES = {
    "attention": ("blue", "circle"),
    "clustering": ("orange", "square"),
    "gating": ("green", "diamond"),
    "rl": ("purple", "star"),
    "literature": ("sky", "triangle-up"),
    "control": ("grey", "x-thin-open"),
    "condition": ("vermillion", "pentagon"),
}
CONDITION = "condition"  # changed weights with their own routing, beside routers
FAMILY_NAMES = {"rl": "reinforcement learning"}
_FLAGS = ("causal", "batch_dependent", "simulated")
_MARKER = 11
_MOST_LAMBDAS = 8
_LABELLED = 14  # points with a name beside them; more overlap


class CostAxis(NamedTuple):
    """A column of a comparison, as an axis.

    Attributes
    ----------
    title : str
        With unit.
    native : float
        Where the model's own router is.
    meaning : str
        One sentence for a newcomer.
    add : float
        To the column, for what is shown.
    more : bool
        More is better.
    """

    title: str
    native: float
    meaning: str
    add: float = 0.0
    more: bool = False


AXES: Registry[CostAxis] = Registry(
    "cost",
    flops_ratio=CostAxis(
        "FLOPs a token (share of the model's own)",
        1.0,
        "Multiplications and additions that ran, in the whole model, the router's own included.",
    ),
    expert_flops_ratio=CostAxis(
        "expert FLOPs a token (share of the model's own)",
        1.0,
        "Multiplications and additions of the experts only.",
    ),
    latency_ratio=CostAxis(
        "measured time of a forward pass (share of the model's own)",
        1.0,
        "Wall time on this machine, in turns with the unchanged model; small models are bound by "
        "other things than experts.",
    ),
    max_violation=CostAxis(
        "busiest expert (× fair share; mean of layers)",
        float("nan"),
        "Load of a layer's busiest expert, 1 = even: with a GPU for each, how much longer the "
        "layer takes. MaxVio in papers is this less 1.",
        add=1.0,
    ),
    hit_rate=CostAxis(
        "hit rate of an LRU cache of a quarter of the experts (mean of layers)",
        float("nan"),
        "Memory: lookups that a small cache answers, text after text; more is better. Routers and "
        "conditions on the same tokens.",
        more=True,
    ),
    draft_experts=CostAxis(
        "different experts of four consecutive tokens (mean of layers)",
        float("nan"),
        "Memory: experts that a draft of speculative decoding reads in one pass; fewer is better. "
        "Routers and conditions on the same tokens.",
    ),
    agreement=CostAxis(
        "agreement (share of the model's own experts that were chosen)",
        1.0,
        "Agreement is a poor predictor of loss: see how the points lie.",
    ),
)


def family_name(family: str) -> str:
    """Return what a family is called."""
    return FAMILY_NAMES.get(family, family)


def badges(row: "pd.Series[object]") -> list[str]:
    """Return what must be said of a router wherever it appears."""
    known = {name: not pd.isna(row[name]) and bool(row[name]) for name in _FLAGS}
    found = ["not causal"] if not known["causal"] and not pd.isna(row["causal"]) else []
    found += ["depends on the batch"] if known["batch_dependent"] else []
    return found + (["simulated"] if known["simulated"] else [])


def marked(results: pd.DataFrame) -> dict[str, str]:
    """Return how routers are called where there is no room for badges: with a † for any badge."""
    wearing = {str(row["router"]) for _, row in results.iterrows() if badges(row)}
    return {str(name): f"{name} †" if name in wearing else str(name) for name in results["router"]}


def front(
    results: pd.DataFrame, *, cost: str, native_loss: float, tokens: int, dark: bool = False
) -> go.Figure:
    """Draw the change in loss of routers over what they cost.

    Parameters
    ----------
    results : DataFrame
        Rows of a comparison's ``results`` with all layers swapped, one a router and seed.
    cost : str
        A name in ``AXES``.
    native_loss : float, nats a token
    tokens : int
        Tokens that the loss is of.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row number in ``results``], -1 for the model's own router
        where ``results`` lack it.
    """
    axis = AXES[cost]
    results = results.assign(**{cost: results[cost].astype(float) + axis.add})
    figure, index = go.Figure(), results.index
    own = results[results["router"] == NATIVE]
    results = results.drop(own.index)
    ours = results[results["family"] != "control"]
    named = len(ours) <= _LABELLED
    for family, (name, symbol) in FAMILIES.items():
        color = theme.hue(name, dark)
        rows = results[results["family"] == family]
        if rows.empty:
            continue
        numbers = index.get_indexer(rows.index)
        figure.add_trace(
            go.Scatter(
                x=rows[cost].to_numpy(dtype=np.float64),
                y=rows["loss_change"].to_numpy(dtype=np.float64),
                error_y={
                    "array": _margin(rows).to_numpy(dtype=np.float64),
                    "thickness": 1.2,
                    "width": 3,
                },
                mode="markers+text" if named and family != "control" else "markers",
                text=labels(rows["router"].tolist(), limit=22),
                textposition="top center",
                textfont={"size": 10},
                customdata=numbers[:, None],
                hovertext=[_hover(row) for _, row in rows.iterrows()],
                hovertemplate="%{hovertext}<extra></extra>",
                marker={
                    "color": color,
                    "symbol": symbol,
                    "size": _MARKER,
                    "line": {"color": color, "width": 2.5 if family == "control" else 0},
                },
                name=label(family_name(family)),
            )
        )
    figure.add_hline(0.0, line=theme.dotted(dark))
    if not np.isnan(axis.native):
        figure.add_vline(axis.native, line=theme.dotted(dark))
    place = float(own[cost].mean()) if np.isnan(axis.native) else axis.native
    if not np.isnan(place):
        number = index.get_loc(own.index[0]) if len(own) else -1
        figure.add_trace(_own_router(place, number, axis, dark))
        reference = {"router": NATIVE, "family": "", cost: place, "loss_change": 0.0}
        results = pd.concat([results, pd.DataFrame([{**reference, "causal": True}])])
    best = pareto(results, cost, more=axis.more)
    figure.add_trace(
        go.Scatter(
            x=best[cost].to_numpy(dtype=np.float64),
            y=best["loss_change"].to_numpy(dtype=np.float64),
            mode="lines",
            line={"color": theme.foreground(dark), "width": 1},
            name="front",
            hoverinfo="skip",
        )
    )
    low, high = _extent(ours if len(ours) else results)
    above = int((results["loss_change"] > high).sum())
    figure.update_xaxes(title=axis.title)
    figure.update_yaxes(
        title="change in loss (nats a token; 0 = the model's own router)", range=[low, high]
    )
    figure.update_layout(
        clickmode="event+select",
        dragmode="zoom",
        hovermode="closest",
        legend=theme.LEGEND_RIGHT,  # above, its rows would lie on the caption of a narrow figure
    )
    return theme.finish(
        figure,
        title="What routers cost and what they save",
        caption=f"n = {tokens:,} held-out tokens; bars: 95% interval of the paired "
        f"difference over texts; the model's own loss is {native_loss:.3f}; on the front: what no "
        "other is both cheaper and better than"
        + (
            f"; {above} {'point lies' if above == 1 else 'points lie'} above: double-click to see "
            "all"
            if above
            else ""
        ),
        dark=dark,
        height=480,
    )


def _own_router(place: float, number: int, axis: CostAxis, dark: bool) -> go.Scatter:
    """Draw the unchanged model: a change in loss of 0 at its own cost."""
    return go.Scatter(
        x=[place],
        y=[0.0],
        mode="markers",
        customdata=[[number]],
        hovertemplate=f"<b>the model's own router</b><br>{axis.title}: %{{x:.3g}}<extra></extra>",
        marker={
            "color": theme.foreground(dark),
            "symbol": "circle-open-dot",
            "size": _MARKER + 4,
            "line": {"color": theme.foreground(dark), "width": 2},
        },
        name="the model's own router",
    )


def _extent(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the range of the losses, with room for bars and names; chance would squeeze it."""
    error = _margin(rows).fillna(0.0)
    low = min(0.0, float((rows["loss_change"] - error).min()))
    high = max(0.0, float((rows["loss_change"] + error).max()))
    room = 0.08 * max(high - low, 1e-3)
    return low - room, high + 2 * room


def _margin(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return half of the 95% interval; files of older formats hold the standard error only."""
    twice = 2 * rows["loss_se"].astype(float)
    return rows["loss_margin"].astype(float).fillna(twice) if "loss_margin" in rows else twice


def pareto(results: pd.DataFrame, cost: str, *, more: bool = False) -> pd.DataFrame:
    """Return the rows that no other row beats in both cost and loss, cheapest first.

    Parameters
    ----------
    more : bool
        Rows with more of ``cost`` are the cheaper ones.

    Controls and rules whose loss cannot be compared (not causal) take no part.
    """
    rows = results[(results["family"] != "control") & ~results["causal"].eq(False)]
    rows = rows.dropna(subset=[cost, "loss_change"]).sort_values(
        [cost, "loss_change"], ascending=[not more, True]
    )
    lowest = rows["loss_change"].cummin()
    return rows[(rows["loss_change"] == lowest) & ~lowest.duplicated()]


def _hover(row: "pd.Series[object]") -> str:
    """Return the lines of a hover, escaped."""
    seed = "" if pd.isna(row["seed"]) else f", seed {row['seed']}"
    lines = [
        f"<b>{label(str(row['router']), limit=60)}</b>{seed}",
        f"change in loss {_number(row['loss_change'], '+.4f')} ± {_number(row['loss_se'], '.4f')}",
        f"experts a token {_number(row['experts_per_token'], '.3f')}",
        f"FLOPs × {_number(row['flops_ratio'], '.3f')}, time × "
        f"{_number(row['latency_ratio'], '.2f')}",
        f"agreement {_number(row['agreement'], '.3f')}, busiest expert "
        f"{_number(row['max_violation'] + 1, '.2f')} × fair share",
    ]
    if not pd.isna(row.get("hit_rate")):
        lines.append(
            f"cache hits {_number(row['hit_rate'], '.1%')}, experts of a draft "
            f"{_number(row['draft_experts'], '.2f')}"
        )
    kind = row.get("harder")
    if isinstance(kind, str) and kind:
        lines.append(f"harder control (chance, {CONTROLS[kind]}) {_number(row[kind], '+.4f')}")
    if isinstance(row.get("better_than_chance"), str):
        low, high = (_number(row[f"chance_{end}"], "+.4f") for end in ("low", "high"))
        lines.append(
            f"better than chance? {row['better_than_chance']}: "
            f"{_number(row['chance_difference'], '+.4f')} (95%: {low} to {high})"
        )
    if isinstance(row["control_of"], str):
        kind = str(row["control"]).replace("_", " ")
        lines.append(f"control, {kind} of {label(row['control_of'], limit=60)}")
    return "<br>".join([*lines, *badges(row)])


def _number(value: object, form: str) -> str:
    return "not measured" if value is None or pd.isna(value) else format(float(str(value)), form)


CURVES = {
    "reward": "reward (nats a token, less the cost)",
    "policy_entropy": "policy entropy (nats)",
    "gate_rate": "share of parts that run",
}


def curves(rows: pd.DataFrame, quantity: str, *, dark: bool = False) -> go.Figure:
    """Draw how a router learned: one line per router, seed and lambda.

    Parameters
    ----------
    rows : DataFrame
        Table ``curves`` of a comparison; rows of single layers are averaged.
    quantity : str
        A name in ``CURVES``.
    """
    figure = go.Figure()
    keys = ["router", "lambda", "seed"]
    # a gate's price moves while it learns: then lambda tells steps apart, not trainings
    moving = rows.groupby("router")["lambda"].transform("nunique") > _MOST_LAMBDAS
    rows = rows.assign(**{"lambda": rows["lambda"].mask(moving)})
    means = rows.groupby([*keys, "step"], dropna=False, sort=True)[quantity].mean().reset_index()
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    routers = list(dict.fromkeys(means["router"]))
    names = labels([str(router) for router in routers], limit=30)
    for (router, weight), group in means.groupby(["router", "lambda"], dropna=False, sort=False):
        number = routers.index(router)
        for shade, (seed, line) in enumerate(group.groupby("seed", dropna=False)):
            cost = "" if pd.isna(weight) else f", λ = {weight:g}"
            figure.add_trace(
                go.Scatter(
                    x=line["step"],
                    y=line[quantity].to_numpy(dtype=np.float64),
                    mode="lines",
                    opacity=1.0 if shade == 0 else 0.55,
                    line={
                        "color": theme.hues(dark)[number % theme.N_HUES],
                        "dash": dashes[_place(group, means, router) % len(dashes)],
                        "width": 1.8,
                    },
                    name=f"{names[number]}{cost}",
                    legendgroup=f"{router} {weight}",
                    showlegend=shade == 0,
                    hovertemplate=f"step %{{x}}: %{{y:.4g}} (seed {seed})<extra></extra>",
                )
            )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title=CURVES[quantity])
    figure.update_layout(legend=theme.LEGEND_RIGHT)
    return theme.finish(
        figure,
        title=f"While learning: {CURVES[quantity]}",
        caption="faint lines: further seeds; means over layers",
        dark=dark,
    )


def _place(group: pd.DataFrame, means: pd.DataFrame, router: object) -> int:
    """Return which of a router's costs this is."""
    weights = list(dict.fromkeys(means.loc[means["router"] == router, "lambda"].fillna(-1.0)))
    return weights.index(group["lambda"].fillna(-1.0).iloc[0])


def means_by(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the change in loss by router and layer (or domain), means over seeds.

    Returns
    -------
    DataFrame
        nats a token; one row a router, in the order of :func:`by_layer` and :func:`by_domain`.
    """
    return rows.fillna({"domain": ""}).pivot_table(
        index="router", columns=column, values="loss_change", aggfunc="mean", sort=False
    )


def by_layer(results: pd.DataFrame, *, tokens: int, dark: bool = False) -> go.Figure:
    """Draw the change in loss when one layer alone is swapped: routers by layers.

    Parameters
    ----------
    results : DataFrame
        Rows of mode ``live-layer``; ``control_loss_change``, of a random rule at the same compute
        in the same layer, is told where there is one.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row of the router, layer].
    """
    means = means_by(results, "layer")
    beside = results.pivot_table(
        index="router", columns="layer", values="control_loss_change", sort=False, dropna=False
    )
    return _changes(
        means,
        beside=beside.reindex(index=means.index, columns=means.columns),
        columns=[str(layer) for layer in means.columns],
        x_title="decoder layer that was swapped",
        hover="layer %{customdata[1]}",
        ids=means.columns.to_numpy(dtype=np.float64),
        title="Change in loss when one layer is swapped (nats a token)",
        caption=f"n = {tokens:,} held-out tokens; all other layers route as the model does",
        dark=dark,
    )


def by_domain(domains: pd.DataFrame, *, tokens: int, dark: bool = False) -> go.Figure:
    """Draw the change in loss of routers in each domain, all layers swapped.

    Returns
    -------
    Figure
        A click returns ``customdata`` [row of the router, column of the domain].
    """
    means = means_by(domains, "domain")
    return _changes(
        means,
        columns=domain_labels(list(means.columns)),
        x_title="domain",
        hover="%{x}",
        ids=np.arange(means.shape[1], dtype=np.float64),
        title="Change in loss by domain (nats a token)",
        caption=f"n = {tokens:,} held-out tokens; all layers swapped",
        dark=dark,
    )


def _changes(
    means: pd.DataFrame,
    *,
    columns: list[str],
    x_title: str,
    hover: str,
    ids: np.ndarray[tuple[int], np.dtype[np.float64]],
    title: str,
    caption: str,
    dark: bool,
    beside: pd.DataFrame | None = None,
) -> go.Figure:
    z = means.to_numpy(dtype=np.float64)
    # one catastrophe would leave the rest without colour
    reach = float(np.nanquantile(np.abs(z), 0.9)) if np.isfinite(z).any() else 1.0
    reach = max(reach, 1e-4)
    rows = np.broadcast_to(np.arange(z.shape[0], dtype=np.float64)[:, None], z.shape)
    names = labels([str(name) for name in means.index], limit=34)
    chance = np.full_like(z, np.nan) if beside is None else beside.to_numpy(dtype=np.float64)
    texts = [
        f"{name}<br>{value:+.4f} nats" + ("" if np.isnan(other) else f" (chance {other:+.4f})")
        for name, line, others in zip(names, z, chance, strict=True)
        for value, other in zip(line, others, strict=True)
    ]
    figure = clickable_heatmap(
        z,
        ids=np.stack([rows, np.broadcast_to(ids, z.shape)], axis=-1),
        hover="%{text}<br>" + (hover if "customdata" in hover else ""),
        missing_hover="not measured",
        hover_text=texts,
        x_labels=columns,
        y_labels=names,
        x_title=x_title,
        y_title="",
        scale=Scale("nats a token", -reach, reach, neutral=0.0),
        dark=dark,
    )
    return theme.finish(
        figure,
        title=title,
        caption=f"{caption}; colours end at ± {reach:.2g}",
        dark=dark,
        height=140 + 26 * max(4, len(names)),
    )


def gate_histogram(rows: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw how often the gates of each layer had which value.

    Parameters
    ----------
    rows : DataFrame
        Of table ``gate_values`` of a comparison, of one router; seeds are added up.
    """
    counts = rows.pivot_table(index="layer", columns="low", values="gates", aggfunc="sum")
    table = counts.to_numpy(dtype=np.float64)
    share = table / table.sum(axis=1, keepdims=True)
    width = float((rows["high"] - rows["low"]).iloc[0])
    figure = go.Figure(
        go.Heatmap(
            z=share,
            x=counts.columns.to_numpy(dtype=np.float64) + width / 2,
            y=[str(layer) for layer in counts.index],
            colorscale=theme.SEQUENTIAL,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "share of the gates"}, "tickformat": ".0%"},
            hovertemplate="layer %{y}, gates of about %{x:.3f}: %{z:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="gate: 0 = the part is skipped, 1 = used whole", range=[0, 1])
    figure.update_yaxes(title="decoder layer", type="category", autorange="reversed")
    return theme.finish(
        figure,
        title="Where the gates of each layer stood (share of their values)",
        caption=f"n = {int(table.sum(axis=1).min()):,} gates a layer, of held-out tokens",
        dark=dark,
        height=180 + 24 * len(counts),
    )


def oracle_bound(rows: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """Draw the loss of the best of n random sets of experts beside the model's own.

    Parameters
    ----------
    rows : DataFrame
        Table ``oracle`` of a comparison.
    """
    by_kind = rows.drop_duplicates("kind").set_index("kind")
    sets = int(rows["sets"].iloc[0])
    drawn = rows[rows["kind"].isin(("random", "best of n", "best"))]
    drawn = drawn.assign(n=drawn["n"].fillna(drawn["kind"].map({"random": 1, "best": sets})))
    drawn = drawn.sort_values("n")
    blue, bound = theme.accent(dark), theme.hue("vermillion", dark)
    figure = go.Figure(
        go.Scatter(
            x=drawn["n"].to_numpy(dtype=np.float64),
            y=drawn["loss"].to_numpy(dtype=np.float64),
            mode="lines+markers",
            marker={
                "size": 9,
                "color": [bound if kind == "best" else blue for kind in drawn["kind"]],
                "symbol": ["diamond" if k == "best" else "circle" for k in drawn["kind"]],
            },
            line={"color": blue, "width": 1},
            hovertemplate="best of %{x:,} sets: %{y:.4f} nats<extra></extra>",
            showlegend=False,
        )
    )
    own = float(by_kind.loc["model", "loss"])
    figure.add_hline(
        own,
        line=theme.dotted(dark),
        annotation={"text": f"the model's own router {own:.4f}", "yanchor": "bottom"},
    )
    figure.update_xaxes(title="random sets of experts to choose the best of", type="log", dtick=1)
    figure.update_yaxes(title="loss (nats a token)")
    which = "all" if bool(rows["enumerated"].iloc[0]) else "random"
    return theme.finish(
        figure,
        title=f"A bound: experts of layer {int(rows['layer'].iloc[0])} chosen by the answer",
        caption=f"n = {int(rows['tokens'].iloc[0]):,} held-out tokens; {which} {sets:,} sets; the "
        "last point sees the next token: no router can",
        dark=dark,
    )
