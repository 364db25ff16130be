"""One process beside the app that owns the model and runs captures, one at a time.

The app's side (``client``, ``protocol``) imports neither torch nor transformers.
"""

from explorer.worker.client import WorkerClient, shared_worker
from explorer.worker.protocol import CaptureRequest, Job, JobProgress, RecoverRequest

__all__ = [
    "CaptureRequest",
    "Job",
    "JobProgress",
    "RecoverRequest",
    "WorkerClient",
    "shared_worker",
]
