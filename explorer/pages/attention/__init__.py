"""Attention: which heads look where, one head on one prompt, and whether routing follows it."""
