"""What the app and the worker process say to each other: one JSON object a line.

The app sends ``{"do": "run", "job": 3, "request": {...}}`` and ``{"do": "cancel", "job": 3}``.
The worker answers with ``{"event": "progress" | "done" | "failed" | "cancelled", "job": 3, ...}``.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from capture.paths import model_name
from capture.progress import Progress
from capture.recorder.config import RecordingOptions

DEMO_MODEL = "demo"  # what runs of the embedded model call it
JobState = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class CaptureRequest(RecordingOptions):
    """A capture: which model reads which prompts, what is recorded, and where the run goes.

    Attributes
    ----------
    out : str
        Path of the run file to write; it must not exist.
    model : str
        ``"demo"``, a Hugging Face id or a local folder.
    prompts : str or list of dict
        ``"demo"``, the path of a prompt file, or records with ``text`` and maybe ``domain``.
    """

    out: str
    model: str = "demo"
    prompts: str | list[dict[str, Any]] = "demo"

    @property
    def title(self) -> str:
        """Name of the run, for messages."""
        return Path(self.out).stem


@dataclass(frozen=True, slots=True)
class RecoverRequest:
    """Close the ``.partial`` file that a killed capture left behind, as an incomplete run."""

    partial: str

    @property
    def out(self) -> str:
        """Path of the run file that results."""
        return self.partial.removesuffix(".partial")

    @property
    def title(self) -> str:
        """Name of the run, for messages."""
        return Path(self.out).stem


@dataclass(frozen=True, slots=True)
class ProjectRequest:
    """Lay out the vectors of a run, or group them, and keep the result in the cache.

    Attributes
    ----------
    out : str
        Path in the cache, which is named after the vectors and the options.
    run : str
        Path of the run file.
    unit, feature, layer, site
        See ``explorer.maps.data.Source``.
    method : str
        ``""`` for a map, else how to group: ``kmeans``, ``gmm`` or ``hdbscan``.
    router : str
        Instead, where this router would send the tokens.
    n_clusters : int
    seed : int
    """

    out: str
    run: str
    unit: str
    feature: str = "hidden"
    layer: int = 0
    site: int = 0
    method: str = ""
    n_clusters: int = 12
    seed: int = 0
    router: str = ""

    @property
    def title(self) -> str:
        """Name of the work, for messages."""
        what = "Clusters of" if self.method else "Map of"
        if self.router:
            what = f"Choices of {self.router} for"
        return f"{what} {self.unit} of {Path(self.run).stem}"


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """Compare routers on a run, live and by replay; with ``capture``, record the run first.

    The job's ``path`` is the comparison file. It is written after every router, so that a
    cancelled job leaves what it finished, and the same request again does only the rest.

    Attributes
    ----------
    run : str
        Path of the run file.
    routers : list of str
        Names, maybe with arguments: ``top_k(k=1)``. Empty = some of every family.
    live, layers, replay : bool
        Modes; ``layers`` also swaps one layer at a time.
    seeds : list of int
    tokens, fit_tokens : int
        At most so many tokens to report on, and to fit on.
    controls, latency : bool
        Random controls at the same compute; timings.
    oracle : bool
        Also the bound of the last layer, one forward pass for each set of experts.
    conditions : list of str
        Measured after the routers, into the same file: ``quantised(bits=4)``.
    capture : CaptureRequest, optional
        What to record to ``run`` before; its ``out`` is ``run``.
    model : str
        The model that may be loaded, which has to be the one that the run names: a run may come
        from a stranger. The demo model needs no leave.
    """

    run: str
    routers: list[str] = field(default_factory=list)
    live: bool = True
    layers: bool = False
    replay: bool = True
    seeds: list[int] = field(default_factory=lambda: [0])
    tokens: int = 10_000
    fit_tokens: int = 20_000
    controls: bool = True
    latency: bool = True
    oracle: bool = False
    conditions: list[str] = field(default_factory=list)
    capture: CaptureRequest | None = None
    model: str = ""

    @property
    def out(self) -> str:
        """What tells jobs apart: a run is compared once at a time, and recorded once."""
        return self.run if self.capture is not None else f"{self.run}.comparison"

    @property
    def title(self) -> str:
        """Name of the work, for messages."""
        return f"Comparison on {Path(self.run).stem}"


@dataclass(frozen=True, slots=True)
class CosinesRequest:
    """Load the model of a run and keep the cosines of its experts' weights in the cache.

    Attributes
    ----------
    out : str
        Path in the cache, from ``explorer.worker.expert_weights.cosines_path``.
    run : str
        Path of the run file.
    model : str
        ``"demo"``, a Hugging Face id or a local folder.
    revision : str or None
    """

    out: str
    run: str
    model: str
    revision: str | None = None

    @property
    def title(self) -> str:
        """Name of the work, for messages."""
        return f"Weights of {model_name(self.model)}"


Request = CaptureRequest | RecoverRequest | ProjectRequest | CompareRequest | CosinesRequest
_KINDS: dict[str, type[Request]] = {
    "capture": CaptureRequest,
    "recover": RecoverRequest,
    "project": ProjectRequest,
    "compare": CompareRequest,
    "cosines": CosinesRequest,
}


@dataclass(slots=True)
class Job:
    """One request and what became of it; ``progress`` keeps the last message that was not empty."""

    job_id: int
    request: Request
    state: JobState = "queued"
    progress: Progress = field(default_factory=Progress)
    cancelling: bool = False
    path: str | None = None  # the run file, once there is one
    error: str = ""
    submitted_at: float = 0.0  # seconds since the epoch

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")


def encode(message: dict[str, Any]) -> str:
    """Return the message as one line of plain ASCII."""
    return json.dumps(message) + "\n"


def pack_request(request: Request) -> dict[str, Any]:
    """Return a request as JSON values, with its kind."""
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(request, cls))
    return {"kind": kind, **asdict(request)}


def unpack_request(values: dict[str, Any]) -> Request:
    """Return the request that `pack_request` packed."""
    given = dict(values)
    if isinstance(given.get("capture"), dict):
        given["capture"] = CaptureRequest(**given["capture"])
    return _KINDS[given.pop("kind")](**given)
