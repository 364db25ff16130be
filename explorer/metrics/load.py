"""How evenly a layer's experts share the work.

Every metric takes the assignments of one layer's experts, idle experts included: leaving idle
experts out makes any layer look balanced. Metrics of the same layer over different numbers of
tokens are not comparable without their sampling floor (``sampling_floor``).
"""

from collections.abc import Callable
from functools import lru_cache
from math import ceil, floor, log
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError
from explorer.registry import Registry

LoadMetric = Callable[[npt.ArrayLike], float]
LOAD_METRICS: Registry[LoadMetric] = Registry("load metric")

# products such as 1.1 * 10 end a hair above the integer; the slack keeps ceil from adding a place
_ROUNDING_SLACK = 1e-9


class Floor(NamedTuple):
    """What a metric takes for perfectly uniform random routing of the same tokens.

    Attributes
    ----------
    mean : float
    low, high : float
        5th and 95th percentile over the draws.
    """

    mean: float
    low: float
    high: float


def _counts(load: npt.ArrayLike) -> npt.NDArray[np.float64]:
    counts = np.asarray(load, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise MetricError(
            f"Expected the load of one layer, an array [E] with E >= 1, got shape {counts.shape}. "
            "Call the metric once per layer: expert ids are not comparable across layers."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise MetricError(
            "Expected finite loads >= 0, got a negative or missing one. "
            "An idle expert has load 0; leave out layers that were not recorded."
        )
    return counts


@LOAD_METRICS.add("max_violation")
def max_violation(load: npt.ArrayLike) -> float:
    r"""Return MaxVio, the busiest expert's excess over a fair share.

    .. math:: \mathrm{MaxVio} = \frac{\max_e f_e - \bar f}{\bar f}

    Parameters
    ----------
    load : array [E], assignments

    Returns
    -------
    float
        0 for perfect balance, ``E - 1`` when one expert takes everything, nan without load.

    References
    ----------
    Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arXiv:2408.15664.
    """
    counts = _counts(load)
    fair = counts.mean()
    return float(counts.max() / fair - 1) if fair > 0 else float("nan")


@LOAD_METRICS.add("coefficient_of_variation")
def coefficient_of_variation(load: npt.ArrayLike) -> float:
    """Return the population standard deviation of the load over its mean.

    Parameters
    ----------
    load : array [E], assignments

    Returns
    -------
    float
        0 for perfect balance, ``sqrt(E - 1)`` at collapse, nan without load.

    Notes
    -----
    Shazeer et al. 2017 (arXiv:1701.06538) train on the square of this, of load and of importance.
    """
    counts = _counts(load)
    fair = counts.mean()
    return float(counts.std() / fair) if fair > 0 else float("nan")


@LOAD_METRICS.add("gini")
def gini(load: npt.ArrayLike) -> float:
    r"""Return the Gini coefficient of the load.

    .. math:: G = \frac{2 \sum_i i\, c_{(i)}}{E \sum_e c_e} - \frac{E + 1}{E}

    Parameters
    ----------
    load : array [E], assignments

    Returns
    -------
    float
        0 for perfect balance, ``1 - 1/E`` at collapse, nan without load. Twice the area between
        the diagonal and ``lorenz_curve``.
    """
    counts = np.sort(_counts(load))
    total = counts.sum()
    if total == 0:
        return float("nan")
    ranks = np.arange(1, counts.size + 1)
    value = 2 * (ranks @ counts) / (counts.size * total) - (counts.size + 1) / counts.size
    return float(max(0.0, value))


@LOAD_METRICS.add("normalized_entropy")
def normalized_entropy(load: npt.ArrayLike) -> float:
    """Return the entropy of the experts' shares over its largest value, ``ln E``.

    Parameters
    ----------
    load : array [E], assignments

    Returns
    -------
    float
        1 for perfect balance, 0 at collapse, nan without load and for a single expert.
    """
    counts = _counts(load)
    total = counts.sum()
    if total == 0 or counts.size == 1:
        return float("nan")
    share = counts[counts > 0] / total
    return float(min(1.0, max(0.0, -(share @ np.log(share)) / log(counts.size))))


@LOAD_METRICS.add("dead_experts")
def dead_experts(load: npt.ArrayLike) -> int:
    """Return how many experts got no assignment at all.

    Parameters
    ----------
    load : array [E], assignments

    Notes
    -----
    With few tokens dead experts are expected; compare with the sampling floor.
    """
    return int((_counts(load) == 0).sum())


def expert_capacity(n_assignments: float, n_experts: int, capacity_factor: float) -> int:
    """Return the places of one expert, ``ceil(capacity_factor * assignments / experts)``.

    Parameters
    ----------
    n_assignments : float
        Tokens times experts per token.
    n_experts : int
    capacity_factor : float
        1 leaves exactly as many places as there are assignments.

    Notes
    -----
    Megatron-Core ``get_capacity``, without its ``min_capacity``. Differs from the source: a
    product that floating point left a hair above an integer is not rounded up.
    """
    if not capacity_factor >= 0:
        raise MetricError(
            f"Expected a capacity factor >= 0, got {capacity_factor}; 1.25 is a usual value."
        )
    return ceil(capacity_factor * n_assignments / n_experts - _ROUNDING_SLACK)


class Lorenz(NamedTuple):
    """A Lorenz curve.

    Attributes
    ----------
    experts : array [E + 1], 0..1
        Share of the experts, least loaded first.
    load : array [E + 1], 0..1
        Share of the assignments that these experts take together.
    """

    experts: npt.NDArray[np.float64]
    load: npt.NDArray[np.float64]


def lorenz_curve(load: npt.ArrayLike) -> Lorenz:
    """Return what share of the load the least loaded experts carry.

    Parameters
    ----------
    load : array [E], assignments

    Returns
    -------
    Lorenz
        Starts at (0, 0), ends at (1, 1); the diagonal is perfect balance. All nan in ``load``
        without any assignment.
    """
    counts = np.sort(_counts(load))
    experts = np.linspace(0.0, 1.0, counts.size + 1)
    total = counts.sum()
    if total == 0:
        return Lorenz(experts, np.full(counts.size + 1, np.nan))
    return Lorenz(experts, np.concatenate([[0.0], np.cumsum(counts)]) / total)


@lru_cache(maxsize=64)
def uniform_loads(
    n_tokens: int, n_experts: int, top_k: float, n_draws: int = 200, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Draw the loads of a layer that routes every token uniformly at random.

    Every token takes its experts without replacement, as a top-k router does. The counts are
    exact at any number of tokens and cost ``E`` draws instead of one per token: going through the
    experts one by one, a token that still has ``r`` of its choices left among ``m`` experts takes
    the next one with probability ``r / m``, so only how many tokens have ``r`` left must be kept.

    Parameters
    ----------
    n_tokens, n_experts : int
    top_k : float
        Experts per token; a fraction means that part of the tokens take one more, as they do
        where slots may stay empty.
    n_draws : int
    seed : int

    Returns
    -------
    array [n_draws, E], assignments
        Read only, since it is cached.
    """
    if n_tokens < 0 or not 0 <= top_k <= n_experts:
        raise MetricError(
            f"Expected n_tokens >= 0 and 0 <= top_k <= n_experts, got {n_tokens}, {top_k} and "
            f"{n_experts}. Pass the experts per token, not the assignments of the layer."
        )
    random = np.random.default_rng(seed)
    low, slots = floor(top_k), ceil(top_k)
    left = np.zeros((n_draws, slots + 1), dtype=np.int64)  # [draw, choices left]
    left[:, slots] = n_tokens
    if slots != low:
        left[:, slots] = round(n_tokens * (top_k - low))
        left[:, low] = n_tokens - left[:, slots]
    loads = np.empty((n_draws, n_experts), dtype=np.int64)
    for expert in range(n_experts):
        chance = np.minimum(1.0, np.arange(slots + 1) / (n_experts - expert))
        taken = random.binomial(left, chance)
        loads[:, expert] = taken.sum(axis=1)
        left -= taken
        left[:, :-1] += taken[:, 1:]
    loads.setflags(write=False)
    return loads


def sampling_floor(
    metric: str | LoadMetric,
    *,
    n_tokens: int,
    n_experts: int,
    top_k: float,
    n_draws: int = 200,
    seed: int = 0,
) -> Floor:
    """Return the value that a metric takes for perfectly uniform routing of this many tokens.

    No router can be expected to do better: a measured value within ``low`` and ``high`` shows
    no imbalance. Monte Carlo with a fixed seed; see ``uniform_loads`` for the draw.

    Parameters
    ----------
    metric : str or callable
        A name in ``LOAD_METRICS``, or a function of the load of one layer.
    n_tokens, n_experts : int
    top_k : float
        Experts per token.
    n_draws, seed : int

    Returns
    -------
    Floor
        All nan without tokens.

    Notes
    -----
    Two values are known exactly and used in the tests: with ``p = k/E`` the mean of CV² is
    ``(1 - p) / (n p)``, and the mean number of dead experts is ``E (1 - p)**n``.
    """
    return _floor(metric, n_tokens, n_experts, top_k, n_draws, seed)


def balance(load: npt.ArrayLike, n_tokens: int, *, n_draws: int = 200) -> dict[str, float]:
    """Return how evenly the experts of one layer are used, by the names of a comparison's columns.

    Parameters
    ----------
    load : array [E], assignments
    n_tokens : int
        That came to the layer.
    n_draws : int
        Of the floor.

    Returns
    -------
    dict of str to float
        ``max_violation``, what uniform routing would have (``max_violation_floor``), ``cv``,
        ``gini``, ``dead_experts`` and ``load_entropy``.
    """
    counts = _counts(load)
    top_k = float(counts.sum()) / max(n_tokens, 1)
    floor = sampling_floor(
        "max_violation", n_tokens=n_tokens, n_experts=len(counts), top_k=top_k, n_draws=n_draws
    )
    return {
        "max_violation": max_violation(counts),
        "max_violation_floor": floor.mean,
        "cv": coefficient_of_variation(counts),
        "gini": gini(counts),
        "dead_experts": float(dead_experts(counts)),
        "load_entropy": normalized_entropy(counts),
    }


@lru_cache(maxsize=256)
def _floor(
    metric: str | LoadMetric, n_tokens: int, n_experts: int, top_k: float, n_draws: int, seed: int
) -> Floor:
    # layers of a model have the same floor, and pages ask for it again
    function = LOAD_METRICS[metric] if isinstance(metric, str) else metric
    if n_tokens == 0 or top_k == 0:
        return Floor(float("nan"), float("nan"), float("nan"))
    loads = uniform_loads(n_tokens, n_experts, top_k, n_draws, seed)
    values = np.array([function(load) for load in loads], dtype=np.float64)
    low, high = np.percentile(values, [5, 95])
    return Floor(float(values.mean()), float(low), float(high))


def forget_floors() -> None:
    """Draw floors anew, as in a process that has shown nothing yet; for measurements of time."""
    uniform_loads.cache_clear()
    _floor.cache_clear()
