"""The points of a map on a page: where they are, what they are, and how they are drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import streamlit as st

from explorer import writing
from explorer.maps import map_cache
from explorer.maps.data import (
    ID_COLUMNS,
    NOISE,
    Prepared,
    Source,
    matching_prompts,
    matching_tokens,
    point_facts,
)
from explorer.maps.map_cache import MapOptions
from explorer.maps.point_table import PointTable
from explorer.pages.clusters.figures import COLORED, Amount, Group
from explorer.queries.routed import NOTHING
from explorer.queries.where import Part
from explorer.run import Run
from explorer.text import counted, plain
from explorer.ui import printing
from explorer.ui.job import follow
from explorer.ui.problems import instead
from explorer.ui.state import Key, View
from explorer.ui.wording import domain_label, domain_labels, expert_label, label, number
from explorer.worker import ProjectRequest, shared_worker

SEED = 0  # of layouts, clusters and measures
MAX_POINTS = 30_000  # drawn one by one; more are drawn as density
_GROUND_POINTS = 4_000  # of those that filters leave out, where there are too many to draw

# what points can be coloured by: column, whether it is an amount, and what it is called
HUES: dict[str, dict[str, str]] = {
    "tokens": {
        "domain": "Domain",
        "expert": "Expert",
        "entropy": "Gate entropy",
        "cluster": "Cluster",
        "router": "Another router",
    },
    "prompts": {
        "domain": "Domain",
        "expert": "Expert of most tokens",
        "entropy": "Mean gate entropy",
        "cluster": "Cluster",
    },
    "experts": {
        "layer": "Layer",
        "domain": "Typical domain",
        "ratio": "Load",
        "cluster": "Cluster",
    },
}
# what a point that was clicked is known by
PICKED = {
    "tokens": "prompt_id, token_id",
    "prompts": "prompt_id",
    "experts": "layer, site, expert_id",
}
AMOUNTS = {"entropy": "gate entropy (nats)", "layer": "layer", "ratio": "share / uniform share"}


class Hue(NamedTuple):
    """What points are coloured by.

    Attributes
    ----------
    column : str
    title : str
        As in ``HUES``.
    names : callable
        Returns the names of values, escaped.
    """

    column: str
    title: str
    names: Callable[[Sequence[Any]], list[str]]

    @property
    def is_amount(self) -> bool:
        """Whether values are on a scale, not names."""
        return self.column in AMOUNTS


def hue_of(view: View, column: str, title: str) -> Hue:
    """Return how points are coloured by a column."""

    def names(values: Sequence[Any]) -> list[str]:
        if column == "domain":
            return domain_labels(values)
        if column == "cluster":
            return ["in no cluster" if v == NOISE else f"cluster {int(v) + 1}" for v in values]
        return [expert_label(view.site_name, int(value)) for value in values]

    return Hue(column, title, names)


def point_table(
    view: View,
    source: Source,
    prepared: Prepared,
    xy: npt.NDArray[np.float32],
    place: str,
    extra: dict[str, tuple[str, pa.Array]],
) -> PointTable:
    """Return the points with their places and facts, remembered.

    Parameters
    ----------
    place : str
        Name of the layout.
    extra : dict
        More columns: name of the content, and values.
    """
    names = tuple((column, name) for column, (name, _) in extra.items())
    facts = _facts(view.key, source, prepared.digest, view.run, prepared.ids)
    columns = {column: values for column, (_, values) in extra.items()}
    shown_by = _shown_by(view, source)
    key = (view.key, source, prepared.digest, place, names, shown_by)
    return _table(key, view, source, prepared, xy, facts, columns)


def _shown_by(view: View, source: Source) -> tuple[Any, ...]:
    part = view.part.whole().key if view.part else None
    if source.unit == "experts":
        return (view.layers,)
    return view.domain, view.phase if source.unit == "tokens" else None, part


@st.cache_resource(max_entries=3, show_spinner=False)
def _facts(key: Key, source: Source, digest: str, _run: Run, _ids: Any) -> pa.Table:
    return point_facts(_run, source, _ids)


@st.cache_resource(max_entries=6, show_spinner=False)
def _table(
    key: tuple[Any, ...],
    _view: View,
    _source: Source,
    _prepared: Prepared,
    _xy: npt.NDArray[np.float32],
    _known: pa.Table,
    _extra: dict[str, pa.Array],
) -> PointTable:
    table = _known
    columns = {"x": _xy[:, 0], "y": _xy[:, 1], "shown": _shown(_view, _source, _prepared)}
    arrays = {name: pa.array(column) for name, column in columns.items()} | _extra
    for name, array in arrays.items():
        table = table.append_column(name, array)
    return PointTable(table)


def _shown(view: View, source: Source, prepared: Prepared) -> npt.NDArray[np.bool_]:
    """Return which points the filters leave."""
    first = prepared.ids[:, 0]
    part: Part | None = view.part.whole() if view.part else None
    if source.unit == "experts":
        return np.array([view.shows(int(layer)) for layer in first], dtype=bool)
    if source.unit == "prompts":
        return np.isin(first, matching_prompts(view.run, domain=view.domain, part=part))
    found = matching_tokens(view.run, domain=view.domain, phase=view.phase, part=part)
    return np.ones(len(first), dtype=bool) if found is None else np.isin(first, found)


class Drawn(NamedTuple):
    """Points as a figure takes them."""

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    shown: npt.NDArray[np.bool_]
    texts: list[str]
    ids: npt.NDArray[np.int64]
    color: Sequence[Group] | Amount


def drawn_points(table: PointTable, source: Source, hue: Hue, view: View) -> Drawn:
    """Return the points that are drawn one by one; of those left out, at most a sample."""
    names = {
        "tokens": "text, domain, prompt_id, position",
        "prompts": "text, domain, prompt_id, tokens",
        "experts": "layer, site, expert_id, kind, ratio, domain",
    }[source.unit]
    known = ", ".join(["x, y, shown", names, PICKED[source.unit], hue.column])
    columns = ", ".join(dict.fromkeys(known.split(", ")))
    rows = table.rows(columns)
    if len(rows) > MAX_POINTS:
        left_out = rows.index[~rows["shown"].to_numpy(dtype=bool)]
        step = -(-len(left_out) // _GROUND_POINTS)
        rows = pd.concat([rows[rows["shown"]], rows.loc[left_out[::step]]])
    return Drawn(
        rows["x"].to_numpy(dtype=np.float64),
        rows["y"].to_numpy(dtype=np.float64),
        rows["shown"].to_numpy(dtype=bool),
        hover_texts(rows, source.unit),
        rows[PICKED[source.unit].split(", ")].to_numpy(dtype=np.int64),
        _color(rows, table, hue),
    )


def hover_texts(rows: pd.DataFrame, unit: str) -> list[str]:
    """Return one line per point, escaped."""
    if unit == "experts":
        return [
            f"{expert_label(str(r.layer) if not r.site else f'{r.layer}.{r.site}', r.expert_id)}: "
            + (NOTHING[r.kind].one if r.kind in NOTHING else f"load {number(r.ratio, '.2f')}×")
            + f", typical: {domain_label(r.domain)}"
            for r in rows.itertuples()
        ]
    if unit == "prompts":
        return [
            f"prompt {r.prompt_id}, {counted(r.tokens, 'token')}: {label(r.text, limit=60)}"
            for r in rows.itertuples()
        ]
    return [
        f"“{label(r.text, limit=24, spaces=True)}” at {r.position} of prompt {r.prompt_id}"
        f" ({domain_label(r.domain)})"
        for r in rows.itertuples()
    ]


def _color(rows: pd.DataFrame, table: PointTable, hue: Hue) -> Sequence[Group] | Amount:
    if hue.is_amount:
        values = rows[hue.column].to_numpy(dtype=np.float64, na_value=np.nan)
        low, high = amount_range(table, hue)
        return Amount(AMOUNTS[hue.column], values, low, high)
    column = rows[hue.column].astype(object)
    listed = [value for value in table.values(hue.column)["value"].tolist() if value != NOISE]
    top = listed[: COLORED if len(listed) != COLORED + 1 else COLORED + 1]
    names = hue.names(listed)
    groups = [
        Group(name, (column == value).to_numpy(dtype=bool))
        for name, value in zip(names, top, strict=False)
    ]
    others = column.isin(listed[len(top) :]).to_numpy(dtype=bool)
    if others.any():
        rest = counted(len(listed) - len(top), "other")
        # this group is not a domain, even if a domain is called so
        groups.append(
            Group(f"{rest} (not one domain)" if rest in names else rest, others, rest=True)
        )
    if hue.column == "cluster" and (column == NOISE).any():
        noise = (column == NOISE).to_numpy(dtype=bool)
        groups.append(Group(hue.names([NOISE])[0], noise, rest=True))
    unknown = column.isna().to_numpy(dtype=bool)
    if unknown.any():
        groups.append(Group("not recorded", unknown, rest=True))
    return groups


def amount_range(table: PointTable, hue: Hue) -> tuple[float, float]:
    """Return the ends of an amount's scale, the same whatever the filters leave."""
    values = table.rows(hue.column)[hue.column].to_numpy(dtype=np.float64, na_value=np.nan)
    if hue.column == "layer" or np.isnan(values).all():
        return float(np.nanmin(values, initial=0.0)), float(np.nanmax(values, initial=1.0))
    low, high = np.nanpercentile(values, [1, 99])
    return float(low), float(max(high, low + 1e-9))


def id_names(source: Source) -> str:
    """Return the columns that say what a point is."""
    return ", ".join(ID_COLUMNS[source.unit])


class Wanted(NamedTuple):
    """What is to be shown of a map.

    Attributes
    ----------
    source : Source
    method : str
        How to group.
    n_clusters : int
    router : str
        Whose choices to show; "" = of none.
    """

    source: Source
    method: str
    n_clusters: int
    router: str


class Made(NamedTuple):
    """What is there of it; None = not yet."""

    layout: map_cache.CachedMap | None
    clusters: map_cache.CachedMap | None
    choices: map_cache.CachedMap | None


def made(view: View, wanted: Wanted, prepared: Prepared) -> Made:
    """Return what the cache has; have the rest made, and show how far it is."""
    source, digest = wanted.source, prepared.digest
    run = str(view.run.path)
    paths = {
        "UMAP": map_cache.map_path(digest, MapOptions(seed=SEED)),
        "clusters": map_cache.clusters_path(digest, wanted.method, wanted.n_clusters, SEED),
        "choices": map_cache.router_path(digest, view.run.fingerprint, wanted.router, SEED),
    }
    how: dict[str, tuple[str, str]] = {
        "UMAP": ("", ""),
        "clusters": (wanted.method, ""),
        "choices": ("", wanted.router),
    }
    found: dict[str, map_cache.CachedMap | None] = dict.fromkeys(paths)
    waiting, missing = False, []
    for what, path in paths.items():
        if (what == "UMAP" and not prepared.has_umap) or (what == "choices" and not wanted.router):
            continue
        found[what] = map_cache.read(path, len(prepared.ids))
        if found[what] is None and printing.theme():
            missing.append(what)
        elif found[what] is None:
            method, router = how[what]
            request = ProjectRequest(
                str(path), run, source, method, wanted.n_clusters, SEED, router
            )
            # one box for all: when its job ends, the page runs again and shows the next one's
            waiting = _have_made(request, what, show=not waiting) or waiting
    if missing:
        shown = " The picture is the PCA." if "UMAP" in missing else ""
        instead(f"Not worked out when this was printed: {' and '.join(missing)}.{shown}")
    return Made(found["UMAP"], found["clusters"], found["choices"])


def _have_made(request: ProjectRequest, what: str, *, show: bool) -> bool:
    """Start what is missing, or say why it is not there; return whether it is being made."""
    if not writing.may_write():
        instead(
            f"The {what} of these points: not worked out yet, and this server writes nothing for "
            "you. Ask somebody who may record to open this page once."
        )
        return False
    jobs = [job for job in shared_worker().jobs() if job.request.out == request.out]
    job = jobs[0] if jobs else writing.submit(request)
    if job.active:
        if show:
            follow(job.job_id, key=Path(request.out).stem)
        return True
    said = plain(job.error or "The result is not in the cache any more.")
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.warning(f"The {what} of these points could not be made. {said}", icon=":material/warning:")
    if right.button("Try again", key=f"again {what}", width="stretch"):
        writing.submit(request)
        st.rerun()
    return False
