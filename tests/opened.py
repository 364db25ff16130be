"""Run files that are asked several questions: opening one costs more than most answers."""

import functools
from pathlib import Path

import duckdb

from capture.store import RunReader
from capture.store.check import identity


def reader(path):
    """Return an open reader of a run file, the same one until the file changes."""
    return _reader(Path(path), identity(Path(path)))


def stranger(path):
    """Return a connection of plain DuckDB to a run file, with nothing of ours."""
    return _stranger(Path(path), identity(Path(path)))


@functools.lru_cache(maxsize=2)
def _reader(path, _identity):
    return RunReader.open(path)


@functools.lru_cache(maxsize=1)
def _stranger(path, _identity):
    return duckdb.connect(str(path), read_only=True)
