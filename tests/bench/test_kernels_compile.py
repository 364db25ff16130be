"""Every Triton kernel compiled for every target without a GPU, held to its limits."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed (tests/requirements.txt)")

from kernels.bench import compile as matrix
from kernels.bench import results
from kernels.bench.compile import TARGETS, cases

CASES = cases()
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]


def name(case):
    return f"{case.kernel}-{case.name}"


def read(line):
    """Return a line of the table as the measurement that it was."""
    texts = ("kernel", "case", "target")
    numbers = {name: float(value) if value else None for name, value in line.items()
               if name not in texts}  # fmt: skip
    return results.Compiled(**{name: line[name] for name in texts}, **numbers)


ROWS = list(map(read, results.read_compiled()))


def broken_limits(row, case):
    """Yield which of its limits a kernel breaks for a target, and how."""
    limits = {"registers that spill, or an array in memory": row.stack == 0 == row.spills}
    if row.target in NVIDIA:
        limits |= {
            f"{row.registers} registers of {case.most_registers}": (
                row.registers <= case.most_registers
            ),
            "code that computes nothing": row.stores > 0 and row.instructions > 50,
            # a layout or a stride is not what makes wide loads
            f"{row.wide_loads} wide loads of {case.wide}": row.wide_loads >= case.wide,
            "tensor cores where none belong, or none": (
                (row.tensor_products > 0) == case.tensor_cores
            ),
        }
    if case.budget and row.target == results.COUNTED:
        limits[f"{row.per_token} instructions a token"] = 0 < row.per_token <= case.budget.most
    for said, kept in limits.items():
        if not kept:
            yield f"{name(case)} for {row.target}: {said}"


def test_every_kernel_keeps_its_limits_on_every_target():
    rows = {(row.kernel, row.case, row.target): row for row in ROWS}
    assert list(rows) == [(case.kernel, case.name, target) for case in CASES for target in TARGETS]
    found = [
        said
        for case in CASES
        for target in TARGETS
        for said in broken_limits(rows[case.kernel, case.name, target], case)
    ]
    assert found == []


def test_the_table_is_what_the_compiler_gives():
    """Compiling all takes a minute, so the table says what it was made from; one is compiled."""
    assert results.COMPILED_FROM.read_text().strip() == results.fingerprint(), (
        "A kernel, Triton or the table was changed: run `python -m kernels.bench --compile`."
    )
    case = next(case for case in CASES if case.budget)
    assert matrix.measure(case, results.COUNTED) in ROWS


def test_whatever_the_table_follows_from_changes_its_fingerprint(monkeypatch, tmp_path):
    """The kernels' code, what measures it, the rows and the compiler, each on its own."""
    package = tmp_path / "kernels"
    shutil.copytree(results.COMPILED.parent.parent, package)
    table = package / "bench" / "compile.csv"
    monkeypatch.setattr(results, "COMPILED", table)
    seen = {results.fingerprint(table)}
    for name in ("ops/gate/_triton.py", "bench/compile.py", "bench/compile.csv"):
        with (package / name).open("a") as file:
            file.write("\n")
        seen.add(results.fingerprint(table))
    monkeypatch.setattr(results.importlib.metadata, "version", lambda name: "0")
    assert len(seen | {results.fingerprint(table)}) == 5


def stand_in(monkeypatch, tmp_path, code):
    """Have another interpreter compile: one that does what `code` says."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable} -Xfaulthandler\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_each_target_is_compiled_by_its_process(monkeypatch, tmp_path):
    printed = json.dumps({t: [vars(row) for row in ROWS if row.target == t] for t in TARGETS})
    code = f"import json, sys\nfor row in json.loads({printed!r})[sys.argv[-1]]:"
    stand_in(monkeypatch, tmp_path, f"{code} print(json.dumps(row))")
    assert matrix.measure_all() == ROWS


def test_a_broken_limit_is_said():
    case = next(case for case in CASES if case.wide and case.budget and not case.tensor_cores)
    broken = results.Compiled(
        kernel=case.kernel, case=case.name, target=results.COUNTED, warps=4,
        registers=case.most_registers + 1, stack=8, spills=1, shared=0, wide_loads=case.wide - 1,
        tensor_products=1, stores=0, instructions=50, per_token=case.budget.most + 1.0,
    )  # fmt: skip
    assert len(list(broken_limits(broken, case))) == 6
    sound = replace(
        broken, registers=1, stack=0, spills=0, wide_loads=case.wide, tensor_products=0, stores=1,
        instructions=51, per_token=1.0,
    )  # fmt: skip
    assert list(broken_limits(sound, case)) == []
    for worse in ({"stack": 1}, {"spills": 1}, {"stores": 0}, {"instructions": 50}):
        assert len(list(broken_limits(replace(sound, **worse), case))) == 1


def test_the_limits_are_those_promised():
    """The gate observing 128 experts, 8 chosen: 120 instructions a token, 200 with importance."""
    plain, summed = (case for case in CASES if case.kernel == "observe_tokens" and case.budget)
    assert (plain.budget.most, summed.budget.most) == (120, 200)
    gate = [
        case for case in CASES if case.kernel in ("observe_tokens", "select_tokens", "gate_rows")
    ]
    assert {case.most_registers for case in gate} == {128}
    assert all(case.wide for case in gate if case.kernel != "gate_rows")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", r"(?s)gfx942 ended with SIGABRT, after 0 kernels.*Aborted"),
        ("import sys; print('{}'); sys.exit('no ptxas')", r"(?s)exit code 1, after 1 .*no ptxas"),
    ],
)
def test_a_compiler_that_dies_says_how(monkeypatch, tmp_path, code, message):
    """The stand-in interpreter notes each start, then does what `code` says."""
    starts = tmp_path / "starts"
    stand_in(monkeypatch, tmp_path, f"open({str(starts)!r}, 'a').write('x')\n{code}")
    monkeypatch.setattr(matrix, "TARGETS", {"gfx942": TARGETS["gfx942"]})
    with pytest.raises(matrix.CompileError, match=message):
        matrix.measure_all()
    # what a signal ended is tried again, alone; an error is not
    assert starts.read_text() == ("xx" if "abort" in code else "x")


def test_a_kernel_that_does_not_compile_is_named():
    with pytest.raises(matrix.CompileError, match=r"observe_tokens .*does not compile for sm_1"):
        next(matrix.measure_target("sm_1"))


def loop_code(*texts):
    return matrix.Code(1, 0, 0, 1, tuple((16 * i, text) for i, text in enumerate(texts)), 0)


def test_nested_loops_multiply_and_waits_do_not_count():
    """Outer loop from 16 to 160 run 3 times, inner from 32 to 48 run 5 times, on paper."""
    code = loop_code(
        "MOV R0, R1",
        "IADD3 R1, R1, 0x1",
        "FADD R2, R2, R3",
        "@!P0 BRA 0x20",
        *["FMUL R4, R4, R5"] * 5,
        "@!P1 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4]",
        "@P2 BRA `(.L_x_1) 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4]",
        "@!P1 BRA 0xc0",
        "BRA 0x50",
    )
    assert matrix.loops(code) == [(16, 160), (32, 48)]
    # outside the loops: MOV, EXIT and the three behind it
    assert matrix.executed(code, [3, 5]) == 5 + 3 * (1 + 2 * 5 + 7)
    with pytest.raises(matrix.UnexpectedCodeError, match=r"2 loops, of \[10, 2\] instructions.* 1"):
        matrix.executed(code, [3])


def test_opcodes_without_predicates():
    code = loop_code("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "@UP1 LDG.E R4, desc[UR4][R2.64]")
    assert code.count("LDG.E.128") == 1 and code.count("LDG") == 2
