"""The picture of vectors that is there at once: their first two principal components."""

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import ArpackError, svds

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

FEWEST = 12  # different points; UMAP makes nothing sensible of fewer
CHUNK = 16_384  # points placed at a time
_PCA_FITTED = 5_000  # points that the axes of the instant picture are found from


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
        on a line) is 0: what rounding leaves is not a distance between points.
    """
    xy = np.zeros((len(values), 2), dtype=np.float32)
    few = draw(len(values), _PCA_FITTED, seed)
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
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            xy[part, column] = (values[part] - mean) @ axis
    return xy


def _axes(
    centred: npt.NDArray[np.float64], seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the largest singular values, falling, and their axes [2, D]; of less, fewer."""
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


def draw(n: int, most: int, seed: int) -> Ids:
    """Return at most so many of n numbers, rising."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
