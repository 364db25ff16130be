"""Clusters: a map of tokens, prompts or experts, what is near what, and how far to trust it."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

from explorer import service
from explorer.clusters import cache, regions
from explorer.clusters.features import Source
from explorer.clusters.prepare import Prepared, prepare
from explorer.clusters.projection import FEWEST, MapOptions
from explorer.errors import RunError
from explorer.figures.clusters import map_density, map_points
from explorer.pages import address, jump
from explorer.pages.components.chart import chart
from explorer.pages.components.job import follow as follow_job
from explorer.pages.components.map_points import (
    AMOUNTS,
    HUES,
    MAX_POINTS,
    Hue,
    amount_range,
    drawn_points,
    hue_of,
    id_names,
    point_table,
)
from explorer.pages.components.map_selection import selection_section
from explorer.pages.shell import current_view
from explorer.pages.state import View, ask, is_dark
from explorer.queries.clusters import vector_counts
from explorer.queries.points import PointTable
from explorer.worker import ProjectRequest, shared_worker

SEED = 0
BINS = 240  # of a density map, along its longer side
_UNITS = {"tokens": "Tokens", "prompts": "Prompts", "experts": "Experts"}
_FEATURES = {"hidden": "Router inputs", "scores": "Router scores"}
_LAYOUTS = {"umap": "UMAP", "pca": "PCA"}
_METHODS = {"kmeans": "K-Means", "gmm": "Gaussian mixture", "hdbscan": "HDBSCAN"}
_GROUPS = ("6", "12", "24", "48")
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

    source: Source
    layout: str
    hue: str
    method: str
    n_clusters: int


def render() -> None:
    """Draw the page."""
    view = current_view()
    jump.follow()
    asked = _controls(view)
    if asked is None:
        return
    st.markdown(_WHAT[asked.source.unit])
    try:
        prepared = ask(view, prepare, source=asked.source)
    except RunError as error:
        st.info(address.plain(str(error)), icon=":material/info:")
        return
    if len(prepared.ids) < 2:
        st.info("There are fewer than two points, so there is nothing to map.")
        return
    work = st.container()
    with work:
        laid_out = _map(view, asked, prepared)
        grouped = _clusters(view, asked, prepared)
    _picture(view, asked, prepared, laid_out, grouped)


def _controls(view: View) -> Asked | None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        unit = _choose("map", "Map of", _UNITS, "tokens")
        feature = "hidden"
        if unit == "tokens":
            counts = ask(view, vector_counts, layer=view.layer, site=view.site)
            there = {name: text for name, text in _FEATURES.items() if counts[name]}
            if there:
                feature = _choose("vectors", "By", there, next(iter(there)))
        layout = _choose("layout", "Layout", _LAYOUTS, "umap")
        hues = dict(HUES[unit])
        hue = address.choose(
            st.selectbox,
            "hue",
            "Colour",
            list(hues),
            default=next(iter(hues)),
            show=hues.__getitem__,
            width=200,
        )
        method = address.choose(
            st.selectbox,
            "method",
            "Clusters",
            list(_METHODS),
            default="kmeans",
            show=_METHODS.__getitem__,
            width=180,
            help="Found among the vectors themselves, not on their picture.",
        )
        groups = "12"
        if method != "hdbscan":
            groups = _choose("groups", "How many", {n: n for n in _GROUPS}, "12")
    if unit == "tokens" and not there:
        _not_recorded(view)
        return None
    source = Source(unit, feature, view.layer, view.site)  # type: ignore[arg-type]
    return Asked(source, layout, hue, method, int(groups))


def _choose(name: str, text: str, choices: dict[str, str], default: str) -> str:
    return address.choose(
        st.segmented_control, name, text, list(choices), default=default, show=choices.__getitem__
    )


def _not_recorded(view: View) -> None:
    """Say what is missing and how to record it."""
    st.info(
        f"This run holds no router inputs and no scores of layer {view.site_name}, so its tokens "
        "cannot be mapped. They are kept for a sample of tokens, unless a capture is told not to.",
        icon=":material/info:",
    )
    st.code(
        "python -m capture MODEL --prompts FILE --out RUN.duckdb --sample-tokens 50000",
        language="bash",
    )
    if view.run.records_ids:
        st.caption("Maps of **Prompts** and **Experts** need expert ids only: this run has them.")


def _map(view: View, asked: Asked, prepared: Prepared) -> cache.Kept | None:
    """Return the UMAP, or start it and return None."""
    if len(prepared.ids) < FEWEST:
        return None
    path = cache.map_path(prepared.digest, MapOptions(seed=SEED))
    return _kept(view, asked, prepared, path, "")


def _clusters(view: View, asked: Asked, prepared: Prepared) -> cache.Kept | None:
    path = cache.clusters_path(prepared.digest, asked.method, asked.n_clusters, SEED)
    return _kept(view, asked, prepared, path, asked.method)


def _kept(
    view: View, asked: Asked, prepared: Prepared, path: Path, method: str
) -> cache.Kept | None:
    """Return what the cache has, or have it made and show how far it is."""
    found = cache.read(path, len(prepared.ids))
    if found is not None:
        return found
    jobs = [job for job in shared_worker().jobs() if job.request.out == str(path)]
    source = asked.source
    request = ProjectRequest(
        str(path),
        str(view.run.path),
        source.unit,
        source.feature,
        source.layer,
        source.site,
        method,
        asked.n_clusters,
        SEED,
    )
    what = "clusters" if method else "UMAP"
    if not service.may_write():
        st.info(
            f"The {what} of these points has not been worked out yet, and this server writes "
            "nothing for you. Ask somebody who may record to open this page once."
        )
        return None
    if not jobs:
        follow_job(service.submit(request).job_id, key=str(path))
        return None
    if jobs[0].active:
        follow_job(jobs[0].job_id, key=str(path))
        return None
    said = address.plain(jobs[0].error) or "Its result is not in the cache any more."
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.warning(f"There is no {what} of these points. {said}", icon=":material/warning:")
    if right.button("Try again", key=f"again {path.name}", width="stretch"):
        service.submit(request)
        st.rerun()
    return None


def _picture(
    view: View,
    asked: Asked,
    prepared: Prepared,
    laid_out: cache.Kept | None,
    grouped: cache.Kept | None,
) -> None:
    is_umap = asked.layout == "umap" and laid_out is not None
    xy = prepared.flat
    if is_umap and laid_out is not None:
        xy = pd.DataFrame(laid_out.columns)[["x", "y"]].to_numpy()
    extra: dict[str, Any] = {}
    if grouped is not None:
        name = f"{asked.method} {asked.n_clusters}"
        extra["cluster"] = (name, grouped.columns["cluster"])
    layout = "UMAP" if is_umap else "PCA"
    table = point_table(view, asked.source, prepared, xy, layout, extra)
    left, right = st.columns([4, 1], gap="large")
    hue = asked.hue
    if hue == "cluster" and grouped is None:
        hue = "domain"
        left.caption("Coloured by domain until the clusters are found.")
    with left:
        region = _region(prepared, layout)
        _figure(view, asked, table, hue_of(view, hue, HUES[asked.source.unit][hue]), layout, region)
    with right:
        _quality(asked, prepared, laid_out, grouped, layout)
    selection_section(view, asked.source, table, region)


def _tag(prepared: Prepared, layout: str) -> str:
    """Return the name of a picture: a region of one means nothing on another."""
    return f"{prepared.digest[:8]}{layout[0].lower()}"


def _region(prepared: Prepared, layout: str) -> regions.Region | None:
    tag, _, text = address.read("region").partition(":")
    return regions.read(text) if tag == _tag(prepared, layout) else None


def _figure(
    view: View,
    asked: Asked,
    table: PointTable,
    hue: Hue,
    layout: str,
    region: regions.Region | None,
) -> None:
    prepared = ask(view, prepare, source=asked.source)
    unit = asked.source.unit
    tag = _tag(prepared, layout)
    key = f"map {tag}"
    state: Any = st.session_state.get(key)
    # what was drawn in this session shows itself
    outlined = None if state and regions.drawn(state["selection"]) else region
    common: dict[str, Any] = {
        "caption": _caption(view, asked, table, layout),
        "extent": table.extent(),
        "region": outlined,
        "dark": is_dark(),
    }

    def on_region(selection: Any) -> None:
        found = regions.drawn(selection)
        address.write("region", f"{tag}:{regions.write(found)}" if found else "")

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
    names = {str(value): hue.show(value) for value in values}
    chosen = address.choose(
        st.selectbox,
        "value",
        f"Show where {hue.title.lower()} is",
        ["", *names],
        default="",
        show=lambda name: _unescaped(names[name]) if name else "any: how many points",
        width=320,
    )
    if not chosen:
        return map_density(
            table.density(BINS), title=f"{title}: number of points in each bin", **common
        )
    value = next(value for value in values if str(value) == chosen)
    return map_density(
        table.density(BINS, share=(hue.column, value)),
        value_title="share of the points",
        title=f"{title}: share of {names[chosen]}",
        **common,
    )


def _unescaped(name: str) -> str:
    import html

    return html.unescape(name)


def _caption(view: View, asked: Asked, table: PointTable, layout: str) -> str:
    unit = asked.source.unit
    parts = [f"{table.n_shown:,} of {table.n_points:,} mapped {unit}"]
    said = view.scope(table.n_shown).filters_text().replace("`", "")
    if said and unit != "experts":
        parts.append(f"filters: {said}")
    if unit == "tokens":
        parts.append("padding excluded")
    parts.append("axes have no unit" if layout == "UMAP" else "first two principal components")
    parts.append("draw a box or a line to see what is inside")
    return "; ".join(parts)


def _quality(
    asked: Asked,
    prepared: Prepared,
    laid_out: cache.Kept | None,
    grouped: cache.Kept | None,
    layout: str,
) -> None:
    """Say how far the picture and the clusters can be trusted."""
    st.markdown("**How good is it?**")
    facts = laid_out.facts if laid_out else {}
    names = {"UMAP": "trustworthiness", "PCA": "trustworthiness_pca"}
    st.metric(
        f"Trustworthiness, {layout}",
        _number(facts.get(names[layout])),
        help="How many of a point's 15 neighbours on the picture are neighbours among the vectors "
        "too, and by how much the others are not: 1 = all are, about 0.5 = by chance. Measured on "
        "a sample of 2,000 points.",
        border=True,
    )
    if laid_out is None:
        st.caption("Measured when the UMAP is done.")
    else:
        other = "PCA" if layout == "UMAP" else "UMAP"
        st.caption(f"{other}: {_number(facts.get(names[other]))}")
    found = grouped.facts if grouped else {}
    domains = found.get("domains") or {}
    st.metric(
        "Clusters and domains (NMI)",
        _number(domains.get("nmi")),
        help="Normalised mutual information: 0 = the clusters say nothing of the domain, 1 = they "
        "are the domains. By chance: domains dealt out anew among the prompts, mean of 50.",
        border=True,
    )
    if domains:
        st.caption(
            f"By chance {_number(domains.get('floor'))} "
            f"(95 % below {_number(domains.get('floor_high'))})"
        )
    elif asked.source.unit == "experts":
        st.caption("An expert has no domain of its own.")
    if grouped is not None:
        st.metric("Clusters", found["n_clusters"], border=True)
        st.caption(_about_clusters(asked, prepared, found))
    missing = prepared.n_all - len(prepared.ids)
    st.caption(
        f"{len(prepared.ids):,} of {prepared.n_all:,} {asked.source.unit} have a vector"
        + (f"; {missing:,} have none and are not on the map." if missing else ".")
        + f" Seed {SEED}."
    )


def _about_clusters(asked: Asked, prepared: Prepared, found: dict[str, Any]) -> str:
    text = f"{_METHODS[asked.method]} in all {prepared.dims:,} dimensions"
    if found["fitted"] < len(prepared.ids):
        text += f", found from {found['fitted']:,} points"
    if found["noise"]:
        text += f"; {found['noise']:.0%} of the points are in none"
    if not found["converged"]:
        text += "; stopped before it had settled"
    return text + "."


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


render()
