"""Conditions of the survey: precision, quantisation, pruning, factorisation, merging, distillation.

condition    what a condition is, and the registry ``CONDITIONS``
catalogue    all of them, registered, and made from text
calibration  what conditions learn from
weights      weights of a part of the model: precision, fewer bits, lower rank
expert_pruning     experts that are never picked
head_pruning       attention heads that add nothing
merging            experts averaged into others
distilled_routers  routers that imitate the model's gate
routing_changes    what every router did in a run over texts, and what changed
effects      loss with own and with forced routing, and flips, kept in the run's comparison file

Importing this package needs no torch; its modules do.
"""

# what a run is measured under when nobody says otherwise
USUAL = (
    "precision(dtype='bfloat16')",
    "precision(dtype='float16')",
    "precision(dtype='bfloat16', parts='router')",
    "precision(dtype='bfloat16', parts='attention')",
    "precision(dtype='bfloat16', parts='experts')",
    "quantised(bits=8)",
    "quantised(bits=4)",
    "quantised(bits=3)",
    "quantised(bits=4, parts='router')",
    "prune_frequency(keep=0.75)",
    "prune_reap(keep=0.75)",
    "prune_naee(keep=0.75)",
    "prune_random(keep=0.75)",
    "prune_heads(keep=0.75)",
    "prune_heads_random(keep=0.75)",
    "low_rank(share=0.5)",
    "low_rank(share=0.25)",
    "low_rank(share=0.125)",
    "merge(keep=0.75)",
)
