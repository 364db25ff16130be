"""The frame around every page, and what is shown while there is no run yet."""

import gc
import lzma
import sys
from pathlib import Path

import plotly.io as pio
import streamlit as st
from streamlit.navigation.page import StreamlitPage

from capture.demo import SAMPLE
from capture.paths import RUN_SUFFIX
from capture.store import MIN_PROMPTS, MIN_TOKENS
from explorer import saved_views, writing
from explorer.errors import ExplorerError
from explorer.text import counted, plain
from explorer.ui import address, filters, problems, saved, state
from explorer.ui.job import follow
from explorer.ui.problems import instead
from explorer.worker import CaptureRequest, Job, shared_worker

# figures carry a template (`ui.theme`); to make plotly's own for each first takes as long as the
# rest. Only here: in a notebook, the figures of others keep theirs
pio.templates.default = None
_VIEW = "current view"
_DEMO = "demo"
_SAMPLE = "demo-sample"  # a run, until the demo's own takes its place
_WAITS = "waits for the demo"
_DRAWN_SECONDS = 3.0  # until the first page is drawn, which should not wait for a model to load
# per prompt, so that what the pages say of the phases has something to show
_DEMO_GENERATE = 8
LOGO = state.ROOT / "explorer" / "assets" / "logo.svg"
# Streamlit leaves a hand's width free above a page and at its sides
_STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding: 2.6rem 3rem 3rem; }
[data-testid="stMetric"] { height: 100%; }
[data-testid="stMetric"] * { white-space: normal !important; }
[data-testid="stSidebarNavLink"] { min-height: 1.7rem; padding-block: 0; }
[data-testid="stSidebarNavItems"] { row-gap: 0; }
/* the line of actions below a figure is calm until its table is opened */
[class*="st-key-table-of-"]:not(:has(details[open])) { width: auto !important; flex: 0 0 auto; }
[class*="st-key-table-of-"]:not(:has(details[open])) details { border-color: transparent; }
[class*="st-key-chip-"] button { min-height: 1.8rem; padding: 0 0.6rem; border-radius: 1rem; }
[class*="st-key-downloads-of-"] button, [class*="st-key-code-of-"] button {
  border-color: transparent; background: none;
}
/* as high as the lists to choose from that stand beside them */
[data-testid="stHorizontalBlock"]:has(> * > [data-testid="stSelectbox"])
  > * > [data-testid="stButtonGroup"] button { min-height: 2.5rem; }
/* a browser writes this file itself, formulas and all; the data of figures is below them */
[data-testid="stElementToolbarButton"]:has([aria-label^="Download as CSV"]) { display: none; }
/* a figure with its title needs this much; on a narrow screen it is moved aside by hand */
@media (max-width: 640px) {
  [data-testid="stMainBlockContainer"] { padding-inline: 1.2rem; }
  [data-testid="stElementContainer"]:has(> * > [data-testid="stPlotlyChart"]) { overflow-x: auto; }
  [data-testid="stFullScreenFrame"]:has(> [data-testid="stPlotlyChart"]) { min-width: 600px; }
}
</style>"""
# Streamlit's small print is too faint to read, and white text on the colour of buttons, too, where
# that colour is light (WCAG: 4.5)
_CONTRAST = """<style>
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] code {
  color: SOFT; opacity: 1;
}
[data-testid="stBaseButton-primary"]:not(:disabled), [data-tag] { color: ON_PRIMARY; }
</style>"""
_frozen = 0  # modules of which nothing is garbage any more
_SOFT = {False: "#4d5a69", True: "#a9b4c2"}
_ON_PRIMARY = {False: "#ffffff", True: "#0e1117"}


def page(name: str, title: str, icon: str) -> StreamlitPage:
    """Return a page of the app, whose address is its name; the overview is at the root."""
    return st.Page(
        f"explorer/pages/{name}/page.py",
        title=title,
        icon=icon,
        url_path=name.replace("_", "-"),
        default=name == "overview",
    )


def frame(title: str) -> None:
    """Draw the page's title and the bar at the side; remember the view for the page."""
    _spare_collector()
    st.logo(str(LOGO), size="large")
    dark = state.is_dark()
    st.html(_STYLE)
    st.html(_CONTRAST.replace("SOFT", _SOFT[dark]).replace("ON_PRIMARY", _ON_PRIMARY[dark]))
    st.title(title, anchor=False)
    address.place_notes()
    saved.banner()
    # no filter says anything about a capture
    if title == "Capture":
        return
    _put_sample()
    st.session_state[_VIEW] = view = filters.select_view()
    if isinstance(view, state.View):
        if view.name == _SAMPLE:
            _beside_sample()
        filters.chips(view)
    saved.save_form(address.page())
    active = [job for job in shared_worker().jobs() if job.active]
    if active:
        with st.sidebar:
            jobs = counted(len(active), "job")
            st.caption(f":material/progress_activity: {jobs} in progress")


def _spare_collector() -> None:
    """Leave what was imported out of the search for garbage, which ends every run of the script.

    Streamlit searches all that lives, a tenth of a second and more, before it takes the next click.
    """
    global _frozen
    if len(sys.modules) > _frozen:
        gc.freeze()
        _frozen = len(sys.modules)


def current_view() -> state.View:
    """Return the run and the filters; without any run, say so and end the page here."""
    view: state.View | state.RunProblem | None = st.session_state[_VIEW]
    if view is None:
        instead(
            "There is no run in this folder yet, and none can be recorded here. Record one with "
            "`python -m capture`, or ask whoever runs this server."
        )
        st.stop()
    if isinstance(view, state.RunProblem):
        st.error(plain(view.text), icon=":material/error:")
        st.stop()
    if view.run.counts_only:
        st.info(
            "This run is a counts-only export: its text was left out, and with it everything that "
            f"was known token by token. What is shown are sums over at least {MIN_TOKENS} tokens "
            f"of at least {MIN_PROMPTS} prompts; smaller domains were put together, and what is "
            "smaller in all was left out.",
            icon=":material/visibility_off:",
        )
    if view.run.sums_only:
        st.info(
            "This run was imported from counts: how often each expert was chosen, and nothing of "
            "single tokens. What needs their text, their experts together, weights or scores is "
            "not shown. Numbers of tokens are assignments over top k.",
            icon=":material/functions:",
        )
    if not view.run.info["complete"]:
        st.warning(
            "This run's capture did not end: it holds a part of its prompts only.",
            icon=":material/warning:",
        )
    if view.part is not None and not view.scope().n_tokens:
        _nothing_matches(view)
        st.stop()
    return view


def _nothing_matches(view: state.View) -> None:
    st.info(
        f"No token matches all the filters at the side: {plain(view.scope().filters_text())}.",
        icon=":material/filter_alt_off:",
    )
    st.button(
        "Take the filters off",
        on_click=filters.take_off,
        args=("phase", "domain", "search", "slice"),
    )


def _put_sample() -> None:
    """Put the run that ships into a folder without any, so that there is something to look at."""
    if state.run_names() or not writing.may_write():
        return
    path = _sample_path()
    try:
        writing.write_new(path, lzma.decompress(SAMPLE.read_bytes()), what="A first run")
    except ExplorerError:
        if not path.exists():  # else another visitor was faster
            raise


def _sample_path() -> Path:
    return state.runs_folder() / f"{_SAMPLE}{RUN_SUFFIX}"


def _beside_sample() -> None:
    """Say what the sample is; record the demo behind it, and let its run take the place."""
    st.info(
        "This is a **sample** that comes with RouteScope, recorded beforehand: the demo model on "
        "20 of its 162 demo prompts, without attention and without the routers' inputs.",
        icon=":material/hourglass_top:",
    )
    alone = state.run_names() == [_SAMPLE]
    job = _demo_job()
    if not writing.may_write() or not (alone or st.session_state.get(_WAITS)):
        return
    if job is None:
        _start_when_drawn()
        return
    st.session_state[_WAITS] = True
    ended = follow(job.job_id, key="first run")
    if ended is None:
        return
    if ended.path:
        _take_place(Path(ended.path).stem)
    elif st.button("Try again", type="primary"):
        _start_demo()
        st.rerun()


@st.fragment(run_every=_DRAWN_SECONDS)
def _start_when_drawn() -> None:
    if st.session_state.get(_WAITS):
        # a part that is drawn alone is not within the page's own
        with problems.shown():
            _start_demo()
        st.rerun()
    st.session_state[_WAITS] = True
    st.caption("The whole demo is recorded next, which takes less than a minute.")


def _take_place(name: str) -> None:
    """Open the whole run; the sample goes, unless something was made of it."""
    folder = state.runs_folder()
    made = [path for path in folder.glob(f"*{_SAMPLE}*") if path != _sample_path()]
    if not made and not saved_views.list_views(folder)[0]:
        writing.remove(_sample_path(), what="Replacing the sample")
    address.write_run(name)
    st.session_state[_WAITS] = False
    st.toast("The whole demo run is recorded and has taken the sample's place.")
    st.rerun()


def _start_demo() -> Job:
    folder = state.runs_folder()
    out = folder / f"{state.new_name(folder, _DEMO)}{RUN_SUFFIX}"
    return writing.submit(CaptureRequest(str(out), level="attention", generate=_DEMO_GENERATE))


def _demo_job() -> Job | None:
    """Return the newest demo capture into this folder, whichever session started it."""
    for job in shared_worker().jobs():
        request = job.request
        if isinstance(request, CaptureRequest) and request.prompts == _DEMO:
            gone = job.state == "done" and job.path and not state.exists(job.path)
            if state.in_folder(request.out) and not gone:
                return job
    return None
