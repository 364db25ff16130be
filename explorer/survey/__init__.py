"""What only reproduces published tables: models trained from scratch, ensembles, distilled models.

Nothing else imports it; run its modules with ``python -m``.
"""
