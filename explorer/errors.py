"""Errors raised by the explorer.

ExplorerError
├── RunError            a run file is missing, unreadable, or has not what a question needs
├── MetricError         a metric was given numbers that it is not defined for
├── ComparisonError     a comparison cannot be made, or a file is not a comparison file
│   └── ComparisonCancelled  the caller asked it to stop; what was finished is kept
├── RouterError         a router lacks what it needs, or was given options it cannot work with
├── ConditionError      a condition was given options, a model or texts it cannot work with
├── WorkerError         the worker process cannot be used
├── JobCancelled        the app asked the worker to stop what it was doing
├── NotAllowedError     the server is read-only, or the caller has not the role to write
└── UnknownNameError    a name is not among the registered ones
"""

from pathlib import Path


class ExplorerError(Exception):
    """Base of everything the explorer raises on purpose; the message says what to do."""


class RunError(ExplorerError):
    """A run file is missing, unreadable, or has not what a question needs."""


class MetricError(ExplorerError, ValueError):
    """A metric was given numbers that it is not defined for."""


class ComparisonError(ExplorerError, ValueError):
    """A comparison cannot be made from what was given, or a file is not a comparison file."""


class ComparisonCancelled(ComparisonError):
    """The caller asked a comparison to stop; what was finished is kept.

    Attributes
    ----------
    path : Path or None
        The comparison file, None when nothing was finished.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class RouterError(ExplorerError, ValueError):
    """A router lacks what it needs, or was given options it cannot work with."""


class ConditionError(ExplorerError, ValueError):
    """A condition was given options, a model or texts that it cannot work with."""


class WorkerError(ExplorerError):
    """The worker process cannot be used."""


class JobCancelled(ExplorerError):
    """The app asked the worker to stop what it was doing.

    Attributes
    ----------
    path : Path or None
        The file with what was done until then, when there is one.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class NotAllowedError(ExplorerError):
    """The server is read-only, or the caller has not the role to write."""


class UnknownNameError(ExplorerError, KeyError):
    """A name is not among the registered ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
