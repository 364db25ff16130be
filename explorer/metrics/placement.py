"""Where experts live: replicas, their placement on GPUs, and what a decode batch reads."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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
    rows = np.sort(ids[: n * batch].reshape(n, batch * ids.shape[1]), axis=1)
    fresh = np.ones(rows.shape, dtype=bool)
    fresh[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return np.asarray((fresh & (rows >= 0)).sum(1), dtype=np.float64)


def coverage(expert_ids: npt.ArrayLike, n_experts: int) -> Ints:
    """Return after how many tokens each further expert was first used, ascending, [used].

    The i-th number (from 1) is the smallest count of tokens that touches ``i`` experts.
    """
    ids = np.asarray(expert_ids)
    token, slot = np.nonzero(ids >= 0)
    first = np.full(n_experts, len(ids), dtype=np.int64)
    np.minimum.at(first, ids[token, slot], token)
    return np.sort(first[first < len(ids)]) + 1


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
