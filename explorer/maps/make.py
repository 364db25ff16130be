"""What the worker does for a map: lay its vectors out with UMAP, group or reroute them; keep it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from explorer.errors import RunError
from explorer.maps import map_cache
from explorer.maps.data import Points, Source, read_points
from explorer.maps.map_cache import MapOptions
from explorer.maps.pca import CHUNK, Floats, Ids, distinct, draw, has_umap, pca
from explorer.maps.point_clusters import Method, cluster, cluster_domain, trustworthiness
from explorer.run import Run, open_run

# what is being done, and how much of it, 0..1; an exception raised here ends the work
Report = Callable[[str, float], None]
# principal components that neighbours are searched in; beyond, distances cost more than they tell
NEIGHBOUR_DIMS = 64
_PLACED_BY = 8  # landmarks around a point that is placed between them
_BARE = {"bar_format": "{n}", "mininterval": 0.2}


def make_map(run_path: str, source: Source, out: Path, options: MapOptions, report: Report) -> Path:
    """Lay out the vectors of a run and keep the map at ``out``.

    Raises
    ------
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
    check_content(out, map_cache.map_path(points.digest, options))
    xy = project(points.values, options, report)
    report("Measuring", 0.96)
    flat = pca(points.values, seed=options.seed)
    facts = {
        "trustworthiness": _known(trustworthiness(points.values, xy, seed=options.seed)),
        "trustworthiness_pca": _known(trustworthiness(points.values, flat, seed=options.seed)),
        "landmarks": min(len(xy), options.n_landmarks),
        "options": options._asdict(),
    }
    return map_cache.write(out, {"x": xy[:, 0], "y": xy[:, 1]}, facts)


def make_clusters(
    run_path: str,
    source: Source,
    out: Path,
    method: Method,
    n_clusters: int,
    seed: int,
    report: Report,
) -> Path:
    """Group the vectors of a run and keep the clusters at ``out``.

    Raises
    ------
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
        domains = _domains(run, points, source)
    check_content(out, map_cache.clusters_path(points.digest, method, n_clusters, seed))
    report("Looking for clusters", 0.1)
    found = cluster(points.values, method, n_clusters=n_clusters, seed=seed)
    report("Comparing with domains", 0.8)
    facts: dict[str, Any] = {
        "n_clusters": found.n_clusters,
        "fitted": found.n_fitted,
        "converged": found.converged,
        "noise": float((found.labels < 0).mean()),
    }
    if domains is not None:
        agreement = cluster_domain(found.labels, domains, points.groups, seed=seed)
        facts["domains"] = {k: _known(v) for k, v in agreement._asdict().items()}
    return map_cache.write(out, {"cluster": found.labels}, facts)


def check_content(out: Path, expected: Path) -> None:
    """Refuse other vectors than those that a file of the cache is named after."""
    if out.name != expected.name:
        raise RunError(
            "Expected the vectors that the page showed, but the run's file or a library changed "
            "since. Reload the page."
        )


def _domains(run: Run, points: Points, source: Source) -> npt.NDArray[np.object_] | None:
    """Return the domain of every point, None for units that have none of their own."""
    if source.unit == "experts":
        return None
    rows = run.query("SELECT prompt_id, coalesce(domain, '') AS domain FROM prompts ORDER BY ALL")
    at = np.searchsorted(rows["prompt_id"].to_numpy(dtype=np.int64), points.groups)
    return np.asarray(rows["domain"].to_numpy(dtype=object)[at])


def _known(value: float) -> float | None:
    """Return a number as JSON has it: what is not defined is null."""
    return None if np.isnan(value) else float(value)


def project(values: Floats, options: MapOptions, report: Report = lambda *_: None) -> Floats:
    """Lay vectors out with UMAP; the same vectors, options and machine give the same map.

    Equal vectors are one point of the map. Up to ``n_landmarks`` points are laid out by UMAP, on
    one thread, as only that can be repeated. Every other point goes to the mean of its nearest
    landmarks' places, nearer ones weighing more. Neighbours are exact, by Euclidean distance
    among principal components.

    Parameters
    ----------
    values : array [N, D]
        Finite.

    Returns
    -------
    array [N, 2]
        The PCA where UMAP has too little to lay out, see ``has_umap``.

    References
    ----------
    McInnes, Healy and Melville 2018, arXiv:1802.03426.
    """
    if not has_umap(values):
        return pca(values, seed=options.seed)
    first, which = distinct(values)
    if len(first) < len(values):
        return _laid_out(values[first], options, report)[which]
    return _laid_out(values, options, report)


def _laid_out(values: Floats, options: MapOptions, report: Report) -> Floats:
    """Lay out vectors that are all different."""
    landmarks = draw(len(values), options.n_landmarks, options.seed)
    report("Finding neighbours", 0.0)
    reduce = _reduction(values[landmarks], options.seed)
    near = reduce(values[landmarks])
    placed = _umap(near, options, report)
    if len(landmarks) == len(values):
        return placed
    return _place(values, landmarks, near, placed, reduce, report)


def _reduction(values: Floats, seed: int) -> Callable[[Floats], Floats]:
    """Return the function that takes vectors to the principal components of these.

    Around their mean and in a unit near their spread, where float32 tells neighbours apart
    whatever the size of the numbers; a power of two changes no digit.
    """
    mean = values.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(np.mean((values - mean) ** 2)))
    unit = 2.0 ** -np.round(np.log2(spread))

    def scaled(rows: Floats) -> Floats:
        return np.asarray((rows - mean) * unit, dtype=np.float32)

    if values.shape[1] <= NEIGHBOUR_DIMS or len(values) <= NEIGHBOUR_DIMS:
        return scaled
    fitted = PCA(NEIGHBOUR_DIMS, svd_solver="randomized", random_state=seed).fit(scaled(values))
    return lambda rows: np.asarray(fitted.transform(scaled(rows)), dtype=np.float32)


def _umap(near: Floats, options: MapOptions, report: Report) -> Floats:
    n_neighbors = min(options.n_neighbors, len(near) - 1)
    search = NearestNeighbors(n_neighbors=n_neighbors + 1, algorithm="brute").fit(near)
    distances, ids = search.kneighbors(near)
    report("Starting UMAP; the first time takes longer", 0.1)
    with warnings.catch_warnings():
        # duplicates, points apart from all others, and what umap could do with tensorflow are no
        # news to a reader of the map
        warnings.simplefilter("ignore")
        from umap import UMAP

        mapper = UMAP(
            n_neighbors=n_neighbors + 1,
            min_dist=options.min_dist,
            n_epochs=options.n_epochs,
            init="pca",
            random_state=options.seed,
            n_jobs=1,
            precomputed_knn=(ids, distances.astype(np.float32)),
            tqdm_kwds={"file": _Epochs(options.n_epochs, report), "disable": False} | _BARE,
        )
        return np.asarray(mapper.fit_transform(near), dtype=np.float32)


class _Epochs:
    """The file that UMAP's progress bar writes to: it passes the number of epochs on."""

    def __init__(self, n_epochs: int, report: Report) -> None:
        self._n_epochs, self._report = n_epochs, report

    def write(self, text: str) -> None:
        if text.strip().isdecimal():
            self._report("Laying out", 0.15 + 0.55 * int(text) / self._n_epochs)

    def flush(self) -> None:
        """Do nothing: there is nothing to flush."""


def _place(
    values: Floats,
    landmarks: Ids,
    near: Floats,
    placed: Floats,
    reduce: Callable[[Floats], Floats],
    report: Report,
) -> Floats:
    """Put every point between its nearest landmarks; landmarks stay where they are."""
    search = NearestNeighbors(n_neighbors=_PLACED_BY, algorithm="brute").fit(near)
    xy = np.empty((len(values), 2), dtype=np.float32)
    for start in range(0, len(values), CHUNK):
        report("Placing the other points", 0.7 + 0.25 * start / len(values))
        part = slice(start, start + CHUNK)
        distance, ids = search.kneighbors(reduce(values[part]))
        # how much farther than the nearest one, against how far that usually is
        beyond = distance - distance[:, :1]
        weight = np.exp(-beyond / np.maximum(beyond.mean(axis=1, keepdims=True), 1e-12))
        weight /= weight.sum(axis=1, keepdims=True)
        xy[part] = np.einsum("nk,nkd->nd", weight, placed[ids])
    xy[landmarks] = placed
    return xy
