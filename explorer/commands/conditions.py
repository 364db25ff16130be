"""The command ``python -m explorer conditions``; imports no torch before it runs."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from explorer.commands.compare import Output
from explorer.comparison.conditions import USUAL

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = """\
examples:
  python -m explorer conditions demo
      precision, quantisation, pruning, low rank and merging, and distilled routers
  python -m explorer conditions runs/mine.duckdb --conditions "quantised(bits=4), merge(keep=0.5)"
  python -m explorer conditions demo --conditions "precision(parts='router+experts')" --json
"""
CELLS = {
    ("condition", "condition"): "own",
    ("condition", "base"): "own weights, base routing",
    ("base", "condition"): "base weights, own routing",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``conditions``."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("run", metavar="RUN", help="a run file, or demo")
    add("--conditions", metavar="A,B", help="names, with arguments: quantised(bits=4); or none")
    add("--students", metavar="A,B", help="routers to distil from the model's gate; or none")
    add("--tokens", type=int, default=50_000, metavar="N", help="to report on (default: 50000)")
    add("--fit-tokens", type=int, default=20_000, metavar="N", help="to learn on (default: 20000)")
    add("--model", metavar="MODEL", help="default: the model that the run was recorded from")
    add("--json", action="store_true", help="print all tables as JSON")
    add("--quiet", action="store_true", help="do not say what is measured")


def run(options: argparse.Namespace) -> Output:
    """Measure, and return what is to be printed."""
    from explorer.comparison.conditions.catalogue import make_conditions
    from explorer.comparison.conditions.distilled_routers import STUDENTS
    from explorer.comparison.conditions.effects import measure_conditions, read
    from explorer.comparison.router_names import split_routers

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


def as_text(tables: "dict[str, pd.DataFrame]") -> str:
    """Return the tables for a terminal."""
    parts = []
    cells = tables["conditions"]
    if len(cells):
        shown = cells[cells["condition"] != "base"].copy()
        shown["cell"] = [
            CELLS[w, r] for w, r in zip(shown["weights"], shown["routing"], strict=True)
        ]
        columns = ["condition", "cell", "loss_change", "loss_se", "weight_bytes_ratio", "method"]
        parts.append(_text(shown[columns]))
    flips = tables["flips"]
    if len(flips):
        whole = flips[flips["layer"] == -1]
        columns = ["condition", "set_flips", "top1_flips", "slot_flips", "margin_auc"]
        parts.append("Share of tokens with a changed set in any layer\n" + _text(whole[columns]))
    if len(tables["students"]):
        columns = ["student", "kl", "agreement", "exact_set", "chance", "loss_change", "loss_se"]
        parts.append(_text(tables["students"][columns]))
    return "\n\n".join(parts)


def _text(table: "pd.DataFrame") -> str:
    text: str = table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4f}")
    return text
