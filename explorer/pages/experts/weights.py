"""Neighbours of an expert in the weights' space: whose router row and whose weights are alike."""

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from capture.paths import model_name
from capture.traces.importing import NO_MODEL
from explorer import writing
from explorer.errors import ExplorerError
from explorer.maps import map_cache
from explorer.pages.experts.figures import DotsAxis, interval_dots
from explorer.text import plain
from explorer.ui import address, problems
from explorer.ui.chart import chart
from explorer.ui.job import follow
from explorer.ui.problems import instead, section
from explorer.ui.state import Key, View, is_dark, key_of
from explorer.ui.wording import Scope, expert_label, number, span
from explorer.worker import CosinesRequest, shared_worker

_SHOWN = 8
_TITLES = {"router": "Router rows alike (cosine)", "experts": "Expert weights alike (cosine)"}
_MISSING = {
    "router": "This router has no matrix with one row per expert.",
    "experts": "These experts are stored in a way that cannot be compared.",
}


@section("Weights")
def weights_section(view: View, expert: int) -> None:
    """Draw the section, or what is needed for it."""
    st.subheader("Neighbours in the weights' space", anchor=False)
    path = map_cache.cosines_path(view.run)
    if not path.is_file():
        _offer(view, path)
        return
    try:
        table = _cosines(key_of(path), view.layer, view.site)
    except ExplorerError as error:
        problems.show(error)
        return
    st.markdown(
        "Experts whose router rows are alike are chosen for similar tokens. Experts that were "
        "trained from different starts have weights of cosine near 0 even where they do similar "
        "work, since the neurons of an expert can stand in any order."
    )
    places = st.columns(2, gap="large")
    for place, kind in zip(places, map_cache.WEIGHT_KINDS, strict=True):
        with place:
            _neighbours(view, expert, table[table["kind"] == kind], kind)


@st.cache_data(max_entries=100, show_spinner=False)
def _cosines(key: Key, layer: int, site: int) -> pd.DataFrame:
    return map_cache.read_cosines(Path(key[0]), layer, site)


def _offer(view: View, path: Path) -> None:
    """Say that the weights were not looked at yet, and how to."""
    jobs = [job for job in shared_worker().jobs() if job.request.out == str(path)]
    if jobs and (jobs[0].active or not jobs[0].path):
        follow(jobs[0].job_id, key="weights")
        if jobs[0].active:
            return
    model = plain(model_name(str(view.run.info["model"])))
    if view.run.info["model"] == NO_MODEL:
        instead("A run holds no weights, and the trace of this one does not name its model.")
        return
    if not writing.may_write():
        instead(
            f"Not available: a run holds no weights, and nobody has compared those of {model} "
            "here yet. That loads the model, which this server does not do for viewers."
        )
        return
    instead(
        f"A run holds no weights. Comparing them loads the model {model} once, in the background; "
        "the result is kept."
    )
    st.button("Compare the weights", on_click=_start, args=(view, path))


@problems.in_callback
def _start(view: View, path: Path) -> None:
    info = view.run.info
    writing.submit(
        CosinesRequest(str(path), str(view.run.path), str(info["model"]), info["revision"])
    )


def _neighbours(view: View, expert: int, table: pd.DataFrame, kind: str) -> None:
    if table.empty:
        instead(_MISSING[kind])
        return
    others = table[table["a"] != table["b"]]["cosine"].to_numpy(dtype=np.float64)
    if np.isnan(others).all():
        instead("This layer has no two experts whose weights can be compared.")
        return
    mine = table[(table["a"] == expert) & (table["b"] != expert)]
    rows = mine.sort_values(["cosine", "b"], ascending=[False, True]).head(_SHOWN)
    names = [expert_label(view.site_name, number) for number in rows["b"]]
    shown = rows.assign(
        label=names,
        value=rows["cosine"],
        low=np.nan,
        high=np.nan,
        hover=[
            f"{name}: cosine {number(value, '.3f')}<br>click for this expert"
            for name, value in zip(names, rows["cosine"], strict=True)
        ],
    )
    middle = float(np.nanmean(others))
    figure = interval_dots(
        shown,
        DotsAxis("cosine", middle, f"mean of the layer's pairs {middle:.3f}", percent=False),
        title=_TITLES[kind],
        scope=Scope(0),
        dark=is_dark(),
    )
    # nothing here is counted over tokens
    figure.update_layout(
        title_subtitle_text=f"the model's weights, no tokens; dotted: mean of the layer's pairs "
        f"{middle:.3f}"
    )
    chart(
        figure,
        key=f"alike {kind}",
        alt=f"Dots: the {len(rows)} experts of the layer whose {kind} weights are most alike, "
        f"cosine {span(rows['cosine'], '.3f')}; mean of all pairs "
        f"{middle:.3f}. Click: that expert.",
        table=mine,
        on_click=lambda data: address.write("id", str(int(rows["b"].iloc[int(data[0])]))),
    )
