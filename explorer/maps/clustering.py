"""Groups of vectors, found where the vectors are and not on their picture."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import ExplorerError
from explorer.maps.projection import distinct

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Scaled = Callable[[Floats], npt.NDArray[Any]]
Method = Literal["kmeans", "gmm", "hdbscan"]

NOISE = -1
MAX_CLUSTERS = 64
# points that a method is fitted on; the others join the cluster that they would be given
FITTED = {"kmeans": 20_000, "gmm": 20_000, "hdbscan": 4_000}
_CHUNK = 16_384
_MIN_SAMPLES = 5  # of HDBSCAN: neighbours that make a place dense
# points; fewer are one cluster
_SMALLEST = {"kmeans": 4, "gmm": 4, "hdbscan": _MIN_SAMPLES}


class Clustering(NamedTuple):
    """Which cluster each point is in.

    Attributes
    ----------
    labels : array [N], int32
        0 is the largest cluster; -1 (``NOISE``) = in none, HDBSCAN only.
    n_clusters : int
    n_fitted : int
        Points that the clusters were found from.
    converged : bool
        False where the method stopped at its limit of steps.
    """

    labels: Labels
    n_clusters: int
    n_fitted: int
    converged: bool = True


def cluster(values: Floats, method: Method, *, n_clusters: int = 12, seed: int = 0) -> Clustering:
    """Group vectors by Euclidean distance in all their dimensions.

    Parameters
    ----------
    values : array [N, D]
    method : {"kmeans", "gmm", "hdbscan"}
        K-Means; a mixture of Gaussians with diagonal covariances; HDBSCAN, which finds how many
        clusters there are and leaves points out, and whose smallest cluster is 1/200 of the
        fitted points.
    n_clusters : int
        For K-Means and the mixture; fewer where there are fewer points, or different ones.
    seed : int

    Raises
    ------
    ExplorerError
        For a number of clusters that is not 2 to ``MAX_CLUSTERS``.
    """
    if not 2 <= n_clusters <= MAX_CLUSTERS:
        raise ExplorerError(
            f"Expected 2 to {MAX_CLUSTERS} clusters, got {n_clusters}. Choose another number."
        )
    random = np.random.default_rng(seed)
    few = min(len(values), FITTED[method])
    rows = np.sort(random.choice(len(values), few, replace=False))
    n_distinct = len(distinct(values[rows])[0])
    if few < _SMALLEST[method] or n_distinct < 2:
        return Clustering(np.zeros(len(values), np.int32), min(1, len(values)), few)
    # around their middle and in one unit for all dimensions together: it moves no cluster, but
    # limits below are in it, and float32 has digits for what differs
    centre = values[rows].mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean((values[rows] - centre) ** 2)))
    exact = np.float64 if method == "gmm" else np.float32

    def scaled(part: Floats) -> npt.NDArray[Any]:
        return np.asarray((part - centre) / scale, dtype=exact)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said by ``converged``
        if method == "hdbscan":
            labels, converged = _hdbscan(values, rows, scaled), True
        else:
            n = min(n_clusters, few // 2, n_distinct)
            labels, converged = _fit(values, rows, scaled, method, n, seed)
    labels = _by_size(labels)
    return Clustering(labels, int(labels.max(initial=NOISE)) + 1, few, converged)


def _fit(
    values: Floats, rows: Ids, scaled: Scaled, method: Method, n_clusters: int, seed: int
) -> tuple[Labels, bool]:
    if method == "kmeans":
        from sklearn.cluster import KMeans

        model = KMeans(n_clusters, n_init=3, random_state=seed).fit(scaled(values[rows]))
        converged = model.n_iter_ < model.max_iter
    else:
        from sklearn.mixture import GaussianMixture

        model = GaussianMixture(
            n_clusters, covariance_type="diag", reg_covar=1e-4, random_state=seed
        ).fit(scaled(values[rows]))
        converged = bool(model.converged_)
    parts = [
        model.predict(scaled(values[start : start + _CHUNK]))
        for start in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(parts).astype(np.int32), converged


def _hdbscan(values: Floats, rows: Ids, scaled: Scaled) -> Labels:
    from sklearn.cluster import HDBSCAN
    from sklearn.neighbors import NearestNeighbors

    fitted = scaled(values[rows])
    smallest = max(_MIN_SAMPLES, len(fitted) // 200)
    model = HDBSCAN(min_cluster_size=smallest, min_samples=_MIN_SAMPLES, copy=True)
    found = model.fit_predict(fitted)
    if len(fitted) == len(values):
        return np.asarray(found, dtype=np.int32)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(fitted)
    parts = [
        found[
            search.kneighbors(scaled(values[start : start + _CHUNK]), return_distance=False)[:, 0]
        ]
        for start in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(parts).astype(np.int32)


def _by_size(labels: Labels) -> Labels:
    """Return the labels with clusters numbered by falling size."""
    names, sizes = np.unique(labels[labels != NOISE], return_counts=True)
    place = {int(name): i for i, name in enumerate(names[np.argsort(-sizes, kind="stable")])}
    table = np.array([place.get(name, NOISE) for name in range(int(labels.max(initial=0)) + 1)])
    return np.where(labels == NOISE, NOISE, table[labels]).astype(np.int32)
