"""Record the routing of a mixture-of-experts model into a run file.

Importing this package imports neither torch nor transformers: names load on first use.
"""

from typing import Any

__all__ = ["CaptureConfig", "record"]


def __getattr__(name: str) -> Any:
    if name == "record":
        from capture.recorder.session import record

        return record
    if name == "CaptureConfig":
        from capture.recorder.config import CaptureConfig

        return CaptureConfig
    raise AttributeError(f"module 'capture' has no attribute {name!r}")
