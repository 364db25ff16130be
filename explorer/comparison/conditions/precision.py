"""Precision: weights and arithmetic of the model, or of some parts of it, in another dtype."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

from capture.errors import quoted
from explorer.comparison.conditions.base import (
    CONDITIONS,
    Applied,
    Condition,
    ConditionInfo,
    Subject,
)
from explorer.comparison.conditions.weights import (
    PARTS,
    check_parts,
    part_modules,
    part_parameters,
    replaced,
)
from explorer.errors import ConditionError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LEAST_SHARE = 0.001  # of the weights, that is written as a number
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@CONDITIONS.add("precision")
class Precision(Condition):
    """Compute the model, or some of its parts, in another dtype.

    Parameters
    ----------
    dtype : {"bfloat16", "float16", "float32"}
    parts : sequence of {"attention", "router", "experts", "rest"}
        With all four, the model runs in the dtype as if it had been loaded so. A part set apart
        gets its inputs rounded, computes in the dtype, and its outputs return to the model's.

    Notes
    -----
    Buffers stay: rotary frequencies and selection biases are kept in float32 by transformers too.
    """

    info = ConditionInfo(
        name="precision",
        kind="precision",
        title="Precision",
        summary=(
            "Weights and arithmetic in 16 bits, for the whole model or for attention, router or "
            "experts alone. Close decisions of the router may fall the other way."
        ),
        formula="y = f(round(W), round(x)),  p = 8 (bf16) or 11 (fp16) bits",
        paper="2101.03961, section 2.4",
        simulated=False,
    )

    def __init__(self, dtype: Dtype = "bfloat16", parts: Sequence[str] = PARTS) -> None:
        if dtype not in DTYPES:
            raise ConditionError(
                f"A dtype among {', '.join(DTYPES)} was expected, got {quoted(dtype)}."
            )
        self.dtype = dtype
        self.parts = check_parts(parts)
        if "rest" in self.parts and self.parts != PARTS:
            raise ConditionError(
                "The rest of a model (embeddings, norms, output) has no boundary of its own where "
                "values could be rounded. Choose parts among attention, router and experts, or "
                "all four."
            )

    @property
    def label(self) -> str:
        """Dtype and parts, such as ``bf16 router``."""
        whole = self.parts == PARTS
        return SHORT[self.dtype] + ("" if whole else " " + "+".join(self.parts))

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        dtype, named = DTYPES[self.dtype], part_parameters(subject)
        changes = {
            p: p.data.to(dtype)
            for part in self.parts
            for p in named[part].values()
            if p.is_floating_point()
        }
        applied.weight_bytes += sum(
            p.numel() * (dtype.itemsize - p.element_size()) for p in changes
        )
        applied.method = _tested(changes)
        with ExitStack() as stack:
            if self.parts != PARTS:
                modules = part_modules(subject)
                for part in self.parts:
                    for module in modules[part]:
                        _cast_around(module, dtype, stack)
            stack.enter_context(replaced(changes))
            return stack.pop_all()


def _tested(changes: Mapping[nn.Parameter, torch.Tensor]) -> str:
    """Say whether weights lose anything, as those of a checkpoint in that dtype do not."""
    pairs = [(p.data, new) for p, new in changes.items() if p.device.type != "meta"]
    rounded = sum(int((new.to(old.dtype) != old).sum()) for old, new in pairs)
    if not rounded:
        return "no weight is rounded, as all are exact in this dtype: tests the arithmetic alone"
    share = rounded / sum(old.numel() for old, _ in pairs)
    told = f"{share:.1%}" if share >= LEAST_SHARE else f"less than {LEAST_SHARE:.1%}"
    return f"{told} of the weights are rounded: tests weights and arithmetic"


def _cast_around(module: nn.Module, dtype: torch.dtype, stack: ExitStack) -> None:
    """Round a module's floating inputs to the dtype, and give its outputs the dtype they had."""
    outside: list[torch.dtype] = []

    def cast(value: Any, to: torch.dtype) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if is_float else value

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [*args, *kwargs.values()]
        outside[:] = [v.dtype for v in given if cast(v, dtype) is not v][:1] or [dtype]
        rounded: tuple[Any, ...] = tree_map(lambda v: cast(v, dtype), args)
        named: dict[str, Any] = tree_map(lambda v: cast(v, dtype), kwargs)
        return rounded, named

    def after(_: nn.Module, args: object, output: Any) -> Any:
        return tree_map(lambda v: cast(v, outside[0]), output)

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)
