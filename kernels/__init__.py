"""Fused statistics of routing and attention; an op is a checked function with its backends.

Ops live in ``kernels.ops`` and are imported when they are first used, so that reading the dispatch
rules needs no torch.

The package must not define a version and must not import transformers: transformers probes for a
Hugging Face package of the same name, finds ours, and imports it (`.github/DECISIONS.md`, 3).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.ops.attention import attention
    from kernels.ops.coactivation import coactivation
    from kernels.ops.gate import gate
    from kernels.ops.project_topk import project_topk

__all__ = ["attention", "coactivation", "gate", "project_topk"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kernels.ops.{name}"), name)
