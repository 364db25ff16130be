"""What an expert is for, by cause: the loss without it, beside what counts say of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from capture.errors import cut
from explorer import writing
from explorer.comparison.atlas_file import (
    ESTIMATES,
    EXACT,
    MANY,
    Atlas,
    agreement,
    atlases_of,
    read_atlas,
    reliability,
    with_news,
)
from explorer.pages.experts.figures import DotsAxis, interval_dots, need_and_use
from explorer.text import counted, plain
from explorer.ui import address
from explorer.ui.chart import chart, listing
from explorer.ui.job import follow
from explorer.ui.problems import in_callback, instead, section
from explorer.ui.state import Key, View, is_dark, key_of
from explorer.ui.wording import Scope, domain_labels, escaped, expert_label, number, span
from explorer.worker import AtlasRequest, shared_worker
from explorer.worker.requests import DEMO_MODEL

_WAYS = {
    "rerouted": "Its weight goes to others",
    "removed": "Its output is left out",
    "fisher": "Estimated by the gradient",
}
_DID = {
    False: "Each expert was taken out of the model alone",
    True: "What the loss would be without each expert is estimated by one gradient",
}
_COLUMNS = {
    "expert": ("Expert", None),
    "news": ("News", None),
    "fair": ("Load (× fair share)", "%.2f"),
    "loss_change": ("Loss without it (nats a token)", "%+.4f"),
    "over_control": ("More than its control", "%+.4f"),
    "served": ("Serves most, by counts", None),
    "hurt": ("Missed most, by loss", None),
}


def of_run(view: View) -> Atlas | None:
    """Return the newest atlas of the run's own recording, None where there is none."""
    for path in atlases_of(view.run.path):
        atlas = _read(key_of(path))
        if atlas.facts["run_fingerprint"] == view.run.fingerprint:
            return atlas
    return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _read(key: Key) -> Atlas:
    return read_atlas(Path(key[0]))


@section("What experts are for")
def atlas_section(view: View) -> None:
    """Draw need beside use for all experts, or what is needed for it."""
    st.subheader("Need beside use", anchor=False)
    atlas = of_run(view)
    if atlas is None or not atlas.facts["complete"]:
        _offer(view, atlas)
    if atlas is None:
        return
    way = _way(atlas)
    rows = view.of_layers(_described(view, atlas, way))
    if rows.empty:
        instead("The atlas has no expert of these layers.")
        return
    sure = reliability(atlas, way)
    st.markdown(
        f"{_DID[way in ESTIMATES]}, on "
        f"{counted(atlas.facts['n_texts'], 'text')} ({plain(atlas.facts['texts'])}). Half of the "
        "texts ranks the experts as the other half does with a correlation of "
        f"**{number(sure.overall, '.2f')}**, within a layer {number(sure.within, '.2f')}. Counts "
        "and loss disagree where an expert is **rare but needed** or **busy but idle**."
        + _estimated(atlas, way)
    )
    hover = [
        f"{row.expert}: {row.loss_change:+.4f} nats a token"
        + ("" if pd.isna(row.loss_margin) else f" ± {row.loss_margin:.4f}")
        + f"<br>load {row.fair:.2f}× fair share<br>serves most {escaped(row.served)}, missed most "
        f"by {escaped(row.hurt)}" + (f"<br>{row.news}" if row.news else "")
        for row in rows.itertuples()
    ]
    chart(
        need_and_use(rows.assign(hover=hover), scope=_scope(atlas), dark=is_dark()),
        key="need and use",
        alt=f"Dots: the load of {counted(len(rows), 'expert')} against the change in loss without "
        f"each, {span(rows['loss_change'], '.4f')} nats a token. Click: the expert.",
        table=rows,
        on_click=lambda data: address.jump_to_expert(view, data),
    )
    news = rows[rows["news"] != ""].sort_values(["news", "loss_change"], ascending=[True, False])
    if news.empty:
        instead("Counts and loss agree: no expert is rare but needed, and none busy but idle.")
        return
    listing(
        news,
        {name: title for name, (title, form) in _COLUMNS.items() if form is None}
        | {name: (title, form) for name, (title, form) in _COLUMNS.items() if form},
        alt="Experts whose use and need disagree.",
    )


@section("What it is for")
def expert_section(view: View, expert: int) -> None:
    """Draw the loss of every domain without one expert, beside its control."""
    atlas = of_run(view)
    if atlas is None:
        return
    st.subheader("What the loss becomes without it", anchor=False)
    way = _way(atlas)
    rows = atlas.rows[
        (atlas.rows["way"] == way)
        & (atlas.rows["layer"] == view.layer)
        & (atlas.rows["site"] == view.site)
        & (atlas.rows["expert_id"] == expert)
    ]
    if rows.empty:
        instead("The atlas has no row of this expert: its layer was not measured this way.")
        return
    every = rows[rows["domain"].isna()].iloc[0]
    named = rows[rows["domain"].notna()].sort_values("loss_change", ascending=False)
    shown = pd.concat([every.to_frame().T, named], ignore_index=True)
    names = ["all texts", *domain_labels(list(named["domain"]))]
    margin = shown["loss_margin"].astype(float)
    change, control = (shown[name].astype(float) for name in ("loss_change", "control_change"))
    figure = interval_dots(
        shown.assign(
            label=names,
            value=change,
            low=change - margin,
            high=change + margin,
            expected=control,
            hover=[
                f"{name}: {row.loss_change:+.4f} nats a token"
                + ("" if pd.isna(row.loss_margin) else f" ± {row.loss_margin:.4f}")
                + f"<br>{row.load:.1%} of the tokens chose it"
                + _controlled(view, row)
                for name, row in zip(names, shown.itertuples(), strict=True)
            ],
        ),
        DotsAxis("change in loss, nats a token", 0.0, "0 = nobody misses it", percent=False),
        title="Loss without the expert (change, nats a token)",
        scope=_scope(atlas),
        notes=[
            _WAYS.get(way, way).lower(),
            "95% intervals, paired by text",
            "diamonds: another expert of the layer with about its load",
        ],
        dark=is_dark(),
    )
    figure.update_traces(name="its control", selector={"name": "by chance"})
    chart(
        figure,
        key="loss without",
        alt=f"Dots with intervals: the change in loss without the expert, all texts "
        f"{change.iloc[0]:+.4f} nats a token, by domain {span(change.iloc[1:], '.4f')}.",
        table=shown,
    )


def _controlled(view: View, row: "pd.Series") -> str:
    if pd.isna(row.control_id):
        return ""
    name = expert_label(view.site_name, int(row.control_id))
    return f"<br>control {name}: {row.control_change:+.4f}, load {row.control_load:.1%}"


def _way(atlas: Atlas) -> str:
    ways = {way: _WAYS[way] for way in atlas.ways if way in _WAYS}
    return address.choose(st.segmented_control, "way", "Without it", ways)


def _estimated(atlas: Atlas, way: str) -> str:
    if way not in ESTIMATES:
        return ""
    if not set(EXACT) & set(atlas.ways):
        if way != "fisher" or not atlas.facts.get("checked"):
            return ""
        return (
            f" Of {counted(atlas.facts['checked'], 'expert')} drawn by chance that were taken out, "
            "the estimates give the order with a correlation of "
            f"{number(atlas.facts.get('checked_agreement'), '.2f')}."
        )
    found = agreement(atlas, way, "removed")
    return (
        " The estimates rank the experts as leaving out their output "
        f"does with a correlation of {number(found.overall, '.2f')}."
    )


def _described(view: View, atlas: Atlas, way: str) -> pd.DataFrame:
    """Return a row for each expert with names, load as a multiple, and the domains it is for."""
    rows = with_news(atlas.of(way))
    keys = ["layer", "site", "expert_id"]
    by_domain = atlas.rows[(atlas.rows["way"] == way) & atlas.rows["domain"].notna()]
    n_experts = rows.groupby(["layer", "site"])["expert_id"].transform("size")
    total = rows.groupby(["layer", "site"])["load"].transform("sum")
    rows["fair"] = rows["load"] * n_experts / total.where(total > 0, np.nan)
    for name, column in (("served", "load"), ("hurt", "loss_change")):
        if by_domain.empty:
            rows[name] = ""
            continue
        best = by_domain.loc[by_domain.groupby(keys)[column].idxmax(), [*keys, "domain"]]
        rows = rows.merge(best.rename(columns={"domain": name}), on=keys, how="left")
        rows[name] = rows[name].fillna("")
    rows["expert"] = [
        expert_label(view.named(row.layer, row.site), row.expert_id) for row in rows.itertuples()
    ]
    return rows


def _scope(atlas: Atlas) -> Scope:
    return Scope(atlas.facts["n_tokens"])


def _offer(view: View, begun: Atlas | None) -> None:
    """Say that there is no atlas yet, or not all of it, and how to make it."""
    out = AtlasRequest(str(view.run.path)).out
    jobs = [job for job in shared_worker().jobs() if job.request.out == out]
    if jobs and jobs[0].state != "done":
        follow(jobs[0].job_id, key="atlas")
        if jobs[0].active:
            return
    named = str(view.run.info["model"])
    if begun is not None and not writing.may_write():
        return
    if begun is not None:
        exact = begun.rows[begun.rows["way"].isin(EXACT)]
        done = len(exact[["layer", "site", "way"]].drop_duplicates())
        steps = counted(len(view.run.sites) * len(EXACT), "step")
        st.caption(
            f"This atlas is not whole: {done} of {steps} are done, one for each layer and way. "
            "Going on keeps them."
        )
    elif not writing.may_write():
        instead(
            "Not available: nobody has taken the experts out of this run's model one by one yet. "
            "That runs the model, which this server does not do for viewers."
        )
        return
    else:
        instead(
            "Counts say how busy an expert is, not whether it is needed. An atlas takes every "
            f"expert out of {plain(cut(named, 120))} alone and measures the loss: minutes for the "
            "demo model, in the background; the result is kept."
        )
    allowed = named == DEMO_MODEL or st.checkbox(
        f"Load the model {plain(cut(named, 120))}",
        help="The run names it. It is loaded on the machine that runs this app, and downloaded "
        "first if it is not there.",
        key=f"atlas loads {named}",
    )
    screen = begun is None and _estimates_only(view)
    st.button(
        "Make an atlas" if begun is None else "Go on with the atlas",
        on_click=_start,
        args=(view, named, screen),
        disabled=not allowed,
    )


def _estimates_only(view: View) -> bool:
    n_experts = sum(info.n_experts for info in view.run.sites)
    return st.checkbox(
        "Estimate only",
        value=n_experts > MANY,
        help="One gradient for all experts instead of one run for each, and a few experts taken "
        f"out to check it: for models with thousands. This one has {n_experts:,}.",
        key="atlas screens",
    )


@in_callback
def _start(view: View, model: str, screen: bool) -> None:
    writing.submit(AtlasRequest(str(view.run.path), model=model, screen=screen))
