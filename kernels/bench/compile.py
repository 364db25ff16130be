"""Every Triton kernel compiled for every target without a GPU, and what its machine code costs.

``python -m kernels.bench --compile`` writes the table ``compile.csv`` that the README of this
package shows; ``tests/test_kernels_compile.py`` holds each row to its limits.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from kernels.bench import sass
from kernels.bench.compile_table import COUNTED, Row
from kernels.bench.launches import TARGETS, compile_launch, record_launches

WIDE_LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128")  # to registers, to shared memory
TENSOR_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Budget:
    """How many machine instructions the warps may execute for each token, on :data:`COUNTED`.

    Attributes
    ----------
    most : float
        The limit.
    trips : callable
        From the launch's compile-time arguments to the rounds of each loop in the code.
    tokens : callable
        From the same to the tokens that one program serves.
    """

    most: float
    trips: Callable[[dict[str, int]], Sequence[int]]
    tokens: Callable[[dict[str, int]], int]


@dataclass(frozen=True)
class Case:
    """One kernel in one specialisation.

    Attributes
    ----------
    kernel : str
        Which of the launches that ``run`` makes, by the kernel's name.
    name : str
        What it is compiled for, as the table shows it.
    run : callable
        From the name of a target to anything; calls the op's Triton code on CPU tensors.
    most_registers : int
        Limit per thread on NVIDIA targets.
    wide : int
        How many 16-byte loads the code must at least hold on NVIDIA targets.
    tensor_cores : bool
        Whether products must run on tensor cores.
    budget : Budget, optional
        Limit on instructions per token.
    """

    kernel: str
    name: str
    run: Callable[[str], object]
    most_registers: int = 255
    wide: int = 0
    tensor_cores: bool = False
    budget: Budget | None = None


def measure(case: Case, target: str) -> Row:
    """Compile a case for a target and return the table's line."""
    launches = [
        launch
        for launch in record_launches(lambda: case.run(target), target)
        if launch.name == case.kernel
    ]
    if not launches:
        raise RuntimeError(f"{case.name} launches no kernel {case.kernel!r}.")
    code = sass.read(compile_launch(launches[0], target))
    nvidia = bool(code.instructions)
    cost = None
    if case.budget and target == COUNTED:
        constants = launches[0].constants()
        executed = sass.executed(code, case.budget.trips(constants)) * code.warps
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
    """Compile every case for every target, on all cores: a minute or two on two of them."""
    from kernels.bench.compile_cases import cases

    jobs = [(index, target) for index in range(len(cases())) for target in TARGETS]
    # new processes: a fork would inherit threads that PyTorch has started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=context) as pool:
        return list(pool.map(_measure_job, jobs))


def _measure_job(job: tuple[int, str]) -> Row:
    """Measure a case by its number: cases hold functions, which processes cannot exchange."""
    from kernels.bench.compile_cases import cases

    case, target = cases()[job[0]], job[1]
    try:
        return measure(case, target)
    except Exception as error:
        raise RuntimeError(f"{case.kernel} ({case.name}) does not compile for {target}") from error
