"""Recording a model that runs through torch.compile.

Compiled code keeps the hooks that were there when it was traced, and only those. So hooks go in
first, then the decoder is compiled in place, and what was compiled is thrown away at the end: the
caller's own compiled model is traced anew, without hooks, when it is used next.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from capture.errors import ModelError

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def default_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without a break, for any batch shape after the first."""
    return torch.compile(function, fullgraph=True)


def unwrapped(model: Any) -> tuple[Any, Compiler | None]:
    """Return the module inside torch.compile's wrapper, and what it compiles with.

    A module that is not wrapped comes back as it is, with None.
    """
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module):
        return model, None
    return inner, model.dynamo_ctx


@contextmanager
def suspended(model: nn.Module) -> Iterator[bool]:
    """Let modules run uncompiled that were compiled in place (``model.compile()``).

    Yields
    ------
    bool
        Whether there were any.
    """
    before = {
        module: module._compiled_call_impl
        for module in model.modules()
        if module._compiled_call_impl is not None
    }
    for module in before:
        module._compiled_call_impl = None
    try:
        yield bool(before)
    finally:
        for module, call in before.items():
            module._compiled_call_impl = call


@contextmanager
def compiled(model: Any, compiler: Compiler | None) -> Iterator[None]:
    """Compile the model's decoder in place while the block runs; None leaves it as it is.

    The language head stays as it is: it runs on chosen rows only.

    Raises
    ------
    ModelError
        If the decoder is no module of its own.
    """
    if compiler is None:
        yield
        return
    decoder = _decoder(model)
    torch._dynamo.reset()
    decoder._compiled_call_impl = compiler(decoder._call_impl)
    try:
        yield
    finally:
        decoder._compiled_call_impl = None
        torch._dynamo.reset()


def uncompiled_steps() -> AbstractContextManager[None]:
    """Run what is compiled uncompiled: decoding steps, whose cache grows from call to call."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _decoder(model: Any) -> nn.Module:
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise ModelError(
            f"{type(model).__name__} has no decoder apart from its language head, so it cannot be "
            "recorded compiled. Leave out compile, or give the model uncompiled."
        )
    return decoder
