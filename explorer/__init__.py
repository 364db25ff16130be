"""Explore routing: open a run file, measure it, draw it.

Importing this package needs no torch; names that do load on first use.
"""

from typing import TYPE_CHECKING, Any

from explorer.comparison.results_file import open_comparison
from explorer.run import open_run

if TYPE_CHECKING:
    from explorer.comparison.compare import compare
    from explorer.routers import ROUTERS

__all__ = ["ROUTERS", "compare", "open_comparison", "open_run"]


def __getattr__(name: str) -> Any:
    if name == "ROUTERS":
        from explorer.routers import ROUTERS

        return ROUTERS
    if name == "compare":
        from explorer.comparison.compare import compare

        return compare
    raise AttributeError(f"module 'explorer' has no attribute {name!r}")
