"""Rows of measurements in ``results.csv``, and the table that the README makes of them."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results.csv"
COPY = "copy"  # the baseline whose bandwidth the others are a share of


@dataclass(frozen=True)
class Result:
    """Times of one function on one input; times in microseconds, bandwidth in GB/s.

    ``backend`` is a backend of the op or the name of a baseline. ``copy_share`` is the bandwidth
    as a share of that of a copy of equal bytes in the same run; bytes are those that the op has
    to move, also for baselines that move more.
    """

    op: str
    shape: str
    backend: str
    p20: float
    p50: float
    p80: float
    bytes: int
    bandwidth: float
    copy_share: float
    device: str
    versions: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a newer measurement replaces."""
        return self.op, self.shape, self.backend, self.device


def read(path: Path = RESULTS) -> list[Result]:
    """Return the rows of a file, none where there is no file."""
    if not path.exists():
        return []
    kinds = {f.name: f.type for f in fields(Result)}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Result(**{name: kinds[name](value) for name, value in row.items()})  # type: ignore[operator]
            for row in csv.DictReader(file)
        ]


def merge(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """Return all rows, newer ones in place of older ones of the same op, shape and device.

    A run replaces everything that an earlier one measured on the same input and device: rows of
    one input stay comparable.
    """
    rows = list(new)
    replaced = {(row.op, row.shape, row.device) for row in rows}
    kept = [row for row in old if (row.op, row.shape, row.device) not in replaced]
    return sorted([*kept, *rows], key=lambda row: (row.device, row.op, row.shape, row.p50))


def write(rows: Sequence[Result], path: Path = RESULTS) -> None:
    """Write the file anew."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(f.name for f in fields(Result))
        lines.writerows(astuple(row) for row in rows)


def markdown(rows: Sequence[Result]) -> str:
    """Return the rows as tables, one a device; ratios are of times in the same run."""
    parts = []
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device]
        dates = sorted({row.date for row in mine})
        versions = ", ".join(dict.fromkeys(row.versions for row in mine))
        parts.append(
            f"{device}; {versions}; {' and '.join(dict.fromkeys((dates[0], dates[-1])))}\n\n"
            "| op | shape | what ran | ms p20 | p50 | p80 | times torch | of copy |\n"
            "|---|---|---|---:|---:|---:|---:|---:|\n"
            + "\n".join(_line(row, _reference(row, mine)) for row in mine)
        )
    return "\n\n".join(parts)


def _reference(row: Result, rows: Sequence[Result]) -> Result | None:
    """Return the row of the plain reference on the same input."""
    same = [r for r in rows if (r.op, r.shape) == (row.op, row.shape) and r.backend == "torch"]
    return same[0] if same else None


def _line(row: Result, reference: Result | None) -> str:
    times = " | ".join(f"{value / 1e3:.3g}" for value in (row.p20, row.p50, row.p80))
    faster = "" if reference is None else f"{reference.p50 / row.p50:.2f}"
    return f"| {row.op} | {row.shape} | {row.backend} | {times} | {faster} | {row.copy_share:.3f} |"
