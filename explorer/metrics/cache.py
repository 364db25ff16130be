"""What a cache of experts would hit: LRU, LFU, pins, prefetching, and Belady's bound.

One layer at a time: a token's experts are looked up in order of slot. A hit is an expert that is in
the cache; a miss loads it and, where the cache is full, evicts another one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numba
import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Ids = npt.NDArray[np.int64]
Policy = Literal["lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def hit_rate(ids: npt.ArrayLike, *, slots: int, policy: Policy = "lru") -> float:
    """Return the share of lookups of one layer that a cache of ``slots`` experts answers.

    The cache starts empty, so that the first lookup of every expert is a miss.

    Parameters
    ----------
    ids : array [T, k] of int
        The experts of each token, tokens in the order in which they ran; -1 marks an empty slot,
        which is not looked up.
    slots : int, experts
        How many experts the cache holds, at least 1.
    policy : {"lru", "lfu", "belady"}
        Which expert a miss evicts. ``lru``: the least recently used one. ``lfu``: the one with the
        fewest lookups since the start, of several the least recently used. ``belady``: the one
        whose next lookup is farthest away (Belady 1966), which no policy beats, and which needs to
        know the future.

    Returns
    -------
    float
        nan without a lookup.

    Raises
    ------
    MetricError
        If the ids are not whole numbers [T, k] of at least -1, the cache has no slot, or the policy
        is unknown.
    """
    if policy not in POLICIES:
        raise MetricError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    if isinstance(slots, bool) or int(slots) != slots or slots < 1:
        raise MetricError(f"slots must be a number of experts of at least 1, got {slots!r}.")
    lookups = _lookups(ids)
    if not len(lookups):
        return float("nan")
    n_experts = int(lookups.max()) + 1
    due = _next_lookups(lookups, n_experts) if policy == "belady" else np.empty(0, np.int64)
    hits: int = _run(lookups, due, n_experts, min(int(slots), n_experts), POLICIES.index(policy))
    return hits / len(lookups)


def pins(load: npt.ArrayLike, budget: int) -> npt.NDArray[np.bool_]:
    """Return which experts to keep in fast memory for good, the busiest ones.

    Parameters
    ----------
    load : array [..., E]
        Lookups of every expert in some traffic: of a layer [E], or of all layers [L, E], which
        then share the budget.
    budget : int
        How many experts fit.

    Returns
    -------
    array of bool, as ``load``
        Of experts with equal load the first ones.

    Raises
    ------
    MetricError
        If loads are negative or not finite, or the budget is none.
    """
    given = np.asarray(load, dtype=np.float64)
    if budget < 0 or not np.isfinite(given).all() or (given < 0).any():
        raise MetricError(f"Expected loads and a budget of 0 or more, got {budget} experts.")
    kept = np.zeros(given.size, dtype=bool)
    kept[np.argsort(-given.ravel(), kind="stable")[:budget]] = True
    return kept.reshape(given.shape)


def pinned_hit_rate(ids: npt.ArrayLike, pinned: npt.ArrayLike) -> float:
    """Return the share of one layer's lookups ``ids`` [T, k] that pinned experts [E] answer."""
    lookups = _lookups(ids)
    return float(np.asarray(pinned, dtype=bool)[lookups].mean()) if len(lookups) else float("nan")


def likely_next(ids: npt.ArrayLike, transitions: npt.ArrayLike, n: int) -> Ids:
    """Predict the next layer's experts from this layer's.

    Parameters
    ----------
    ids : array [T, k] of int
        Experts of each token in one layer; -1 = empty slot.
    transitions : array [E, E2]
        How many tokens of other traffic chose an expert here and one there.
    n : int
        How many to predict.

    Returns
    -------
    array [T, n] of int
        Most likely first: by the sum over a token's experts of P(expert there | expert here).
    """
    counts = np.asarray(transitions, dtype=np.float64)
    total = counts.sum(-1, keepdims=True)
    chances = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    given = np.asarray(ids)
    scores = np.where((given >= 0)[..., None], chances[given], 0.0).sum(-2)
    return np.argsort(-scores, axis=-1, kind="stable")[:, :n].astype(np.int64)


class Prefetched(NamedTuple):
    """A cache that is told beforehand what may come.

    Attributes
    ----------
    hit_rate : float
        Share of lookups that are in the cache when they come.
    loads : float
        Experts loaded, a token: those fetched beforehand and the misses.
    """

    hit_rate: float
    loads: float


def prefetched(ids: npt.ArrayLike, predicted: npt.ArrayLike, *, slots: int) -> Prefetched:
    """Run an LRU cache of one layer that loads what was predicted before each token.

    Parameters
    ----------
    ids : array [T, k] of int
        As for :func:`hit_rate`.
    predicted : array [T, n] of int
        Loaded before the token's lookups, the likeliest last, so that it stays longest.
    slots : int, experts
    """
    given, before = np.asarray(ids, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    _lookups(given)
    if slots < 1 or before.shape[0] != given.shape[0]:
        raise MetricError(
            f"Expected a slot and a prediction for each of {len(given)} tokens, got {slots} slots "
            f"and predictions of shape {list(before.shape)}."
        )
    n_lookups = int((given >= 0).sum())
    if not n_lookups:
        return Prefetched(float("nan"), float("nan"))
    n_experts = int(max(given.max(), before.max(initial=0))) + 1
    hits, loads = _run_prefetched(given, before, n_experts, min(slots, n_experts))
    return Prefetched(hits / n_lookups, loads / len(given))


LINES = {
    "lru": "LRU",
    "lfu": "LFU",
    "pins": "pins, slots a layer",
    "pins_shared": "pins, shared budget",
    "prefetch": "LRU + prefetch",
    "belady": "Belady (bound)",
}


class LayerLookups(NamedTuple):
    """One layer's lookups [T, k]: of the prompts that pins are fitted on, and of the others."""

    layer: int
    n_experts: int
    fit: npt.NDArray[np.int64]
    judged: npt.NDArray[np.int64]
    prompt_id: npt.NDArray[np.int64]  # of the tokens of ``judged``

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """Lookups of every expert in the prompts to fit on, [E]."""
        return np.bincount(self.fit[self.fit >= 0], minlength=self.n_experts).astype(np.float64)


def simulate(
    layers: Sequence[LayerLookups], slots: Sequence[int]
) -> dict[str, list[tuple[float, float]]]:
    """Run every kind of cache on the judged half.

    Returns
    -------
    dict
        For each name of ``LINES``, and each number of slots a layer: the hit rate, and the share
        of lookups that are loaded, which prefetching raises above 1 - hit rate.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    if len({layer.n_experts for layer in layers}) > 1:
        raise MetricError("A budget that layers share counts experts of layers of one size.")
    loads = np.stack([layer.load for layer in layers])
    predictions = _predictions(layers)

    def of_layer(at: int, size: int) -> list[float]:
        """Run what needs a pass over the layer's lookups; threads run side by side in it."""
        judged = layers[at].judged
        rates = [hit_rate(judged, slots=size, policy=name) for name in POLICIES]
        fetched = prefetched(judged, predictions[at][:, :size], slots=size)
        return [*rates, *fetched]

    with ThreadPoolExecutor() as pool:
        for size in slots:
            passes = pool.map(of_layer, range(len(layers)), [size] * len(layers))
            *rates, hits, loaded = np.array(list(passes)).T
            for name, one in zip(POLICIES, rates, strict=True):
                found[name].append(_of(float(one.mean())))
            apart = [pinned_hit_rate(layer.judged, pins(layer.load, size)) for layer in layers]
            found["pins"].append(_of(float(np.mean(apart))))
            kept = pins(loads, size * len(layers))
            shared = [pinned_hit_rate(layer.judged, kept[at]) for at, layer in enumerate(layers)]
            found["pins_shared"].append(_of(float(np.mean(shared))))
            per_token = [(layer.judged >= 0).sum(1).mean() for layer in layers]
            found["prefetch"].append((float(hits.mean()), float(np.mean(loaded / per_token))))
    return found


def _of(rate: float) -> tuple[float, float]:
    return rate, 1 - rate


def _predictions(layers: Sequence[LayerLookups]) -> list[npt.NDArray[np.int64]]:
    """Predict each layer's experts from those of the layer before; nothing for the first."""
    found = [np.empty((len(layers[0].judged), 0), np.int64)]
    for before, layer in pairwise(layers):
        counts = np.zeros((before.n_experts, layer.n_experts))
        for here in before.fit.T:
            for there in layer.fit.T:
                both = (here >= 0) & (there >= 0)
                np.add.at(counts, (here[both], there[both]), 1)
        found.append(likely_next(before.judged, counts, layer.judged.shape[1]))
    return found


@numba.njit(cache=True, nogil=True)
def _run_prefetched(ids: Ids, before: Ids, n_experts: int, slots: int) -> tuple[int, int]:
    """Return hits of lookups and loads in all, of an LRU cache."""
    used = np.full(n_experts, -1)  # when an expert was asked for last; -1 = not held
    held = hits = loads = now = 0
    for token in range(len(ids)):
        for step in range(before.shape[1] + ids.shape[1]):
            fetch = step < before.shape[1]
            if fetch:
                expert = before[token, before.shape[1] - 1 - step]
            else:
                expert = ids[token, step - before.shape[1]]
            if expert < 0:
                continue
            now += 1
            if used[expert] >= 0:
                hits += 0 if fetch else 1
            else:
                loads += 1
                if held == slots:
                    oldest = -1
                    for other in range(n_experts):
                        if used[other] >= 0 and (oldest < 0 or used[other] < used[oldest]):
                            oldest = other
                    used[oldest] = -1
                else:
                    held += 1
            used[expert] = now
    return hits, loads


def _lookups(ids: npt.ArrayLike) -> Ids:
    """Return the experts in the order in which they are looked up, without empty slots."""
    given = np.asarray(ids)
    if given.ndim != 2 or not (given.size == 0 or np.issubdtype(given.dtype, np.integer)):
        raise MetricError(
            "Expected the expert ids of one layer, whole numbers [T, k], got an array of "
            f"{given.dtype} of shape {given.shape}. Call it once per layer."
        )
    flat = given.astype(np.int64).ravel()
    if (flat < -1).any():
        raise MetricError(f"Expert ids are 0 or more, -1 marks an empty slot; got {flat.min()}.")
    return flat[flat >= 0]


@numba.njit(cache=True, nogil=True)
def _next_lookups(lookups: Ids, n_experts: int) -> Ids:
    """Return for every lookup when its expert is looked up next; the length where never."""
    due = np.empty(len(lookups), np.int64)
    later = np.full(n_experts, len(lookups))
    for at in range(len(lookups) - 1, -1, -1):
        due[at] = later[lookups[at]]
        later[lookups[at]] = at
    return due


@numba.njit(cache=True, nogil=True)
def _run(lookups: Ids, due: Ids, n_experts: int, slots: int, policy: int) -> int:
    """Return how many lookups hit; ``policy`` is an index into ``POLICIES``."""
    held = np.empty(slots, np.int64)
    inside = np.zeros(n_experts, np.bool_)
    used = np.zeros(n_experts, np.int64)  # when an expert was looked up last
    count = np.zeros(n_experts, np.int64)
    following = np.zeros(n_experts, np.int64)  # when it is looked up next
    filled = hits = 0
    for at in range(len(lookups)):
        expert = lookups[at]
        if inside[expert]:
            hits += 1
        elif filled < slots:
            held[filled] = expert
            filled += 1
        else:
            victim = 0
            for other in range(1, slots):
                a, b = held[other], held[victim]
                if policy == 0:
                    worse = used[a] < used[b]
                elif policy == 1:
                    worse = count[a] < count[b] or (count[a] == count[b] and used[a] < used[b])
                else:
                    worse = following[a] > following[b]
                if worse:
                    victim = other
            inside[held[victim]] = False
            held[victim] = expert
        inside[expert] = True
        used[expert] = at
        count[expert] += 1
        if policy == 2:
            following[expert] = due[at]
    return hits
