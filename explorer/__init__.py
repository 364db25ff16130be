"""Explore routing: open a run file, measure it, draw it.

Importing this package needs no torch; names that do load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from explorer.comparison.results_file import open_comparison
from explorer.run import open_run

if TYPE_CHECKING:
    from explorer import figures
    from explorer.comparison.compare import compare
    from explorer.routers import ROUTERS

__all__ = ["ROUTERS", "compare", "figures", "open_comparison", "open_run"]

_LATER = {"ROUTERS": "explorer.routers", "compare": "explorer.comparison.compare"}


def __getattr__(name: str) -> Any:
    if name == "figures":
        return importlib.import_module("explorer.figures")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'explorer' has no attribute {name!r}")
