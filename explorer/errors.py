"""Errors raised by the explorer.

ExplorerError
└── UnknownNameError    a name is not among the registered ones
"""


class ExplorerError(Exception):
    """Base of everything the explorer raises on purpose; the message says what to do."""


class UnknownNameError(ExplorerError, KeyError):
    """A name is not among the registered ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
