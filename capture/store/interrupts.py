"""Ctrl-C while DuckDB works."""

from collections.abc import Iterator
from contextlib import contextmanager

# what DuckDB raises instead, as a bare RuntimeError
_INTERRUPTED = "Query interrupted"


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt where DuckDB says that a query was interrupted."""
    try:
        yield
    except RuntimeError as error:
        if _INTERRUPTED not in str(error):
            raise
        raise KeyboardInterrupt from error
