"""Groups of vectors where the vectors are, not on their picture; how far both can be trusted."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.manifold import trustworthiness as measured_trustworthiness
from sklearn.metrics import normalized_mutual_info_score as nmi
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from explorer.errors import ExplorerError
from explorer.maps.data import FEWEST_MEASURED, NOISE
from explorer.maps.pca import Floats, Ids, distinct

Labels = npt.NDArray[np.int32]
Scaled = Callable[[Floats], npt.NDArray[Any]]

Method = Literal["kmeans", "gmm", "hdbscan"]

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
        model = KMeans(n_clusters, n_init=3, random_state=seed).fit(scaled(values[rows]))
        converged = model.n_iter_ < model.max_iter
    else:
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


_SAMPLE = 2_000  # points; the measure compares all pairs of them
_NEIGHBOURS = 15
_SHUFFLES = 50


class ClusterAgreement(NamedTuple):
    """How much two labellings of the same points say about each other.

    Attributes
    ----------
    nmi : float, 0..1
        Normalised mutual information: mutual information over the mean of both entropies.
    floor, floor_high : float, 0..1
        What clusters say of domains that were shuffled among the prompts: mean and 95th
        percentile.
    noise : float, 0..1
        Share of points in no cluster; they count as one cluster more.
    n : int
        Points with a domain.
    """

    nmi: float
    floor: float
    floor_high: float
    noise: float
    n: int


def trustworthiness(values: Floats, xy: Floats, *, seed: int = 0) -> float:
    """Return how far near points of a picture are near in the original space too.

    Parameters
    ----------
    values : array [N, D]
    xy : array [N, 2]

    Returns
    -------
    float
        0..1, 1 = every neighbour is a real one; over a sample of 2,000 points and 15 neighbours.
        Equal vectors count as one: which of them is nearer cannot be said. nan for fewer than 10
        different ones.

    References
    ----------
    Venna and Kaski 2001, "Neighborhood preservation in nonlinear projection methods".
    """
    known = distinct(values)[0]
    if len(known) < FEWEST_MEASURED:
        return float("nan")
    few = min(len(known), _SAMPLE)
    chosen = known[np.random.default_rng(seed).choice(len(known), few, replace=False)]
    # the measure is defined for fewer neighbours than half of the points
    return float(
        measured_trustworthiness(
            values[chosen], xy[chosen], n_neighbors=min(_NEIGHBOURS, (few - 1) // 2)
        )
    )


def cluster_domain(
    labels: Labels, domains: npt.NDArray[np.object_], groups: Ids, *, seed: int = 0
) -> ClusterAgreement:
    """Compare clusters with domains.

    Parameters
    ----------
    labels : array [N]
    domains : array [N] of str
        ``""`` = none; such points are left out.
    groups : array [N]
        Prompts. Tokens of a prompt have one domain and are not independent, so that the
        floor shuffles domains among prompts, not among tokens.
    seed : int

    Returns
    -------
    ClusterAgreement
        nan where fewer than two domains are known.
    """
    known = domains != ""
    labels, domains, groups = labels[known], domains[known], groups[known]
    names, domain = np.unique(domains.astype(str), return_inverse=True)
    if len(names) < 2:
        none = float("nan")
        return ClusterAgreement(none, none, none, none, len(labels))
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    of_group = domain[first]
    random = np.random.default_rng(seed)
    floors = [nmi(labels, random.permutation(of_group)[group]) for _ in range(_SHUFFLES)]
    return ClusterAgreement(
        float(nmi(labels, domain)),
        float(np.mean(floors)),
        float(np.percentile(floors, 95)),
        float((labels == NOISE).mean()),
        len(labels),
    )
