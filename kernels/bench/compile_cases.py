"""Which kernels the compile matrix holds, in which shapes, and their limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from kernels.ops.attention import AttentionInputs
from kernels.ops.attention import _triton as attention
from kernels.ops.coactivation._triton import coactivation_triton
from kernels.ops.gate._triton import gate_triton
from kernels.ops.gate.reference import GateInputs
from kernels.ops.project_topk._triton import project_topk_triton

TOKENS = 65536
Run = Callable[[str], object]
# what PyTorch says of the GPUs that the targets stand for
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (9, 4)}


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
