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

FEWEST = 12  # different points; UMAP makes nothing sensible of fewer
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


def distinct(values: Floats) -> tuple[Ids, Ids]:
    """Find equal vectors.

    Parameters
    ----------
    values : array [N, D]

    Returns
    -------
    first : array [M]
        Row of each different vector, where it comes first; rising.
    which : array [N]
        The number of every row's vector among those of ``first``.
    """
    if not values.size:
        return np.arange(min(1, len(values))), np.zeros(len(values), dtype=np.int64)
    # as bytes, which are compared much faster than columns; -0 is 0
    rows = np.ascontiguousarray(values + values.dtype.type(0))
    rows = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[which]


def has_umap(values: Floats) -> bool:
    """Return whether UMAP can lay out vectors [N, D], or only their principal components.

    It needs ``FEWEST`` different ones of two dimensions or more, which differ by more than
    rounding.
    """
    if len(values) < FEWEST or values.shape[1] < 2:
        return False
    # nearly always the beginning has enough
    if len(distinct(values[:1_000])[0]) < FEWEST and len(distinct(values)[0]) < FEWEST:
        return False
    return bool(pca(values).any())


def pca(values: Floats, *, seed: int = 0) -> Floats:
    """Return the first two principal components, in well under a second.

    Parameters
    ----------
    values : array [N, D]
        Of many points, some are drawn to find the axes from.

    Returns
    -------
    array [N, 2]
        A missing component (D = 1, fewer than two points, or vectors that are all equal or lie
        on a line) is 0: what rounding leaves of it is no distance between points.
    """
    xy = np.zeros((len(values), 2), dtype=np.float32)
    few = _draw(len(values), _PCA_FITTED, seed)
    if not values.size:
        return xy
    mean = values[few].mean(axis=0, dtype=np.float64)
    centred = values[few] - mean
    largest = float(np.abs(centred).max())
    # what rounding float32 can add to a singular value
    noise = 4 * np.finfo(np.float32).eps * float(np.abs(values[few]).max())
    noise *= float(np.sqrt(len(few)) + np.sqrt(values.shape[1]))
    if largest <= noise / np.sqrt(len(few)):
        return xy
    sizes, axes = _axes(centred / largest, seed)
    for column, (size, axis) in enumerate(zip(sizes[:2], axes[:2], strict=True)):
        if size * largest <= noise:
            break
        # the sign of an axis is arbitrary: its largest part is positive
        axis = axis * np.sign(axis[np.abs(axis).argmax()] or 1)
        for start in range(0, len(values), _CHUNK):
            part = slice(start, start + _CHUNK)
            xy[part, column] = (values[part] - mean) @ axis
    return xy


def _axes(
    centred: npt.NDArray[np.float64], seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the largest singular values, falling, and their axes [2, D]; of less, fewer."""
    from scipy.sparse.linalg import ArpackError, svds

    if min(centred.shape) > 2:
        start = np.random.default_rng(seed).normal(size=min(centred.shape))
        try:
            _, sizes, axes = svds(centred, k=2, v0=start)
        except ArpackError:  # of few dimensions in use, which the slow way knows what to do with
            pass
        else:
            return sizes[::-1], axes[::-1]
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    return sizes, axes


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
    from sklearn.decomposition import PCA

    fitted = PCA(NEIGHBOUR_DIMS, svd_solver="randomized", random_state=seed).fit(scaled(values))
    return lambda rows: np.asarray(fitted.transform(scaled(rows)), dtype=np.float32)


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
