"""A backend asked for runs or is refused with the reason; auto takes the best that can run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import KernelError, backend_for, resolve_backend

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def every_package_installed_and_nothing_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("device", "refusals", "chosen"),
    [
        (CUDA, {"triton": None, "numba": None, "torch": None}, "triton"),
        (CPU, {"triton": None, "numba": None, "torch": None}, "numba"),
        (CUDA, {"triton": "it has no float64", "numba": None, "torch": None}, "torch"),
        (CPU, {"triton": None, "numba": "too many experts", "torch": None}, "torch"),
    ],
)
def test_auto_takes_the_first_that_can_run(device, refusals, chosen):
    assert resolve_backend("auto", device=device, refusals=refusals) == chosen


@pytest.mark.parametrize(
    ("requested", "device", "message"),
    [
        ("triton", CPU, r"'triton' cannot run here: it needs CUDA tensors, these are on cpu"),
        (
            "numba",
            CUDA,
            r"'numba' cannot run here: it runs on the CPU.*cuda:0.*auto, triton, torch",
        ),
        (
            "fast",
            CPU,
            r"'fast' is not one of this op's backends. Choose one of auto, triton, numba",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(requested, device, message):
    refusals = {"triton": None, "numba": None, "torch": None}
    with pytest.raises(KernelError, match=message):
        resolve_backend(requested, device=device, refusals=refusals)


def test_a_backend_that_cannot_run_these_inputs_is_refused_with_the_ops_reason():
    with pytest.raises(KernelError, match=r"cannot run here: 9 experts. Pass one of auto, torch"):
        resolve_backend("numba", device=CPU, refusals={"numba": "9 experts", "torch": None})


def test_a_package_that_is_missing_is_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    refusals = {"triton": None, "numba": None, "torch": None}
    assert resolve_backend("auto", device=CPU, refusals=refusals) == "torch"
    with pytest.raises(KernelError, match="the package triton is not installed"):
        resolve_backend("triton", device=CUDA, refusals=refusals)


def test_auto_says_why_nothing_can_run():
    with pytest.raises(KernelError, match="No backend can run these inputs: numba: 9 experts"):
        resolve_backend("auto", device=CPU, refusals={"numba": "9 experts"})


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refusals = {"triton": None, "torch": None}
    assert resolve_backend("auto", device=CPU, refusals=refusals) == "torch"
    assert resolve_backend("triton", device=CPU, refusals=refusals) == "triton"


def test_the_choice_of_an_op_is_visible():
    assert backend_for("gate", CPU) in ("numba", "torch")
    with pytest.raises(KernelError, match="no op 'gating'"):
        backend_for("gating", CPU)


def test_an_op_is_a_function_whatever_was_imported_first():
    """Each in a process that has loaded torch, which takes seconds, and nothing of ours."""
    code = """
import os, torch
for first in ("import kernels.ops.gate", "from kernels import gate", "import kernels.dispatch"):
    if os.fork() == 0:
        exec(first, {})
        import kernels
        print(callable(kernels.gate), type(kernels).__name__, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, first
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "module"] * 3
