"""What goes wrong is said on the page, and a section that fails takes no other one down.

A file may be damaged, replaced or a stranger's, a disk full, a right missing: such errors carry a
sentence for the reader. The framework's box with a traceback is left for errors of the code.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import streamlit as st

from capture.errors import CaptureError
from explorer.errors import ExplorerError
from explorer.run import Run
from explorer.text import plain
from explorer.ui import printing

KNOWN = (CaptureError, ExplorerError)
P = ParamSpec("P")
_LEFT = "problem of a callback"
_log = logging.getLogger(__name__)


def show(error: Exception) -> None:
    """Draw an error as a message."""
    _draw(str(error))


def instead(text: str) -> None:
    """Say in the place of a figure why there is none, and what can be done; Markdown."""
    st.info(text, icon=":material/info:")


def without_ids(run: Run, what: str) -> bool:
    """Return whether a run keeps no experts of single tokens, after saying what needs them."""
    if not run.records_ids:
        instead(f"{what} {run.needs_ids}")
    return not run.records_ids


@contextmanager
def shown() -> Iterator[None]:
    """Draw the errors of a callback before, and of the block itself, instead of raising them."""
    left = st.session_state.pop(_LEFT, None)
    if left is not None:
        show(left)
    try:
        yield
    except KNOWN as error:
        show(error)


def in_callback(act: Callable[P, None]) -> Callable[P, None]:
    """Leave a callback's error for the page, which is drawn after it."""

    @functools.wraps(act)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            act(*args, **kwargs)
        except KNOWN as error:
            st.session_state[_LEFT] = error

    return guarded


def section(
    title: str, *, passing: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function that draws a section of a page show a message in its place where it fails.

    Parameters
    ----------
    title : str
        What the section is called in the message.
    passing : tuple of exceptions
        Those that the page itself has something to say of.
    """

    def decorate(draw: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(draw)
        def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                draw(*args, **kwargs)
            except passing:
                raise
            except KNOWN as error:
                _draw(f"{title}: {error}")
            except Exception as error:
                # whatever it is: a reader is told where, the console why
                _log.exception("the section %r of a page failed", title)
                _draw(f"{title}: this part could not be drawn ({_kind(error)}).")

        return drawn

    return decorate


def _kind(error: Exception) -> str:
    """Return the kind of an error; on paper its message too, which on a server is the console's."""
    name = type(error).__name__
    return f"{name}: {printing.one_line(str(error))}" if printing.theme() else name


def _draw(text: str) -> None:
    st.error(plain(text), icon=":material/error:")
