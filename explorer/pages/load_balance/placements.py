"""Placements on traffic that they were not made from: which holds, when to renew it, as a file."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from explorer.engine_files import PLACEMENT_FORMATS
from explorer.metrics import placement
from explorer.pages.load_balance import data
from explorer.pages.load_balance.figures import HALF_PAGE, balancedness_lines
from explorer.queries.load import steps_of
from explorer.text import counted
from explorer.ui import address, theme
from explorer.ui.chart import chart, listing
from explorer.ui.heatmap import Scale, clickable_heatmap
from explorer.ui.problems import instead, section
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Scope, span

PATIENCE = 10.0  # seconds that a page computes without being asked to
_BY = {"domains": "Domains", "prompts": "Prompts", "time": "Time"}
_COLUMNS = {
    "policy": "Placement",
    "own": ("Made from all windows", "%.3f"),
    "own_low": ("95% from", "%.3f"),
    "own_high": ("to", "%.3f"),
    "held_out": ("Window held out", "%.3f"),
    "low": ("95% from ", "%.3f"),
    "high": ("to ", "%.3f"),
    "worst": ("Worst window", "%.3f"),
}


@section("Placements on other traffic")
def placements_section(view: View, **sizes: int) -> None:
    """Draw what placements keep of their balance on traffic that they were not made from.

    Parameters
    ----------
    sizes : int
        ``n_experts, gpus, nodes, groups, replicas``.
    """
    st.subheader("Placements on traffic that they were not made from", anchor=False)
    by, windows = _windows(view)
    layers = sum(site.n_routed == sizes["n_experts"] for site in view.run.sites)
    seconds = data.seconds_to_judge(windows, layers, sizes["replicas"])
    if seconds > PATIENCE and not st.toggle(
        f"Judge placements (about {seconds:,.0f} s)", key="judge placements"
    ):
        return
    asked: dict[str, Any] = {"by": by, "windows": windows, "phase": view.phase, **sizes}
    with st.spinner("Judging placements on windows that they were not made from."):
        found = ask(view, data.judged, **asked)
    if found.table.empty:
        instead("One window cannot be held out from itself. Choose other windows.")
        return
    listing(
        found.table,
        _COLUMNS,
        alt="Balancedness of placements on windows that they were made from, and not made from",
    )
    st.caption(_explained(found, by))
    scope = view.scope().without_filters()
    left, right = st.columns(2, gap="medium")
    with left:
        chart(
            balancedness_lines(found.stragglers, scope=scope, held_out=True, dark=is_dark()),
            key="gpu stragglers held out",
            alt=f"Straggler factor of {layers} layers on held-out windows under "
            f"{counted(found.stragglers['policy'].nunique(), 'placement')}, "
            f"{span(found.stragglers['straggler'], '.2f')}.",
            table=found.stragglers,
        )
    with right:
        _ageing(found, scope)
    _renewals(found)
    policy = address.choose(
        st.selectbox,
        "policy",
        "Placement to look at and to save",
        [name for name in found.table["policy"] if name != data.CHOSEN],
        default=found.best,
    )
    with st.spinner("Making the placement."):
        made = ask(view, data.placed, policy=policy, **asked)
    _files(view, made, policy, sizes)
    if made.dispatch is not None:
        _dispatch(made.dispatch, policy, scope, sizes)


def _windows(view: View) -> tuple[str, int]:
    """Let the reader choose what is held out."""
    ways = list(_BY) if view.run.records_ids else ["domains"]
    if view.run.sums_only and ask(view, steps_of):
        ways = ["domains", "time"]
    known = {way: _BY[way] for way in ways}
    left, right = st.columns([2, 3], gap="medium")
    with left:
        by = address.choose(
            st.segmented_control,
            "by_windows",
            "Windows of",
            known,
            default="domains" if len(view.run.domains) > 1 else ways[-1],
            help="What is held out, one at a time: a domain; consecutive prompts; forward passes "
            "that follow each other.",
        )
    if by == "domains":
        return by, len(view.run.domains)
    with right:
        choices = [str(n) for n in (3, 4, 6, 8, 12, 16, 24)]
        n = address.choose(st.select_slider, "windows", "How many windows", choices, default="8")
    return by, int(n)


def _explained(found: data.Judgement, by: str) -> str:
    kinds = {"domains": "domains", "prompts": "windows of prompts", "time": "windows in time"}
    text = (
        f"Balancedness (mean over largest GPU load, all layers), mean over {found.windows} "
        f"{kinds[by]}, with 95% intervals of a bootstrap over "
        f"{'windows' if by == 'domains' else 'blocks of windows'}. *Across windows* makes copies "
        "as EPLB does and keeps experts that are hot in the same windows apart."
    )
    if (found.table["policy"] == data.CHOSEN).any():
        text += (
            f" Which placement is best is learned from traffic too: in *{data.CHOSEN}* each window "
            "is judged under the one that won on the others, which is what to expect of the winner."
        )
    return text


def _ageing(found: data.Judgement, scope: Scope) -> None:
    """Draw what was predicted and what came of it, and when to make the placement again."""
    if found.ages.empty:
        st.caption("How a placement ages is seen on windows that follow each other: prompts, time.")
        return
    rows, dark = found.ages, is_dark()
    figure = go.Figure(
        [
            *theme.band(rows["windows_later"], rows["low"], rows["high"]),
            theme.line(
                rows["windows_later"],
                rows["balancedness"],
                "realised",
                form={"color": theme.accent(dark), "width": 2.5},
                symbol="circle",
                hover="%{x} windows later: %{y:.3f}",
            ),
        ]
    )
    figure.update_xaxes(title="windows after the one it was made from", dtick=1)
    figure.update_yaxes(title="balancedness", range=[0, 1.04])
    figure.update_layout(showlegend=False)
    theme.finish(
        figure,
        title=f"Predicted and realised: {found.best}, made from one window",
        caption=scope.caption("at 0 as predicted; grey: 95% interval over windows"),
        dark=dark,
        caption_width=HALF_PAGE,
    )
    chart(
        figure,
        key="gpu ageing",
        alt="Balancedness of a placement made from one window, there and in the windows after it, "
        f"{span(rows['balancedness'], '.3f')}.",
        table=rows,
    )


@section("When to make it again")
def _renewals(found: data.Judgement) -> None:
    """List what making the placement again saves and costs."""
    if found.renewals.empty:
        return
    again = found.renewals
    shown = again.assign(
        every=[
            "never" if pd.isna(n) else f"{n} window{'s' if n > 1 else ''}" for n in again["every"]
        ]
    )
    listing(
        shown,
        {
            "every": "Made again after",
            "held_out": ("Balancedness", "%.3f"),
            "low": ("95% from", "%.3f"),
            "high": ("to", "%.3f"),
            "copies": ("Experts loaded", "%.0f"),
            "most": ("Loaded by the busiest GPU", "%.1f"),
        },
        alt="What making the placement again saves, and how many experts have to be loaded for it",
    )


def _files(view: View, made: data.Placed, policy: str, sizes: dict[str, int]) -> None:
    """Offer the placement as the files that engines load."""
    if made.refused:
        instead(made.refused)
        return
    st.markdown(f"**Save it**: {placement.PLACEMENTS[policy]}.")
    with st.container(horizontal=True):
        for kind, of in PLACEMENT_FORMATS.items():
            name = f"{view.name}-{kind}-{sizes['gpus']}gpus{of.ending}"
            how = of.how.format(
                file=name, copies=sizes["replicas"] - sizes["n_experts"], gpus=sizes["gpus"]
            )
            st.download_button(
                of.name,
                made.files[kind],
                file_name=name,
                icon=":material/download:",
                on_click="ignore",
                key=f"save {kind}",
                help=how,
            )
    st.caption(
        "The same from a terminal, also for a model with more layers than were recorded: "
        f"`python -m explorer place RUN --gpus {sizes['gpus']} --slots {sizes['replicas']} "
        "--out placement.json`."
    )


def _dispatch(sent: data.Dispatch, policy: str, scope: Scope, sizes: dict[str, int]) -> None:
    """Draw what GPUs send each other."""
    gpus = sizes["gpus"]
    away = sent.sent.sum() - np.trace(sent.sent)
    nodes = f" in {sent.nodes:.2f} of {sizes['nodes']} nodes" if sizes["nodes"] > 1 else ""
    st.markdown(
        f"A token visits **{sent.gpus:.2f} of {gpus} GPUs** a layer{nodes}; over all layers "
        f"**{away / 1e3:,.2f} kB** a token leave the GPU of its request, and as much comes back."
    )
    cells = [(a, b) for a in range(gpus) for b in range(gpus)]
    table = pd.DataFrame(cells, columns=["from_gpu", "to_gpu"])
    table = table.assign(bytes_per_token=sent.sent.ravel())
    ids = table.to_numpy(dtype=np.float64).reshape(gpus, gpus, 3)
    figure = clickable_heatmap(
        sent.sent,
        ids=ids,
        hover="GPU %{customdata[0]} to GPU %{customdata[1]}<br>%{customdata[2]:,.1f} bytes a token",
        missing_hover="nothing",
        x_labels=[str(gpu) for gpu in range(gpus)],
        y_labels=[str(gpu) for gpu in range(gpus)],
        x_title="to GPU (of the experts)",
        y_title="from GPU (of the request)",
        scale=Scale("bytes a token", 0.0, float(sent.sent.max())),
        dark=is_dark(),
    )
    theme.finish(
        figure,
        title=f"Dispatch between GPUs, {policy} (bytes a token, all layers)",
        caption=scope._replace(n_tokens=sent.tokens).caption(
            "requests dealt to GPUs in turn; a hidden state in 16 bits once to every GPU with one "
            "of its experts; the diagonal stays at home"
        ),
        dark=is_dark(),
        height=int(np.clip(150 + 26 * gpus, 300, 700)),
    )
    chart(
        figure,
        key="gpu dispatch",
        alt=f"Heatmap of {gpus} by {gpus} GPUs: bytes a token sent, {span(sent.sent, '.0f')}.",
        table=table,
    )
