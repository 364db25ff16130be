"""Slices: named sets of tokens of a run, kept beside it, that every page can be limited to.

The slices of ``demo.duckdb`` are the files in ``demo.slices``, one Parquet file each: a column of
token ids, and in the file's metadata the name, the note, the author and the run's fingerprint. A
slice file may come from a stranger, as a run may, so nothing in it is believed.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from capture.errors import first_line, quoted
from capture.store.files import is_own_file
from explorer import writing
from explorer.errors import ExplorerError, RunError
from explorer.run import Run

Ids = npt.NDArray[np.int64]

# a set of more tokens than this is more than a page can ask for quickly
MAX_TOKENS = 2_000_000
MAX_NAME, MAX_NOTE = 80, 2_000
_FACTS = b"routescope slice"
_FIELDS = ("name", "note", "author", "created", "fingerprint")


class SliceInfo(NamedTuple):
    """What a list of slices shows.

    Attributes
    ----------
    name, note, author : str
        As somebody typed them.
    created : str
        Time in UTC, ISO 8601.
    n_tokens : int
    problem : str
        Why it cannot be used, such as another recording under the run's name; "" = it can.
    """

    name: str
    note: str
    author: str
    created: str
    n_tokens: int
    problem: str


class Slice(NamedTuple):
    """A slice with its tokens.

    Attributes
    ----------
    info : SliceInfo
    token_ids : array [N]
        Sorted, each once.
    """

    info: SliceInfo
    token_ids: Ids


def save_slice(
    run: Run, name: str, token_ids: Sequence[int] | Ids, *, note: str = "", author: str = ""
) -> Slice:
    """Save tokens of a run under a name.

    Parameters
    ----------
    name : str
        New in this run.
    token_ids : sequence of int
        Of tokens of the run; for whole prompts see ``queries.overview.prompt_tokens``.

    Raises
    ------
    NotAllowedError
        Where the caller may not write.
    ExplorerError
        If the name is empty, too long or taken, or the tokens are none, too many or not of the
        run.
    """
    writing.refuse_if_read_only("Saving a slice")
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME or len(note) > MAX_NOTE:
        raise ExplorerError(
            f"A slice needs a name of 1 to {MAX_NAME} characters and a note of at most "
            f"{MAX_NOTE:,}, got {len(name)} and {len(note):,}. Change them."
        )
    path = _path(run, name)
    if path.exists():
        raise ExplorerError(f"There is a slice {quoted(name)} of this run. Choose another name.")
    ids = _checked(run, np.unique(np.asarray(token_ids, dtype=np.int64)))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = dict(zip(_FIELDS, (name, note, author, created, run.fingerprint), strict=True))
    table = pa.table({"token_id": pa.array(ids, pa.uint32())})
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_FACTS: json.dumps(facts).encode()}),
        buffer,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"token_id": "DELTA_BINARY_PACKED"},
    )
    writing.write_new(path, buffer.getvalue(), what="Saving a slice")
    return Slice(SliceInfo(name, note, author, created, len(ids), ""), ids)


def list_slices(run: Run) -> list[SliceInfo]:
    """Return the slices of a run, newest first; those that cannot be used say why."""
    infos = [_info(run, path) for path in writing.own_files(slices_folder(run.path), "*.parquet")]
    return sorted(infos, key=lambda info: (info.created, info.name), reverse=True)


def load_slice(run: Run, name: str) -> Slice:
    """Return a slice of a run.

    Raises
    ------
    ExplorerError
        If there is none of this name, its file is damaged, or it belongs to another recording.
    """
    path = _path(run, name)
    if not is_own_file(path):
        raise ExplorerError(f"There is no slice {quoted(name)} of this run. Choose another one.")
    info = _info(run, path)
    if info.problem:
        raise ExplorerError(info.problem)
    try:
        ids = _read(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ExplorerError(
            f"The slice {quoted(name)} is damaged ({first_line(error)}). Delete it."
        ) from error
    return Slice(info, ids)


def delete_slice(run: Run, name: str) -> None:
    """Remove a slice; one that is gone already is no error."""
    writing.remove(_path(run, name), what="Deleting a slice")


def content(path: Path) -> str:
    """Return a digest of the tokens of a slice file; name, note and time do not count.

    Raises
    ------
    ExplorerError
        If the file cannot be read, or is too large for a slice.
    """
    try:
        n_tokens = pq.read_metadata(path).num_rows
        if n_tokens > MAX_TOKENS:
            raise ValueError(f"it has {n_tokens:,} tokens")
        ids = _read(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ExplorerError(
            f"The slice file {path.name} is damaged ({first_line(error)})."
        ) from error
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def version(run: Run) -> int:
    """Return a number that changes when slices of the run are saved or deleted."""
    try:
        return slices_folder(run.path).stat().st_mtime_ns
    except OSError:
        return 0


def slice_path(run_path: Path, name: str) -> Path:
    """Return where the slice of a name is, given the run's file."""
    # the name is free text: the file's name is what is harmless of it, and a digest of all of it
    harmless = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()
    return slices_folder(run_path) / f"{harmless or 'slice'}-{digest}.parquet"


def slices_folder(run_path: Path) -> Path:
    """Return the folder of a run's slices, given the run's file; it need not exist."""
    return run_path.with_suffix(".slices")


def _path(run: Run, name: str) -> Path:
    return slice_path(run.path, name)


def _read(path: Path) -> Ids:
    """Return the token ids of a slice file, sorted, each once."""
    column = pq.read_table(path, columns=["token_id"])["token_id"]
    return np.unique(column.to_numpy().astype(np.int64))


def _checked(run: Run, ids: Ids) -> Ids:
    if not 0 < len(ids) <= MAX_TOKENS:
        raise ExplorerError(
            f"A slice holds 1 to {MAX_TOKENS:,} tokens, got {len(ids):,}. Choose others."
        )
    rows = run.query(
        "SELECT count(*) AS n FROM tokens WHERE token_id IN (SELECT unnest($ids::BIGINT[]))",
        {"ids": ids},
    )
    if int(rows["n"].iloc[0]) < len(ids):
        raise RunError(
            f"Expected tokens of {run.path.name}, but {len(ids) - int(rows['n'].iloc[0]):,} of "
            f"{len(ids):,} are not in it. Choose tokens of this run."
        )
    return ids


def _info(run: Run, path: Path) -> SliceInfo:
    """Return what a file says of itself, and what is wrong with it."""
    try:
        read = pq.read_metadata(path)
        facts = json.loads((read.metadata or {})[_FACTS])
        name, note, author, created, fingerprint = (str(facts[field]) for field in _FIELDS)
        n_tokens = int(read.num_rows)
        if _path(run, name) != path or not 0 < n_tokens <= MAX_TOKENS:
            raise ValueError("a slice has another name or another size")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        problem = (
            f"{path.name} is not a slice that can be read ({str(error)[:80]}). Delete the file."
        )
        return SliceInfo(path.stem, "", "", "", 0, problem)
    problem = ""
    if fingerprint != run.fingerprint:
        problem = (
            f"The slice {quoted(name)} belongs to another recording than {run.path.name} is now. "
            "Delete it, or choose it again from this one."
        )
    return SliceInfo(name, note, author, created, n_tokens, problem)
