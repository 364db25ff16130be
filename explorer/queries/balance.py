"""Metrics applied to the answers of queries: balance of every layer, capacity of one site."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from explorer.metrics.capacity import POLICIES, curve
from explorer.metrics.load import LOAD_METRICS, max_violation, sampling_floor
from explorer.queries.load import Routing


def balance_table(load: pd.DataFrame, *, n_tokens: int) -> pd.DataFrame:
    """Measure the balance of every site.

    Parameters
    ----------
    load : DataFrame
        From ``queries.load.expert_load``.
    n_tokens : int
        Tokens behind the load, from ``queries.overview.token_count`` with the same filters.

    Returns
    -------
    DataFrame
        One row per ``layer`` and ``site``: ``n_experts``, ``top_k``, ``n_tokens``,
        ``assignments``, and for every metric of ``LOAD_METRICS`` its value and, as
        ``NAME_floor``, ``NAME_floor_low`` and ``NAME_floor_high``, what uniform routing of
        ``n_tokens`` tokens gives (mean, 5th and 95th percentile). Missing where the site has no
        load.
    """
    rows = []
    for (layer, site), experts in load.groupby(["layer", "site"], sort=True):
        total = int(experts["assignments"].sum())
        row: dict[Hashable, Any] = {
            "layer": layer,
            "site": site,
            "n_experts": len(experts),
            "top_k": int(experts["top_k"].iloc[0]),
            "n_tokens": n_tokens,
            "assignments": total,
        }
        # the measured number of experts per token, smaller than top_k where slots stay empty
        per_token = min(total / n_tokens, len(experts)) if n_tokens else 0.0
        for name in LOAD_METRICS:
            floor = sampling_floor(name, n_tokens=n_tokens, n_experts=len(experts), top_k=per_token)
            row[name] = LOAD_METRICS[name](experts["assignments"]) if total else float("nan")
            row[f"{name}_floor"] = floor.mean
            row[f"{name}_floor_low"] = floor.low
            row[f"{name}_floor_high"] = floor.high
        rows.append(row)
    return pd.DataFrame(rows)


def capacity_table(chosen: Routing, n_experts: int, factors: Sequence[float]) -> pd.DataFrame:
    """Measure what capacity factors drop at one site, per batch, for both drop policies.

    Parameters
    ----------
    chosen : Routing
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


def smallest_safe_factor(chosen: Routing, n_experts: int) -> float:
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
        numbers[token] * n_experts + chosen.expert_ids[token, slot],
        minlength=n_batches * n_experts,
    ).reshape(n_batches, n_experts)
    return 1 + max(max_violation(load) for load in loads if load.any())
