"""Conditions of the survey: precision, quantisation, pruning, factorisation, merging, distillation.

contract     what a condition is, and the registry ``CONDITIONS``
catalogue    all of them, registered, and made from text
calibration  what conditions learn from
weights      weights of a part of the model: precision, fewer bits, lower rank
expert_pruning     experts that are never picked
head_pruning       attention heads that add nothing
merging            experts averaged into others
distilled_routers  routers that imitate the model's gate
routing_changes    what every router did in a run over texts, and what changed
measure      loss with own and with forced routing, and flips, kept in the run's comparison file

Importing this package needs no torch; names that do load on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explorer.comparison.conditions.contract import (
        CONDITIONS,
        Condition,
        ConditionInfo,
        Subject,
    )
    from explorer.comparison.conditions.measure import ConditionTables, decomposition, measure

__all__ = [
    "CONDITIONS",
    "Condition",
    "ConditionInfo",
    "ConditionTables",
    "Subject",
    "decomposition",
    "measure",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'explorer.comparison.conditions' has no attribute {name!r}")
    from explorer.comparison.conditions import catalogue, measure

    return getattr(catalogue, name, None) or getattr(measure, name)
