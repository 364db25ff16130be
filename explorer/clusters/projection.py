"""Vectors laid out in two dimensions: PCA at once, UMAP of landmarks in the background."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# what is being done, and how much of it, 0..1; an exception raised here ends the work
Report = Callable[[str, float], None]

FEWEST = 12  # points; UMAP makes nothing sensible of fewer
# principal components that neighbours are searched in; beyond, distances cost more than they tell
NEIGHBOUR_DIMS = 64
_PLACED_BY = 8  # landmarks around a point that is placed between them
_CHUNK = 16_384  # points placed at a time
_PCA_FITTED = 5_000  # points that the axes of the instant picture are found from


class MapOptions(NamedTuple):
    """How a map is laid out.

    Attributes
    ----------
    n_neighbors : int
        Of each point, that the layout tries to keep near it.
    min_dist : float
        How close points may come, in units of the map.
    n_landmarks : int
        Points that are laid out by UMAP; the others are placed between their nearest ones.
    n_epochs : int
        Passes over the neighbours.
    seed : int
    """

    n_neighbors: int = 15
    min_dist: float = 0.1
    n_landmarks: int = 15_000
    n_epochs: int = 120
    seed: int = 0


def pca(values: Floats, *, seed: int = 0) -> Floats:
    """Return the first two principal components, in well under a second.

    Parameters
    ----------
    values : array [N, D]
        Of many points, some are drawn to find the axes from.

    Returns
    -------
    array [N, 2]
        A missing component (D = 1, or fewer than two points) is 0.
    """
    from scipy.sparse.linalg import svds

    few = _draw(len(values), _PCA_FITTED, seed)
    mean = values[few].mean(axis=0) if len(few) else 0
    centred = (values[few] - mean).astype(np.float64)
    xy = np.zeros((len(values), 2), dtype=np.float32)
    if min(centred.shape) <= 2:
        axes = np.linalg.svd(centred, full_matrices=False)[2] if centred.size else centred
    else:
        start = np.random.default_rng(seed).normal(size=min(centred.shape))
        axes = svds(centred, k=2, v0=start)[2][::-1]
    for column, axis in enumerate(axes[:2]):
        # the sign of an axis is arbitrary: its largest part is positive
        axis = axis * np.sign(axis[np.abs(axis).argmax()] or 1)
        xy[:, column] = values @ axis.astype(np.float32) - float(np.dot(mean, axis))
    return xy


def project(values: Floats, options: MapOptions, report: Report = lambda *_: None) -> Floats:
    """Lay vectors out with UMAP; the same vectors, options and machine give the same map.

    Up to ``n_landmarks`` points are laid out by UMAP, on one thread, as only that can be
    repeated. Every other point goes to the mean of its nearest landmarks' places, nearer ones
    weighing more. Neighbours are exact, by Euclidean distance among principal components.

    Parameters
    ----------
    values : array [N, D]
        Finite.

    Returns
    -------
    array [N, 2]
        The PCA where there are fewer than ``FEWEST`` points.

    References
    ----------
    McInnes, Healy and Melville 2018, arXiv:1802.03426.
    """
    if len(values) < FEWEST:
        return pca(values, seed=options.seed)
    landmarks = _draw(len(values), options.n_landmarks, options.seed)
    report("Finding neighbours", 0.0)
    reduce = _reduction(values[landmarks], options.seed)
    near = reduce(values[landmarks])
    placed = _umap(near, options, report)
    if len(landmarks) == len(values):
        return placed
    return _place(values, landmarks, near, placed, reduce, report)


def _draw(n: int, most: int, seed: int) -> Ids:
    """Return at most so many of n numbers, rising."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def _reduction(values: Floats, seed: int) -> Callable[[Floats], Floats]:
    """Return the function that takes vectors to the principal components of these."""
    if values.shape[1] <= NEIGHBOUR_DIMS or len(values) <= NEIGHBOUR_DIMS:
        return lambda rows: rows
    from sklearn.decomposition import PCA

    fitted = PCA(NEIGHBOUR_DIMS, svd_solver="randomized", random_state=seed).fit(values)
    return lambda rows: np.asarray(fitted.transform(rows), dtype=np.float32)


def _umap(near: Floats, options: MapOptions, report: Report) -> Floats:
    from sklearn.neighbors import NearestNeighbors

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


_BARE = {"bar_format": "{n}", "mininterval": 0.2}


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
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=_PLACED_BY, algorithm="brute").fit(near)
    xy = np.empty((len(values), 2), dtype=np.float32)
    for start in range(0, len(values), _CHUNK):
        report("Placing the other points", 0.7 + 0.25 * start / len(values))
        part = slice(start, start + _CHUNK)
        distance, ids = search.kneighbors(reduce(values[part]))
        # how much farther than the nearest one, against how far that usually is
        beyond = distance - distance[:, :1]
        weight = np.exp(-beyond / np.maximum(beyond.mean(axis=1, keepdims=True), 1e-12))
        weight /= weight.sum(axis=1, keepdims=True)
        xy[part] = np.einsum("nk,nkd->nd", weight, placed[ids])
    xy[landmarks] = placed
    return xy


def versions() -> dict[str, Any]:
    """Return the versions of what lays maps out; another one may give another map."""
    from importlib.metadata import version

    return {name: version(name) for name in ("umap-learn", "scikit-learn", "numpy")}
