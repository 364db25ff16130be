"""Measuring a problem: refused unless it is correct, then timed in turns with its baselines."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from kernels.bench.problems import Problem
from kernels.bench.results import COPY, Result
from kernels.bench.timing import time_in_turns


def measure(problem: Problem, device: torch.device, repeats: int) -> list[Result]:
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
        Result(
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
