"""Trends: how routing changed over the checkpoints of a training."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import streamlit as st

from capture.demo import TRENDS as DEMO_TRENDS
from capture.errors import CaptureError
from explorer.errors import ExplorerError, RunError
from explorer.figures.number import number
from explorer.figures.trends import TRENDS, trend_lines
from explorer.pages import address, state
from explorer.pages.components.chart import chart
from explorer.pages.shell import current_view
from explorer.pages.state import is_dark
from explorer.run import Run, open_run
from explorer.trends import MAX_TOKENS, in_order, trend_table
from explorer.views import join

_DEMO, _FOLDER = "demo", "folder"
_SOURCES = {_DEMO: "The demo model's training", _FOLDER: "Runs of this folder"}


def render() -> None:
    """Draw the page."""
    view = current_view()
    st.markdown(
        "Record the same prompts with several checkpoints of one model, and see when its routers "
        "settled, whether the load stayed even, and when experts took up domains. A number after "
        "`step` in a run's name is its training step."
    )
    source = address.choose(
        st.segmented_control,
        "source",
        "Checkpoints",
        list(_SOURCES),
        default=_DEMO,
        show=_SOURCES.__getitem__,
    )
    if source == _DEMO:
        address.write("runs", "")  # of the folder, which is not shown
    named = _demo_runs() if source == _DEMO else _folder_runs()
    if len(named) < 2:
        st.info(
            "Trends need at least two runs. Record each checkpoint on the same prompts: "
            "`python -m capture CHECKPOINT --prompts FILE --out runs/step_1000.duckdb`.",
            icon=":material/info:",
        )
        return
    try:
        checkpoints = in_order(named)
        keys = tuple((name, str(run.path), run.fingerprint) for name, run in named)
        with st.spinner("Measuring every checkpoint…"):
            table = view.of_layers(_measured(keys, view.domain, view.phase, named))
    except RunError as error:
        st.error(address.plain(str(error)), icon=":material/error:")
        return
    if table.empty or not table["tokens"].min():
        st.info("A checkpoint has no token of this selection. Change the filters at the side.")
        return
    if view.part is not None:
        st.caption("The search and the slice at the side do not act on checkpoints.")
    _figure(table, [one.name for one in checkpoints])


def _figure(table: pd.DataFrame, names: list[str]) -> None:
    quantity = address.choose(
        st.segmented_control,
        "trend",
        "Quantity",
        list(TRENDS),
        default="saturation",
        show=_short,
    )
    st.caption(TRENDS[quantity].meaning)
    if table[quantity].isna().all():
        st.info(
            "This was not recorded: saturation needs the same prompts in all runs, at level `ids` "
            "or above; information needs prompts of several domains.",
            icon=":material/info:",
        )
        return
    tokens = f"n = {int(table['tokens'].min()):,} tokens of each checkpoint; padding excluded"
    if quantity == "saturation" and int(table["tokens"].max()) > MAX_TOKENS:
        tokens += f"; compared on up to {MAX_TOKENS:,} prompt tokens, evenly spread"
    chart(
        trend_lines(table, quantity, caption=f"{tokens}; one line a layer", dark=is_dark()),
        key=f"trend {quantity}",
        alt=f"{TRENDS[quantity].title} over {len(names)} checkpoints, one line for each of "
        f"{table['layer'].nunique()} layers; at the last one "
        f"{number(table[table['name'] == names[-1]][quantity].mean(), '.3f')} on average.",
        table=table,
    )


def _short(quantity: str) -> str:
    """Return a quantity's title without its unit."""
    title = TRENDS[quantity].title.partition(" (")[0]
    return title[:1].upper() + title[1:]


def _demo_runs() -> list[tuple[str, Run]]:
    paths = sorted(DEMO_TRENDS.glob("*.duckdb"))
    return list(zip([path.stem for path in paths], _opened(tuple(paths)), strict=True))


def _folder_runs() -> list[tuple[str, Run]]:
    names = state.run_names()
    stepped = sorted(name for name in names if "step" in name)
    chosen = address.choose_several(
        st.multiselect, "runs", "Runs", names, default=stepped, what="run"
    )
    # written even if it is the default, which changes with the runs of the folder
    address.write("runs", join(chosen))
    found = []
    for name in chosen:
        try:
            found.append((name, state.opened(name)[0]))
        except (CaptureError, ExplorerError) as error:
            st.error(address.plain(str(error)), icon=":material/error:")
    return found


def _close(runs: list[Run]) -> None:
    for run in runs:
        run.close()


@st.cache_resource(show_spinner=False, on_release=_close)
def _opened(paths: tuple[Path, ...]) -> list[Run]:
    with ThreadPoolExecutor() as pool:  # DuckDB opens files side by side
        return list(pool.map(open_run, paths))


@st.cache_data(max_entries=10, show_spinner=False)
def _measured(
    keys: tuple[tuple[str, str, str], ...],
    domain: str | None,
    phase: str | None,
    _named: list[tuple[str, Run]],
) -> pd.DataFrame:
    return trend_table(in_order(_named), domain=domain, phase=phase)


render()
