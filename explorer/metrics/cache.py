"""What a cache of experts would hit: LRU, LFU and Belady's bound on the routing of a trace.

One layer at a time: a token's experts are looked up in order of slot. A hit is an expert that is in
the cache; a miss loads it and, where the cache is full, evicts another one.
"""

from typing import Literal, get_args

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
