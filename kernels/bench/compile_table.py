"""The table of compiled kernels: its file and what the README shows of it."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).parent / "compile.csv"
COUNTED = "sm_90"  # the target whose instructions are counted


@dataclass(frozen=True)
class Row:
    """A line of the table: a case on a target; None where a target does not tell.

    ``per_token`` are the instructions that warps execute for each token.
    """

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int | None
    tensor_products: int | None
    stores: int | None
    instructions: int | None
    per_token: float | None


def write(rows: Sequence[Row], path: Path = TABLE) -> None:
    """Write the table as csv, empty where a target does not tell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(f.name for f in fields(Row))
        lines.writerows(astuple(row) for row in rows)


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """Return the table's lines as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the table of NVIDIA targets, a line a kernel and case, and of AMD's in one column."""
    lines = [
        "| kernel | compiled for | registers sm_80 / sm_90 / sm_100 | instructions in the code, "
        "sm_90 | per token | 16-byte loads | spills | gfx942 registers |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        mine = {
            row["target"]: row for row in rows if (row["kernel"], row["case"]) == (kernel, case)
        }
        counted = mine[COUNTED]
        registers = " / ".join(mine[target]["registers"] for target in ("sm_80", "sm_90", "sm_100"))
        spills = sum(int(row["spills"]) + int(row["stack"]) for row in mine.values())
        lines.append(
            f"| {kernel} | {case} | {registers} | {counted['instructions']} | "
            f"{counted['per_token']} | {counted['wide_loads']} | {spills} | "
            f"{mine['gfx942']['registers']} |"
        )
    return "\n".join(lines)
