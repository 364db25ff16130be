"""What a launch would compile: an op's Triton code runs on CPU tensors and its kernels are kept.

The launcher itself decides block sizes, warps and which integers and pointers are multiples of 16,
so what is compiled here is the kernel that a GPU would get, not a copy of its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300X
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, not executed.

    Attributes
    ----------
    kernel : JITFunction
        The Triton kernel.
    args, kwargs : tuple, dict
        Its arguments and options, as the launcher passed them.
    grid : tuple of int
        Programs along each axis.
    """

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

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
