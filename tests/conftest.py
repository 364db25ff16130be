"""How the tests of the Triton kernels run without a GPU.

Triton decides when a kernel is *decorated* whether it is compiled or interpreted, so interpreted
kernels need a process of their own. A file named ``test_kernels_<op>_triton.py`` gets one: here it
is a single test that runs the whole file in a new Python with ``TRITON_INTERPRET=1`` and reports
what that run printed. The file itself holds ordinary tests that call
``op(..., backend="triton")`` on CPU tensors and know nothing of this. One of them runs alone with

    TRITON_INTERPRET=1 python -m pytest tests/test_kernels_gate_triton.py -k ties

In that process ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` are poisoned (see
``poisoned_memory``), so a kernel that leaves a piece of its output unwritten fails; other test
files may ask for the fixture by name.

Write such tests with small shapes (a program takes 10 to 20 ms), and remember that bfloat16
arithmetic is silently wrong in the interpreter: kernels convert to float32 right after the load.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# models of tests are too small for threads; on a busy machine torch's threads wait for each other
# many times longer than they work, and the sum of a product may depend on how many there are
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).parent.parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT = 600  # seconds for one file


def pytest_pycollect_makemodule(module_path, parent):
    """Collect a file of Triton tests as one test, unless this is the process made for it."""
    name = module_path.name
    if INTERPRETING or not (name.startswith("test_kernels_") and name.endswith("_triton.py")):
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


class InterpretedFile(pytest.File):
    """A file whose tests run in a process of their own."""

    def collect(self):
        yield InterpretedRun.from_parent(self, name="interpreted")


class InterpretedRun(pytest.Item):
    """One run of a file's tests with Triton's interpreter."""

    def runtest(self):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed (tests/requirements.txt)")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if result.returncode:
            raise InterpretedRunFailed(result.stdout + result.stderr)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, InterpretedRunFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class InterpretedRunFailed(Exception):
    """Tests failed in the interpreting process; the message is what it printed."""


@pytest.fixture(autouse=INTERPRETING)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with nan, or 85 in integers, instead of leaving it as it happens to be."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            fresh = make(*args, **kwargs)
            poison = float("nan") if fresh.is_floating_point() else fresh.dtype != torch.bool and 85
            return fresh.fill_(poison) if fresh.device.type != "meta" else fresh

        return make_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
