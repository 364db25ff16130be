"""From a run file, or a saved view of it, to the report's HTML."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from capture.paths import RUN_SUFFIX, model_name
from explorer import writing
from explorer.errors import ExplorerError, RunError
from explorer.report.document import document, section
from explorer.run import Run, open_run
from explorer.saved_views import SavedView, changed, fingerprint, runs_named
from explorer.text import counted

ROOT = Path(__file__).resolve().parent.parent.parent
# what a report of a whole run shows: pages as they are called in addresses, with their choices,
# and what tells two of one page apart
RUN_PAGES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("overview", {}, ""),
    ("load-balance", {}, ""),
    ("load-balance", {"topic": "serving"}, "serving"),
    ("load-balance", {"topic": "memory"}, "memory"),
    ("experts", {}, ""),
    ("tokens", {}, ""),
    ("attention", {}, ""),
    ("flow", {}, ""),
    ("clusters", {}, "tokens"),
    ("clusters", {"map": "prompts"}, "prompts"),
    ("clusters", {"map": "experts"}, "experts"),
)
_PRINT = (sys.executable, "-m", "explorer.ui.printing")
# a page takes a core for a second or two: reports wait for each other
_one_at_a_time = threading.Lock()


class Report(NamedTuple):
    """A report.

    Attributes
    ----------
    text : str
        The HTML file.
    failed : dict
        Title of each section that could not be made whole -> why.
    """

    text: str
    failed: dict[str, str]


def build_report(path: str | Path, view: SavedView | None = None) -> str:
    """Return the text of ``make_report``."""
    return make_report(path, view).text


def make_report(path: str | Path, view: SavedView | None = None) -> Report:
    """Make a report of a run, or of a saved view, as one HTML file.

    A section that fails is named in the report, which holds the others.

    Parameters
    ----------
    path : path
        The run file; that of the view, if there is one, which may name other runs of the same
        folder too.
    view : SavedView, optional
        Without it, the report is of the whole run.

    Raises
    ------
    ExplorerError
        If no page can be shown, or the view is of another run, or of one that is gone.
    capture.errors.StoreError
        If the file is not a run file.
    """
    path = Path(path)
    if path.suffix != RUN_SUFFIX:
        raise RunError(f"Expected a run file named NAME{RUN_SUFFIX}, got {path.name}. Rename it.")
    pages = [(page, {"run": path.stem} | choices, part) for page, choices, part in RUN_PAGES]
    if view is not None:
        _check_runs(path, view)
        pages = [(view.page, {"run": path.stem} | view.params, "")]
    with open_run(path) as run:
        facts = _facts(run, view)
        title = view.name if view is not None else f"Run {path.stem}"
    printed = _print(path.absolute().parent, [(page, address) for page, address, _ in pages])
    failed = {
        _title(page, part): shown["problem"]
        for (page, _, part), shown in zip(pages, printed, strict=True)
        if shown["problem"]
    }
    if len(failed) == len(pages):
        page, why = next(iter(failed.items()))
        raise ExplorerError(f"The report could not be made: the section {page} failed: {why}")
    sections = [
        (_title(page, part), section([*_problem(shown["problem"]), *shown["blocks"]]))
        for (page, _, part), shown in zip(pages, printed, strict=True)
    ]
    if view is not None:
        facts |= _address(view, printed[0]["address"])
    return Report(document(f"{title} · RouteScope", facts, sections, failed=failed), failed)


def write_report(path: Path, out: Path, view: SavedView | None = None) -> Report:
    """Write a report as a new file; one that exists is never replaced."""
    writing.refuse_if_read_only("Writing a report")
    if out.exists():
        raise ExplorerError(f"{out} exists already and is not overwritten. Choose another name.")
    report = make_report(path, view)
    writing.write_new(out, report.text.encode(), what="Writing a report")
    return report


def _check_runs(path: Path, view: SavedView) -> None:
    """Refuse a view whose figures would be of another run than the report says."""
    run = view.params.get("run") or next(iter(view.fingerprints), path.stem)
    if run != path.stem:
        raise ExplorerError(
            f"The view “{view.name}” is of the run {run}, not of {path.stem}. Make the report of "
            f"{run}{RUN_SUFFIX}."
        )
    folder = path.absolute().parent
    shown = runs_named(view.params)
    gone = [name for name in shown if not (folder / f"{name}{RUN_SUFFIX}").is_file()]
    if gone:
        raise ExplorerError(
            f"The view “{view.name}” shows runs that are gone: {', '.join(gone)}. Put them back "
            "beside the run, or save the view again without them."
        )


def _problem(why: str) -> list[Mapping[str, Any]]:
    """Return what stands above a section that failed."""
    if not why:
        return []
    return [{"kind": "failure", "text": f"This section could not be made whole. {why}"}]


def _address(view: SavedView, shown: Mapping[str, str]) -> dict[str, str]:
    """Say what the page showed, and what of the view it could not."""
    names = list(dict.fromkeys([*view.params, *shown]))
    facts = {"Address": ", ".join(f"{name} = {shown[name]}" for name in names if name in shown)}
    lost = [f"{n} = {v}" for n, v in view.params.items() if v and shown.get(n) != v]
    if lost:
        facts["Not as saved"] = f"The page could not show {', '.join(lost)}."
    return facts


def _title(page: str, part: str) -> str:
    name = page.replace("-", " ").capitalize()
    return f"{name}: {part}" if part else name


def _print(folder: Path, pages: Sequence[tuple[str, Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Return what pages show; where printing all of them ends in nothing, one after the other."""
    try:
        return _printed(folder, pages)
    except ExplorerError as error:
        if len(pages) == 1:
            return [{"blocks": [], "address": {}, "problem": str(error)}]
    return [shown for page in pages for shown in _print(folder, [page])]


def _printed(folder: Path, pages: Sequence[tuple[str, Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Run pages in a process of their own and return what they show."""
    request = {"runs": str(folder), "pages": [[page, dict(address)] for page, address in pages]}
    with _one_at_a_time:
        done = subprocess.run(
            _PRINT, cwd=ROOT, input=json.dumps(request), capture_output=True, text=True
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExplorerError(f"The process that draws it ended: {last[:200]}")
    answer: list[dict[str, Any]] = json.loads(done.stdout)
    return answer


def _facts(run: Run, view: SavedView | None) -> dict[str, str]:
    """Say where the report's numbers are from."""
    info = run.info
    facts: dict[str, str] = {}
    if view is not None:
        saved = f"{view.name} ({view.created[:10]}{', ' + view.author if view.author else ''})"
        facts |= {"Saved view": saved, "Note": view.note}
        if others := [name for name in runs_named(view.params) if name != run.path.stem]:
            facts["Other runs"] = ", ".join(
                f"{name} (fingerprint {fingerprint(run.path.parent / f'{name}{RUN_SUFFIX}')})"
                for name in others
            )
        if names := changed(view, run.path.parent):
            facts["Warning"] = f"Changed since the view was saved: {', '.join(names)}"
    facts |= {
        "Run file": f"{run.path.name}, {run.path.stat().st_size:,} bytes",
        "Fingerprint": run.fingerprint,
        "Model": f"{model_name(info['model'])} ({info['architecture']}), revision "
        f"{info['revision'] or '–'}",
        "Recorded": f"{info['started_at']:%Y-%m-%d %H:%M} UTC on {info['device']} in "
        f"{info['dtype']}, level {info['level']}",
        "Tokens": f"{info['n_tokens']:,}, from counts over top k"
        if run.sums_only
        else f"{info['n_tokens']:,} of {counted(info['n_prompts'], 'prompt')}, "
        f"{info['n_generated']:,} generated; padding excluded",
        "Complete": "yes" if info["complete"] else "no: the capture was stopped or killed",
        "Packages": _listed(info["packages"]),
        "Report made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by RouteScope, schema "
        f"{info['schema_version']}",
    }
    return {name: value for name, value in facts.items() if value}


def _listed(text: str) -> str:
    """Return a JSON object of the run on one line; the run may come from a stranger."""
    try:
        values = json.loads(text)
    except ValueError:
        return text
    if not isinstance(values, dict):
        return text
    return ", ".join(f"{name} {value}" for name, value in values.items())
