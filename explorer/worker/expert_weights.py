"""Which experts have weights alike: cosines of the router's rows and of the experts' weights.

A run file holds no weights, so that the worker loads the model that the run names, once, and keeps
the cosines in the user's cache folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from capture import demo
from capture.errors import first_line, quoted
from capture.store import SiteInfo
from explorer.errors import ExplorerError
from explorer.maps import cache
from explorer.run import Run, open_run

if TYPE_CHECKING:
    import torch

    from capture.model.sites import Site

Floats = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]

KINDS = ("router", "experts")
_VERSION = 1
_STACK = 3  # axes of a tensor that holds all experts' matrices


def cosines_path(run: Run) -> Path:
    """Return where the cosines of a run's model are kept."""
    model = str(run.info["model"])
    places = [(s.layer, s.site, s.n_experts) for s in run.sites]
    text = json.dumps([_VERSION, model, run.info["revision"], _changed(model), places])
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return cache.folder() / f"weights-{digest}.parquet"


def read_cosines(path: Path, layer: int, site: int) -> pd.DataFrame:
    """Return the cosines at one router.

    Returns
    -------
    DataFrame
        ``kind`` (of ``KINDS``), ``a``, ``b`` (experts), ``cosine``. A kind that the model does not
        have in a form that can be compared has no rows.

    Raises
    ------
    ExplorerError
        If the file cannot be read.
    """
    where = [("layer", "=", layer), ("site", "=", site)]
    try:
        return pq.read_table(path, filters=where).drop(["layer", "site"]).to_pandas()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ExplorerError(f"{path} cannot be read ({first_line(error)}). Delete it.") from error


def measure_cosines(
    path: Path, run_path: str, model: str, revision: str | None, on: Progress
) -> Path:
    """Load a model and write the cosines of the sites that a run has; for the worker.

    Raises
    ------
    ExplorerError
        If the model is not the one that was recorded.
    capture.errors.CaptureError
        If it cannot be loaded.
    """
    from capture.model.load import load_model
    from capture.model.sites import find_sites

    with open_run(run_path) as run:
        recorded = list(run.sites)
    on("Loading the model", 0.0)
    sites = find_sites(load_model(model, revision=revision, device="cpu").model)
    _check(model, recorded, [site.info for site in sites])
    parts = []
    for number, site in enumerate(sites):
        on(f"Layer {site.info.layer}", (number + 1) / (len(sites) + 1))
        parts += list(_rows(site))
    names = ("layer", "site", "kind", "a", "b", "cosine")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return cache.write(path, columns, {"model": model})


def cosines(gram: npt.ArrayLike) -> Floats:
    """Return cosines from products of every two vectors.

    Parameters
    ----------
    gram : array [E, E]

    Returns
    -------
    array [E, E], -1..1
        nan for a vector of zeros.
    """
    products = np.asarray(gram, dtype=np.float64)
    lengths = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.clip(products / np.outer(lengths, lengths), -1, 1))


def _rows(site: "Site") -> Iterator[dict[str, Any]]:
    n_experts = site.info.n_experts
    for kind, tensors in zip(KINDS, (_router(site), _experts(site)), strict=True):
        gram = np.zeros((n_experts, n_experts))
        for tensor in tensors:
            flat = tensor.detach().float().reshape(n_experts, -1)
            gram += (flat @ flat.T).double().numpy()
        if not gram.any():
            continue
        a, b = np.indices(gram.shape)
        yield {
            "layer": np.full(gram.size, site.info.layer, np.int32),
            "site": np.full(gram.size, site.info.site, np.int32),
            "kind": np.full(gram.size, kind, dtype=object),
            "a": a.ravel().astype(np.int32),
            "b": b.ravel().astype(np.int32),
            "cosine": cosines(gram).ravel().astype(np.float32),
        }


def _router(site: "Site") -> Iterator["torch.Tensor"]:
    """Yield the router's matrix with a row per expert, where it has one."""
    matrices = [p for p in site.router.parameters() if p.ndim == 2]
    if len(matrices) != 1:
        return
    (matrix,) = matrices
    if matrix.shape[0] == site.info.n_experts:
        yield matrix
    elif matrix.shape[1] == site.info.n_experts:
        yield matrix.T


def _experts(site: "Site") -> Iterator["torch.Tensor"]:
    """Yield all experts' matrices, [E, ...] each: stacked by the model, or here."""
    import torch

    n_experts = site.info.n_experts
    if isinstance(site.experts, torch.nn.ModuleList) and len(site.experts) == n_experts:
        for together in zip(*(expert.parameters() for expert in site.experts), strict=True):
            yield torch.stack([one.detach() for one in together])
        return
    second = getattr(site.parent, "output_linear", None)
    modules = [site.experts, *([second] if isinstance(second, torch.nn.Module) else [])]
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim == _STACK and parameter.shape[0] == n_experts:
                yield parameter


def _check(model: str, recorded: Sequence[SiteInfo], found: Sequence[SiteInfo]) -> None:
    def places(infos: Sequence[SiteInfo]) -> list[tuple[int, int, int]]:
        return sorted((info.layer, info.site, info.n_experts) for info in infos)

    if places(recorded) != places(found):
        raise ExplorerError(
            f"The model {quoted(model)} has {len(found)} routers now and the "
            f"run {len(recorded)}, or "
            "other numbers of experts: it is not the model that was recorded."
        )


def _changed(model: str) -> int:
    """Return when the weights of a local model changed, so that others are not taken for them."""
    folder = Path(demo.__file__).parent / "weights" if model == "demo" else Path(model)
    try:
        # not the folders within: a stranger's run may name any folder of this machine
        files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
        return max((file.stat().st_mtime_ns for file in files), default=0)
    except (OSError, ValueError):  # no name that a file can have
        return 0
