"""How far a picture can be trusted, and how much clusters say about domains."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.maps.clustering import NOISE, Labels
from explorer.maps.projection import distinct

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

FEWEST_MEASURED = 10  # different points that trustworthiness is measured on
_SAMPLE = 2_000  # points; the measure compares all pairs of them
_NEIGHBOURS = 15
_SHUFFLES = 50


class Agreement(NamedTuple):
    """How much two labellings of the same points say about each other.

    Attributes
    ----------
    nmi : float, 0..1
        Normalised mutual information: mutual information over the mean of both entropies.
    floor, floor_high : float, 0..1
        What clusters say of domains that were dealt out anew among the prompts: mean and 95th
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
    from sklearn.manifold import trustworthiness as measure

    known = distinct(values)[0]
    if len(known) < FEWEST_MEASURED:
        return float("nan")
    few = min(len(known), _SAMPLE)
    chosen = known[np.random.default_rng(seed).choice(len(known), few, replace=False)]
    # the measure is defined for fewer neighbours than half of the points
    return float(measure(values[chosen], xy[chosen], n_neighbors=min(_NEIGHBOURS, (few - 1) // 2)))


def cluster_domain(
    labels: Labels, domains: npt.NDArray[np.object_], groups: Ids, *, seed: int = 0
) -> Agreement:
    """Compare clusters with domains.

    Parameters
    ----------
    labels : array [N]
    domains : array [N] of str
        ``""`` = none; such points are left out.
    groups : array [N]
        Prompts. Tokens of a prompt have one domain and are no independent witnesses, so that the
        floor deals domains out among prompts, not among tokens.
    seed : int

    Returns
    -------
    Agreement
        nan where fewer than two domains are known.
    """
    from sklearn.metrics import normalized_mutual_info_score as nmi

    known = domains != ""
    labels, domains, groups = labels[known], domains[known], groups[known]
    names, domain = np.unique(domains.astype(str), return_inverse=True)
    if len(names) < 2:
        none = float("nan")
        return Agreement(none, none, none, none, len(labels))
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    of_group = domain[first]
    random = np.random.default_rng(seed)
    floors = [nmi(labels, random.permutation(of_group)[group]) for _ in range(_SHUFFLES)]
    return Agreement(
        float(nmi(labels, domain)),
        float(np.mean(floors)),
        float(np.percentile(floors, 95)),
        float((labels == NOISE).mean()),
        len(labels),
    )
