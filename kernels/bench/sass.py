"""Machine code of compiled kernels: registers, spills, loads, and instructions with loops."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\S*\s+.*?0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")


class UnexpectedCodeError(RuntimeError):
    """Machine code looks different from what the counting assumes."""


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Attributes
    ----------
    registers : int
        Registers per thread (AMD: vector registers).
    stack : int
        Bytes of stack per thread; not 0 where registers spill or arrays are indexed.
    shared : int
        Bytes of shared memory per program, dynamic and static.
    warps : int
        Warps per program.
    instructions : tuple of (address, text)
        In order; empty where only resources are known (AMD).
    spills : int
        Loads from and stores to local memory (AMD: vector registers that spill).
    """

    registers: int
    stack: int
    shared: int
    warps: int
    instructions: tuple[tuple[int, str], ...]
    spills: int

    def opcodes(self) -> Counter[str]:
        """Count instructions by name with modifiers, predicates left out."""
        return Counter(PREDICATE.sub("", text).split()[0] for _, text in self.instructions)

    def count(self, prefix: str) -> int:
        """Count the instructions whose name starts with ``prefix``, ``"LDG.E.128"`` say."""
        return sum(n for name, n in self.opcodes().items() if name.startswith(prefix))


def read(compiled: Any) -> Code:
    """Disassemble what :func:`kernels.bench.launches.compile_launch` returns."""
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

    Parameters
    ----------
    code : Code
        Of an NVIDIA target.
    trips : sequence of int
        Rounds of each loop of :func:`loops`, in its order.

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
