"""Clusters: a map of tokens, prompts or experts, what is near what, and how far to trust it."""

import html
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import streamlit as st

from explorer.errors import RunError
from explorer.maps.data import FEWEST_MEASURED, Prepared, Source, prepare, vector_counts
from explorer.maps.map_cache import CachedMap
from explorer.maps.pca import FEWEST
from explorer.maps.point_table import PointTable, Region, drawn_region, read_region, write_region
from explorer.pages.clusters.figures import map_density, map_points
from explorer.pages.clusters.points import (
    AMOUNTS,
    HUES,
    MAX_POINTS,
    PICKED,
    SEED,
    Hue,
    Made,
    Wanted,
    amount_range,
    drawn_points,
    hue_of,
    id_names,
    made,
    point_table,
)
from explorer.pages.clusters.selection import aim, selection_section
from explorer.router_cards import CARDS
from explorer.text import plain
from explorer.ui import address
from explorer.ui.address import domain_key
from explorer.ui.chart import chart, clicked
from explorer.ui.problems import instead, section
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Caption, number

BINS = 240  # of a density map, along its longer side
_UNITS = {"tokens": "Tokens", "prompts": "Prompts", "experts": "Experts"}
_FEATURES = {"hidden": "Router inputs", "scores": "Router scores"}
_LAYOUTS = {"umap": "UMAP", "pca": "PCA"}
METHODS = {"kmeans": "K-Means", "gmm": "Gaussian mixture", "hdbscan": "HDBSCAN"}
_GROUPS = ("6", "12", "24", "48")
_NO_UMAP = (
    f"UMAP needs {FEWEST} different vectors of two numbers or more, and there are fewer here: the "
    "picture is the PCA."
)
_OTHER_REGION = (
    "The link names a region that is not of this picture: it was drawn on another map, on the "
    "other layout, or before the vectors changed. Nothing is selected."
)
# what a run knows of a router's inputs
_RECORDED = {"hidden", "logits", "native", "token_ids", "starts", "positions"}
_WHAT = {
    "tokens": "A point is a **token**, described by what the router of the chosen layer read or "
    "by its score for every expert. Near points are tokens that the router sees alike.",
    "prompts": "A point is a **prompt**, described by how its tokens were spread over the "
    "experts of all layers. Near points are prompts that use the same experts.",
    "experts": "A point is an **expert** of a layer, described by the prompts that its tokens "
    "came from. Near points are experts that serve the same prompts, in whichever layer.",
}


class Asked(NamedTuple):
    """What the controls say."""

    wanted: Wanted
    layout: str
    hue: str

    @property
    def source(self) -> Source:
        """Where the vectors come from."""
        return self.wanted.source


def render() -> None:
    """Draw the page."""
    view = current_view()
    address.follow_jump()
    asked = _controls(view)
    if asked is None:
        return
    st.markdown(_WHAT[asked.source.unit])
    try:
        prepared = ask(view, prepare, source=asked.source)
    except RunError as error:
        instead(plain(str(error)))
        return
    if len(prepared.ids) < 2:
        instead("There are fewer than two points, so there is nothing to map.")
        return
    if prepared.is_point:
        instead(
            f"All {len(prepared.ids):,} vectors are equal, so that the map is one point and the "
            f"{asked.source.unit} are one cluster."
        )
    elif asked.layout == "umap" and not prepared.has_umap:
        instead(_NO_UMAP)
    _picture(view, asked, prepared, made(view, asked.wanted, prepared))


def _controls(view: View) -> Asked | None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        unit = address.choose(st.segmented_control, "map", "Map of", _UNITS, resets=("hue",))
        feature = "hidden"
        if unit == "tokens":
            counts = ask(view, vector_counts, **view.place)
            there = {name: text for name, text in _FEATURES.items() if counts[name]}
            if there:
                feature = address.choose(st.segmented_control, "vectors", "By", there)
        layout = address.choose(st.segmented_control, "layout", "Layout", _LAYOUTS)
        hues = dict(HUES[unit])
        hue = address.choose(st.selectbox, "hue", "Colour", hues, width=150)
        method = address.choose(
            st.selectbox,
            "method",
            "Clusters",
            METHODS,
            width=150,
            help="Found among the vectors themselves, not on their picture.",
        )
        groups = "12"
        if method != "hdbscan":
            groups = address.choose(
                st.selectbox, "groups", "How many", _GROUPS, default="12", width=90
            )
    if unit == "tokens" and not there:
        _not_recorded(view)
        return None
    source = Source(unit, feature, view.layer, view.site)  # type: ignore[arg-type]
    router = _router() if hue == "router" else ""
    return Asked(Wanted(source, method, int(groups), router), layout, hue)


def _router() -> str:
    """Let the reader choose whose choices the map shows."""
    titles = {
        name: card.title
        for name, card in CARDS.items()
        if card.part == "expert" and card.fits != "trained" and card.needs <= _RECORDED
    }
    return address.choose(
        st.selectbox,
        "other",
        "Router",
        titles,
        default="kmeans",
        width=240,
        help="Fitted on half of the prompts where it has to be, then asked about every mapped "
        "token: which expert would it weigh most?",
    )


def _not_recorded(view: View) -> None:
    """Say what is missing and how to record it."""
    instead(
        f"This run holds no router inputs and no scores of layer {view.site_name}, so its tokens "
        "cannot be mapped. They are kept for a sample of tokens, unless a capture is told not to."
    )
    st.code(
        "python -m capture MODEL --prompts FILE --out RUN.duckdb --sample-tokens 50000",
        language="bash",
    )
    if view.run.records_ids:
        st.caption("Maps of **Prompts** and **Experts** need expert ids only: this run has them.")


def _picture(view: View, asked: Asked, prepared: Prepared, there: Made) -> None:
    is_umap = asked.layout == "umap" and there.layout is not None
    xy = prepared.flat
    if is_umap and there.layout is not None:
        xy = np.stack([there.layout.columns["x"], there.layout.columns["y"]], axis=1)
    extra: dict[str, Any] = {}
    wanted = asked.wanted
    if there.clusters is not None:
        name = f"{wanted.method} {wanted.n_clusters}"
        extra["cluster"] = (name, pa.array(there.clusters.columns["cluster"]))
    if there.choices is not None:
        chosen = there.choices.columns["router"]
        extra["router"] = (wanted.router, pa.array(chosen, mask=chosen < 0))
    layout = "UMAP" if is_umap else "PCA"
    table = point_table(view, asked.source, prepared, xy, layout, extra)
    region = _region(prepared, layout)
    # what is selected stands beside the map, else what the map is worth
    left, right = st.columns([4, 1] if region is None else [5, 3], gap="large")
    hue = asked.hue
    if hue in ("cluster", "router") and hue not in extra:
        left.caption(f"Coloured by domain until the {HUES['tokens'][hue].lower()} is known.")
        hue = "domain"
    title = HUES[asked.source.unit][hue]
    if hue == "router":
        title = f"the expert of {wanted.router}"
    with left:
        if region is None and address.read("region"):
            instead(_OTHER_REGION)
        _figure(view, asked, prepared, table, hue_of(view, hue, title), layout, region)
    if region is None:
        with left:
            selection_section(view, asked.source, table, None)
    else:
        with right:
            selection_section(view, asked.source, table, region)
    with right if region is None else left:
        quality_panel(asked.source, wanted.method, prepared, there.layout, there.clusters, layout)


def _tag(prepared: Prepared, layout: str) -> str:
    """Return the name of a picture: a region of one means nothing on another."""
    return f"{prepared.digest[:8]}{layout[0].lower()}"


def _region(prepared: Prepared, layout: str) -> Region | None:
    tag, _, text = address.read("region").partition(":")
    return read_region(text) if tag == _tag(prepared, layout) else None


def _figure(
    view: View,
    asked: Asked,
    prepared: Prepared,
    table: PointTable,
    hue: Hue,
    layout: str,
    region: Region | None,
) -> None:
    unit = asked.source.unit
    tag = _tag(prepared, layout)
    key = f"map {tag}"
    state: Any = st.session_state.get(key)
    # what was drawn in this session shows itself
    outlined = None if state and drawn_region(state["selection"]) else region
    common: dict[str, Any] = {
        "caption": _caption(view, asked, table, layout),
        "extent": table.extent(),
        "region": outlined,
        "dark": is_dark(),
    }

    def on_region(selection: Any) -> None:
        found = drawn_region(selection)
        point = None if found else clicked(selection)
        if point:
            names = PICKED[unit].split(", ")
            aim(view, asked.source, {n: int(v) for n, v in zip(names, point, strict=True)})
        else:
            address.write("region", f"{tag}:{write_region(found)}" if found else "")

    title = f"{layout} of {unit}"
    if unit == "tokens":
        title += f": {_FEATURES[asked.source.feature].lower()} of layer {view.site_name}"
    if table.n_shown > MAX_POINTS:
        figure = _density(table, hue, title, common)
        drawn = "density map"
    else:
        points = drawn_points(table, asked.source, hue, view)
        figure = map_points(
            points.x,
            points.y,
            points.shown,
            texts=points.texts,
            ids=points.ids,
            color=points.color,
            title=f"{title}, coloured by {hue.title.lower()}",
            **common,
        )
        drawn = "scatter plot"
    columns = list(dict.fromkeys([*id_names(asked.source).split(", "), "x", "y", hue.column]))
    chart(
        figure,
        key=key,
        alt=f"{layout} {drawn} of {table.n_shown:,} {unit}, coloured by {hue.title.lower()}. Draw "
        "a box or a line to list what is inside.",
        table=lambda: table.rows(", ".join(columns)),
        on_region=on_region,
    )


def _density(table: PointTable, hue: Hue, title: str, common: dict[str, Any]) -> Any:
    if hue.is_amount:
        low, high = amount_range(table, hue)
        return map_density(
            table.density(BINS, mean=hue.column),
            value_title=f"mean {AMOUNTS[hue.column]}",
            low=low,
            high=high,
            title=f"{title}: mean {hue.title.lower()} of the points of each bin",
            **common,
        )
    values = table.values(hue.column)["value"].tolist()
    keys = [domain_key(value) if hue.column == "domain" else str(value) for value in values]
    names = dict(zip(keys, hue.names(values), strict=True))
    chosen = address.choose(
        st.selectbox,
        "value",
        f"Show where {hue.title.lower()} is",
        ["", *names],
        show=lambda name: html.unescape(names[name]) if name else "any: how many points",
        width=320,
    )
    if not chosen:
        return map_density(
            table.density(BINS), title=f"{title}: number of points in each bin", **common
        )
    value = values[keys.index(chosen)]
    return map_density(
        table.density(BINS, share=(hue.column, value)),
        value_title="share of the points",
        title=f"{title}: share of {names[chosen]}",
        **common,
    )


def _caption(view: View, asked: Asked, table: PointTable, layout: str) -> Caption:
    unit = asked.source.unit
    parts = [f"{table.n_shown:,} of {table.n_points:,} mapped {unit}"]
    acting = view.scope(table.n_shown, over_layers=unit == "experts")
    # experts are mapped by all of their tokens, prompts by whole ones
    if unit == "experts":
        acting = acting.without_filters()
    if unit != "tokens":
        acting = acting._replace(phase=None)
    said = ", ".join(view.scope(table.n_shown).filters())
    if said and unit != "experts":
        parts.append(f"filters: {said}")
    parts.append("axes have no unit" if layout == "UMAP" else "first two principal components")
    return Caption("; ".join(parts), acting.filter_values())


@section("How good the map is")
def quality_panel(
    source: Source,
    method: str,
    prepared: Prepared,
    laid_out: CachedMap | None,
    grouped: CachedMap | None,
    layout: str,
) -> None:
    """Say how far the picture and the clusters can be trusted."""
    st.markdown("**How good is it?**")
    facts = laid_out.facts if laid_out else {}
    names = {"UMAP": "trustworthiness", "PCA": "trustworthiness_pca"}
    st.metric(
        "Trustworthiness",
        _number(facts.get(names[layout])),
        help="How many of a point's 15 neighbours on the picture are neighbours among the vectors "
        "too, and by how much the others are not: 1 = all are, about 0.5 = by chance. Measured on "
        "a sample of 2,000 points.",
        border=True,
    )
    if not prepared.has_umap:
        st.caption("Measured beside a UMAP, and there are too few different points for one.")
    elif laid_out is None:
        st.caption("Measured on the UMAP, which is not there yet.")
    elif facts[names[layout]] is None:
        st.caption(f"Not defined for fewer than {FEWEST_MEASURED} different points.")
    else:
        other = "PCA" if layout == "UMAP" else "UMAP"
        st.caption(f"of this {layout}; of the {other}: {_number(facts.get(names[other]))}")
    found = grouped.facts if grouped else {}
    domains = found.get("domains") or {}
    st.metric(
        "NMI with domains",
        _number(domains.get("nmi")),
        help="Normalised mutual information of clusters and domains: 0 = the clusters say nothing "
        "of the domain, 1 = they are the domains. By chance: domains shuffled among the "
        "prompts, mean of 50.",
        border=True,
    )
    if domains.get("nmi") is not None:
        st.caption(
            f"By chance {_number(domains.get('floor'))} "
            f"(95% below {_number(domains.get('floor_high'))})"
        )
    elif source.unit == "experts":
        st.caption("An expert has no domain of its own.")
    elif grouped is None:
        st.caption("Measured on the clusters, which are not there yet.")
    else:
        st.caption("Not defined: the mapped points are of fewer than two domains.")
    if grouped is not None:
        st.metric("Clusters", found["n_clusters"], border=True)
        st.caption(_about_clusters(method, prepared, found))
    missing = prepared.n_all - len(prepared.ids)
    st.caption(
        f"Mapped: {len(prepared.ids):,} of {prepared.n_all:,} {source.unit}"
        + (f"; without a vector: {missing:,}." if missing else ".")
        + f" Seed {SEED}."
    )


def _about_clusters(method: str, prepared: Prepared, found: dict[str, Any]) -> str:
    text = f"{METHODS[method]} in all {prepared.dims:,} dimensions"
    if found["fitted"] < len(prepared.ids):
        text += f", found from {found['fitted']:,} points"
    if found["noise"]:
        text += f"; {found['noise']:.0%} of the points are in none"
    if not found["converged"]:
        text += "; stopped before it had settled"
    return text + "."


def _number(value: float | None) -> str:
    return number(value, ".2f")


render()
