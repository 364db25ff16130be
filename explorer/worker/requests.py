"""What the app asks of the worker process, and what it is told in the end.

Through a connection the app sends ``(number, request)``, ``(number, None)`` to cancel that job, and
``None`` to end the process; the worker sends ``(number, Progress)`` and ``(number, JobOutcome)``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from capture.errors import quoted
from capture.paths import model_name
from capture.recorder.config import RecordingOptions
from explorer.errors import ComparisonError
from explorer.maps.data import Source

DEMO_MODEL = "demo"  # what runs of the embedded model call it


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
    source : Source
        Which vectors.
    method : str
        ``""`` for a map, else how to group: ``kmeans``, ``gmm`` or ``hdbscan``.
    router : str
        Instead, where this router would send the tokens.
    n_clusters : int
    seed : int
    """

    out: str
    run: str
    source: Source
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
        return f"{what} {self.source.unit} of {Path(self.run).stem}"


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
        Path in the cache, from ``explorer.maps.map_cache.cosines_path``.
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


@dataclass(frozen=True, slots=True)
class AtlasRequest:
    """Knock every expert of a run's model out in turn; the file goes beside the run.

    Attributes
    ----------
    run : str
        Path of the run file.
    model : str
        The model that may be loaded, as for :class:`CompareRequest`.
    tokens : int
        Of texts, at most.
    screen : bool
        Only estimate by one gradient.
    """

    run: str
    model: str = ""
    tokens: int = 8_000
    screen: bool = False

    @property
    def out(self) -> str:
        """What tells jobs apart: a run has one atlas made at a time."""
        return f"{self.run}.atlas"

    @property
    def title(self) -> str:
        """Name of the work, for messages."""
        return f"Atlas of {Path(self.run).stem}"


@dataclass(frozen=True, slots=True)
class WhatIfRequest:
    """Run a recorded text with its routing changed and keep the answer in the cache.

    Attributes
    ----------
    out : str
        Path in the cache, from ``explorer.worker.interventions.answer_path``.
    run : str
        Path of the run file.
    prompt_id, position : int
        The text, and the token whose next token is looked at.
    edits : str
        As in an address, see :mod:`explorer.worker.interventions`.
    router : str
        Another router for all layers; ``""`` = the model's own.
    model : str
        The model that may be loaded, as for :class:`CompareRequest`.
    """

    out: str
    run: str
    prompt_id: int
    position: int
    edits: str = ""
    router: str = ""
    model: str = ""

    @property
    def title(self) -> str:
        """Name of the work, for messages."""
        return f"What if, on {Path(self.run).stem}"


Request = (
    CaptureRequest
    | RecoverRequest
    | ProjectRequest
    | CompareRequest
    | CosinesRequest
    | AtlasRequest
    | WhatIfRequest
)


class JobOutcome(NamedTuple):
    """How a job ended.

    Attributes
    ----------
    state : {"done", "failed", "cancelled"}
    path : str or None
        The file that came of it.
    error : str
        Why it failed, or what is left of a cancelled one.
    """

    state: Literal["done", "failed", "cancelled"]
    path: str | None = None
    error: str = ""


def refuse_unnamed_model(named: str, allowed: str) -> None:
    """Refuse to load a model that only the run names, and not whoever started the job.

    Raises
    ------
    ComparisonError
    """
    if named not in (DEMO_MODEL, allowed):
        raise ComparisonError(
            f"This needs the model that the run names, {quoted(named)}, and nobody said that it "
            "may be loaded. Tick the box that names it."
        )
