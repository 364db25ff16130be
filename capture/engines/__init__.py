"""Routing recorded inside serving engines; each engine lives in an environment of its own.

An engine's module imports the engine when it is used, never on import. What it records goes through
``capture.traces`` into a run file, as the traces of other programs do.
"""
