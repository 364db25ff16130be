"""Every Triton kernel compiled for every target without a GPU, and what its machine code costs.

``python -m kernels.bench --compile`` writes the table ``compile.csv`` that the README of this
package shows; ``tests/bench/test_kernels_compile.py`` holds each row to its limits.

An op's Triton code runs on CPU tensors and its launches are kept. The launcher itself decides block
sizes, warps and which integers and pointers are multiples of 16, so what is compiled here is the
kernel that a GPU would get, not a copy of its settings.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.bench.results import COUNTED, Compiled
from kernels.ops.attention import AttentionInputs
from kernels.ops.attention import _triton as attention
from kernels.ops.coactivation._triton import coactivation_triton
from kernels.ops.gate._triton import gate_triton
from kernels.ops.gate.reference import GateInputs
from kernels.ops.project_topk._triton import project_topk_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300X
}
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\S*\s+.*?0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
WIDE_LOADS = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128")  # to registers, to shared memory
PROCESSES = 2  # at a time; each takes about 500 MB
ROOT = Path(__file__).parent.parent.parent
TENSOR_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
TOKENS = 65536
Run = Callable[[str], object]
# what PyTorch says of the GPUs that the targets stand for
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 4)}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, not executed."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]  # programs along each axis

    @property
    def name(self) -> str:
        """The kernel's name without what marks it as private."""
        return str(self.kernel.fn.__name__).strip("_").removesuffix("_kernel")

    def constants(self) -> dict[str, Any]:
        """Return the kernel's compile-time arguments and options by name."""
        names = [p.name for p in self.kernel.params]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


def record_launches(run: Callable[[], object], target: str) -> list[Launch]:
    """Call ``run`` with every launch of a Triton kernel kept instead of executed.

    Launchers ask PyTorch whether it is built for AMD; they are told what ``target`` means.
    """
    launches: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = {p.name: value for p, value in zip(kernel.params, args, strict=False)}
        size = grid({**bound, **kwargs}) if callable(grid) else grid
        launches.append(Launch(kernel, args, kwargs, tuple(size)))

    amd = TARGETS[target].backend == "hip"
    with (
        patch.object(JITFunction, "run", keep),
        patch.object(torch.version, "hip", "6" if amd else None),
    ):
        run()
    return launches


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a launch for a target of :data:`TARGETS`; needs no GPU."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    options = {**launch.kwargs, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, left = bind(*launch.args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, left
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=parsed.__dict__)


class UnexpectedCodeError(RuntimeError):
    """Machine code looks different from what the counting assumes."""


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    registers: int  # per thread (AMD: vector registers)
    stack: int  # bytes per thread; not 0 where registers spill or arrays are indexed
    shared: int  # bytes of shared memory per program, dynamic and static
    warps: int  # per program
    instructions: tuple[tuple[int, str], ...]  # address and text; empty for AMD
    spills: int  # loads from and stores to local memory (AMD: vector registers that spill)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """Count instructions by name with modifiers, predicates left out."""
        return Counter(PREDICATE.sub("", text).split()[0] for _, text in self.instructions)

    def count(self, prefix: str) -> int:
        """Count the instructions whose name starts with ``prefix``, ``"LDG.E.128"`` say."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))


def read_code(compiled: Any) -> Code:
    """Disassemble what :func:`compile_launch` returns."""
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if "cubin" not in compiled.asm:
        return _read_amd(compiled.asm["amdgcn"], warps, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _cuobjdump("-res-usage", "-sass", file.name)
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    instructions = [
        (int(match[1], 16), match[2])
        for match in map(INSTRUCTION.search, text.splitlines())
        if match
    ]
    code = Code(found["REG"], found["STACK"], shared, warps, tuple(_trimmed(instructions)), 0)
    spills = code.count("LDL") + code.count("STL")
    return Code(code.registers, code.stack, shared, warps, code.instructions, spills)


def loops(code: Code) -> list[tuple[int, int]]:
    """Return (first, last) address of every loop, outer before inner, in order of address.

    A loop is what a branch backwards encloses. Left out are waits on a barrier, which try again
    while the hardware works: a few instructions, or a way back from behind the kernel's exit.
    """
    found: dict[int, int] = {}
    addresses = [address for address, _ in code.instructions]
    for address, text in code.instructions:
        match = BRANCH.search(text)
        if not match:
            continue
        target = int(match[1], 16)
        body = [t for a, t in code.instructions if target <= a <= address]
        if target in addresses and target < address and not _is_wait(body):
            found[target] = max(address, found.get(target, 0))
    return sorted(found.items(), key=lambda loop: (loop[0], -loop[1]))


def executed(code: Code, trips: Sequence[int]) -> int:
    """Return how many instructions one warp executes, each loop as often as ``trips`` says.

    Both sides of a branch count, and so do instructions whose predicate is off: an upper bound.
    ``trips`` are rounds of each of :func:`loops`, in their order.

    Raises
    ------
    UnexpectedCodeError
        If the code has another number of loops, so that ``trips`` no longer describes it.
    """
    found = loops(code)
    if len(found) != len(trips):
        sizes = [sum(first <= a <= last for a, _ in code.instructions) for first, last in found]
        raise UnexpectedCodeError(
            f"The kernel has {len(found)} loops, of {sizes} instructions; rounds were given for "
            f"{len(trips)}. Look at the code and give the rounds of each."
        )
    total = 0
    for address, _ in code.instructions:
        rounds = 1
        for (first, last), trip in zip(found, trips, strict=True):
            rounds *= trip if first <= address <= last else 1
        total += rounds
    return total


def _is_wait(body: list[str]) -> bool:
    """Whether the instructions of a loop say that it only waits."""
    tries = any("TRYWAIT" in text for text in body) and len(body) <= 8
    return tries or any(text == "EXIT" for text in body)


def _trimmed(instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Leave out what pads the code: the branch to itself at its end, and no-ops."""
    return [
        (address, text)
        for address, text in instructions
        if not text.startswith("NOP")
        and not ((match := BRANCH.search(text)) and int(match[1], 16) == address)
    ]


def _cuobjdump(*arguments: str) -> str:
    result = subprocess.run(
        [str(CUOBJDUMP), *arguments], capture_output=True, text=True, check=True
    )
    return result.stdout + result.stderr


def _read_amd(text: str, warps: int, shared: int) -> Code:
    """Read the resources that the AMD compiler writes at the end of its assembly."""

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise UnexpectedCodeError(f"The AMD assembly does not say its {name}.")
        return int(match[1])

    return Code(
        registers=value("vgpr_count"),
        stack=value("private_segment_fixed_size"),
        shared=shared,
        warps=warps,
        instructions=(),
        # scalar registers spill into lanes of vector registers, not into memory
        spills=value("vgpr_spill_count"),
    )


@dataclass(frozen=True)
class Budget:
    """How many machine instructions the warps may execute for each token, on :data:`COUNTED`.

    ``trips`` and ``tokens`` are told the launch's compile-time arguments.
    """

    most: float
    trips: Callable[[dict[str, int]], Sequence[int]]  # rounds of each loop in the code
    tokens: Callable[[dict[str, int]], int]  # that one program serves


@dataclass(frozen=True)
class Case:
    """One kernel in one specialisation, and the limits that its code keeps on NVIDIA targets."""

    kernel: str  # which of the launches that ``run`` makes
    name: str  # what it is compiled for, as the table shows it
    run: Callable[[str], object]  # calls the op's Triton code on CPU tensors, for a target
    most_registers: int = 255  # per thread
    wide: int = 0  # least number of 16-byte loads
    tensor_cores: bool = False  # whether products must run on them
    budget: Budget | None = None  # on instructions per token


class CompileError(RuntimeError):
    """A kernel of the matrix could not be compiled."""


def measure(case: Case, target: str) -> Compiled:
    """Compile a case for a target and return the table's line."""
    launches = [
        launch
        for launch in record_launches(lambda: case.run(target), target)
        if launch.name == case.kernel
    ]
    if not launches:
        raise RuntimeError(f"{case.name} launches no kernel {case.kernel!r}.")
    code = read_code(compile_launch(launches[0], target))
    nvidia = bool(code.instructions)
    cost = None
    if case.budget and target == COUNTED:
        constants = launches[0].constants()
        total = executed(code, case.budget.trips(constants)) * code.warps
        cost = round(total / case.budget.tokens(constants), 1)
    return Compiled(
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


def measure_all() -> list[Compiled]:
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


def _rows(run: subprocess.CompletedProcess[str], target: str) -> list[Compiled]:
    if run.returncode:
        signalled = run.returncode < 0
        end = signal.Signals(-run.returncode).name if signalled else f"exit code {run.returncode}"
        raise CompileError(
            f"The process that compiles for {target} ended with {end}, after "
            f"{len(run.stdout.splitlines())} kernels. It printed:\n{run.stderr[-4000:]}"
        )
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


def measure_target(target: str) -> Iterator[Compiled]:
    """Compile every case for one target, in this process."""
    for case in cases():
        try:
            yield measure(case, target)
        except Exception as error:
            what = f"{case.kernel} ({case.name}) does not compile for {target}."
            raise CompileError(what) from error


def cases() -> list[Case]:
    """Return every kernel in the shapes that the limits speak of."""
    return [*_gate(), *_attention(), *_coactivation(), *_project_topk()]


def _gate() -> list[Case]:
    capture: dict[str, Any] = {"rows": True, "importance": True, "dtype": torch.float32}
    deepseek: dict[str, Any] = {
        "score_function": "sigmoid",
        "bias": True,
        "n_groups": 8,
        "top_groups": 4,
    }
    return [
        Case(
            "observe_tokens", "E=128, k=8, bf16, int64 ids", _gate_run(128, 8, importance=False),
            most_registers=128, wide=4, budget=_observe_budget(120, importance=False),
        ),
        Case(
            "observe_tokens", "the same with importance", _gate_run(128, 8, importance=True),
            most_registers=128, wide=4, budget=_observe_budget(200, importance=True),
        ),
        Case(
            "observe_tokens", "E=64, k=8, fp32, rows and segments of a capture",
            _gate_run(64, 8, **capture), most_registers=128, wide=4,
        ),
        Case(
            "select_tokens", "E=128, k=8, bf16, with importance",
            _gate_run(128, 8, select=True, importance=True), most_registers=128, wide=1,
        ),
        Case(
            "gate_rows", "select, E=256, k=8, sigmoid, bias, 8 groups",
            _gate_run(256, 8, select=True, importance=True, **deepseek), most_registers=128,
        ),
        Case(
            "gate_rows", "observe, E=60, k=4, rows and segments of a capture",
            _gate_run(60, 4, **capture), most_registers=128,
        ),
    ]  # fmt: skip


def _gate_run(
    n_experts: int,
    k: int,
    *,
    select: bool = False,
    rows: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **rule: Any,
) -> Run:
    def run(target: str) -> object:
        return gate_triton(
            GateInputs(
                n_tokens=TOKENS,
                n_experts=n_experts,
                top_k=k,
                logits=(torch.zeros((TOKENS, n_experts), dtype=dtype),),
                expert_ids=None if select else (torch.zeros((TOKENS, k), dtype=torch.int64),),
                weights=None if select else (torch.zeros((TOKENS, k), dtype=dtype),),
                selection_bias=(torch.zeros(n_experts),) if bias else None,
                rows=torch.arange(TOKENS) if rows else None,
                segments=torch.zeros(TOKENS, dtype=torch.int32) if rows else None,
                n_segments=8 if rows else 1,
                packed=True,
                **{"score_function": "softmax", **rule},
            )
        )

    return run


def _observe_budget(most: float, *, importance: bool) -> Budget:
    """Give the rounds: words of experts; blocks of columns and, in each, the one segment there."""

    def trips(constants: dict[str, int]) -> list[int]:
        words = [constants["EXPERTS"] // constants["WORD"]]
        return [*words, constants["EXPERTS"] // constants["COLUMNS"], 1] if importance else words

    return Budget(most, trips, tokens=lambda constants: constants["BLOCK"])


def _attention() -> list[Case]:
    bf16, float32 = torch.bfloat16, torch.float32
    options: dict[str, Any] = {"softcap": 30.0, "window": 512, "sinks": True, "packed": True}
    most: dict[str, Any] = {"tensor_cores": True, "wide": 4}
    return [
        Case("statistics", "bf16, D=128, causal", _attention_run(128, bf16), **most),
        Case("statistics", "bf16, D=128, every=8", _attention_run(128, bf16, every=8), **most),
        Case(
            "statistics", "bf16, D=64, softcap, window, packed",
            _attention_run(64, bf16, **options), **most,
        ),
        Case("statistics", "fp32, D=64, causal", _attention_run(64, float32), wide=4),
        Case("denominator", "bf16, D=128, causal", _attention_run(128, bf16, lse=False), **most),
        Case(
            "denominator", "bf16, D=64, softcap, window, packed, sinks",
            _attention_run(64, bf16, lse=False, **options), **most,
        ),
    ]  # fmt: skip


def _attention_run(
    size: int,
    dtype: torch.dtype,
    *,
    lse: bool = True,
    sinks: bool = False,
    packed: bool = False,
    **rule: Any,
) -> Run:
    n_tokens, heads = 8192, 4

    def run(target: str) -> object:
        with patch.object(attention, "capability", lambda device: CAPABILITIES[target]):
            return attention.attention_triton(
                AttentionInputs(
                    query=torch.zeros((1, heads, n_tokens, size), dtype=dtype),
                    key=torch.zeros((1, 1, n_tokens, size), dtype=dtype),
                    scaling=size**-0.5,
                    lse=torch.zeros((1, heads, n_tokens)) if lse else None,
                    sinks=torch.zeros(heads) if sinks else None,
                    valid=torch.ones((1, n_tokens), dtype=torch.int32) if packed else None,
                    **rule,
                )
            )

    return run


def _coactivation() -> list[Case]:
    byte = _coactivation_run(torch.uint8, 8, 128, 128)
    # a kernel without loops: every instruction once
    pack = Budget(20, trips=lambda constants: [], tokens=lambda constants: constants["BLOCK_T"])
    gram = Budget(
        60,
        trips=lambda constants: [-(-constants["tokens_per_program"] // constants["BLOCK_T"])],
        tokens=lambda constants: constants["tokens_per_program"],
    )
    wide_ids = _coactivation_run(torch.int64, 8, 512, 512)
    return [
        Case("pack", "uint8 ids, k=8, E=128", byte, most_registers=128, budget=pack),
        Case("pack", "int64 ids, k=8, E=512", wide_ids, most_registers=128, budget=pack),
        Case("gram", "E=128", byte, tensor_cores=True, budget=gram),
        Case("gram", "E=32 to 8", _coactivation_run(torch.uint8, 2, 32, 8), tensor_cores=True),
    ]


def _coactivation_run(dtype: torch.dtype, k: int, n_experts: int, n_next: int) -> Run:
    def run(target: str) -> object:
        ids = torch.zeros((2, TOKENS, k), dtype=dtype)
        return coactivation_triton(ids, ids, n_experts=n_experts, n_next_experts=n_next)

    return run


def _project_topk() -> list[Case]:
    return [
        Case(
            "project_topk", f"{name}, k={k}, E={n_experts}", _project_topk_run(dtype, k, n_experts),
            wide=16, tensor_cores=True,
        )
        for name, dtype, k, n_experts in [
            ("bf16", torch.bfloat16, 2, 8),
            ("bf16", torch.bfloat16, 8, 128),
            ("bf16", torch.bfloat16, 16, 512),
            ("fp32", torch.float32, 8, 128),
            ("fp32", torch.float32, 16, 512),
        ]
    ]  # fmt: skip


def _project_topk_run(dtype: torch.dtype, k: int, n_experts: int) -> Run:
    def run(target: str) -> object:
        return project_topk_triton(
            torch.zeros((64, 2048), dtype=dtype),
            torch.zeros((4, n_experts, 2048), dtype=dtype),
            top_k=k,
            bias=torch.zeros((4, n_experts)),
        )

    return run
