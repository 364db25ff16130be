"""Measuring a problem: refused unless it is correct, then timed in turns with its baselines.

In turns, so that ratios of times are of one run.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.bench.cases import Problem
from kernels.bench.results import COPY, Measurement

FLUSH_BYTES = 2**28  # more than the second-level cache of any GPU we know
SLEEP_CYCLES = 10**6  # about half a millisecond: the host queues the call while the GPU sleeps


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
