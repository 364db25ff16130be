"""Conditions of the survey: precision, quantisation, pruning, factorisation, merging, distillation.

base         what a condition is, and the registry ``CONDITIONS``
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
students     routers that imitate the model's gate (imported on its own)
distil       a smaller model that imitates the whole (imported on its own)

Importing this package imports torch; ``import explorer`` does not import this package.
"""

from explorer.conditions import heads, low_rank, merging, precision, pruning, quantise
from explorer.conditions.base import (
    CONDITIONS,
    Applied,
    Condition,
    ConditionError,
    ConditionInfo,
    Subject,
)
from explorer.conditions.measure import ConditionTables, decomposition, measure

__all__ = [
    "CONDITIONS",
    "Applied",
    "Condition",
    "ConditionError",
    "ConditionInfo",
    "ConditionTables",
    "Subject",
    "decomposition",
    "heads",
    "low_rank",
    "measure",
    "merging",
    "precision",
    "pruning",
    "quantise",
]
