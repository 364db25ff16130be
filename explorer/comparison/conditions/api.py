"""Conditions on the texts of a run, kept in the run's comparison file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from capture.model.load import load_model, loading_bars
from explorer.comparison import keys
from explorer.comparison.api import compare, demo_run
from explorer.comparison.conditions.base import Condition, Subject
from explorer.comparison.conditions.catalogue import USUAL, make_conditions
from explorer.comparison.conditions.measure import measure, run_texts
from explorer.comparison.conditions.students import STUDENTS, measure_students
from explorer.comparison.file import open_comparison, write_comparison
from explorer.comparison.tables import CONDITION_TABLES
from explorer.comparison.texts import split_texts
from explorer.run import open_run

FOLDER = Path(__file__).resolve().parent

Records = dict[str, list[dict[str, Any]]]


def measure_conditions(
    run: str | Path = "demo",
    conditions: Sequence[str] = USUAL,
    *,
    students: Sequence[str] = STUDENTS,
    tokens: int = 50_000,
    fit_tokens: int = 20_000,
    seed: int = 0,
    model: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Measure conditions and distilled routers, and keep them in the run's comparison file.

    Parameters
    ----------
    run : str or Path
        A run file, or ``"demo"``.
    conditions : sequence of str
        Such as ``quantised(bits=4)``.
    students : sequence of str
        Routers that are distilled from the model's gate.
    tokens, fit_tokens : int
        Of the held-out split, on which losses are reported, and of the fit split.
    seed : int
        Draws the texts.
    model : str, optional
        Default: the model that the run was recorded from.
    progress : callable, optional
        Told what is measured next.

    Returns
    -------
    Path
        Of the comparison file; tables ``conditions``, ``flips``, ``flip_margins`` and
        ``students``. What it holds already, of the same code and options, is not measured again.
    """
    made = make_conditions(conditions)
    path = demo_run() if str(run) == "demo" else Path(run)
    settings: dict[str, Any] = {"tokens": tokens, "fit_tokens": fit_tokens, "seed": seed}
    progress("the model's own router")
    # one file with the routers that were compared on the same texts
    with compare(
        path, ["native"], live=True, replay=False, controls=False, latency=False, model=model,
        progress=False, **settings,
    ) as comparison:  # fmt: skip
        file, rows = comparison.path, comparison.records()
    wanted = {one.label: fingerprint(one) for one in made}
    known = {row["condition"]: row["fingerprint"] for row in rows["conditions"]}
    missing = [one for one in made if known.get(one.label) != wanted[one.label]]
    taught = {name: keys.fingerprint((name, code())) for name in students}
    learned = {row["student"]: row["fingerprint"] for row in rows["students"]}
    untaught = [name for name in students if learned.get(name) != taught[name]]
    if not missing and not untaught:
        return file
    with open_run(path) as opened:
        name = opened.info["model"] if model is None else model
        with loading_bars(shown=False):
            loaded = load_model(name)
        split = split_texts(opened, loaded, **settings)
    subject = Subject.of(loaded.model, split.fit.sequences)
    base = run_texts(subject, split.report.sequences) if missing else None
    for condition in missing:
        tables = measure(subject, split.report.sequences, [condition], base=base, progress=progress)
        found = {name: records(getattr(tables, name)) for name in tables._fields}
        for row in found["conditions"]:
            row["fingerprint"] = wanted.get(row["condition"], "")
        keep(file, found)
    if untaught:
        learners = measure_students(
            subject, split.report.sequences, untaught, seed=seed, fit_tokens=fit_tokens,
            progress=progress,
        )  # fmt: skip
        taught_rows = [
            {**row, "fingerprint": taught[row["student"]]} for row in records(learners.students)
        ]
        keep(file, {"students": taught_rows, "student_layers": records(learners.layers)})
    return file


def keep(file: Path, found: Records) -> None:
    """Put rows into a comparison file, in the place of the same conditions' or students' rows."""
    with open_comparison(file) as comparison:
        rows = comparison.records()
    for table, fresh in found.items():
        name = "student" if table.startswith("student") else "condition"
        labels = {row[name] for row in fresh}
        rows[table] = [row for row in rows[table] if row[name] not in labels] + fresh
    write_comparison(file, rows)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows, missing values as None: a file holds no NaN."""
    return [
        {str(k): None if isinstance(v, float) and v != v else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]


def read(file: Path) -> dict[str, pd.DataFrame]:
    """Return the tables about conditions of a comparison file."""
    with open_comparison(file) as comparison:
        return {name: comparison.rows(name) for name in CONDITION_TABLES}


def fingerprint(condition: Condition) -> str:
    """Return a short name for what a condition's rows depend on besides the file's own key."""
    options = json.dumps(vars(condition), sort_keys=True, default=str)
    return keys.fingerprint((condition.info.name, options, code()))


def code() -> str:
    """Return a short name for the code of the conditions."""
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.py"))]
    return keys.fingerprint(sources)
