"""Where experts live: replicas, their placement on GPUs, and what tokens send between GPUs.

A placement is made from the loads of some traffic and serves other traffic:
``explorer.metrics.traffic`` judges it there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

IN_ORDER, BY_NODE, GLOBAL = "in order", "EPLB, by node", "EPLB, global"
ACROSS_WINDOWS = "across windows"
PLACEMENTS: Mapping[str, str] = {
    IN_ORDER: "experts in the order of their ids, one copy each",
    BY_NODE: "copies of hot experts; groups of experts stay on one node",
    GLOBAL: "copies of hot experts, anywhere",
    ACROSS_WINDOWS: "copies as EPLB makes them; experts that are hot at the same time lie apart",
}
STATE_BYTES = 2  # of a number of a hidden state as it is sent: bfloat16
DRAFTS = (1, 2, 3, 4, 6, 8)  # tokens that speculative decoding checks in one pass
_SWEEPS = 20  # over all pairs of copies; two or three change something


class Placement(NamedTuple):
    """Replicas of ``L`` layers with ``E`` logical and ``R`` physical experts.

    Attributes
    ----------
    phy2log : array [L, R], int64
        The logical expert of each physical one. Physical experts are numbered GPU by GPU, so that
        the first ``R / num_gpus`` are those of the first GPU.
    log2phy : array [L, E, X], int64
        The physical experts of each logical one, -1 beyond its replicas; ``X`` is the largest
        number of replicas.
    logcnt : array [L, E], int64
        Replicas of each logical expert.
    """

    phy2log: Ints
    log2phy: Ints
    logcnt: Ints


def rebalance(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Replicate hot experts and place all of them so that GPUs share the load.

    Groups of experts go to nodes, then each node copies its hottest expert again and again, then
    the copies go to the node's GPUs. Where groups do not divide by nodes, all experts are one
    group on one node: the global policy.

    Parameters
    ----------
    weight : array [L, E]
        Load of every logical expert, any unit.
    num_replicas : int
        Physical experts a layer, a multiple of ``num_gpus`` and at least ``E``.
    num_groups, num_nodes, num_gpus : int
        Expert groups; servers with fast links inside; GPUs, a multiple of the nodes.

    Raises
    ------
    MetricError
        For sizes that do not divide.

    References
    ----------
    The Expert Parallelism Load Balancer, github.com/deepseek-ai/EPLB; loads are float32 as there.

    Notes
    -----
    Equal loads are packed in the order of their numbers. The published code sorts more than 16
    items unstably, so that there the machine decides which of two equal copies goes first; loads
    of GPUs and numbers of replicas do not depend on it.
    """
    load = np.atleast_2d(np.asarray(weight, dtype=np.float32))
    if num_groups % max(num_nodes, 1):
        num_groups = num_nodes = 1
    _check_sizes(load, num_replicas, num_groups, num_nodes, num_gpus)
    layers, experts = load.shape
    group_size = experts // num_groups

    # groups to nodes; a "slot" numbers the experts in their order on the nodes
    by_group = load.reshape(layers, num_groups, group_size)
    groups: npt.NDArray[np.float32] = by_group.sum(-1).astype(np.float32)
    node, rank = _pack(groups, num_nodes)
    first = (node * (num_groups // num_nodes) + rank) * group_size
    log2slot = (first[..., None] + np.arange(group_size)).reshape(layers, experts)
    slot2log = _inverse(log2slot)

    # replicas within each node, then to its GPUs
    per_node = np.take_along_axis(load, slot2log, 1).reshape(-1, experts // num_nodes)
    copy2slot, copy_rank, count = _replicate(per_node, num_replicas // num_nodes)
    share = np.divide(per_node, count, dtype=np.float32)
    copies = np.take_along_axis(share, copy2slot, 1)
    gpu, place = _pack(copies, num_gpus // num_nodes)
    phy2copy = _inverse(gpu * (num_replicas // num_gpus) + place)

    slots = np.take_along_axis(copy2slot, phy2copy, 1).reshape(layers, num_nodes, -1)
    starts = np.arange(num_nodes)[:, None] * (experts // num_nodes)
    phy2log = np.take_along_axis(slot2log, (slots + starts).reshape(layers, -1), 1)
    phy_rank = np.take_along_axis(copy_rank, phy2copy, 1).reshape(layers, -1)
    logcnt = np.take_along_axis(count.reshape(layers, -1), log2slot, 1)
    log2phy = np.full((layers, experts, int(logcnt.max())), -1, dtype=np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, phy_rank] = np.arange(num_replicas)
    return Placement(phy2log, log2phy, logcnt)


def in_order(n_layers: int, n_experts: int, num_gpus: int) -> Placement:
    """Place one copy of each expert, in the order of their ids: what serving starts from."""
    if num_gpus < 1 or n_experts % num_gpus:
        raise MetricError(
            f"Expected a number of GPUs that divides {n_experts} experts, got {num_gpus}."
        )
    ids = np.broadcast_to(np.arange(n_experts), (n_layers, n_experts)).copy()
    return Placement(ids, ids[..., None].copy(), np.ones_like(ids))


def across_windows(windows: npt.ArrayLike, num_replicas: int, num_gpus: int) -> Placement:
    """Place experts so that the fullest GPU of each window is as empty as it can be made.

    Loads of a sum hide which experts are hot at the same time. Here every window is a scenario:
    copies are made as :func:`rebalance` makes them from the mean of the windows' shares, and then
    two copies on different GPUs change places for as long as this lowers the mean over windows of
    the largest share of a GPU. Ours; no published load balancer does this.

    Parameters
    ----------
    windows : array [W, L, E]
        Load of every logical expert in each window of traffic; windows count equally.
    num_replicas : int
        Physical experts a layer, a multiple of ``num_gpus`` and at least ``E``.
    num_gpus : int

    Raises
    ------
    MetricError
        For sizes that do not divide.
    """
    shares = _shares(windows)
    start = rebalance(shares.mean(0), num_replicas, 1, 1, num_gpus)
    phy2log = start.phy2log.copy()
    log2phy = np.full_like(start.log2phy, -1)
    first = np.repeat(np.arange(num_gpus), num_replicas // num_gpus)
    for layer, copies in enumerate(start.phy2log):
        loads = shares[:, layer, copies] / start.logcnt[layer, copies]
        gpu = _swapped(np.ascontiguousarray(loads), first, num_gpus)
        phy2log[layer] = copies[np.argsort(gpu, kind="stable")]
        filled = np.zeros(shares.shape[-1], np.int64)
        for place, expert in enumerate(phy2log[layer]):
            log2phy[layer, expert, filled[expert]] = place
            filled[expert] += 1
    return Placement(phy2log, log2phy, start.logcnt)


@numba.njit(cache=True, nogil=True)
def _swapped(loads: Floats, first: Ints, gpus: int) -> Ints:
    """Return the GPU of each copy [R] after swaps; ``loads`` is [W, R], ``first`` the start."""
    windows, copies = loads.shape
    gpu = first.copy()
    total = np.zeros((windows, gpus))
    best = 0.0
    for window in range(windows):
        for copy in range(copies):  # in loops: slices take seconds to compile
            total[window, gpu[copy]] += loads[window, copy]
        best += total[window].max()
    for _ in range(_SWEEPS):
        changed = False
        for one in range(copies):
            for other in range(one + 1, copies):
                here, there = gpu[one], gpu[other]
                if here == there:
                    continue
                found = 0.0
                for window in range(windows):
                    more = loads[window, one] - loads[window, other]
                    most = max(total[window, here] - more, total[window, there] + more)
                    for rank in range(gpus):
                        if rank != here and rank != there:
                            most = max(most, total[window, rank])
                    found += most
                    if found >= best:
                        break
                if found < best - 1e-12:
                    for window in range(windows):
                        more = loads[window, one] - loads[window, other]
                        total[window, here] -= more
                        total[window, there] += more
                    gpu[one], gpu[other] = there, here
                    best, changed = found, True
        if not changed:
            break
    return gpu


def policies(n_experts: int, *, gpus: int, nodes: int, groups: int) -> list[str]:
    """Return the names of ``PLACEMENTS`` that these sizes allow."""
    allowed = [IN_ORDER] if n_experts % gpus == 0 else []
    if nodes > 1 and n_experts % groups == 0 and groups % nodes == 0:
        allowed.append(BY_NODE)
    return [*allowed, GLOBAL, ACROSS_WINDOWS]


def place(
    windows: npt.ArrayLike, policy: str, *, gpus: int, nodes: int, groups: int, replicas: int
) -> Placement:
    """Place the experts of layers by one of ``PLACEMENTS``.

    Parameters
    ----------
    windows : array [W, L, E]
        Loads in each window of the traffic that the placement is made from.

    Raises
    ------
    MetricError
        For an unknown policy, loads of another shape, or sizes that do not divide.
    """
    loads = checked_windows(windows)
    if policy == IN_ORDER:
        return in_order(loads.shape[1], loads.shape[2], gpus)
    if policy == BY_NODE:
        return rebalance(loads.sum(0), replicas, groups, nodes, gpus)
    if policy == GLOBAL:
        return rebalance(loads.sum(0), replicas, 1, 1, gpus)
    if policy == ACROSS_WINDOWS:
        return across_windows(loads, replicas, gpus)
    raise MetricError(f"Expected one of {', '.join(PLACEMENTS)}; got {policy!r}.")


def visited(
    expert_ids: npt.ArrayLike, placement: Placement, layer: int, *, gpus: int, nodes: int = 1
) -> tuple[Floats, Floats]:
    """Return how many different GPUs, and nodes, each token's experts lie on, two arrays [T].

    Of an expert with several copies the one that is taken goes by the token's number, in turn, as
    engines spread requests.

    Parameters
    ----------
    expert_ids : array [T, K], int
        -1 in empty slots.
    layer : int
        Row of the placement.
    """
    gpu = _gpu_of(expert_ids, placement, layer, gpus)
    on_nodes = np.where(gpu >= 0, gpu // (gpus // nodes), -1)
    found = [_distinct(rank).sum(1).astype(np.float64) for rank in (gpu, on_nodes)]
    return found[0], found[1]


def dispatch(
    expert_ids: npt.ArrayLike,
    source: npt.ArrayLike,
    placement: Placement,
    layer: int,
    *,
    gpus: int,
    token_bytes: float,
) -> Floats:
    """Return the bytes that one layer's all-to-all sends from each GPU to each GPU, [G, G].

    A token's hidden state goes once to every GPU that holds one of its experts, however many of
    them, as DeepEP dispatches; the results come back the other way. The diagonal stays at home.

    Parameters
    ----------
    expert_ids : array [T, K], int
        -1 in empty slots; copies are taken in turn, see :func:`visited`.
    source : array [T], int
        The GPU that each token comes from.
    layer : int
        Row of the placement.
    token_bytes : float
        Of a hidden state as it is sent.
    """
    gpu = np.sort(_gpu_of(expert_ids, placement, layer, gpus), axis=1)
    token, place = np.nonzero(_distinct(gpu))
    cells = np.asarray(source, dtype=np.int64)[token] * gpus + gpu[token, place]
    counts = np.bincount(cells, minlength=gpus * gpus).reshape(gpus, gpus)
    return np.asarray(counts * float(token_bytes))


def _gpu_of(expert_ids: npt.ArrayLike, placement: Placement, layer: int, gpus: int) -> Ints:
    """Return the GPU of each choice [T, K], -1 in empty slots."""
    ids = np.asarray(expert_ids)
    turn = np.arange(len(ids))[:, None] % placement.logcnt[layer][ids]
    slot = placement.log2phy[layer][ids, turn]
    return np.where(ids >= 0, slot // (placement.phy2log.shape[1] // gpus), -1)


def _distinct(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark in each sorted row [N, M] the first of equal values that are not negative."""
    rows = np.sort(values, axis=1)
    fresh = np.ones(rows.shape, dtype=bool)
    fresh[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return np.asarray(fresh & (rows >= 0))


def gpu_load(weight: npt.ArrayLike, placement: Placement, num_gpus: int) -> Floats:
    """Return the load of each GPU, [L, G]; an expert's copies share its load evenly."""
    load = np.atleast_2d(np.asarray(weight, dtype=np.float64)) / placement.logcnt
    copies = np.take_along_axis(load, placement.phy2log, 1)
    if copies.shape[1] % num_gpus:
        raise MetricError(
            f"Expected a number of GPUs that divides {copies.shape[1]} physical experts, "
            f"got {num_gpus}."
        )
    return np.asarray(copies.reshape(len(copies), num_gpus, -1).sum(-1))


def balancedness(loads: npt.ArrayLike) -> Floats:
    """Return mean over largest load of the ranks of each layer, [L]; 1 = even, nan = no load.

    One expert per rank makes it ``1 / (1 + MaxVio)``; its inverse is the straggler factor, by
    which the slowest rank makes the layer wait.
    """
    ranks = np.atleast_2d(np.asarray(loads, dtype=np.float64))
    most = ranks.max(-1)
    none = np.full(len(ranks), np.nan)
    return np.asarray(np.divide(ranks.mean(-1), most, out=none, where=most > 0))


def overall_balancedness(loads: npt.ArrayLike) -> float:
    """Return the sum over layers of mean loads over that of largest loads; nan without load.

    Layers run one after another, so their slowest ranks add up. As vLLM's load balancer logs it.
    """
    ranks = np.atleast_2d(np.asarray(loads, dtype=np.float64))
    most = float(ranks.max(-1).sum())
    return float(ranks.mean(-1).sum()) / most if most else float("nan")


def expected_distinct(n_experts: int, top_k: float, batch: npt.ArrayLike) -> Floats:
    """Return how many different experts uniform routing of ``batch`` tokens reads, a layer."""
    tokens = np.asarray(batch, dtype=np.float64)
    return np.asarray(n_experts * (1 - (1 - top_k / n_experts) ** tokens))


def distinct_experts(expert_ids: npt.ArrayLike, batch: int) -> Floats:
    """Return the different experts of each whole batch of consecutive tokens, [T // batch].

    Parameters
    ----------
    expert_ids : array [T, K], int
        -1 in empty slots.
    batch : int
        Tokens that are decoded together.
    """
    ids = np.asarray(expert_ids)
    n = len(ids) // batch
    rows = ids[: n * batch].reshape(n, batch * ids.shape[1])
    return np.asarray(_distinct(rows).sum(1), dtype=np.float64)


def draft_windows(expert_ids: npt.ArrayLike, prompt_id: npt.ArrayLike, window: int) -> Floats:
    """Return the different experts of each whole window of one sequence's tokens, [windows].

    Speculative decoding checks a draft of so many tokens of one request in one pass, which reads
    the experts of all of them.

    Parameters
    ----------
    expert_ids : array [T, K], int
        Sequence after sequence, each in its order; -1 in empty slots.
    prompt_id : array [T], int
    window : int
        Tokens of a draft and the one before it.
    """
    ids, of = np.asarray(expert_ids), np.asarray(prompt_id)
    starts = np.flatnonzero(np.r_[True, of[1:] != of[:-1]]) if len(of) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[starts, len(of)])
    at = np.arange(len(of)) - np.repeat(starts, sizes)
    return distinct_experts(ids[at < np.repeat(sizes // window * window, sizes)], window)


class DraftReads(NamedTuple):
    """Different experts that so many tokens read together, means over windows; arrays [N].

    Attributes
    ----------
    tokens : array
        That are checked together: a draft and the token before it.
    one_request : array
        Consecutive tokens of one request, as speculative decoding checks them.
    many_requests : array
        Tokens of all requests in random order, as a batch of requests reads them.
    uniform : array
        Expected of uniform routing.
    windows : array
        How many windows of one request there were.
    """

    tokens: Ints
    one_request: Floats
    many_requests: Floats
    uniform: Floats
    windows: Ints


def draft_reads(
    expert_ids: npt.ArrayLike,
    prompt_id: npt.ArrayLike,
    n_experts: int,
    *,
    sizes: Sequence[int] = DRAFTS,
    seed: int = 0,
) -> DraftReads:
    """Compare what drafts of one request read with what batches of many requests do.

    Parameters
    ----------
    expert_ids : array [T, K], int
        Sequence after sequence, each in its order; -1 in empty slots.
    prompt_id : array [T], int
    sizes : sequence of int
        Tokens that are checked together; those of which there is no whole window are left out.
    """
    ids = np.asarray(expert_ids)
    shuffled = ids[np.random.default_rng(seed).permutation(len(ids))]
    top_k = float((ids >= 0).sum(1).mean()) if len(ids) else float("nan")
    rows = []
    for size in sizes:
        found = draft_windows(ids, prompt_id, size)
        if len(found):
            mixed = distinct_experts(shuffled, size).mean()
            chance = float(expected_distinct(n_experts, top_k, size))
            rows.append((size, found.mean(), mixed, chance, len(found)))
    tokens, one, many, even, windows = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    return DraftReads(tokens.astype(np.int64), one, many, even, windows.astype(np.int64))


def coverage(expert_ids: npt.ArrayLike, n_experts: int) -> Ints:
    """Return after how many tokens each further expert was first used, ascending, [used].

    The i-th number (from 1) is the smallest count of tokens that touches ``i`` experts.
    """
    ids = np.asarray(expert_ids)
    token, slot = np.nonzero(ids >= 0)
    first = np.full(n_experts, len(ids), dtype=np.int64)
    np.minimum.at(first, ids[token, slot], token)
    return np.sort(first[first < len(ids)]) + 1


def checked_windows(windows: npt.ArrayLike) -> Floats:
    """Return loads of windows as an array [W, L, E], or refuse what is none."""
    loads = np.asarray(windows, dtype=np.float64)
    if loads.ndim != 3 or not loads.size:
        raise MetricError(
            f"Expected loads [windows, layers, experts], got shape {list(loads.shape)}."
        )
    return loads


def _shares(windows: npt.ArrayLike) -> Floats:
    """Return each layer's shares in each window [W, L, E]; zeros in a window without load."""
    loads = checked_windows(windows)
    total = loads.sum(-1, keepdims=True)
    return np.asarray(np.divide(loads, total, out=np.zeros_like(loads), where=total > 0))


def _check_sizes(load: npt.NDArray[np.float32], *sizes: int) -> None:
    replicas, groups, nodes, gpus = sizes
    experts = load.shape[1]
    wrong = (
        (min(sizes) < 1, "sizes of at least 1"),
        (bool(experts % max(groups, 1)), f"groups that divide {experts} experts"),
        (bool(gpus % max(nodes, 1)), f"a number of GPUs that divides by {nodes} nodes"),
        (bool(replicas % max(gpus, 1)), f"a number of replicas that divides by {gpus} GPUs"),
        (replicas < experts, f"at least {experts} replicas, one for each expert"),
        (bool((load < 0).any() or not np.isfinite(load).all()), "loads of 0 or more"),
    )
    for is_wrong, expected in wrong:
        if is_wrong:
            raise MetricError(
                f"Expected {expected}; got {replicas} replicas, {groups} groups, {nodes} nodes "
                f"and {gpus} GPUs for {experts} experts. Change one of these numbers."
            )


def _pack(weight: npt.NDArray[np.float32], packs: int) -> tuple[Ints, Ints]:
    """Give each pack equally many items, the heaviest first to the lightest pack with room.

    Returns the pack of each item and its place there, both [X, N].
    """
    rows, items = weight.shape
    room = items // packs
    if room == 1:
        return np.broadcast_to(np.arange(items), weight.shape).copy(), np.zeros(
            weight.shape, np.int64
        )
    pack = np.zeros(weight.shape, dtype=np.int64)
    place = np.zeros(weight.shape, dtype=np.int64)
    row = np.arange(rows)
    total = np.zeros((rows, packs), dtype=np.float32)
    filled = np.zeros((rows, packs), dtype=np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        chosen = np.where(filled < room, total, np.inf).argmin(1)
        pack[row, item] = chosen
        place[row, item] = filled[row, chosen]
        total[row, chosen] += weight[row, item]
        filled[row, chosen] += 1
    return pack, place


def _replicate(weight: npt.NDArray[np.float32], copies: int) -> tuple[Ints, Ints, Ints]:
    """Copy the expert with the largest load per copy until there are enough copies.

    Returns each copy's expert and its number among the expert's copies [X, copies], and the
    copies of each expert [X, E].
    """
    rows, experts = weight.shape
    of = np.tile(np.arange(copies), (rows, 1))
    rank = np.zeros((rows, copies), dtype=np.int64)
    count = np.ones((rows, experts), dtype=np.int64)
    row = np.arange(rows)
    for copy in range(experts, copies):
        hottest = (weight / count.astype(np.float32)).argmax(1)
        of[:, copy] = hottest
        rank[:, copy] = count[row, hottest]
        count[row, hottest] += 1
    return of, rank, count


def _inverse(permutation: Ints) -> Ints:
    """Return the inverse of each row."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None], 1)
    return inverse
