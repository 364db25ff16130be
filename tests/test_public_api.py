"""What other people may import, pinned."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.dispatch import BACKENDS, backend_for

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "triton", "numba", "numpy"}


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("kernels", ["attention", "coactivation", "gate", "project_topk"]),
        ("capture", ["CaptureConfig", "TrainerCallback", "import_routing", "record", "recording"]),
        ("explorer", ["ROUTERS", "compare", "figures", "open_comparison", "open_run"]),
    ],
)
def test_public_names(package, names):
    module = __import__(package)
    assert sorted(module.__all__) == names
    others = {"ROUTERS", "figures"}  # a registry, and a module
    assert all(callable(getattr(module, name)) for name in names if name not in others)
    assert all(hasattr(module, name) for name in names)


def imported_by(code):
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code", ["import kernels", "import kernels.dispatch", "import kernels.bench"]
)
def test_importing_kernels_is_cheap(code):
    assert not imported_by(code) & HEAVY


def test_ops_import_their_backends_when_they_run():
    """A CPU install has no triton, and numba takes a second to load."""
    names = ", ".join(kernels.__all__)
    modules = imported_by(f"from kernels import {names}; assert all(map(callable, ({names},)))")
    assert "torch" in modules and not modules & {"triton", "numba"}


@pytest.mark.parametrize("op", kernels.__all__)
def test_ops_share_their_shape(op):
    """An op names its backends in its docstring; the last one is the plain definition."""
    function = getattr(kernels, op)
    option = inspect.signature(function).parameters["backend"]
    assert option.kind is inspect.Parameter.KEYWORD_ONLY and option.default == "auto"
    assert BACKENDS[-1] == "torch"
    assert all(f'"{name}"' in function.__doc__ for name in ("auto", *BACKENDS))
    assert backend_for(op, torch.device("cpu")) in BACKENDS[:-1]


def test_an_unknown_op_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'kernels' has no attribute 'softmax'"):
        _ = kernels.softmax
