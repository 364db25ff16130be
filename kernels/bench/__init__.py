"""Measurements of the ops: ``python -m kernels.bench`` times them, ``--compile`` counts them."""
