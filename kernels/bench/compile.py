"""Every Triton kernel compiled for every target without a GPU, and what its machine code costs.

``python -m kernels.bench --compile`` writes the table ``compile.csv`` that the README of this
package shows; ``tests/bench/test_kernels_compile.py`` holds each row to its limits.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels.bench import machine_code
from kernels.bench.compile_cases import Case, cases
from kernels.bench.compile_table import COUNTED, Row
from kernels.bench.machine_code import TARGETS, compile_launch, record_launches

WIDE_LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128")  # to registers, to shared memory
PROCESSES = 2  # at a time; each takes about 500 MB
ROOT = Path(__file__).parent.parent.parent
TENSOR_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


class CompileError(RuntimeError):
    """A kernel of the matrix could not be compiled."""


def measure(case: Case, target: str) -> Row:
    """Compile a case for a target and return the table's line."""
    launches = [
        launch
        for launch in record_launches(lambda: case.run(target), target)
        if launch.name == case.kernel
    ]
    if not launches:
        raise RuntimeError(f"{case.name} launches no kernel {case.kernel!r}.")
    code = machine_code.read(compile_launch(launches[0], target))
    nvidia = bool(code.instructions)
    cost = None
    if case.budget and target == COUNTED:
        constants = launches[0].constants()
        executed = machine_code.executed(code, case.budget.trips(constants)) * code.warps
        cost = round(executed / case.budget.tokens(constants), 1)
    return Row(
        kernel=case.kernel,
        case=case.name,
        target=target,
        warps=code.warps,
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=code.shared,
        wide_loads=sum(map(code.count, WIDE_LOADS)) if nvidia else None,
        tensor_products=sum(map(code.count, TENSOR_PRODUCTS)) if nvidia else None,
        stores=sum(map(code.count, ("STG", "RED", "ATOMG"))) if nvidia else None,
        instructions=len(code.instructions) if nvidia else None,
        per_token=cost,
    )


def measure_all() -> list[Row]:
    """Compile every case for every target: a minute or two on two cores.

    Each target has a Python process of its own, two at a time. The compiler is native code: where
    it crashes, or the system ends it for its memory, that is an error with a name and not the end
    of the caller. A process that a signal ended gets one more try, alone.

    Raises
    ------
    CompileError
        If a kernel does not compile; says which, for what, and what the process printed.
    """
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as threads:
        runs = dict(zip(TARGETS, threads.map(_run_target, TARGETS), strict=True))
    for target in [target for target, run in runs.items() if run.returncode < 0]:
        runs[target] = _run_target(target)
    rows = [_rows(run, target) for target, run in runs.items()]
    return [row for same_case in zip(*rows, strict=True) for row in same_case]


def _run_target(target: str) -> subprocess.CompletedProcess[str]:
    """Measure every case for one target in a new process, which prints a row a line."""
    command = [sys.executable, "-X", "faulthandler", "-m", "kernels.bench", "--compile-for", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _rows(run: subprocess.CompletedProcess[str], target: str) -> list[Row]:
    if run.returncode:
        signalled = run.returncode < 0
        end = signal.Signals(-run.returncode).name if signalled else f"exit code {run.returncode}"
        raise CompileError(
            f"The process that compiles for {target} ended with {end}, after "
            f"{len(run.stdout.splitlines())} kernels. It printed:\n{run.stderr[-4000:]}"
        )
    return [Row(**json.loads(line)) for line in run.stdout.splitlines()]


def measure_target(target: str) -> Iterator[Row]:
    """Compile every case for one target, in this process."""
    for case in cases():
        try:
            yield measure(case, target)
        except Exception as error:
            what = f"{case.kernel} ({case.name}) does not compile for {target}."
            raise CompileError(what) from error
