"""Every Triton kernel compiled for every target without a GPU, and what its machine code costs.

``python -m kernels.bench --compile`` writes the table in ``compile.csv`` that the README of this
package shows; ``tests/test_kernels_compile.py`` holds each row to its limits.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.bench import sass
from kernels.bench.launches import TARGETS, Launch, compile_launch, record_launches

TABLE = Path(__file__).parent / "compile.csv"
TOKENS = 65536


@dataclass(frozen=True)
class Budget:
    """How many machine instructions a warp may execute for each token.

    Attributes
    ----------
    most : float
        The limit, on sm_90.
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
    name : str
        Op and shape, as the table shows them.
    kernel : str
        Which of the launches that ``run`` makes, by the kernel's name.
    run : callable
        Calls the op's Triton code on CPU tensors.
    most_registers : int
        Limit per thread on NVIDIA targets.
    wide : str
        Prefix of the 16-byte loads that the code must hold; empty where none are promised.
    budget : Budget, optional
        Limit on instructions per token.
    """

    name: str
    kernel: str
    run: Callable[[], object]
    most_registers: int = 255
    wide: str = ""
    budget: Budget | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: a case on a target."""

    case: str
    kernel: str
    target: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int | None
    instructions: int | None
    per_token: float | None


def compiled(case: Case, target: str) -> tuple[sass.Code, Launch]:
    """Compile a case for a target and read its machine code."""
    launches = [
        launch for launch in record_launches(case.run, target) if launch.name == case.kernel
    ]
    if not launches:
        raise RuntimeError(f"{case.name} launches no kernel {case.kernel!r}.")
    return sass.read(compile_launch(launches[0], target)), launches[0]


def per_token(case: Case, code: sass.Code, launch: Launch) -> float | None:
    """Return the instructions that a warp executes for each token, None without a budget."""
    if case.budget is None or not code.instructions:
        return None
    constants = launch.constants()
    total = sass.executed(code, case.budget.trips(constants)) * code.warps
    return total / case.budget.tokens(constants)


def measure(case: Case, target: str) -> Row:
    """Return the table's line of a case on a target."""
    code, launch = compiled(case, target)
    nvidia = bool(code.instructions)
    cost = per_token(case, code, launch) if target == "sm_90" else None
    return Row(
        case=case.name,
        kernel=case.kernel,
        target=target,
        warps=code.warps,
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=code.shared,
        wide_loads=code.count("LDG.E.128") + code.count("LDGSTS.E.BYPASS.128") if nvidia else None,
        instructions=len(code.instructions) if nvidia else None,
        per_token=None if cost is None else round(cost, 1),
    )


def cases() -> list[Case]:
    """Return every kernel in the shapes that the limits speak of."""
    return [*_coactivation(), *_project_topk()]


def _coactivation() -> list[Case]:
    from kernels.coactivation._triton import coactivation_triton

    def run(dtype: torch.dtype, k: int, n_experts: int, n_next: int) -> Callable[[], object]:
        def launch() -> object:
            ids = torch.zeros((2, TOKENS, k), dtype=dtype)
            return coactivation_triton(ids, ids, n_experts=n_experts, n_next_experts=n_next)

        return launch

    # a kernel without loops: every instruction once
    pack = Budget(40, trips=lambda c: [], tokens=lambda c: c["BLOCK_T"])
    gram = Budget(60, trips=_gram_trips, tokens=lambda c: c["tokens_per_program"])
    return [
        Case("ids u8, k=8, E=128", "pack", run(torch.uint8, 8, 128, 128), 128, budget=pack),
        Case("ids i64, k=8, E=512", "pack", run(torch.int64, 8, 512, 512), 128, budget=pack),
        Case("E=128", "gram", run(torch.uint8, 8, 128, 128), budget=gram),
        Case("E=32 to 8", "gram", run(torch.uint8, 2, 32, 8)),
    ]


def _gram_trips(constants: dict[str, int]) -> list[int]:
    return [-(-constants["tokens_per_program"] // constants["BLOCK_T"])]


def _project_topk() -> list[Case]:
    from kernels.project_topk._triton import project_topk_triton

    def run(dtype: torch.dtype, k: int, n_experts: int) -> Callable[[], object]:
        def launch() -> object:
            hidden = torch.zeros((64, 2048), dtype=dtype)
            projections = torch.zeros((4, n_experts, 2048), dtype=dtype)
            return project_topk_triton(
                hidden, projections, top_k=k, bias=torch.zeros((4, n_experts))
            )

        return launch

    half, single = torch.bfloat16, torch.float32
    wide = "LDGSTS.E.BYPASS.128"
    return [
        Case("bf16, k=2, E=8", "project_topk", run(half, 2, 8), wide=wide),
        Case("bf16, k=8, E=128", "project_topk", run(half, 8, 128), wide=wide),
        Case("bf16, k=16, E=512", "project_topk", run(half, 16, 512), wide=wide),
        Case("bf16, k=16, E=1024", "project_topk", run(half, 16, 1024), wide=wide),
        Case("fp32, k=8, E=128", "project_topk", run(single, 8, 128), wide=wide),
        Case("fp32, k=16, E=512", "project_topk", run(single, 16, 512), wide=wide),
    ]


def write(rows: Sequence[Row], path: Path = TABLE) -> None:
    """Write the table as csv, empty where a target does not tell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Row.__dataclass_fields__)
        for row in rows:
            lines.writerow("" if value is None else value for value in vars(row).values())


def all_rows() -> list[Row]:
    """Compile everything: a minute or two on two cores."""
    return [measure(case, target) for case in cases() for target in TARGETS]
