"""Measurements of problems: taken, kept in files, and shown in the README.

A problem is refused unless it is correct, then timed in turns with its baselines, so that ratios
of times are of one run.
"""

import csv
import hashlib
import importlib.metadata
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.bench.cases import Problem

RESULTS = Path(__file__).parent / "results.csv"
COMPILED = Path(__file__).parent / "compile.csv"
COMPILED_FROM = COMPILED.with_suffix(".sha256")  # what the table was made from
README = Path(__file__).parent.parent / "README.md"
COPY = "copy"  # the baseline whose bandwidth the others are a share of
COUNTED = "sm_90"  # the target whose instructions are counted
FLUSH_BYTES = 2**28  # more than the second-level cache of any GPU we know
SLEEP_CYCLES = 10**6  # about half a millisecond: the host queues the call while the GPU sleeps


@dataclass(frozen=True)
class Measurement:
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


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target; None where a target does not tell.

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


class Times(NamedTuple):
    """Quantiles of a function's times, in seconds."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Times:
    """Return the 20th, 50th and 80th percentile, between neighbours by their distance."""
    values = torch.tensor(sorted(samples), dtype=torch.float64)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*values.quantile(points).tolist())


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Times]:
    """Time each function ``repeats`` times, one after the other, after two calls unmeasured.

    On CUDA a time is what the device needs, from event to event, with a second-level cache that
    holds nothing of the inputs; the host's part is hidden behind a device that sleeps first. On a
    CPU it is the processor time of all threads together, which other work on the machine changes
    little; caches hold what they hold.
    """
    measure = _cuda_timer() if device.type == "cuda" else _processor_time
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(2):
        for function in functions.values():
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            samples[name].append(measure(function))
    return {name: quantiles(values) for name, values in samples.items()}


def _processor_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _cuda_timer() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(function: Callable[[], object]) -> float:
        before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        flush.zero_()
        before.record()
        function()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    return measure


def measure(problem: Problem, device: torch.device, repeats: int) -> list[Measurement]:
    """Return a row for each backend and baseline of a problem.

    Raises
    ------
    BenchError
        If a backend disagrees with the reference; nothing is timed then.
    """
    problem.refuse_what_disagrees()
    n_bytes = problem.n_bytes()
    # a copy reads half of the bytes and writes the other half
    source = torch.ones(max(1, n_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions = {**problem.timed(), COPY: lambda: target.copy_(source)}
    times = time_in_turns(functions, device, repeats)
    date = datetime.now(UTC).date().isoformat()
    return [
        Measurement(
            op=problem.op,
            shape=problem.shape,
            backend=name,
            p20=round(found.p20 * 1e6, 2),
            p50=round(found.p50 * 1e6, 2),
            p80=round(found.p80 * 1e6, 2),
            bytes=n_bytes,
            bandwidth=round(n_bytes / found.p50 / 1e9, 2),
            copy_share=round(times[COPY].p50 / found.p50, 4),
            device=device_name(device),
            versions=versions(),
            date=date,
        )
        for name, found in times.items()
    ]


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Return the versions of what the times depend on."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "numba"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _processor() -> str:
    """Return the processor's name where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read(path: Path = RESULTS) -> list[Measurement]:
    """Return the rows of a file, none where there is no file."""
    if not path.exists():
        return []
    kinds = {f.name: f.type for f in fields(Measurement)}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Measurement(**{name: kinds[name](value) for name, value in row.items()})  # type: ignore[operator]
            for row in csv.DictReader(file)
        ]


def merge(old: Iterable[Measurement], new: Iterable[Measurement]) -> list[Measurement]:
    """Return all rows, newer ones in place of older ones of the same op, shape and device.

    A run replaces everything that an earlier one measured on the same input and device: rows of
    one input stay comparable.
    """
    rows = list(new)
    replaced = {(row.op, row.shape, row.device) for row in rows}
    kept = [row for row in old if (row.op, row.shape, row.device) not in replaced]
    return sorted([*kept, *rows], key=lambda row: (row.device, row.op, row.shape, row.p50))


def write(rows: Sequence[Measurement | Compiled], path: Path) -> None:
    """Write a file anew; empty is what is not known."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(f.name for f in fields(rows[0]))
        lines.writerows(astuple(row) for row in rows)


def markdown(rows: Sequence[Measurement]) -> str:
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


def _reference(row: Measurement, rows: Sequence[Measurement]) -> Measurement | None:
    """Return the row of the plain reference on the same input."""
    same = [r for r in rows if (r.op, r.shape) == (row.op, row.shape) and r.backend == "torch"]
    return same[0] if same else None


def _line(row: Measurement, reference: Measurement | None) -> str:
    times = " | ".join(f"{value / 1e3:.3g}" for value in (row.p20, row.p50, row.p80))
    faster = "" if reference is None else f"{reference.p50 / row.p50:.2f}"
    return f"| {row.op} | {row.shape} | {row.backend} | {times} | {faster} | {row.copy_share:.3f} |"


def read_compiled(path: Path = COMPILED) -> list[dict[str, str]]:
    """Return the lines of a file of compiled kernels, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fingerprint(table: Path = COMPILED) -> str:
    """Return the SHA-256 of all that a table of compiled kernels follows from, and of the table.

    That is the code of the ops, of what measures them, and the version of Triton, which brings its
    compilers along. Equal to :data:`COMPILED_FROM`, there is nothing to be compiled again.
    """
    package = COMPILED.parent.parent
    sources = [*sorted((package / "ops").rglob("*.py")), COMPILED.with_suffix(".py")]
    found = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in (*sources, table):
        found.update(path.read_bytes())
    return found.hexdigest()


def write_compiled(rows: Sequence[Compiled]) -> None:
    """Write the table anew, and beside it what it was made from."""
    write(rows, COMPILED)
    COMPILED_FROM.write_text(f"{fingerprint()}\n", encoding="utf-8")


def compiled_markdown(rows: Sequence[dict[str, str]]) -> str:
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


def section(text: str, part: str) -> str:
    """Return what stands between the marks of a part."""
    match = re.search(rf"<!-- {part} -->\n(.*?)\n?<!-- end -->", text, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"{README} has no part {part!r} between <!-- {part} --> and <!-- end -->.")
    return match[1]


def with_section(text: str, part: str, content: str) -> str:
    """Return the text with the part replaced."""
    section(text, part)
    pattern = rf"(<!-- {part} -->\n).*?(<!-- end -->)"
    return re.sub(
        pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL, count=1
    )


def update_readme() -> None:
    """Write both tables into the README from their files."""
    text = README.read_text(encoding="utf-8")
    text = with_section(text, "results", markdown(read()))
    text = with_section(text, "compile", compiled_markdown(read_compiled()))
    README.write_text(text, encoding="utf-8")
