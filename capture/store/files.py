"""Names of run files on disk: the partial file, and closing it without overwriting anything."""

import os
from pathlib import Path

from capture.errors import StoreError

SUFFIX = ".partial"


def partial_of(out: Path) -> Path:
    """Return the name under which OUT is written."""
    return out.with_name(out.name + SUFFIX)


def log_of(path: Path) -> Path:
    """Return the name of DuckDB's write-ahead log of a file."""
    return path.with_name(path.name + ".wal")


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
    one is more likely a slip of the pen.
    """
    check_free(out)
    if out.name.endswith(SUFFIX):
        raise StoreError(
            f"{out} would look like an unfinished capture. Choose a name without {SUFFIX}."
        )
    partial = partial_of(out)
    if os.path.lexists(partial):
        raise StoreError(
            f"{partial} is left from an unfinished capture. Close it with: "
            f"python -m capture recover '{partial}', or delete it."
        )
    _make_folder(out)


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
    partial = partial_of(out)
    partial.unlink(missing_ok=True)
    log_of(partial).unlink(missing_ok=True)


def publish(partial: Path, out: Path) -> None:
    """Give the closed partial file its name, or refuse when something has that name by now."""
    if log_of(partial).exists():
        # a file without its log lacks the last transactions
        raise StoreError(
            f"{partial} was not closed cleanly: {log_of(partial).name} is left. Close it with: "
            f"python -m capture recover '{partial}'"
        )
    try:
        try:
            # unlike a rename, a link never replaces what is there
            os.link(partial, out)
        except FileExistsError:
            raise
        except OSError:
            # no hard links on this file system: claim the name, then replace our own claim
            os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(partial, out)
        else:
            os.unlink(partial)
    except FileExistsError as error:
        raise StoreError(
            f"{out} appeared while the capture ran, and a run is never overwritten. The data is "
            f"in {partial}: move {out} away, then python -m capture recover '{partial}'."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{partial} could not be renamed to {out}: {error.strerror}. Rename it by hand."
        ) from error
