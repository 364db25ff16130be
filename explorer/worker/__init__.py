"""One process beside the app that does what takes long, such as captures, one job at a time.

The app's side (``client``, ``requests``) imports neither torch nor transformers.
"""

from explorer.worker.client import Job, WorkerClient, close_shared_worker, shared_worker
from explorer.worker.requests import (
    AtlasRequest,
    CaptureRequest,
    CompareRequest,
    CosinesRequest,
    ProjectRequest,
    RecoverRequest,
    WhatIfRequest,
)

__all__ = [
    "AtlasRequest",
    "CaptureRequest",
    "CompareRequest",
    "CosinesRequest",
    "Job",
    "ProjectRequest",
    "RecoverRequest",
    "WhatIfRequest",
    "WorkerClient",
    "close_shared_worker",
    "shared_worker",
]
