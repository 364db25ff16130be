"""Conditions of the survey: precision, quantisation, pruning, factorisation, merging, distillation.

base         what a condition is, and the registry ``CONDITIONS``
catalogue    all of them, registered, and made from text
weights      which part a weight belongs to, and replacing weights for a while
calibration  what conditions learn from
subsets      the best subset to drop, by trying all or greedily
precision    16-bit weights and arithmetic, of the model or of a part
quantise     8, 4 or 3 bits a weight
pruning      experts that are never picked
heads        attention heads that add nothing
low_rank     experts' matrices as products of thin ones
merging      experts averaged into others
trace        what every router did in a run over texts
flips        routing that changed, and how it follows from margins
measure      loss with own and with forced routing, and routing flips
students     routers that imitate the model's gate
smaller      a smaller model that imitates the whole
likeness     whether two models' routing is alike, whatever their experts' numbers
api          all of it on the texts of a run, kept in its comparison file
cli          the command ``python -m explorer conditions``
distil       the command ``python -m explorer.survey.distil``

Importing this package needs no torch; names that do load on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explorer.comparison.conditions.base import CONDITIONS, Condition, ConditionInfo, Subject
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
