"""What the worker makes for a map: taken from the cache, or started and followed."""

from pathlib import Path
from typing import NamedTuple

import streamlit as st

from explorer import service
from explorer.maps import cache
from explorer.maps.features import Source
from explorer.maps.prepare import Prepared
from explorer.maps.projection import MapOptions
from explorer.pages.clusters.quality import SEED
from explorer.ui import address, printing
from explorer.ui.job import follow
from explorer.ui.state import View
from explorer.worker import ProjectRequest, shared_worker


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

    layout: cache.Kept | None
    clusters: cache.Kept | None
    choices: cache.Kept | None


def made(view: View, wanted: Wanted, prepared: Prepared) -> Made:
    """Return what the cache has; have the rest made, and show how far it is."""
    source, digest = wanted.source, prepared.digest
    run = str(view.run.path)
    place = (source.unit, source.feature, source.layer, source.site)
    paths = {
        "UMAP": cache.map_path(digest, MapOptions(seed=SEED)),
        "clusters": cache.clusters_path(digest, wanted.method, wanted.n_clusters, SEED),
        "choices": cache.router_path(digest, view.run.fingerprint, wanted.router, SEED),
    }
    how: dict[str, tuple[str, str]] = {
        "UMAP": ("", ""),
        "clusters": (wanted.method, ""),
        "choices": ("", wanted.router),
    }
    found: dict[str, cache.Kept | None] = dict.fromkeys(paths)
    waiting, missing = False, []
    for what, path in paths.items():
        if (what == "UMAP" and not prepared.has_umap) or (what == "choices" and not wanted.router):
            continue
        found[what] = cache.read(path, len(prepared.ids))
        if found[what] is None and printing.theme():
            missing.append(what)
        elif found[what] is None:
            method, router = how[what]
            request = ProjectRequest(
                str(path), run, *place, method, wanted.n_clusters, SEED, router
            )
            # one box for all: when its job ends, the page runs again and shows the next one's
            waiting = _have_made(request, what, show=not waiting) or waiting
    if missing:
        shown = " The picture is the PCA." if "UMAP" in missing else ""
        st.info(f"Not worked out when this was printed: {' and '.join(missing)}.{shown}")
    return Made(found["UMAP"], found["clusters"], found["choices"])


def _have_made(request: ProjectRequest, what: str, *, show: bool) -> bool:
    """Start what is missing, or say why it is not there; return whether it is on its way."""
    if not service.may_write():
        st.info(
            f"The {what} of these points: not worked out yet, and this server writes nothing for "
            "you. Ask somebody who may record to open this page once.",
            icon=":material/info:",
        )
        return False
    jobs = [job for job in shared_worker().jobs() if job.request.out == request.out]
    job = jobs[0] if jobs else service.submit(request)
    if job.active:
        if show:
            follow(job.job_id, key=Path(request.out).stem)
        return True
    said = address.plain(job.error or "The result is not in the cache any more.")
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.warning(f"There is no {what} of these points. {said}", icon=":material/warning:")
    if right.button("Try again", key=f"again {what}", width="stretch"):
        service.submit(request)
        st.rerun()
    return False
