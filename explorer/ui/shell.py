"""The frame around every page, and what is shown while there is no run yet."""

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from capture.paths import RUN_SUFFIX
from capture.store import MIN_PROMPTS, MIN_TOKENS
from explorer import writing
from explorer.text import counted, plain
from explorer.ui import address, filters, saved, state
from explorer.ui.job import follow
from explorer.ui.problems import instead
from explorer.worker import CaptureRequest, Job, shared_worker

_VIEW = "current view"
_DEMO = "demo"
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
[class*="st-key-downloads-of-"] button { border-color: transparent; background: none; }
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
    st.session_state[_VIEW] = view = filters.select_view()
    if isinstance(view, state.View):
        filters.chips(view)
    saved.save_form(address.page())
    active = [job for job in shared_worker().jobs() if job.active]
    if active:
        with st.sidebar:
            jobs = counted(len(active), "job")
            st.caption(f":material/progress_activity: {jobs} in progress")


def current_view() -> state.View:
    """Return the run and the filters; without any run, record the demo and end the page here."""
    view: state.View | state.RunProblem | None = st.session_state[_VIEW]
    if view is None:
        first_run()
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


def first_run() -> None:
    """Record the demo prompts with the demo model, show how far it is, then show the run."""
    if not writing.may_write():
        instead(
            "There is no run in this folder yet, and none can be recorded here. Record one with "
            "`python -m capture`, or ask whoever runs this server."
        )
        return
    st.markdown(
        "Nothing has been recorded yet, so RouteScope makes a first **run**: a small "
        "mixture-of-experts language model, which comes with it, reads its demo prompts, and "
        "every decision of its routers is written down. This takes less than a minute."
    )
    job = _demo_job() or _start_demo()
    ended = follow(job.job_id, key="first run")
    if ended is None:
        return
    if ended.path:
        st.rerun()
    if st.button("Try again", type="primary"):
        _start_demo()
        st.rerun()
    st.page_link("explorer/pages/capture/page.py", label="Capture prompts of your own")


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
