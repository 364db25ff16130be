"""Record the routing of a mixture-of-experts model into a run file.

Importing this package imports neither torch nor transformers: names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capture.recorder.config import CaptureConfig
    from capture.recorder.own_loop.callback import TrainerCallback
    from capture.recorder.own_loop.recording import recording
    from capture.recorder.record import record
    from capture.traces.importing import import_routing

__all__ = ["CaptureConfig", "TrainerCallback", "import_routing", "record", "recording"]
_WHERE = {
    "CaptureConfig": "capture.recorder.config",
    "TrainerCallback": "capture.recorder.own_loop.callback",
    "import_routing": "capture.traces.importing",
    "record": "capture.recorder.record",
    "recording": "capture.recorder.own_loop.recording",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'capture' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
