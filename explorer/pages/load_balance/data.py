"""What serving a run's traffic would ask of GPUs: placements, decode batches, coverage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.metrics import placement, traffic
from explorer.metrics.capacity import POLICIES, curve
from explorer.metrics.load import max_violation
from explorer.queries.load import BatchRouting, routing, window_loads
from explorer.run import Run

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def gpu_table(
    load: pd.DataFrame, *, gpus: int, nodes: int, groups: int, replicas: int
) -> pd.DataFrame:
    """Return the load of every GPU under every policy.

    Parameters
    ----------
    load : DataFrame
        From ``queries.load.expert_load``, of sites with equally many experts.

    Returns
    -------
    DataFrame
        ``policy, layer, site, gpu, load`` (assignments) and ``ratio`` = load / mean of the GPUs.
    """
    sites = load[["layer", "site"]].drop_duplicates()
    counts = load["assignments"].to_numpy(dtype=np.float64).reshape(len(sites), -1)
    allowed = placement.policies(counts.shape[1], gpus=gpus, nodes=nodes, groups=groups)
    allowed.remove(placement.ACROSS_WINDOWS)  # these loads are of one window
    parts = []
    for policy in allowed:
        found = placement.place(
            counts[None], policy, gpus=gpus, nodes=nodes, groups=groups, replicas=replicas
        )
        loads = placement.gpu_load(counts, found, gpus)
        part = sites.loc[sites.index.repeat(gpus)].reset_index(drop=True)
        mean = loads.mean(-1, keepdims=True)
        ratio = np.divide(loads, mean, out=np.full(loads.shape, np.nan), where=mean > 0)
        part = part.assign(
            policy=policy,
            gpu=np.tile(np.arange(gpus), len(sites)),
            load=loads.ravel(),
            ratio=ratio.ravel(),
        )
        parts.append(part)
    columns = ["policy", "layer", "site", "gpu", "load", "ratio"]
    return pd.concat(parts, ignore_index=True)[columns]


def held_out_table(
    run: Run, *, n_experts: int, gpus: int, nodes: int, groups: int, replicas: int
) -> pd.DataFrame:
    """Judge placements on domains that they were not made from, one domain at a time.

    Returns
    -------
    DataFrame
        ``policy``, ``own`` (mean over domains of the overall balancedness under the placement made
        from all of them), ``held_out`` (under that made from all others), ``low, high`` (its 95 %
        interval), ``worst``. No rows with fewer than two domains.
    """
    loads = window_loads(run, n_experts=n_experts).loads
    rows = []
    if len(loads) > 1:
        sizes = {"gpus": gpus, "nodes": nodes, "groups": groups}
        for policy in placement.policies(n_experts, **sizes):
            found = traffic.held_out(loads, policy, replicas=replicas, **sizes)
            low, high = traffic.mean_interval(found.held_out, in_time=False)
            held = found.held_out
            rows.append((policy, found.own.mean(), held.mean(), low, high, held.min()))
    names = ["policy", "own", "held_out", "low", "high", "worst"]
    return pd.DataFrame(rows, columns=names)


def balance_of_gpus(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``policy, layer, site, balancedness, straggler`` of a table of :func:`gpu_table`.

    ``straggler`` is the largest load over the mean: how much longer the layer takes than with
    even GPUs.
    """
    busiest = table.groupby(["policy", "layer", "site"], sort=False)["ratio"].max()
    frame = busiest.to_frame("straggler").reset_index()
    return frame.assign(balancedness=1 / frame["straggler"])


def overall(table: pd.DataFrame) -> "pd.Series[float]":
    """Return the balancedness over all layers of each policy, as vLLM reports it."""
    values = {}
    for policy, rows in table.groupby("policy", sort=False):
        loads = rows["load"].to_numpy(dtype=np.float64)
        gpus = int(rows["gpu"].max()) + 1
        values[policy] = placement.overall_balancedness(loads.reshape(-1, gpus))
    return pd.Series(values, dtype=np.float64)


def decode_reads(
    expert_ids: npt.ArrayLike, n_experts: int, *, sizes: Sequence[int] = BATCHES
) -> pd.DataFrame:
    """Return how many different experts a batch of decoded tokens reads.

    Parameters
    ----------
    expert_ids : array [T, K], int
        Tokens in the order in which they meet in batches; -1 = empty slot.
    n_experts : int

    Returns
    -------
    DataFrame
        ``batch`` (tokens), ``measured`` (mean), ``low, high`` (5th and 95th percentile over
        batches), ``uniform`` (expected of uniform routing), ``batches`` (how many were seen).
        Sizes of which no whole batch is there are left out.
    """
    ids = np.asarray(expert_ids)
    rows = []
    for size in sizes:
        found = placement.distinct_experts(ids, size)
        if not len(found):
            break
        top_k = float((ids >= 0).sum(1).mean())
        low, high = np.quantile(found, [0.05, 0.95])
        uniform = float(placement.expected_distinct(n_experts, top_k, size))
        rows.append((size, float(found.mean()), low, high, uniform, len(found)))
    names = ["batch", "measured", "low", "high", "uniform", "batches"]
    return pd.DataFrame(rows, columns=names)


def coverage_curve(expert_ids: npt.ArrayLike, n_experts: int) -> pd.DataFrame:
    """Return ``tokens, share``: the share of a layer's experts that the first tokens touched.

    And ``uniform``, what uniform routing of as many tokens would touch.
    """
    ids = np.asarray(expert_ids)
    if not len(ids):
        return pd.DataFrame({"tokens": [], "share": [], "uniform": []})
    first = placement.coverage(ids, n_experts)
    tokens = np.append(first, len(ids))
    share = np.append(np.arange(1, len(first) + 1), len(first)) / n_experts
    top_k = float((ids >= 0).sum(1).mean())
    uniform = placement.expected_distinct(n_experts, top_k, tokens) / n_experts
    return pd.DataFrame({"tokens": tokens, "share": share, "uniform": uniform})


def capacity_table(chosen: BatchRouting, n_experts: int, factors: Sequence[float]) -> pd.DataFrame:
    """Measure what capacity factors drop at one site, per batch, for both drop policies.

    Parameters
    ----------
    chosen : BatchRouting
        From ``queries.load.routing``.
    n_experts : int
    factors : sequence of float

    Returns
    -------
    DataFrame
        One row per factor: ``capacity_factor``, ``assignments`` (share dropped, the same for
        both policies), ``weight_position``, ``weight_probs`` (share of the combine weight),
        ``tokens_position``, ``tokens_probs`` (share of the tokens that lose every expert).
        Missing without a token.
    """
    columns: dict[str, Any] = {"capacity_factor": [float(factor) for factor in factors]}
    for policy in POLICIES:
        drops = curve(
            chosen.expert_ids,
            n_experts,
            factors,
            policy=policy,
            weights=chosen.weights,
            batch=chosen.batch,
        )
        columns["assignments"] = [drop.assignments for drop in drops]
        columns[f"weight_{policy}"] = [drop.weight for drop in drops]
        columns[f"tokens_{policy}"] = [drop.tokens for drop in drops]
    return pd.DataFrame(columns)


def smallest_safe_factor(chosen: BatchRouting, n_experts: int) -> float:
    """Return the capacity factor from which on no batch drops anything: 1 + its MaxVio.

    Returns
    -------
    float
        nan without an assignment.
    """
    numbers = np.unique(chosen.batch, return_inverse=True)[1]
    token, slot = np.nonzero(chosen.expert_ids >= 0)
    if not len(token):
        return float("nan")
    n_batches = int(numbers.max()) + 1
    loads = np.bincount(
        numbers[token] * n_experts + chosen.expert_ids[token, slot], minlength=n_batches * n_experts
    ).reshape(n_batches, n_experts)
    return 1 + max(max_violation(load) for load in loads if load.any())


# tokens that the capacity figure reads; more would make the page wait
MAX_CAPACITY_TOKENS = 30_000


FACTORS = tuple(np.round(np.arange(0.5, 4.01, 0.05), 2).tolist())


def capacity_of(
    run: Run, *, layer: int, site: int, phase: str | None
) -> tuple[pd.DataFrame, float, int, int, int]:
    """Return the capacity curve of a site, the safe factor, batches, tokens used, and all."""
    chosen = routing(run, layer, site=site, phase=phase, max_tokens=MAX_CAPACITY_TOKENS)
    n_experts = run.site_info(layer, site).n_experts
    return (
        capacity_table(chosen, n_experts, FACTORS),
        smallest_safe_factor(chosen, n_experts),
        len(np.unique(chosen.batch)),
        len(chosen.token_id),
        chosen.n_tokens,
    )
