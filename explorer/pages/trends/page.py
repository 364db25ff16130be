"""Trends: how routing changed over the checkpoints of a training."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import streamlit as st

from capture.demo import TRENDS as DEMO_TRENDS
from capture.errors import CaptureError
from capture.store import RunReader
from explorer.errors import ExplorerError, RunError
from explorer.pages.load_balance.figures import domain_heatmap, uniform_text
from explorer.pages.trends.data import (
    MAX_TOKENS,
    Checkpoint,
    expert_loads,
    in_order,
    steps_table,
    trend_table,
)
from explorer.pages.trends.figures import TRENDS, tokens_of, trend_lines
from explorer.queries.load import steps_of
from explorer.run import Run
from explorer.saved_views import join
from explorer.text import counted, plain
from explorer.ui import address, problems, state
from explorer.ui.chart import chart
from explorer.ui.problems import instead, section
from explorer.ui.shell import current_view
from explorer.ui.state import View, ask, is_dark
from explorer.ui.wording import Caption, label, labels, number, site_name

_LISTED = 6  # checkpoints whose numbers of tokens are told one by one
FOLLOW_SECONDS = 5.0
_DEMO, _FOLDER, _LIVE, _STEPS = "demo", "folder", "live", "steps"
_SOURCES = {
    _DEMO: "The demo model's training",
    _FOLDER: "Runs of this folder",
    _LIVE: "Follow this folder",
}
_OVER_STEPS = ("max_violation", "normalized_entropy")


def render() -> None:
    """Draw the page."""
    view = current_view()
    st.markdown(
        "Record the same prompts with several checkpoints of one model, and see when its routers "
        "settled, whether the load stayed even, and when experts took up domains. A number after "
        "`step` in a run's name is its training step."
    )
    stepped = len(ask(view, steps_of)) > 1
    sources = _SOURCES | ({_STEPS: "Steps of this run"} if stepped else {})
    default = _STEPS if stepped else _DEMO
    source = address.choose(st.segmented_control, "source", "Checkpoints", sources, default=default)
    if source == _STEPS:
        _over_steps(view)
        return
    if source != _FOLDER:
        address.write("runs", "")  # a choice among those of the folder
    choose = {_DEMO: _demo_runs, _FOLDER: _folder_runs, _LIVE: _followed_runs}
    named = choose[source]()
    if len(named) < 2:
        instead(
            "Trends need at least two runs. Record each checkpoint on the same prompts: "
            "`python -m capture CHECKPOINT --prompts FILE --out runs/step_1000.duckdb`."
        )
        return
    try:
        checkpoints = in_order(named)
        keys = tuple((name, str(run.path), run.fingerprint) for name, run in named)
        with st.spinner("Measuring every checkpoint…"):
            table = view.of_layers(_measured(keys, view.domain, view.phase, named))
    except RunError as error:
        problems.show(error)
        return
    without = _named(table[table["tokens"] == 0])
    if table.empty or without:
        instead(f"No token of this selection: {without}. Change the filters at the side.")
        return
    if view.part is not None:
        st.caption("The search and the slice at the side do not act on checkpoints.")
    _figure(view, table, [one.name for one in checkpoints])
    _experts(view, table, checkpoints)


@section("Steps of this run")
def _over_steps(view: View) -> None:
    """Draw the balance over the steps of a recorder, which a run of counts keeps."""
    table = view.of_layers(ask(view, steps_table))
    quantity = address.choose(st.segmented_control, "trend", "Quantity", _OVER_STEPS, show=_short)
    st.caption(TRENDS[quantity].meaning)
    counts = tokens_of(table, quantity)
    low, high = min(counts.values()), max(counts.values())
    caption = f"{counted(len(counts), 'window')} of steps; n = {low:,} to {high:,} tokens of each"
    caption += "; one line a layer"
    note = view.run.notes.get("import")
    if isinstance(note, dict) and note.get("rotated") is True:
        caption += "; the recorder's ring was full: its first step may be any"
    chart(
        trend_lines(
            table, quantity, caption=Caption(caption, {}), axis="first step", dark=is_dark()
        ),
        key=f"trend {quantity}",
        alt=f"{TRENDS[quantity].title} over {len(counts)} windows of steps, one line for each of "
        f"{counted(table['layer'].nunique(), 'layer')}.",
        table=table,
    )


def _named(rows: pd.DataFrame) -> str:
    """Return the names of the checkpoints of some rows, for Markdown."""
    return ", ".join(f"{plain(name)}" for name in dict.fromkeys(rows["name"]))


@section("Figure")
def _figure(view: View, table: pd.DataFrame, names: list[str]) -> None:
    quantity = address.choose(
        st.segmented_control, "trend", "Quantity", list(TRENDS), default="saturation", show=_short
    )
    st.caption(TRENDS[quantity].meaning)
    if quantity == "saturation":
        _not_shared(table, names[-1])
        only_last = table[table["name"] != names[-1]][quantity].isna().all()
    if table[quantity].isna().all() or (quantity == "saturation" and only_last):
        instead(
            "There is nothing to draw: saturation needs the same prompts in several runs, at level "
            "`ids` or above; information needs prompts of several domains; load entropy needs "
            "more than one expert."
        )
        return
    chart(
        trend_lines(table, quantity, caption=_caption(view, table, quantity), dark=is_dark()),
        key=f"trend {quantity}",
        alt=f"{TRENDS[quantity].title} over {len(names)} checkpoints, one line for each of "
        f"{counted(table['layer'].nunique(), 'layer')}; at the last one "
        f"{number(table[table['name'] == names[-1]][quantity].mean(), '.3f')} on average.",
        table=table,
    )


@section("Expert by expert")
def _experts(view: View, table: pd.DataFrame, checkpoints: Sequence[Checkpoint]) -> None:
    """Draw the load of each expert of the layer that is looked at, a row a checkpoint."""
    sites = [(site.layer, site.site) for site in checkpoints[0].run.sites]
    layer, site = here = (view.layer, view.site)
    if here not in sites:
        layer, site = sites[0]
        instead(f"These checkpoints have no router {view.site_name}: their first one is drawn.")
    load = expert_loads(checkpoints, layer, site=site, domain=view.domain, phase=view.phase)
    ends = [
        load[load["checkpoint"] == one.name].set_index("expert_id")["ratio"]
        for one in (checkpoints[0], checkpoints[-1])
    ]
    chart(
        domain_heatmap(
            load,
            caption=_caption(
                view, table, "max_violation", f"1× = uniform share {uniform_text(load)}"
            ),
            by="checkpoint",
            layer=site_name(layer, site, several=any(other for _, other in sites)),
            dark=is_dark(),
        ),
        key="load by checkpoint",
        alt=f"Heatmap: load of each of {len(ends[0])} experts at {len(checkpoints)} checkpoints; "
        f"{int((ends[1] / ends[0] >= 2).sum())} at least doubled from the first to the last.",
        table=load,
    )


def _not_shared(table: pd.DataFrame, last: str) -> None:
    """Say which checkpoints have nothing in common with the last one, and which no ids."""
    others = table[table["name"] != last]
    for rows, said in (
        (others[others["shared"] == 0], f"No prompt in common with {plain(last)}: "),
        (others[others["shared"].isna()], "Experts of tokens were not recorded here or there: "),
    ):
        if len(rows):
            instead(f"{said}{_named(rows)}. Saturation is not defined for them.")


def _caption(
    view: View, table: pd.DataFrame, quantity: str, more: str = "one line a layer"
) -> Caption:
    """Say how many tokens each checkpoint's values are of, and which filters act."""
    counts = tokens_of(table, quantity)
    most = max(counts.values())
    what = ""
    scope = view.scope(most, over_layers=True)._replace(search=None, slice=None, step=1)
    if quantity == "saturation":
        what = ", shared with the last one"
        if most >= MAX_TOKENS:
            what += f" (at most {MAX_TOKENS:,}, evenly spread)"
        scope = scope._replace(phase="prompt")
    of = "".join(f"; {name}: {label(value)}" for name, value in scope.filter_values().items())
    return Caption(
        f"n = {_numbers(counts)}{what}{of}; {more}",
        scope.filter_values(),
    )


def _numbers(counts: dict[str, int]) -> str:
    """Write the number of each checkpoint's tokens: one for all where they are the same."""
    low, high = min(counts.values()), max(counts.values())
    if low == high:
        return f"{counted(low, 'token')} of each checkpoint"
    if len(counts) > _LISTED:
        return f"{low:,} to {high:,} tokens of each checkpoint (in the table and under the mouse)"
    names = labels(list(counts), limit=18)
    each = [f"{n:,} ({name})" for name, n in zip(names, counts.values(), strict=True)]
    return ", ".join(each) + " tokens"


def _short(quantity: str) -> str:
    """Return a quantity's title without its unit."""
    title = TRENDS[quantity].title.partition(" (")[0]
    return title[:1].upper() + title[1:]


def _demo_runs() -> list[tuple[str, Run]]:
    paths = sorted(DEMO_TRENDS.glob("*.duckdb"))
    return list(zip([path.stem for path in paths], _opened(tuple(paths)), strict=True))


def _folder_runs() -> list[tuple[str, Run]]:
    chosen = address.choose_several(
        st.multiselect, "runs", "Runs", state.run_names(), default=_stepped()
    )
    # written even if it is the default, which changes with the runs of the folder
    address.write("runs", join(chosen))
    return _opened_by_name(chosen)


def _stepped() -> list[str]:
    """Return the runs of the folder that are named by a step."""
    return sorted(name for name in state.run_names() if "step" in name)


def _followed_runs() -> list[tuple[str, Run]]:
    """Return what the folder holds by now; the page is drawn again when there is more."""
    names = _stepped()
    _watch(tuple(names))
    return _opened_by_name(names)


@st.fragment(run_every=FOLLOW_SECONDS)
def _watch(drawn: tuple[str, ...]) -> None:
    # a part that is drawn alone is not within the page's own
    with problems.shown():
        if tuple(_stepped()) != drawn:
            st.rerun()
        st.caption(
            f"{counted(len(drawn), 'run')} with `step` in the name so far. The folder is looked at "
            f"every {FOLLOW_SECONDS:.0f} s, and a new one is drawn as it is there."
        )


def _opened_by_name(names: Sequence[str]) -> list[tuple[str, Run]]:
    found = []
    for name in names:
        try:
            found.append((name, state.opened(name)[0]))
        except (CaptureError, ExplorerError) as error:
            problems.show(error)
    return found


def _close(runs: list[Run]) -> None:
    for run in runs:
        run.close()


@st.cache_resource(show_spinner=False, on_release=_close)
def _opened(paths: tuple[Path, ...]) -> list[Run]:
    # a part of this package: the values of strangers' files are questioned, which takes most of it
    with ThreadPoolExecutor() as pool:  # DuckDB opens files side by side
        return [Run(reader) for reader in pool.map(RunReader.open, paths)]


@st.cache_data(max_entries=10, show_spinner=False)
def _measured(
    keys: tuple[tuple[str, str, str], ...],
    domain: str | None,
    phase: str | None,
    _named: list[tuple[str, Run]],
) -> pd.DataFrame:
    return trend_table(in_order(_named), domain=domain, phase=phase)


render()
