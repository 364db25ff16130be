"""Errors raised by capture.

CaptureError
├── ConfigError           an option has a value that cannot work
├── PromptError           a prompt file or record cannot be read
├── ModelError            a model cannot be loaded, or loads only with a flag
│   └── SiteError         a model has no MoE site, or a site cannot be tapped
├── TraceError            routing of another program cannot be read
├── SwapError             a rule cannot take a router's place, lacks what it asks for, or its
│                         answer cannot be executed
├── StoreError            a run file cannot be created, written or opened
│   └── SchemaVersionError  a run file has a schema version this code does not read
└── CaptureCancelled      the caller asked the capture to stop; what was recorded is kept
"""

import reprlib
from pathlib import Path

MAX_QUOTED = 80  # characters
MAX_LINE = 200
_CUT = "…"
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_QUOTED


class CaptureError(Exception):
    """Base of everything capture raises on purpose; the message says what to do."""


class ConfigError(CaptureError):
    """An option has a value that cannot work."""


class PromptError(CaptureError):
    """A prompt file or record cannot be read."""


class ModelError(CaptureError):
    """A model cannot be loaded, or loads only with a flag."""


class SiteError(ModelError):
    """A model has no MoE site, or a site cannot be tapped."""


class TraceError(CaptureError):
    """Routing that another program recorded cannot be read."""


class SwapError(CaptureError):
    """A rule cannot take a router's place, lacks what it asks for, or answers what cannot run."""


class StoreError(CaptureError):
    """A run file cannot be created, written or opened."""


class SchemaVersionError(StoreError):
    """A run file has a schema version this code does not read."""


class CaptureCancelled(CaptureError):
    """The caller asked the capture to stop; what was recorded is kept.

    ``path`` is the finished, incomplete run; None when nothing was recorded yet.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


def quoted(value: object, most: int = MAX_QUOTED) -> str:
    """Return how Python writes a value, on one line, cut where it has over ``most`` characters."""
    try:
        return cut(_repr.repr(value), most)
    except ValueError:  # a number of more digits than Python writes
        return "a number with too many digits to write"


def cut(text: str, most: int = MAX_LINE) -> str:
    """Return a text on one line, cut where it is longer than ``most`` characters."""
    line = " ".join(text[: most + 1].splitlines())
    return line if len(line) <= most else line[: most - 1] + _CUT


def first_line(error: object, most: int = MAX_LINE) -> str:
    """Return the first line of what an error of a library says, without its full stop.

    An error that says nothing is named by its kind. ``most`` are characters.
    """
    lines = str(error)[: 10 * most].strip().splitlines()
    return cut(lines[0].strip().rstrip("."), most) if lines else type(error).__name__
