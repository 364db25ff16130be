"""What a model is called where others can read it: never the folders of a home."""

import os
import re

_CACHED = re.compile(r"models--(.+?)--(.+)")
_LOCAL = re.compile(r"[./~\\]|[A-Za-z]:[/\\]|.*\\|[^/]*/[^/]*/")


def model_name(model: str) -> str:
    """Return the name of a model: the last one of a folder, or the id of a hub as it is.

    Parameters
    ----------
    model : str
        As a run has it: ``demo``, ``org/name``, or the path of a folder.
    """
    text = model.rstrip("/\\")
    if not _LOCAL.match(text) and not (text and os.path.isdir(text)):
        return model
    parts = re.split(r"[/\\]", text)
    # a snapshot in the cache of a hub is named by a digest
    cached = [found for part in parts if (found := _CACHED.fullmatch(part))]
    if cached:
        return f"{cached[-1][1]}/{cached[-1][2]}"
    return parts[-1] if parts[-1].strip(".~") else "a local folder"
