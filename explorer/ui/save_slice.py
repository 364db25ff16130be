"""Keep the tokens that a page shows as a slice, which all pages can be limited to."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import streamlit as st

from explorer import service, slices
from explorer.errors import ExplorerError
from explorer.ui import access, address, printing
from explorer.ui.state import View

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
            f"Slice **{address.plain(saved)}** is saved: choose it at the side to limit every "
            "page to it.",
            icon=":material/check_circle:",
        )
    # a report has no forms
    if not service.may_write() or printing.theme() is not None:
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
        place.error(address.plain(str(error)), icon=":material/error:")
        return
    st.session_state[done] = named.strip()
    # the list of slices at the side is drawn before the page
    st.rerun()
