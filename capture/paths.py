"""Names of files and folders as people give them, and of models where others can read them."""

import argparse
import os
import re
from pathlib import Path

from capture.errors import CaptureError

RUN_SUFFIX = ".duckdb"
_RUN_NAME = re.compile(r"\w[\w.-]{0,59}")
RUN_NAMES = (
    "The name of a run must start with a letter or digit and hold at most 60 letters, digits, "
    "dots, dashes and underscores"
)
_CACHED = re.compile(r"models--(.+?)--(.+)")
_LOCAL = re.compile(r"[./~\\]|[A-Za-z]:[/\\]|.*\\|[^/]*/[^/]*/")


def given_path(name: str | Path, what: str, error: type[Exception] = CaptureError) -> Path:
    """Return the path that a name means: ``~`` is a home folder.

    An empty name or an unknown home folder raises ``error``; ``what`` is for its message, such as
    ``"the run file"``.
    """
    text = str(name)
    if not text.strip():
        raise error(
            f"A name was expected for {what}, got {text!r}. An unset shell variable gives an empty "
            "name; '.' stands for this folder."
        )
    if not text.startswith("~"):
        return Path(name)
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise error(
            f"{text!r}: there is no such home folder. Write ./{text} for a file of this name."
        ) from None


def path_argument(text: str) -> Path:
    """Return the path that an argument of a command line means."""
    return given_path(text, "a file or folder", argparse.ArgumentTypeError)


def is_run_name(name: str) -> bool:
    """Whether a run may have this name, see :data:`RUN_NAMES`."""
    return _RUN_NAME.fullmatch(name) is not None


def suggested_name(wish: str, *, most: int = 50, otherwise: str = "run") -> str:
    """Return a name that a run may have, near to a wish; what cannot be in one becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", wish).strip("-.")[:most] or otherwise


def model_name(model: str) -> str:
    """Return the name of a model: the last one of a folder, or the id of a hub as it is."""
    text = model.rstrip("/\\")
    if not _LOCAL.match(text) and not (text and os.path.isdir(text)):
        return model
    parts = re.split(r"[/\\]", text)
    # a snapshot in the cache of a hub is named by a digest
    cached = [found for part in parts if (found := _CACHED.fullmatch(part))]
    if cached:
        return f"{cached[-1][1]}/{cached[-1][2]}"
    return parts[-1] if parts[-1].strip(".~") else "a local folder"
