"""A run with everything that lies beside it, renamed or deleted as one."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from capture.store.files import rows_folder
from explorer import saved_views, slices, worker, writing
from explorer.comparison import atlas_file, results_file
from explorer.errors import ExplorerError
from explorer.saved_views import SavedView


class RunFiles(NamedTuple):
    """What belongs to a run.

    Attributes
    ----------
    run : Path
    rows : list of Path
        Of a partitioned run, its files and folders of Parquet, those inside before what holds them.
    comparisons, atlases, slices : list of Path
        Files beside it that say nothing without it.
    views : list of SavedView
        Saved views that show it.
    """

    run: Path
    rows: list[Path]
    comparisons: list[Path]
    atlases: list[Path]
    slices: list[Path]
    views: list[SavedView]


def files_of(folder: Path, name: str) -> RunFiles:
    """Return what belongs to a run of the runs folder.

    Maps are not listed: they are kept in the user's cache by what was recorded, so that they are
    found again under another name, and forgotten when they are not used.

    Raises
    ------
    ExplorerError
        If there is no such run.
    """
    run = writing.run_file(folder, name)
    views, _ = saved_views.list_views(folder)
    rows = rows_folder(run)
    return RunFiles(
        run,
        [*sorted(rows.rglob("*"), reverse=True), rows] if _is_folder(rows) else [],
        results_file.comparisons_of(run),
        atlas_file.atlases_of(run),
        writing.own_files(slices.slices_folder(run), "*.parquet"),
        [view for view in views if name in saved_views.runs_named(view.params)],
    )


def rename_run(folder: Path, name: str, new: str) -> Path:
    """Give a run another name, and with it what lies beside it; saved views follow.

    Raises
    ------
    NotAllowedError
        Where the caller may not write.
    ExplorerError
        If no run can have the new name or one has it, or a job works on the run. Then everything
        is as it was.
    """
    writing.refuse_if_read_only("Renaming a run")
    files = files_of(folder, name)
    _refuse_in_use(files.run)
    out = writing.run_path(folder, new)
    old = slices.slices_folder(files.run)
    moves = [(files.run, out)]
    if files.rows:
        moves.append((rows_folder(files.run), rows_folder(out)))
    if files.slices:
        moves.append((old, slices.slices_folder(out)))
    for path in (*files.comparisons, *files.atlases):
        moves.append((path, path.with_name(new + path.name.removeprefix(name))))
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            writing.move(source, target, what="Renaming a run")
            done.append((source, target))
    except ExplorerError:
        for source, target in reversed(done):
            with suppress(ExplorerError):
                writing.move(target, source, what="Renaming a run")
        raise
    beside = {source.name: target.name for source, target in moves[1:]}
    for view in files.views:
        saved_views.follow(folder, view, name, new, beside)
    return out


def delete_run(folder: Path, name: str) -> None:
    """Delete a run and the comparisons, atlases and slices beside it; saved views stay and say so.

    Raises
    ------
    NotAllowedError
        Where the caller may not write.
    ExplorerError
        If there is no such run, or a job works on it.
    """
    writing.refuse_if_read_only("Deleting a run")
    files = files_of(folder, name)
    _refuse_in_use(files.run)
    # the run last: what is beside it is not found without it
    for path in (*files.comparisons, *files.atlases, *files.slices, *files.rows):
        writing.remove(path, what="Deleting a run")
    kept = slices.slices_folder(files.run)
    if _is_folder(kept) and not any(kept.iterdir()):
        writing.remove(kept, what="Deleting a run")
    writing.remove(files.run, what="Deleting a run")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _refuse_in_use(run: Path) -> None:
    """Refuse where a job reads the run, to write what lies beside it, or writes it."""
    for job in worker.shared_worker().jobs():
        if job.active and str(run) in (getattr(job.request, name, "") for name in ("run", "out")):
            raise ExplorerError(
                f"A job works on {run.stem} just now. Wait for its end, or stop it, and try again."
            )
