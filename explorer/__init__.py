"""Explore routing: open a run file, measure it, draw it. Importing this needs no torch."""

from explorer.run import open_run

__all__ = ["open_run"]
