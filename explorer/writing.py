"""Everything the app writes goes through here, and is refused where writing is not allowed.

Hiding a button is not enough: a page, a callback or a new feature calls one of these functions,
or `refuse_if_read_only` first thing, and nothing else in the app writes. The command line calls
them too; nobody has configured a policy there, so that it may write.
"""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from capture.errors import CaptureError, quoted
from capture.paths import RUN_NAMES, RUN_SUFFIX, is_run_name
from capture.store import check_run, counts_only
from capture.store.files import is_own_file
from explorer import worker
from explorer.errors import ExplorerError, NotAllowedError
from explorer.worker import Job, uploads
from explorer.worker.requests import Request

Role = Literal["viewer", "editor"]
MAX_UPLOAD = 1_024  # MB; the server holds an upload in memory
_FILE_NAME = re.compile(r"(?!\.\.?\Z)[^/\\\0]{1,255}")
_CHUNK = 2**20


class Policy(NamedTuple):
    """Who may write.

    Attributes
    ----------
    read_only : bool
        Nobody, as ``--read-only`` says.
    role : callable
        Returns the role of whoever calls, asked for every write.
    """

    read_only: bool = False
    role: Callable[[], Role] = lambda: "editor"


_policy = Policy()


def configure(policy: Policy) -> None:
    """Set the policy of this process; the app does so before it draws anything."""
    global _policy
    _policy = policy


def is_read_only() -> bool:
    """Return whether the whole server writes nothing."""
    return _policy.read_only


def may_write() -> bool:
    """Return whether the caller may write; pages leave out what would be refused."""
    return not _policy.read_only and _policy.role() == "editor"


def refuse_if_read_only(what: str) -> None:
    """Refuse to go on where the caller may not write.

    Parameters
    ----------
    what : str
        What would be written, as in "Saving a view".

    Raises
    ------
    NotAllowedError
    """
    if _policy.read_only:
        raise NotAllowedError(
            f"{what} needs a server that may write, and this one was started with --read-only. "
            "Ask whoever started it, or open the runs in an app of your own."
        )
    if _policy.role() != "editor":
        raise NotAllowedError(
            f"{what} needs the role editor, and yours is viewer. Ask whoever runs this server to "
            "add you to its editors."
        )


def submit(request: Request) -> Job:
    """Hand a job that writes a file to the worker."""
    refuse_if_read_only("Recording or changing a run")
    return worker.shared_worker().submit(request)


def cancel(job_id: int) -> None:
    """Stop a job; others may be waiting for it, so that only those may who may start one."""
    refuse_if_read_only("Stopping a job")
    worker.shared_worker().cancel(job_id)


def write_new(path: Path, data: bytes, *, what: str) -> Path:
    """Write a new file whole or not at all; an existing one is never replaced.

    Raises
    ------
    NotAllowedError
    ExplorerError
        If there is such a file already, or the folder cannot be written.
    """
    refuse_if_read_only(what)
    try:
        path.parent.mkdir(exist_ok=True)
        return _write_new(path, data)
    except FileExistsError:
        raise ExplorerError(
            f"{path} exists already and is not overwritten. Choose another name, or delete it."
        ) from None
    except OSError as error:
        raise ExplorerError(
            f"{path} could not be written: {error.strerror}. Choose another place."
        ) from error


def _write_new(path: Path, data: bytes) -> Path:
    # beside the target, so that it gets its name in one step and is never seen half-written
    number, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.link(name, path)  # unlike a rename, a link never replaces what is there
    finally:
        os.unlink(name)
    return path


def write_json(path: Path, values: Mapping[str, Any], *, what: str) -> Path:
    """Write a new small file of settings, such as a saved view or a slice."""
    text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True)
    return write_new(path, text.encode(), what=what)


def rewrite_json(path: Path, values: Mapping[str, Any], *, what: str) -> Path:
    """Write a small file of settings in the place of the one that is there, in one step."""
    refuse_if_read_only(what)
    text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True)
    newer = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        newer.write_text(text, encoding="utf-8")
        os.replace(newer, path)
    except OSError as error:
        newer.unlink(missing_ok=True)
        raise ExplorerError(f"{path} could not be written: {error.strerror}.") from error
    return path


def move(path: Path, out: Path, *, what: str) -> Path:
    """Give a file or a folder another name in its folder; what has that name is never replaced."""
    refuse_if_read_only(what)
    try:
        if path.is_dir():
            if os.path.lexists(out):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            path.rename(out)
        else:
            os.link(path, out)  # unlike a rename, a link never replaces what is there
            path.unlink()
    except OSError as error:
        raise ExplorerError(
            f"{path.name} could not be renamed to {out.name}: {error.strerror}. Choose another "
            "name."
        ) from error
    return out


def remove(path: Path, *, what: str) -> None:
    """Remove a file that the app wrote, or an empty folder; one that is gone is no error."""
    refuse_if_read_only(what)
    try:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ExplorerError(f"{path} could not be removed: {error.strerror}.") from error


def keep_upload(folder: Path, name: str, data: IO[bytes]) -> Path:
    """Keep a run file that somebody uploaded, once it is found to be sound.

    Parameters
    ----------
    folder : Path
        The runs folder.
    name : str
        Of the new run, without ``.duckdb``.

    Raises
    ------
    NotAllowedError
    ExplorerError
        If no run can have this name or one has it already, or the file is too large or damaged.
    """
    refuse_if_read_only("Uploading a run")
    out = run_path(folder, name)
    folder.mkdir(exist_ok=True)
    # not listed among the runs until it has its name
    number, hidden = tempfile.mkstemp(prefix=".upload-", dir=folder)
    try:
        with os.fdopen(number, "wb") as file:
            _copy(data, file, int(MAX_UPLOAD * 10**6))
        check_run(hidden)
        os.chmod(hidden, 0o644)
        os.link(hidden, out)
    except CaptureError as error:
        raise ExplorerError(
            f"{name} was not kept. {str(error).replace(hidden, f'{name}{RUN_SUFFIX}')}"
        ) from None
    except OSError as error:
        raise ExplorerError(f"{name} could not be kept: {error.strerror}.") from error
    finally:
        os.unlink(hidden)
    return out


def read_trace(
    folder: Path, name: str | None, files: Sequence[tuple[str, IO[bytes]]], **options: Any
) -> dict[str, Any]:
    """Say what uploaded files of another program's trace hold, or keep them as a run.

    Parameters
    ----------
    folder : Path
        The runs folder.
    name : str or None
        Of the new run, without ``.duckdb``; None only looks.
    files : sequence of (name, file)
    **options
        Of ``capture.import_routing``.

    Returns
    -------
    dict
        From ``explorer.worker.uploads.read_trace``.

    Raises
    ------
    NotAllowedError
    ExplorerError
        If no run can have this name or one has it already, the files are too large, or no trace.
    """
    refuse_if_read_only("Importing a trace")
    out = None if name is None else run_path(folder, name)
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=folder) as hidden:
        paths, room = [], MAX_UPLOAD * 10**6
        for given, data in sorted(files, key=lambda one: one[0]):
            path = in_folder(Path(hidden), given)
            with path.open("xb") as file:
                _copy(data, file, room)
                room -= file.tell()
            paths.append(path)
        # the readers find what belongs together by its names
        several = [path for path in paths if path.name == "meta_info.json"] or paths
        made = None if out is None else Path(hidden) / out.name
        try:
            found = uploads.read_trace(several, made, **options)
            if made is not None and out is not None:
                check_run(made)
                os.link(made, out)
        except CaptureError as error:
            raise ExplorerError(str(error)) from None
        except OSError as error:
            raise ExplorerError(f"{name} could not be kept: {error.strerror}.") from error
    return found


def run_path(folder: Path, name: str) -> Path:
    """Return where a new run of a name goes.

    Raises
    ------
    ExplorerError
        If no run can have this name, or one has it already.
    """
    if not is_run_name(name):
        raise ExplorerError(f"{RUN_NAMES}, got {quoted(name)}. Rename it.")
    out = folder / f"{name}{RUN_SUFFIX}"
    if os.path.lexists(out):
        raise ExplorerError(
            f"There is a run named {name} already; runs are never overwritten. Choose another name."
        )
    return out


def in_folder(folder: Path, name: str) -> Path:
    """Return where the file of a name is in a folder, whether it exists or not.

    Names come from links and from files of strangers, so that they may try to lead elsewhere.

    Raises
    ------
    ExplorerError
        If the name leaves the folder, or is that of a link that does, of a pipe or of a device.
    """
    path = folder / name if _FILE_NAME.fullmatch(name) else None
    if path is None or path.parent != folder or (os.path.lexists(path) and not is_own_file(path)):
        raise ExplorerError(
            f"Expected the name of a file in {folder.name or folder}, got {quoted(name)}, which "
            "leads out of it or is not a file name. Choose one that is listed."
        )
    return path


def own_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder, by name, without links that lead out of it, pipes and devices.

    Parameters
    ----------
    folder : Path
        It need not exist.
    pattern : str
        As for ``Path.glob``.
    """
    return sorted(path for path in folder.glob(pattern) if is_own_file(path))


def run_file(folder: Path, name: str) -> Path:
    """Return the file of a run that is in the runs folder.

    Raises
    ------
    ExplorerError
        If the name leaves the folder, or there is no such run.
    """
    path = in_folder(folder, f"{name}{RUN_SUFFIX}")
    if not path.is_file():
        raise ExplorerError(f"The run {quoted(name)} was removed; choose another one.")
    return path


def _copy(data: IO[bytes], file: IO[bytes], most: int) -> None:
    """Copy an upload of at most so many bytes."""
    size = 0
    while chunk := data.read(_CHUNK):
        size += len(chunk)
        if size > most:
            raise ExplorerError(
                f"Uploads have at most {MAX_UPLOAD:,} MB. Put a run file into the runs folder "
                "instead; import a trace with python -m capture import."
            )
        file.write(chunk)


def export_counts(path: Path, out: Path) -> Path:
    """Write a run without its text and without anything per token, as a new file."""
    refuse_if_read_only("Exporting a run")
    return counts_only(path, out)
