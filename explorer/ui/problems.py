"""What is known to go wrong is said on the page, whichever part of it asked.

A file may be damaged, replaced or a stranger's, a disk full, a right missing: such errors carry a
sentence for the reader. The framework's box with a traceback is left for errors of the code.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import streamlit as st

from capture.errors import CaptureError
from explorer.errors import ExplorerError
from explorer.ui import address

KNOWN = (CaptureError, ExplorerError)
_LEFT = "problem of a callback"
P = ParamSpec("P")


def say(error: Exception) -> None:
    """Draw an error as a message."""
    st.error(address.plain(str(error)), icon=":material/error:")


@contextmanager
def said() -> Iterator[None]:
    """Draw what a callback could not do, and then what the block cannot, instead of raising it."""
    left = st.session_state.pop(_LEFT, None)
    if left is not None:
        say(left)
    try:
        yield
    except KNOWN as error:
        say(error)


def in_callback(act: Callable[P, None]) -> Callable[P, None]:
    """Leave a callback's error for the page, which is drawn after it."""

    @functools.wraps(act)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            act(*args, **kwargs)
        except KNOWN as error:
            st.session_state[_LEFT] = error

    return guarded
