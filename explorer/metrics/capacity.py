"""What is dropped when every expert takes only so many tokens of a batch.

A batch is one forward pass: that is the group over which a limit acts in a running system. How
many assignments a batch drops depends only on its loads; *which* ones, and so how much combine
weight is lost, depends on the drop policy.

References
----------
Megatron-Core ``topk_softmax_with_capacity`` and ``get_capacity`` (``moe_utils.py``),
``--moe-token-drop-policy``; Switch Transformer, arXiv:2101.03961, section 2.2.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import quoted
from explorer.errors import MetricError
from explorer.metrics.load import expert_capacity

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Policy = Literal["position", "probs"]
POLICIES: tuple[Policy, ...] = ("position", "probs")


class Shares(NamedTuple):
    """What a capacity limit drops.

    Attributes
    ----------
    assignments : float, 0..1
        Share of the assignments that are dropped; the same for both policies.
    weight : float, 0..1
        Share of the combine weight that is dropped; nan without weights.
    tokens : float, 0..1
        Share of the tokens that lose every expert they chose.
    """

    assignments: float
    weight: float
    tokens: float


class Arrival(NamedTuple):
    """The order in which assignments reach their experts; one sort serves every factor.

    Attributes
    ----------
    rank : array [T, K]
        How many assignments of the same batch the expert prefers to this one; -1 = empty slot.
    best_rank : array [T]
        The smallest rank of each token's assignments; -1 = it has none.
    batch : array [T]
        Batch number of each token, 0 .. B-1.
    assignments : array [B]
        Assignments per batch.
    weights : array [T, K] or None
    total_weight : float
        Of the assignments; nan without weights.
    n_experts : int
    """

    rank: npt.NDArray[np.int64]
    best_rank: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    assignments: npt.NDArray[np.int64]
    weights: npt.NDArray[np.floating[Any]] | None
    total_weight: float
    n_experts: int

    def shares(self, capacity_factors: Sequence[float]) -> list[Shares]:
        """Return what each capacity factor drops, from one pass over the assignments.

        What a factor drops of a batch are the assignments from some rank on. So those of every
        rank are counted once, over all batches with as many assignments, hence as many places.
        """
        sizes, kind = np.unique(self.assignments, return_inverse=True)
        of_token = kind[self.batch]
        width = np.zeros(len(sizes), dtype=np.int64)
        np.maximum.at(width, of_token, self.rank.max(axis=1, initial=-1) + 1)
        ends = np.cumsum(width)
        real = self.rank >= 0
        cell = (self.rank + (ends - width)[of_token][:, None])[real]
        has = self.best_rank >= 0
        first = (self.best_rank + (ends - width)[of_token])[has]
        size = int(ends[-1]) if len(ends) else 0
        weights = None if self.weights is None else self.weights[real]
        counted = [
            (_before(cell, None, size), float(self.assignments.sum())),
            (_before(cell, weights, size), self.total_weight),
            (_before(first, None, size), float(np.count_nonzero(has))),
        ]
        found = []
        for factor in capacity_factors:
            kept = ends - width + np.minimum(_places(sizes, self.n_experts, factor), width)
            shares = [
                _share(float((sums[ends] - sums[kept]).sum()), all_) for sums, all_ in counted
            ]
            found.append(Shares(*shares))
        return found


def _before(cell: Ints, weights: npt.NDArray[np.floating[Any]] | None, size: int) -> Floats:
    """Return the sums [size + 1] of what is in the cells before each one."""
    return np.append(0.0, np.cumsum(np.bincount(cell, weights, minlength=size)))


def _places(assignments: Ints, n_experts: int, capacity_factor: float) -> Ints:
    """Return the places [B] of an expert in batches of so many assignments."""
    places = [expert_capacity(int(n), n_experts, capacity_factor) for n in assignments]
    return np.array(places, dtype=np.int64)


def arrival(
    expert_ids: npt.ArrayLike,
    n_experts: int,
    *,
    policy: Policy = "position",
    weights: npt.ArrayLike | None = None,
    batch: npt.ArrayLike | None = None,
) -> Arrival:
    """Return the order of the assignments at their experts.

    Parameters
    ----------
    expert_ids : array [T, K], int
        Chosen experts of each token, tokens in the order of the forward pass; -1 = empty slot.
    n_experts : int
    policy : {"position", "probs"}
        ``position``: an expert keeps the tokens that come first. ``probs``: it keeps those with
        the largest weight, earlier tokens first among equals.
    weights : array [T, K], optional
        Combine weights; needed for ``probs``.
    batch : array [T], int, optional
        Which batch a token was in; one batch without it.

    Notes
    -----
    Slots do not compete: a token takes an expert once, so the order within an expert is the order
    of its tokens. GShard and Switch with k > 1 serve all first choices before any second one;
    that is a third policy, which Megatron-Core does not have.
    Differs from the source: Megatron counts ``T * K`` assignments also where slots are empty; here
    only real ones count. Padding is not in the run and takes no place.
    """
    ids = np.asarray(expert_ids)
    shape = ids.shape
    if ids.ndim != 2 or (ids.size and (ids.min() < -1 or ids.max() >= n_experts)):
        raise MetricError(
            f"Expected expert ids [T, K] within -1 .. {n_experts - 1}, got shape {shape}"
            f"{f' with ids {ids.min()} .. {ids.max()}' if ids.size else ''}. "
            "Pass one layer's ids, one row per token."
        )
    if policy not in POLICIES:
        raise MetricError(f"Expected a policy of {POLICIES}, got {quoted(policy)}.")
    gates = None if weights is None else _floats(weights)
    if gates is None and policy == "probs":
        raise MetricError("The policy 'probs' drops by weight: pass weights [T, K], or 'position'.")
    if gates is not None and gates.shape != shape:
        raise MetricError(f"Expected weights of shape {shape} like the ids, got {gates.shape}.")
    numbers, counts = _batches(batch, ids)
    real = np.flatnonzero(ids >= 0)
    group = (numbers[:, None] * n_experts + ids).ravel()[real].astype(np.uint64)
    order = np.arange(len(real))
    if policy == "probs" and gates is not None:
        order = _sorted_by(_descending(gates.ravel()[real]), order)
    order = _sorted_by(group, order)
    grouped = group[order]
    first = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]]) if len(grouped) else order
    starts = np.repeat(first, np.diff(np.r_[first, len(grouped)]))
    rank_of = np.full(ids.size, -1, dtype=np.int64)
    rank_of[real[order]] = np.arange(len(grouped)) - starts
    rank: Ints = rank_of.reshape(shape)
    best: Ints = np.where(rank < 0, len(real), rank).min(axis=1, initial=len(real))
    best[best == len(real)] = -1
    total = float("nan") if gates is None else float(gates.ravel()[real].sum(dtype=np.float64))
    return Arrival(rank, best, numbers, counts, gates, total, n_experts)


def _floats(weights: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
    given = np.asarray(weights)
    return given if given.dtype == np.float32 else given.astype(np.float64)


def _descending(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Return whole numbers that are smaller where a value is larger, and equal where it is."""
    kind: Any = np.uint32 if values.dtype == np.float32 else np.uint64
    bits = (values + 0.0).view(kind)  # -0.0 becomes 0.0
    top = kind(1 << (8 * bits.itemsize - 1))
    ordered: npt.NDArray[Any] = np.where(bits & top, bits, ~(bits | top))
    return ordered


def _sorted_by(keys: npt.NDArray[Any], order: Ints) -> Ints:
    """Sort an order by keys, equal ones as they are, 16 bits at a time.

    NumPy sorts 16-bit numbers by counting, several times as fast as it compares longer ones.
    """
    most = int(keys.max(initial=0))
    for shift in range(0, max(1, most.bit_length()), 16):
        digits = ((keys >> keys.dtype.type(shift)) & keys.dtype.type(0xFFFF)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def curve(
    expert_ids: npt.ArrayLike,
    n_experts: int,
    capacity_factors: Sequence[float],
    *,
    policy: Policy = "position",
    weights: npt.ArrayLike | None = None,
    batch: npt.ArrayLike | None = None,
) -> list[Shares]:
    """Return what each capacity factor drops; arguments as for :func:`arrival`.

    An expert takes ``ceil(capacity_factor * assignments / experts)`` tokens of a batch.
    """
    order = arrival(expert_ids, n_experts, policy=policy, weights=weights, batch=batch)
    return order.shares(capacity_factors)


def _batches(
    batch: npt.ArrayLike | None, ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return batch numbers [T] from 0, and assignments per batch [B]."""
    if batch is None:
        numbers = np.zeros(len(ids), dtype=np.int64)
    else:
        names = np.asarray(batch)
        if names.shape != (len(ids),):
            raise MetricError(
                f"Expected one batch per token, shape ({len(ids)},), got {names.shape}."
            )
        numbers = np.unique(names, return_inverse=True)[1].astype(np.int64)
    real = (ids >= 0).sum(axis=1)
    n_batches = int(numbers.max()) + 1 if len(numbers) else 0
    counts = np.bincount(numbers, real, minlength=n_batches).astype(np.int64)
    return numbers, counts


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
