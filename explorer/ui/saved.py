"""Saved views on the pages: opening one by its link, saying what it is, and saving a new one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import streamlit as st
from streamlit.navigation.page import StreamlitPage

from capture.errors import quoted
from explorer import saved_views, slices, writing
from explorer.errors import ExplorerError
from explorer.saved_views import SavedView
from explorer.text import plain
from explorer.ui import access, address, printing, state
from explorer.ui.state import View

_ADDRESS = "view"  # its name in the address
_PROBLEM, _MADE = "problem of the saved view", "saved just now"
# pages that show no view of a run
NOT_SAVED = ("capture", "share", "learn")


def follow(pages: Sequence[StreamlitPage]) -> None:
    """Go where a link to a saved view leads, if the address is one."""
    view_id = st.query_params.get(_ADDRESS, "")
    # once it is open, the address names what it shows too
    if not view_id or "run" in st.query_params:
        return
    try:
        view = saved_views.load_view(state.runs_folder(), view_id)
        target = next((p for p in pages if (p.url_path or "overview") == view.page), None)
        if target is None or view.page in NOT_SAVED:
            raise ExplorerError(
                f"The saved view “{view.name}” is of a page that is not here: {quoted(view.page)}."
            )
    except ExplorerError as error:
        st.session_state[_PROBLEM] = str(error)
        del st.query_params[_ADDRESS]
        return
    there = {n: v for n, v in view.params.items() if n in address.names_of(view.page) and v}
    address.restart(there)
    st.switch_page(target, query_params={**there, _ADDRESS: view_id})


def is_open() -> bool:
    """Return whether the page says at its top which saved view it is."""
    return _ADDRESS in st.query_params


def banner() -> None:
    """Say which saved view this is, and whether its choices or its data changed since then."""
    problem = st.session_state.pop(_PROBLEM, "")
    if problem:
        address.note(problem)
    view_id = st.query_params.get(_ADDRESS, "")
    if not view_id:
        return
    try:
        view = saved_views.load_view(state.runs_folder(), view_id)
    except ExplorerError as error:
        address.note(str(error))
        del st.query_params[_ADDRESS]
        return
    other = _changed_choices(view)
    if other:
        _no_longer(view_id, other)
        return
    with st.container(border=True, key="saved view"):
        st.markdown(f":material/bookmark: **{plain(view.name)}** · {plain(by_line(view))}")
        if view.note:
            st.markdown(plain(view.note, lines=True))
    warn_of_changes(view)


def _changed_choices(view: SavedView) -> list[str]:
    """Return what of the address is not as the view has it."""
    page = address.page()
    if view.page != page:
        return ["page"]
    # a job that is under way is not a choice
    names = [name for name in address.names_of(page) if name != "job"]
    found = {name: st.query_params.get(name, "") for name in names}
    # a view that names no run, perhaps from elsewhere, is of the run that is open
    asked = {"run": found["run"]} | view.params
    return [name for name in names if found[name] != asked.get(name, "")]


def _no_longer(view_id: str, changed: list[str]) -> None:
    """Say that this is not the view any more, whose name and note would stand above other data."""
    with st.container(border=True, key="saved view", horizontal=True, vertical_alignment="center"):
        st.markdown(
            ":material/bookmark_remove: This is no longer the saved view that was opened: "
            + ", ".join(f"`{name}`" for name in changed)
            + (" was" if len(changed) == 1 else " were")
            + " changed."
        )
        st.page_link(
            "explorer/pages/overview/page.py",
            label="Back to the view",
            icon=":material/undo:",
            query_params={_ADDRESS: view_id},
        )


def warn_of_changes(view: SavedView) -> None:
    """Warn when a run, the slice or the comparison of a view is not what it was."""
    changed = saved_views.changed(view, state.runs_folder(), digest=_digest)
    if changed:
        names = ", ".join(plain(name) for name in changed)
        st.warning(
            f"The data changed since this view was saved: {names}. What is shown may differ from "
            "what the note says.",
            icon=":material/warning:",
        )


def by_line(view: SavedView) -> str:
    """Say who saved a view and when."""
    by = f"saved by {view.author}" if view.author else "saved"
    return f"{by} on {view.created[:10]}"


def _digest(path: Path) -> str:
    """Return what a file is, which is read again only when it changed."""
    try:
        return _known_digest(state.key_of(path))
    except OSError as error:
        raise ExplorerError(f"{path.name} cannot be read: {error.strerror}.") from None


# as many as the runs that one view may name
@st.cache_data(max_entries=1_000, show_spinner=False)
def _known_digest(key: state.Key) -> str:
    return saved_views.digest(Path(key[0]))


def save_form(page: str) -> None:
    """Draw the button that saves what the page shows, for those who may."""
    if page in NOT_SAVED or not writing.may_write():
        return
    with st.sidebar.popover("Save this view", icon=":material/bookmark_add:", width="stretch"):
        with st.form("save view", border=False, clear_on_submit=True):
            st.text_input("Name", key="view name", max_chars=saved_views.MAX_NAME)
            st.text_area("Note", key="view note", max_chars=saved_views.MAX_NOTE, height=90)
            st.text_input("Author", access.who().name, key="view author", max_chars=80)
            st.form_submit_button("Save", type="primary", on_click=_save, args=(page,))
        made = st.session_state.get(_MADE)
        if isinstance(made, SavedView):
            st.markdown(f"Saved as **{plain(made.name)}**. Its link:")
            st.code(link_to(made), language=None, wrap_lines=True)
        elif made:
            st.error(plain(made), icon=":material/error:")


def _save(page: str) -> None:
    given = st.session_state
    params = {n: v for n, v in st.query_params.items() if n in address.names_of(page)}
    try:
        made: SavedView | str = saved_views.save_view(
            state.runs_folder(),
            given["view name"],
            page=page,
            params=params,
            runs=runs_of(params),
            note=given["view note"],
            author=given["view author"],
        )
    except ExplorerError as error:
        made = str(error)
    given[_MADE] = made


def runs_of(params: Mapping[str, str]) -> dict[str, Path]:
    """Return the files of the runs that an address names."""
    there = set(state.run_names())
    folder = state.runs_folder()
    return {n: writing.run_file(folder, n) for n in saved_views.runs_named(params) if n in there}


def link_to(view: SavedView) -> str:
    """Return the link that opens a view, on the server that this browser asks."""
    there = str(st.context.url or "").split("?")[0].rstrip("/")
    return f"{there.removesuffix('/' + address.page())}/?{_ADDRESS}={view.view_id}"


Ids = npt.NDArray[np.int64]


def save_slice(view: View, tokens: Callable[[], Ids], *, key: str, fold: bool = False) -> None:
    """Draw the form, to those who may write; and after saving, say so.

    Parameters
    ----------
    tokens : callable
        Returns ids of tokens of the run; called when the form is sent.
    fold : bool
        Show the form only when somebody opens it.
    """
    done = f"slice saved {key}"
    saved = st.session_state.pop(done, None)
    if saved:
        st.success(
            f"Slice **{plain(saved)}** is saved: choose it at the side to limit every page to it.",
            icon=":material/check_circle:",
        )
    # a report has no forms
    if not writing.may_write() or printing.theme() is not None:
        return
    place = st.container()
    if fold:
        place = st.expander("Save these tokens as a slice", icon=":material/bookmark_add:")
    with place, st.form(f"save slice {key}", border=False):
        name, note, button = st.columns([2, 3, 1], vertical_alignment="bottom")
        named = name.text_input("Save as slice", placeholder="Name", max_chars=slices.MAX_NAME)
        noted = note.text_input("Note", placeholder="What is it?", max_chars=slices.MAX_NOTE)
        if not button.form_submit_button("Save slice", width="stretch"):
            return
    try:
        slices.save_slice(view.run, named, tokens(), note=noted, author=access.who().name)
    except ExplorerError as error:
        place.error(plain(str(error)), icon=":material/error:")
        return
    st.session_state[done] = named.strip()
    # the list of slices at the side is drawn before the page
    st.rerun()
