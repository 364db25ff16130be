"""Measurements of capture: ``python -m capture.bench``. Nothing else imports them, save tests."""

import sys


def say(line: str) -> None:
    """Print one line at once, so that a long measurement shows its progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
