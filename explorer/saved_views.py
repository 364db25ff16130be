"""Saved views: a page as somebody saw it, with a name and a note, kept beside the runs.

A view is one JSON file in ``views/`` of the runs folder, and is opened by a link that names it. It
remembers what the files behind it were (runs, slice, comparison), so that whoever opens it is told
when they changed since. View files may come from a stranger, as runs may, so nothing in them is
believed.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from capture.errors import quoted
from capture.store.files import is_own_file
from explorer import slices, writing
from explorer.errors import ExplorerError

SCHEMA_VERSION = 1
FOLDER = "views"
MAX_NAME, MAX_NOTE, MAX_AUTHOR = 80, 2_000, 120
_MAX_FILE = 200_000  # bytes; a longer file is not a view
_MAX_VALUE = 16_000  # characters of one value of an address
_MAX_PAIRS = 1_000
_PAGE = re.compile(r"[a-z0-9-]{1,40}")
_ID = re.compile(r"[0-9a-f]{10}")
# of a run, or of a comparison file: names never lead out of the runs folder
_FILE = re.compile(r"[^/\\\0]{1,200}")
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
    contents : dict
        Of ``slice`` and ``comparison``, those that the address names -> what was in their files.
        Views that were saved before this was kept have none.
    """

    view_id: str
    name: str
    note: str
    author: str
    page: str
    params: dict[str, str]
    fingerprints: dict[str, str]
    created: str
    contents: dict[str, str] = field(default_factory=dict)
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
        If the name is empty, a text is too long, or the address names what cannot be a file.
    """
    writing.refuse_if_read_only("Saving a view")
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
        contents={name: digest(path) for name, path in _beside(folder, params) if path.is_file()},
    )
    try:
        _checked(view.view_id, asdict(view))
    except ValueError as error:
        raise ExplorerError(
            f"This view cannot be kept: {error}. Choose less on the page."
        ) from None
    writing.write_json(_path(folder, view.view_id), asdict(view), what="Saving a view")
    return view


def load_view(folder: Path, view_id: str) -> SavedView:
    """Return a view.

    Raises
    ------
    ExplorerError
        If there is no such view, or its file is damaged.
    """
    if not _ID.fullmatch(view_id) or not is_own_file(_path(folder, view_id)):
        raise ExplorerError(
            f"There is no saved view {quoted(view_id)} here: it was deleted, or belongs to another "
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
    for path in writing.own_files(folder / FOLDER, "*.json"):
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
        raise ExplorerError(f"Expected the id of a saved view, got {quoted(view_id)}.")
    writing.remove(_path(folder, view_id), what="Deleting a view")


def follow(
    folder: Path, view: SavedView, old: str, new: str, files: Mapping[str, str]
) -> SavedView:
    """Let a view go on showing a run that was renamed.

    Parameters
    ----------
    old, new : str
        Names of the run.
    files : mapping
        Old to new names of the files beside it, such as its comparisons.
    """
    params = dict(view.params)
    for name in ("run", "against"):
        if params.get(name) == old:
            params[name] = new
    if params.get("runs"):
        params["runs"] = join(new if name == old else name for name in split(params["runs"]))
    if params.get("comparison") in files:
        params["comparison"] = files[params["comparison"]]
    known = {(new if name == old else name): was for name, was in view.fingerprints.items()}
    renamed = replace(view, params=params, fingerprints=known)
    path = _path(folder, view.view_id)
    writing.rewrite_json(path, asdict(renamed), what="Changing a view")
    return renamed


def digest(path: Path) -> str:
    """Return what a file behind a view is: of a slice its tokens, else its fingerprint."""
    return slices.content(path) if path.suffix == ".parquet" else fingerprint(path)


def changed(view: SavedView, folder: Path, *, digest: Callable[[Path], str] = digest) -> list[str]:
    """Return the runs, the slice and the comparison of a view that are not what they were.

    Parameters
    ----------
    folder : Path
        The runs folder.
    digest : callable
        As :func:`digest`, which it may remember.

    Returns
    -------
    list of str
        Their names, such as ``demo``, ``the slice rare`` or ``step_10 (gone)``.
    """
    known = [(run, folder / f"{run}.duckdb", was) for run, was in view.fingerprints.items()]
    for name, path in _beside(folder, view.params):
        if name in view.contents:
            known.append((f"the {name} {view.params[name]}", path, view.contents[name]))
    found = []
    for title, path, was in known:
        try:
            if not path.is_file():
                found.append(f"{title} (gone)")
            elif digest(path) != was:
                found.append(title)
        except ExplorerError:
            found.append(title)
    return found


def runs_named(params: Mapping[str, str]) -> list[str]:
    """Return the runs whose names an address holds, each once."""
    names = [params.get("run", ""), params.get("against", ""), *split(params.get("runs", ""))]
    return list(dict.fromkeys(name for name in names if name))


def join(names: Iterable[str]) -> str:
    """Write names as one value of an address; a comma alone means none."""
    return ",".join(n.replace("%", "%25").replace(",", "%2C") for n in names) or ","


def split(value: str) -> list[str]:
    """Return the names of a value of an address, each once; the inverse of :func:`join`."""
    return list(dict.fromkeys(unquote(name) for name in value.split(",") if name))


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


def _beside(folder: Path, params: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Yield the slice and the comparison that an address names, with their files."""
    if params.get("slice") and params.get("run"):
        run = writing.in_folder(folder, f"{params['run']}.duckdb")
        yield "slice", slices.slice_path(run, params["slice"])
    if params.get("comparison"):
        yield "comparison", writing.in_folder(folder, params["comparison"])


def _checked(view_id: str, values: Any) -> SavedView:
    """Return the view that a file holds, or raise ValueError."""
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"it is of another version than {SCHEMA_VERSION}")
    texts = {"name": MAX_NAME, "note": MAX_NOTE, "author": MAX_AUTHOR, "page": 40, "created": 40}
    for name, limit in texts.items():
        if not isinstance(values[name], str) or len(values[name]) > limit:
            raise ValueError(f"its {name} is not a text of at most {limit} characters")
    if not _PAGE.fullmatch(values["page"]):
        raise ValueError("its page is not the name of a page")
    values = {"contents": {}} | values
    for name in ("params", "fingerprints", "contents"):
        pairs = values[name]
        if not isinstance(pairs, dict) or len(pairs) > _MAX_PAIRS:
            raise ValueError(f"its {name} are not a list of names and values")
        if any(not isinstance(v, str) or len(v) > _MAX_VALUE for v in pairs.values()):
            raise ValueError(f"its {name} hold something else than short texts")
    params = values["params"]
    files = [*values["fingerprints"], *runs_named(params), params.get("comparison") or "none"]
    if not all(_FILE.fullmatch(name) for name in files):
        raise ValueError("it names a run or a comparison that no file can be called")
    given = {name: values[name] for name in (*texts, "params", "fingerprints", "contents")}
    return SavedView(view_id=view_id, **given)
