"""Errors raised by capture.

CaptureError
├── ConfigError           an option has a value that cannot work
├── PromptError           a prompt file or record cannot be read
├── ModelError            a model cannot be loaded, or loads only with a flag
│   └── SiteError         a model has no MoE site, or a site cannot be tapped
├── SwapError             a rule cannot take a router's place, or its answer cannot be executed
├── StoreError            a run file cannot be created, written or opened
│   └── SchemaVersionError  a run file has a schema version this code does not read
└── CaptureCancelled      the caller asked the capture to stop; what was recorded is kept
"""

from pathlib import Path


class CaptureError(Exception):
    """Base of everything capture raises on purpose; the message says what to do."""


class ConfigError(CaptureError):
    """An option has a value that cannot work."""


class PromptError(CaptureError):
    """A prompt file or record cannot be read."""


class ModelError(CaptureError):
    """A model cannot be loaded, or loads only with a flag."""


class SiteError(ModelError):
    """A model has no MoE site, or a site cannot be tapped."""


class SwapError(CaptureError):
    """A rule cannot take a router's place, or its answer cannot be executed."""


class StoreError(CaptureError):
    """A run file cannot be created, written or opened."""


class SchemaVersionError(StoreError):
    """A run file has a schema version this code does not read."""


class CaptureCancelled(CaptureError):
    """The caller asked the capture to stop; what was recorded is kept.

    Attributes
    ----------
    path : Path or None
        The finished, incomplete run; None when nothing was recorded yet.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path
