"""Choosing the backend of an op, without silent fallback.

``triton``
    Triton kernels on CUDA tensors. CPU tensors only where ``TRITON_INTERPRET=1`` runs the kernels
    in Triton's interpreter, which is for tests: ``"auto"`` never picks it there.
``numba``
    Compiled loops, on CPU tensors.
``torch``
    The plain PyTorch definition of the op, on any device.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import kernels

if TYPE_CHECKING:
    import torch

BACKENDS = ("triton", "numba", "torch")  # of every op, best first
PACKAGES = ("triton", "numba")  # backends that need a package of their own name


class KernelError(ValueError):
    """An op was called with a shape, dtype, option or backend it does not support."""


def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(
    requested: str, *, device: "torch.device", refusals: Mapping[str, str | None]
) -> str:
    """Turn a request into the backend that will run, or refuse it with the reason.

    Parameters
    ----------
    requested : str
        ``"auto"`` or the name of a backend.
    device : torch.device
        Where the tensors are.
    refusals : mapping
        The op's backends, best first: name -> None if it can run these inputs, else the reason
        why not, as a phrase. What follows from the device alone is added here.

    Raises
    ------
    KernelError
        If the op has no such backend, or the backend cannot run these inputs here.
    """
    reasons = {name: _refusal(name, device) or reason for name, reason in refusals.items()}
    if requested == "auto":
        for name, reason in reasons.items():
            if reason is None and not (name == "triton" and device.type == "cpu"):
                return name
        raise KernelError(f"No backend can run these inputs: {_listed(reasons)}.")
    if requested not in reasons:
        raise KernelError(
            f"backend={requested!r} is not one of this op's backends. "
            f"Choose one of auto, {', '.join(reasons)}."
        )
    reason = reasons[requested]
    if reason is not None:
        able = [name for name, why in reasons.items() if why is None]
        raise KernelError(
            f"backend={requested!r} cannot run here: {reason}. "
            f"Pass one of {', '.join(['auto', *able])}."
        )
    return requested


def backend_for(op: str, device: "torch.device") -> str:
    """Return the backend that ``"auto"`` means for an op on a device, for ordinary inputs.

    Raises
    ------
    KernelError
        If there is no such op.
    """
    if op not in kernels.__all__:
        raise KernelError(f"There is no op {op!r}. Choose one of kernels.__all__.")
    return resolve_backend("auto", device=device, refusals=dict.fromkeys(BACKENDS))


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return what runs an op: ``OP_reference``, or ``OP_BACKEND`` of its module ``_BACKEND``.

    That module is imported on first use: a CPU-only install has no triton, and numba takes a
    second to load.
    """
    of_op, name = f"kernels.ops.{op}", f"{op}_{backend}"
    if backend == "torch":
        name = f"{op}_reference"
    else:
        of_op += f"._{backend}"
    run: Callable[..., Any] = getattr(importlib.import_module(of_op), name)
    return run


def _refusal(name: str, device: "torch.device") -> str | None:
    """Return why a backend cannot run on a device, whatever the inputs."""
    if name == "numba" and device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    if name == "triton" and device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"it needs CUDA tensors, these are on {device}"
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed"
    return None


def _listed(reasons: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
