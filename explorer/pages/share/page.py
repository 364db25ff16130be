"""Share: saved views, reports, runs without their text, and runs from somebody else."""

import streamlit as st

from capture.errors import CaptureError
from capture.paths import RUN_SUFFIX, suggested_name
from capture.store import MIN_PROMPTS, MIN_TOKENS
from explorer import run_files, saved_views, writing
from explorer.errors import ExplorerError
from explorer.report import make_report
from explorer.saved_views import SavedView
from explorer.text import counted, plain
from explorer.ui import access, address, problems, saved
from explorer.ui.problems import section
from explorer.ui.shell import current_view
from explorer.ui.state import View, close_runs, new_name, run_names, runs_folder
from explorer.ui.wording import listed

# a longer list makes the page slow to draw
MAX_LISTED = 50
_SAID = "said on the share page"
_COPY = "copy made on the share page"
# the newest report of the session: of which button, why it failed, its bytes
_REPORT = "report of the share page"


def render() -> None:
    """Draw the page."""
    st.markdown(
        "What a page shows is in its address: copy it from the browser and send it, or save it "
        "under a name. A **report** is one file that shows the same without this app."
    )
    st.caption(f":material/group: {access.statement()}")
    said = st.session_state.pop(_SAID, "")
    if said:
        st.success(plain(said), icon=":material/check_circle:")
    left, right = st.columns([3, 2], gap="large")
    with left:
        _views()
    view = current_view()
    with right:
        _run_report(view)
        if writing.may_write() or view.run.counts_only:
            _without_text(view)
        if writing.may_write():
            _this_run(view)
            _upload()
        if access.has_login():
            _account()


@section("Saved views")
def _views() -> None:
    st.subheader("Saved views", anchor=False)
    found, damaged = saved_views.list_views(runs_folder())
    if not found:
        how = (
            "Set a page up as you want others to see it, then press *Save this view* at the side."
            if writing.may_write()
            else "Those who may write here can save what a page shows under a name."
        )
        st.info(f"No view is saved yet. {how}", icon=":material/bookmark:")
    runs = run_names()
    for view in found[:MAX_LISTED]:
        _one_view(view, runs)
    if len(found) > MAX_LISTED:
        st.caption(f"The newest {MAX_LISTED} of {len(found):,} are shown; older ones open by link.")
    for view_id in damaged:
        left, right = st.columns([4, 1], vertical_alignment="center")
        left.warning(f"The saved view {plain(view_id)} cannot be read.", icon=":material/warning:")
        if writing.may_write():
            right.button("Delete", key=f"delete {view_id}", on_click=_delete, args=(view_id,))


def _one_view(view: SavedView, runs: list[str]) -> None:
    with st.container(border=True, key=f"view {view.view_id}"):
        run = view.params.get("run", "")
        where = plain(f"{view.page.replace('-', ' ')} of {run}")
        st.markdown(f"**{plain(view.name)}**  \n{where} · {plain(saved.by_line(view))}")
        if view.note:
            st.markdown(plain(view.note, lines=True))
        saved.warn_of_changes(view)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.page_link(
                "explorer/pages/overview/page.py",
                label="Open",
                icon=":material/open_in_new:",
                query_params={"view": view.view_id},
            )
            if run in runs:
                _report_button("Report", run, view)
            if writing.may_write():
                with st.popover("Delete", icon=":material/delete:"):
                    st.markdown("Its link will not work any more.")
                    st.button(
                        "Delete the view",
                        key=f"delete {view.view_id}",
                        on_click=_delete,
                        args=(view.view_id,),
                    )


@problems.in_callback
def _delete(view_id: str) -> None:
    saved_views.delete_view(runs_folder(), view_id)
    st.session_state[_SAID] = "The view was deleted."


def _report_button(label: str, run: str, view: SavedView | None = None) -> None:
    """Draw the button that makes a report; then the download, or why the report could not be made.

    A download button that makes its file when it is pressed says nothing while it works, and
    writes its problems to the server's console only.
    """
    key = f"report of {view.view_id if view else run}"
    if st.button(label, icon=":material/description:", key=key):
        st.session_state[_REPORT] = (key, "", b"")
        try:
            with st.spinner("Making the report…"):
                made_now = make_report(writing.run_file(runs_folder(), run), view)
            said = "; ".join(f"{title}: {why}" for title, why in made_now.failed.items())
            st.session_state[_REPORT] = (key, said, made_now.text.encode())
        except (CaptureError, ExplorerError, OSError) as error:
            st.session_state[_REPORT] = (key, str(error), b"")
    made, problem, report = st.session_state.get(_REPORT, ("", "", b""))
    if made != key:
        return
    if problem and not report:
        st.error(plain(problem), icon=":material/error:")
        return
    if problem:
        st.warning(
            f"These sections could not be made whole: {plain(problem)}", icon=":material/warning:"
        )
    wish = f"{run} {view.name if view else ''}"
    st.download_button(
        f"Download · {len(report) / 1e6:.1f} MB",
        report,
        file_name=f"{suggested_name(wish, most=80, otherwise='report')}.html",
        mime="text/html",
        type="primary",
        icon=":material/download:",
        on_click="ignore",
        key=f"download {key}",
    )


@section("Report")
def _run_report(view: View) -> None:
    st.subheader("Report", anchor=False)
    st.markdown(
        f"The main pages of **{plain(view.name)}** as one HTML file: figures to zoom and "
        "hover, light and dark, no network needed. It takes a few seconds to make."
    )
    _report_button("Report of this run", view.name)


@section("Counts only")
def _without_text(view: View) -> None:
    st.subheader("Counts only", anchor=False)
    if view.run.counts_only:
        st.markdown("This run is such an export: it holds no text.")
        _download(view.name)
        return
    if view.run.sums_only:
        st.markdown("This run is imported from counts and holds no text. Share the file as it is.")
        return
    st.markdown(
        "A copy of this run for people who may not read its prompts: sums per expert, domain and "
        "phase. It holds no text, no token ids, and nothing else that is known per token, because "
        f"routing alone can give tokens away. There are sums only of {MIN_TOKENS} tokens from "
        f"{MIN_PROMPTS} prompts or more: smaller domains are put together without their names, "
        "and a phase that is smaller in all is left out."
    )
    key = "counts name"
    st.text_input("Name of the copy", new_name(runs_folder(), f"{view.name}-counts"), key=key)
    st.button("Make the copy", icon=":material/visibility_off:", on_click=_export, args=(view, key))
    _say_problem(key)
    copy = st.session_state.get(_COPY, "")
    if copy in run_names():
        _download(copy)


def _download(name: str) -> None:
    path = writing.run_file(runs_folder(), name)
    st.download_button(
        f"Download {name}{RUN_SUFFIX} · {path.stat().st_size / 1e6:.1f} MB",
        path.read_bytes,
        file_name=path.name,
        mime="application/octet-stream",
        icon=":material/download:",
        on_click="ignore",
        key=f"download the copy {name}",
    )


def _export(view: View, key: str) -> None:
    name = str(st.session_state[key]).strip()
    try:
        out = writing.run_path(runs_folder(), name)
        writing.export_counts(view.run.path, out)
    except (CaptureError, ExplorerError) as error:
        st.session_state[f"problem of {key}"] = str(error)
        return
    st.session_state[_SAID] = f"The run {name} holds the counts of {view.name}, and no text."
    st.session_state[_COPY] = name


@section("This run")
def _this_run(view: View) -> None:
    st.subheader("Rename or delete", anchor=False)
    files = run_files.files_of(runs_folder(), view.name)
    kinds = (
        counted(len(files.comparisons), "comparison"),
        counted(len(files.atlases), "atlas", "atlases"),
        counted(len(files.slices), "slice"),
    )
    beside = [said for said in kinds if not said.startswith("0 ")]
    views = counted(len(files.views), "saved view")
    with st.container(horizontal=True):
        with st.popover("Rename", icon=":material/edit:"):
            with_it = f" What lies beside it goes along: {listed(beside)}." if beside else ""
            st.markdown(
                f"**{plain(view.name)}** gets another name.{with_it} "
                + (f"{views} will show it under that name; " if files.views else "")
                + ("links" if files.views else "Links")
                + " to pages of it that were sent will not find it."
            )
            key = f"new name of {view.name}"
            st.text_input("New name", view.name, key=key)
            st.button("Rename the run", type="primary", on_click=_rename, args=(view.name, key))
        with st.popover("Delete", icon=":material/delete:"):
            size = files.run.stat().st_size / 1e6
            goes = [f"the run **{plain(view.name)}**, {size:,.1f} MB", *beside]
            st.markdown(
                "For good go:\n\n"
                + "\n".join(f"- {what}" for what in goes)
                + (f"\n\n{views} will say that the run is gone." if files.views else "")
            )
            st.button("Delete for good", type="primary", on_click=_delete_run, args=(view.name,))
    _say_problem(f"new name of {view.name}")


def _rename(old: str, key: str) -> None:
    new = str(st.session_state[key]).strip()
    close_runs()
    try:
        run_files.rename_run(runs_folder(), old, new)
    except (CaptureError, ExplorerError) as error:
        st.session_state[f"problem of {key}"] = str(error)
        return
    # what is chosen at the side is of the same run still
    address.write("run", new)
    st.session_state[_SAID] = f"The run {old} is called {new} now."


@problems.in_callback
def _delete_run(name: str) -> None:
    close_runs()
    run_files.delete_run(runs_folder(), name)
    address.write_run("")
    st.session_state[_SAID] = f"The run {name} was deleted."


@section("Upload")
def _upload() -> None:
    st.subheader("A run from somebody else", anchor=False)
    given = st.file_uploader(
        "A run file",
        type=[RUN_SUFFIX.removeprefix(".")],
        max_upload_size=writing.MAX_UPLOAD,
        key="run upload",
        help="It is checked before it is kept; nothing that the file brings along is run.",
    )
    if given is None:
        return
    wish = suggested_name(given.name.removesuffix(RUN_SUFFIX))
    key = f"upload name {given.file_id}"
    st.text_input("Its name here", new_name(runs_folder(), wish), key=key)
    st.button("Keep the run", type="primary", on_click=_keep, args=(given, key))
    _say_problem(key)


def _keep(given: "st.runtime.uploaded_file_manager.UploadedFile", key: str) -> None:
    name = str(st.session_state[key]).strip()
    try:
        given.seek(0)
        writing.keep_upload(runs_folder(), name, given)
    except ExplorerError as error:
        st.session_state[f"problem of {key}"] = str(error)
        return
    st.session_state[_SAID] = f"The run {name} was checked and kept. Choose it at the side."


def _say_problem(key: str) -> None:
    problem = st.session_state.pop(f"problem of {key}", "")
    if problem:
        st.error(plain(problem), icon=":material/error:")


def _account() -> None:
    st.subheader("You", anchor=False)
    viewer = access.who()
    st.markdown(f"Logged in as {plain(viewer.name)}, role **{viewer.role}**.")
    if st.button("Log out"):
        st.logout()


render()
