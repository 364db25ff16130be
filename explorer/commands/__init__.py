"""What ``python -m explorer`` does: one module a command, loaded when its command is given.

Nothing else imports them.
"""

from pathlib import Path
from typing import NamedTuple

RUN_HELP = "a run file, or the name of one in runs/"


class Output(NamedTuple):
    """What a command has to say.

    Attributes
    ----------
    text : str
        For standard output.
    notes : list of str
        For standard error.
    """

    text: str
    notes: list[str] = []  # noqa: RUF012


def run_file(given: Path) -> Path:
    """Return the run file that is meant: as given, or of this name in ``runs/``."""
    named = Path("runs", f"{given}.duckdb")
    return named if not given.suffix and not given.exists() and named.is_file() else given
