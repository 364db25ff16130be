"""Run files on disk: their names, opening one as it is, and one clear error for what is not one.

Every name is taken once, and a file gets it whole or not at all.
"""

import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import duckdb

from capture.errors import StoreError, first_line

SUFFIX = ".partial"
# of files that are being made and have no name yet; no page lists them
_UNNAMED = ".new"
_UNNAMED_HOURS = 24.0  # after which one is left from a process that died
# of a DuckDB file without a table; the log beside it holds what was committed since
_HEADER_BYTES = 12_288
# statements on a file that may come from a stranger read no other file and no Python variable
SAFE = {
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
LOCKED = SAFE | {"enable_external_access": "false", "lock_configuration": "true"}
PARTITIONED = "partitioned"  # the note of a run whose rows lie beside its file
# what a system says when a write finds no room
_NO_ROOM = ("No space left", "File too large", "quota exceeded")
_log = logging.getLogger(__name__)


@contextmanager
def limited(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what the connection does when it takes longer.

    Raises
    ------
    duckdb.InterruptException
        Where the block was interrupted.
    """
    alarm = threading.Timer(seconds, connection.interrupt)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def partial_of(out: Path) -> Path:
    """Return the name under which OUT is written."""
    return out.with_name(out.name + SUFFIX)


def log_of(path: Path) -> Path:
    """Return the name of DuckDB's write-ahead log of a file."""
    return path.with_name(path.name + ".wal")


def is_own_file(path: Path) -> bool:
    """Return whether a path is a regular file of its folder.

    Folders, pipes and devices are not, nor is a link that leads out of the folder: whoever may put
    names into a folder may not choose with them what else is read.
    """
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            target = path.resolve(strict=True)
            return target.parent == path.parent.resolve() and target.is_file()
        return path.is_file()
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        return False


def check_free(out: Path) -> None:
    """Refuse an OUT that exists."""
    if os.path.isdir(out):  # unlike Path.is_dir, says no to a name that is too long
        raise StoreError(
            f"The run file must be a file name, but {out} is a folder. "
            f"Give a name in it: {out / 'run.duckdb'}."
        )
    if os.path.lexists(out):
        raise StoreError(
            f"{out} already exists, and a run is never overwritten. Choose another name, or "
            "delete it first."
        )


def check_new(out: Path) -> None:
    """Refuse an OUT that exists, has an unfinished capture, or has no folder to lie in.

    One missing folder is made, so that ``runs/first.duckdb`` works in a new checkout; more than
    one is more likely a slip.
    """
    check_free(out)
    if out.name.endswith(SUFFIX):
        raise StoreError(
            f"{out} would look like an unfinished capture. Choose a name without {SUFFIX}."
        )
    partial = partial_of(out)
    if os.path.lexists(partial):
        if not holds_nothing(partial):
            raise StoreError(
                f"{partial} is left from an unfinished capture. Close it with: "
                f"python -m capture recover '{partial}', or delete it."
            )
        _remove(partial)
        _log.warning("%s held nothing, and its name is used again.", partial)
    _make_folder(out)


def holds_nothing(partial: Path) -> bool:
    """Whether a capture was killed before the first transaction reached this file.

    Raises
    ------
    StoreError
        If another process is writing it, or it is not a file of DuckDB.
    """
    if not is_own_file(partial) or partial.stat().st_size > _HEADER_BYTES:
        return False
    log = log_of(partial)
    if log.exists() and log.stat().st_size:
        return False
    if partial.stat().st_size:
        connect(partial, read_only=True).close()
    return True


def _make_folder(out: Path) -> None:
    folder = out.parent
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        raise StoreError(
            f"The folder of {out} does not exist. Create it first: mkdir -p '{folder}'"
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder {folder} cannot be made: {error.strerror}. Choose another OUT."
        ) from None


def remove_partial(out: Path) -> None:
    """Remove the partial file of OUT, which holds nothing worth keeping."""
    _remove(partial_of(out))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    log_of(path).unlink(missing_ok=True)


@contextmanager
def unnamed(path: Path) -> Iterator[Path]:
    """Yield a hidden name of our own beside ``path``, and remove what is left there in the end.

    Two processes that make the same file do not meet before one of them gives its own the name
    (:func:`give_name`), and a name never belongs to a file that is not whole.
    """
    _forget_left_over(path)
    # a name may have 255 bytes
    fresh = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{_UNNAMED}")
    try:
        yield fresh
    finally:
        with suppress(OSError):
            _remove(fresh)


def _forget_left_over(path: Path) -> None:
    """Remove files that processes which died long ago left beside ``path``."""
    with suppress(OSError):
        for file in path.parent.glob(f".*{_UNNAMED}"):
            if time.time() - file.lstat().st_mtime > _UNNAMED_HOURS * 3600:
                _remove(file)


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """Yield a hidden name, and give the file that the block makes there the name OUT.

    Raises
    ------
    StoreError
        If OUT exists by then or cannot be written; nothing of ours is left.
    """
    with unnamed(out) as fresh:
        yield fresh
        try:
            give_name(fresh, out)
        except FileExistsError as error:
            raise StoreError(
                f"{out} appeared in the meantime, and a run is never overwritten. "
                "Choose another name."
            ) from error
        except OSError as error:
            raise StoreError(
                f"{out} could not be written: {error.strerror}. Choose another place."
            ) from error


def give_name(source: Path, name: Path) -> None:
    """Rename a file without ever replacing another one.

    Raises
    ------
    FileExistsError
        If there is something of that name; ``source`` stays.
    OSError
        If it cannot be renamed; there is nothing under the name, and ``source`` stays.
    """
    try:
        # unlike a rename, a link never replaces what is there
        os.link(source, name)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        # no hard links on this file system: claim the name, then replace our own claim
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(source, name)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
    else:
        os.unlink(source)


def publish(partial: Path, out: Path) -> None:
    """Give the closed partial file its name, or refuse when something has that name by now."""
    if log_of(partial).exists():
        # a file without its log lacks the last transactions
        raise StoreError(
            f"{partial} was not closed cleanly: {log_of(partial).name} is left. Close it with: "
            f"python -m capture recover '{partial}'"
        )
    try:
        give_name(partial, out)
    except FileExistsError as error:
        raise StoreError(
            f"{out} appeared while the capture ran, and a run is never overwritten. The data is "
            f"in {partial}: move {out} away, then python -m capture recover '{partial}'."
        ) from error
    except FileNotFoundError as error:
        raise StoreError(
            f"{partial} vanished before it could be named {out}: something else moved or removed "
            "it, and the run is where it was moved to. There is no run of this name."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{partial} is closed and whole, but could not be renamed to {out}: {error.strerror}. "
            f"Then: python -m capture recover '{partial}'."
        ) from error


def check_file(path: Path) -> None:
    """Refuse a path with no file."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise StoreError(
            f"A run file was expected at {path}, which is {found}. Record one with: "
            "python -m capture MODEL --prompts FILE --out RUN"
        )


def connect(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB file itself, to write it or to look at its version."""
    check_file(path)
    try:
        return duckdb.connect(str(path), read_only=read_only, config=dict(LOCKED))
    except duckdb.Error as error:
        raise cannot_open(path, error) from error


def cannot_open(path: Path, error: duckdb.Error) -> StoreError:
    """Make the error for what DuckDB says when it cannot open a file."""
    if "different configuration" in str(error) or "already attached" in str(error):
        return StoreError(
            f"{path} is open in this process with other settings. Close that connection first."
        )
    if "Could not set lock" in str(error):
        return StoreError(
            f"{path} is being written by another process. Wait until its capture ends."
        )
    if any(words in str(error) for words in _NO_ROOM):
        return StoreError(
            f"{path} could not be opened: {first_line(error)}. Free disk space; nothing in it is "
            "lost."
        )
    return not_a_run(path, error)


def not_a_run(path: Path, reason: Exception | str) -> StoreError:
    """Make the error for a file that is not a run file."""
    return StoreError(
        f"A run file was expected at {path}, but it is not one ({first_line(reason)}). "
        "Record one with: python -m capture MODEL --prompts FILE --out RUN"
    )


def rows_folder(path: Path) -> Path:
    """Return where the rows of a partitioned run lie: beside its file, under its name."""
    return path.with_suffix(".parquet")


def is_partitioned(notes: str) -> bool:
    """Whether a run says in its notes that its rows lie in Parquet files beside it."""
    try:
        said = json.loads(notes)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get(PARTITIONED) is True


class Identity(NamedTuple):
    """What changes when a file does."""

    path: str
    size: int
    changed: int
    altered: int
    inode: int
    device: int


def identity(path: Path) -> Identity:
    """Return what tells a file from another one, and from itself after a change."""
    status = os.stat(path)
    return Identity(
        str(path.absolute()),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    )
