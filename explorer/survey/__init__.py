"""What only reproduces published tables.

from_scratch  models trained from scratch, each with one rule, and ensembles of them
distil        smaller models that learn from a run's model, and their routing beside its
locality      how often experts repeat from a token to the next

Nothing else imports it; run its modules with ``python -m``.
"""
