"""Saved views: a page as somebody saw it, with a name and a note, kept beside the runs.

A view is one JSON file in ``views/`` of the runs folder, and is opened by a link that names it. It
remembers what the run files were, so that whoever opens it is told when they changed since. View
files may come from a stranger, as runs may, so nothing in them is believed.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from explorer import service
from explorer.errors import ExplorerError

SCHEMA_VERSION = 1
FOLDER = "views"
MAX_NAME, MAX_NOTE, MAX_AUTHOR = 80, 2_000, 120
_MAX_FILE = 200_000  # bytes; a longer file is no view
_MAX_VALUE = 4_000  # characters of one value of an address
_ID = re.compile(r"[0-9a-f]{10}")
_RUN = re.compile(r"[^/\\\0]{1,200}")
# parts of a run file that its fingerprint reads: a run is written once, and DuckDB's first block
# changes with every change of the file
_PARTS, _PART_BYTES = 64, 2**16


@dataclass(frozen=True, slots=True)
class SavedView:
    """A page as somebody saw it.

    Attributes
    ----------
    view_id : str
        Ten hexadecimal digits, as in ``?view=ID``.
    name, note, author : str
        As somebody typed them.
    page : str
        The page's name in its address, such as ``load-balance``.
    params : dict
        The address: run, filters, and what was chosen on the page.
    fingerprints : dict
        Name of each run of the view -> what its file was.
    created : str
        Time in UTC, ISO 8601.
    """

    view_id: str
    name: str
    note: str
    author: str
    page: str
    params: dict[str, str]
    fingerprints: dict[str, str]
    created: str
    schema_version: int = field(default=SCHEMA_VERSION)


def save_view(
    folder: Path,
    name: str,
    *,
    page: str,
    params: Mapping[str, str],
    runs: Mapping[str, Path],
    note: str = "",
    author: str = "",
) -> SavedView:
    """Keep a view.

    Parameters
    ----------
    folder : Path
        The runs folder.
    runs : mapping
        Name of each run that the view shows -> its file.

    Raises
    ------
    NotAllowedError
        Where the caller may not write.
    ExplorerError
        If the name is empty, or a text is too long.
    """
    service.refuse_if_read_only("Saving a view")
    name, note, author = name.strip(), note.strip(), author.strip()
    if not 0 < len(name) <= MAX_NAME or len(note) > MAX_NOTE or len(author) > MAX_AUTHOR:
        raise ExplorerError(
            f"A view needs a name of 1 to {MAX_NAME} characters, a note of at most {MAX_NOTE:,} "
            f"and an author of at most {MAX_AUTHOR}, got {len(name)}, {len(note):,} and "
            f"{len(author)}. Change them."
        )
    view = SavedView(
        view_id=secrets.token_hex(5),
        name=name,
        note=note,
        author=author,
        page=page,
        params=dict(params),
        fingerprints={run: fingerprint(path) for run, path in runs.items()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    service.write_json(_path(folder, view.view_id), asdict(view), what="Saving a view")
    return view


def load_view(folder: Path, view_id: str) -> SavedView:
    """Return a view.

    Raises
    ------
    ExplorerError
        If there is no such view, or its file is damaged.
    """
    if not _ID.fullmatch(view_id) or not _path(folder, view_id).is_file():
        raise ExplorerError(
            f"There is no saved view {view_id[:40]!r} here: it was deleted, or belongs to another "
            "runs folder. The Share page lists the views there are."
        )
    path = _path(folder, view_id)
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ValueError("it is too large")
        return _checked(view_id, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExplorerError(
            f"The saved view {view_id} cannot be read ({str(error)[:100]}). Delete it."
        ) from None


def list_views(folder: Path) -> tuple[list[SavedView], list[str]]:
    """Return the views of a runs folder, newest first, and the ids of files that are damaged."""
    views, damaged = [], []
    for path in sorted((folder / FOLDER).glob("*.json")):
        if not _ID.fullmatch(path.stem):
            continue
        try:
            views.append(load_view(folder, path.stem))
        except ExplorerError:
            damaged.append(path.stem)
    return sorted(views, key=lambda view: (view.created, view.view_id), reverse=True), damaged


def delete_view(folder: Path, view_id: str) -> None:
    """Remove a view; one that is gone already is no error."""
    if not _ID.fullmatch(view_id):
        raise ExplorerError(f"Expected the id of a saved view, got {view_id[:40]!r}.")
    service.remove(_path(folder, view_id), what="Deleting a view")


def changed_runs(view: SavedView, runs: Mapping[str, Path]) -> list[str]:
    """Return the runs of a view whose files are not what they were when it was saved.

    Parameters
    ----------
    runs : mapping
        Name of each run there is -> its file; a run that is missing has changed.
    """
    return [
        run
        for run, known in view.fingerprints.items()
        if run not in runs or not runs[run].is_file() or fingerprint(runs[run]) != known
    ]


def fingerprint(path: Path) -> str:
    """Return a digest of a run file: its size, and parts from all over it.

    Reads at most 4 MB, so that it takes milliseconds for a run of any size.

    Raises
    ------
    ExplorerError
        If the file cannot be read.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        last = max(0, size - _PART_BYTES)
        with path.open("rb") as file:
            for start in sorted({last * part // (_PARTS - 1) for part in range(_PARTS)}):
                file.seek(start)
                digest.update(file.read(_PART_BYTES))
    except OSError as error:
        raise ExplorerError(f"{path.name} cannot be read: {error.strerror}.") from None
    return digest.hexdigest()


def _path(folder: Path, view_id: str) -> Path:
    return folder / FOLDER / f"{view_id}.json"


def _checked(view_id: str, values: Any) -> SavedView:
    """Return the view that a file holds, or raise ValueError."""
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"it is of another version than {SCHEMA_VERSION}")
    texts = {"name": MAX_NAME, "note": MAX_NOTE, "author": MAX_AUTHOR, "page": 40, "created": 40}
    for name, limit in texts.items():
        if not isinstance(values[name], str) or len(values[name]) > limit:
            raise ValueError(f"its {name} is no text of at most {limit} characters")
    for name in ("params", "fingerprints"):
        pairs = values[name]
        if not isinstance(pairs, dict) or len(pairs) > 100:
            raise ValueError(f"its {name} are no list of names and values")
        if any(not isinstance(v, str) or len(v) > _MAX_VALUE for v in pairs.values()):
            raise ValueError(f"its {name} hold something else than short texts")
    if not all(_RUN.fullmatch(run) for run in values["fingerprints"]):
        raise ValueError("it names a run that cannot be one")
    given = {name: values[name] for name in (*texts, "params", "fingerprints")}
    return SavedView(view_id=view_id, **given)
