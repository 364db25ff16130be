"""From a run file, or a saved view of it, to the report's HTML."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from explorer import service
from explorer.errors import ExplorerError, RunError
from explorer.report.document import document, section
from explorer.run import Run, open_run
from explorer.views import SavedView, changed

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIX = ".duckdb"
# what a report of a whole run shows: pages as they are called in addresses, with their choices,
# and what tells two of one page apart
RUN_PAGES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("overview", {}, ""),
    ("load-balance", {}, ""),
    ("load-balance", {"topic": "serving"}, "serving"),
    ("experts", {}, ""),
    ("tokens", {}, ""),
    ("attention", {}, ""),
    ("flow", {}, ""),
    ("clusters", {}, "tokens"),
    ("clusters", {"map": "prompts"}, "prompts"),
    ("clusters", {"map": "experts"}, "experts"),
)
_PRINT = (sys.executable, "-m", "explorer.pages.printing")
# a page takes a core for a second or two: reports wait for each other
_one_at_a_time = threading.Lock()


def build_report(path: str | Path, view: SavedView | None = None) -> str:
    """Return a report of a run, or of a saved view, as one HTML file.

    Parameters
    ----------
    path : path
        The run file. A view may name other runs too; they lie in the same folder.
    view : SavedView, optional
        Without it, the report is of the whole run.

    Raises
    ------
    ExplorerError
        If a page cannot be shown.
    capture.errors.StoreError
        If the file is no run.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise RunError(f"Expected a run file named NAME{SUFFIX}, got {path.name}. Rename it.")
    with open_run(path) as run:
        facts = _facts(run, view)
        title = f"Run {path.stem}"
    pages = [(page, {"run": path.stem} | choices, part) for page, choices, part in RUN_PAGES]
    if view is not None:
        title = view.name
        pages = [(view.page, dict(view.params), "")]
    printed = _print(path.absolute().parent, [(page, address) for page, address, _ in pages])
    sections = [
        (_title(page, part), section(blocks))
        for (page, _, part), blocks in zip(pages, printed, strict=True)
    ]
    return document(f"{title} · RouteScope", facts, sections)


def write_report(path: Path, out: Path, view: SavedView | None = None) -> Path:
    """Write a report as a new file; one that exists is never replaced."""
    service.refuse_if_read_only("Writing a report")
    if out.exists():
        raise ExplorerError(f"{out} exists already and is not overwritten. Choose another name.")
    report = build_report(path, view)
    return service.write_new(out, report.encode(), what="Writing a report")


def _title(page: str, part: str) -> str:
    name = page.replace("-", " ").capitalize()
    return f"{name}: {part}" if part else name


def _print(
    folder: Path, pages: Sequence[tuple[str, Mapping[str, str]]]
) -> list[list[dict[str, Any]]]:
    """Run pages in a process of their own and return what they show."""
    request = {"runs": str(folder), "pages": [[page, dict(address)] for page, address in pages]}
    with _one_at_a_time:
        done = subprocess.run(
            _PRINT, cwd=ROOT, input=json.dumps(request), capture_output=True, text=True
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExplorerError(f"The report could not be made: {last[:300]}")
    answer: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return answer


def _facts(run: Run, view: SavedView | None) -> dict[str, str]:
    """Say where the report's numbers are from."""
    info = run.info
    facts: dict[str, str] = {}
    if view is not None:
        saved = f"{view.name} ({view.created[:10]}{', ' + view.author if view.author else ''})"
        facts |= {"Saved view": saved, "Note": view.note}
        facts["Address"] = ", ".join(f"{name} = {value}" for name, value in view.params.items())
        if names := changed(view, run.path.parent):
            facts["Warning"] = f"Changed since the view was saved: {', '.join(names)}"
    facts |= {
        "Run file": f"{run.path.name}, {run.path.stat().st_size:,} bytes",
        "Fingerprint": run.fingerprint,
        "Model": f"{info['model']} ({info['architecture']}), revision {info['revision'] or '–'}",
        "Recorded": f"{info['started_at']:%Y-%m-%d %H:%M} UTC on {info['device']} in "
        f"{info['dtype']}, level {info['level']}",
        "Tokens": f"{info['n_tokens']:,} of {info['n_prompts']:,} prompts, {info['n_generated']:,} "
        "generated; padding excluded",
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
