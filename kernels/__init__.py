"""Fused statistics of routing and attention; an op is a checked function with its backends.

Ops are imported when they are first used, so that reading the dispatch rules needs no torch.

The package must not define a version and must not import transformers: transformers probes for a
Hugging Face package of the same name, finds ours, and imports it (`.github/DECISIONS.md`, 3).
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.attention import attention
    from kernels.coactivation import coactivation
    from kernels.gate import gate
    from kernels.project_topk import project_topk

__all__ = ["attention", "coactivation", "gate", "project_topk"]


class _Package(ModuleType):
    """Keeps an op's name for the function: the subpackage that defines it has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a subpackage here when its import ends
        if name in __all__ and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernels.{name}"), name)


sys.modules[__name__].__class__ = _Package
