"""Parts of a page that stand alone: one that fails says so, and takes no other one down."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

import streamlit as st

from capture.errors import CaptureError
from explorer.errors import ExplorerError
from explorer.ui import address, printing

P = ParamSpec("P")
_log = logging.getLogger(__name__)


def part(
    title: str, *, passing: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function that draws a part of a page show a message in its place where it fails.

    Parameters
    ----------
    title : str
        What the part is called in the message.
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
            except (ExplorerError, CaptureError) as error:
                _say(f"{title}: {error}")
            except Exception as error:
                # whatever it is: a reader is told where, the console why
                _log.exception("the part %r of a page failed", title)
                _say(f"{title}: this part could not be drawn ({_kind(error)}).")

        return drawn

    return decorate


def _kind(error: Exception) -> str:
    """Return the kind of an error; on paper its message too, which on a server is the console's."""
    name = type(error).__name__
    return f"{name}: {printing.one_line(str(error))}" if printing.theme() else name


def _say(text: str) -> None:
    st.error(address.plain(text), icon=":material/error:")
