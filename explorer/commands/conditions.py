"""``python -m explorer conditions``: what fewer bits, experts or weights cost, as text or JSON."""

import argparse
import json
import sys
from typing import Any

import pandas as pd

from explorer.commands import Output
from explorer.commands.compare import plain_table
from explorer.comparison.conditions import USUAL
from explorer.comparison.conditions.catalogue import make_conditions
from explorer.comparison.conditions.distilled_routers import STUDENTS
from explorer.comparison.conditions.effects import measure_conditions, read
from explorer.router_cards import split_routers

CELLS = {
    ("condition", "condition"): "own",
    ("condition", "base"): "own weights, base routing",
    ("base", "condition"): "base weights, own routing",
}


def run(options: argparse.Namespace) -> Output:
    """Measure, and return what is to be printed."""

    def chosen(text: str | None, usual: tuple[str, ...]) -> list[str]:
        if text is None:
            return list(usual)
        return [] if text.strip() == "none" else split_routers(text)

    def say(what: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"{what}\n")

    conditions = chosen(options.conditions, USUAL)
    students = chosen(options.students, STUDENTS if options.conditions is None else ())
    labels = {one.label for one in make_conditions(conditions)}
    file = measure_conditions(
        options.run,
        conditions,
        students=students,
        tokens=options.tokens,
        fit_tokens=options.fit_tokens,
        model=options.model,
        progress=say,
    )
    tables = read(file)
    for name, table in tables.items():
        about = "student" if name.startswith("student") else "condition"
        wanted = set(students) if about == "student" else {*labels, "base"}
        tables[name] = table[table[about].isin(wanted)]
    if options.json:
        found: dict[str, Any] = {"file": str(file)}
        for name, table in tables.items():
            found[name] = json.loads(table.to_json(orient="records"))
        return Output(json.dumps(found, indent=1))
    return Output(f"{as_text(tables)}\n\n{file}")


def as_text(tables: dict[str, pd.DataFrame]) -> str:
    """Return the tables for a terminal."""
    parts = []
    cells = tables["conditions"]
    if len(cells):
        shown = cells[cells["condition"] != "base"].copy()
        shown["cell"] = [
            CELLS[w, r] for w, r in zip(shown["weights"], shown["routing"], strict=True)
        ]
        columns = ["condition", "cell", "loss_change", "loss_se", "weight_bytes_ratio", "method"]
        parts.append(plain_table(shown[columns]))
    flips = tables["flips"]
    if len(flips):
        whole = flips[flips["layer"] == -1]
        columns = ["condition", "set_flips", "top1_flips", "slot_flips", "margin_auc"]
        title = "Share of tokens with a changed set in any layer"
        parts.append(f"{title}\n{plain_table(whole[columns])}")
    if len(tables["students"]):
        columns = ["student", "kl", "agreement", "exact_set", "chance", "loss_change", "loss_se"]
        parts.append(plain_table(tables["students"][columns]))
    return "\n\n".join(parts)
