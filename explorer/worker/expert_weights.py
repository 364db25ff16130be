"""Which experts have weights alike: cosines of the router's rows and of the experts' weights.

A run file holds no weights, so that the worker loads the model that the run names, once, and keeps
the cosines in the user's cache folder.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capture.errors import quoted
from capture.model.load import load_model
from capture.model.sites import Site, find_sites
from capture.store import SiteInfo
from explorer.errors import ExplorerError
from explorer.maps import map_cache
from explorer.run import open_run

Floats = npt.NDArray[np.float64]

_STACK = 3  # axes of a tensor that holds all experts' matrices


def measure_cosines(
    path: Path,
    run_path: str,
    model: str,
    revision: str | None,
    on: Callable[[str, float], None],
) -> Path:
    """Load a model and write the cosines of the sites that a run has; for the worker.

    Raises
    ------
    ExplorerError
        If the model is not the one that was recorded.
    capture.errors.CaptureError
        If it cannot be loaded.
    """
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
    return map_cache.write(path, columns, {"model": model})


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


def _rows(site: Site) -> Iterator[dict[str, Any]]:
    n_experts = site.info.n_experts
    for kind, tensors in zip(map_cache.WEIGHT_KINDS, (_router(site), _experts(site)), strict=True):
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


def _router(site: Site) -> Iterator[torch.Tensor]:
    """Yield the router's matrix with a row per expert, where it has one."""
    matrices = [p for p in site.router.parameters() if p.ndim == 2]
    if len(matrices) != 1:
        return
    (matrix,) = matrices
    if matrix.shape[0] == site.info.n_experts:
        yield matrix
    elif matrix.shape[1] == site.info.n_experts:
        yield matrix.T


def _experts(site: Site) -> Iterator[torch.Tensor]:
    """Yield all experts' matrices, [E, ...] each: stacked by the model, or here."""
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
