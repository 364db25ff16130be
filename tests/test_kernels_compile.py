"""Every Triton kernel compiled for every target without a GPU, held to its limits."""

import pytest

pytest.importorskip("triton", reason="triton is not installed (tests/requirements.txt)")

from kernels.bench import compile as matrix
from kernels.bench import sass
from kernels.bench.launches import TARGETS

CASES = matrix.cases()
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]


@pytest.fixture(scope="module")
def code():
    """Compiles each case for each target once."""
    made = {}

    def get(case, target):
        if (case, target) not in made:
            made[case, target] = matrix.compiled(case, target)
        return made[case, target]

    return get


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.name}")
def test_no_spills_and_few_registers(code, case, target):
    compiled, _ = code(case, target)
    assert compiled.stack == 0, "registers spill, or an array lives in memory"
    assert compiled.spills == 0
    limit = case.most_registers if target in NVIDIA else 512
    assert compiled.registers <= limit
    if target in NVIDIA:
        assert compiled.count("STG") + compiled.count("RED") + compiled.count("ATOMG") > 0
        assert compiled.count(case.wide) > 0, f"no {case.wide}: the layout or a stride changed"


BUDGETED = [case for case in CASES if case.budget]


@pytest.mark.parametrize("case", BUDGETED, ids=lambda case: f"{case.kernel}-{case.name}")
def test_instructions_for_each_token(code, case):
    cost = matrix.per_token(case, *code(case, "sm_90"))
    assert 0 < cost <= case.budget.most


@pytest.mark.parametrize("kernel", ["gram", "project_topk"])
@pytest.mark.parametrize("target", NVIDIA)
def test_products_run_on_tensor_cores(code, kernel, target):
    case = next(case for case in CASES if case.kernel == kernel and "E=128" in case.name)
    compiled, _ = code(case, target)
    opcodes = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    assert compiled.count(opcodes[target]) > 0
    assert compiled.count("FFMA") < len(compiled.instructions) / 4


def loop_code(*texts):
    return sass.Code(1, 0, 0, 1, tuple((16 * i, text) for i, text in enumerate(texts)), 0)


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
    assert sass.loops(code) == [(16, 160), (32, 48)]
    # outside the loops: MOV, EXIT and the three behind it
    assert sass.executed(code, [3, 5]) == 5 + 3 * (1 + 2 * 5 + 7)
    with pytest.raises(sass.UnexpectedCodeError, match=r"2 loops, of \[10, 2\] instructions.* 1"):
        sass.executed(code, [3])


def test_opcodes_without_predicates():
    code = loop_code("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "@UP1 LDG.E R4, desc[UR4][R2.64]")
    assert code.count("LDG.E.128") == 1 and code.count("LDG") == 2
