"""Explore routing: open a run file, measure it, draw it. Importing this needs no torch."""
