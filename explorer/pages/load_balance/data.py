"""What serving a run's traffic would ask of GPUs: placements, decode batches, coverage."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.engine_files import PIN_FORMATS, PLACEMENT_FORMATS, pins_file, placement_file
from explorer.errors import RunError
from explorer.metrics import cache, placement, traffic
from explorer.metrics.capacity import POLICIES, curve
from explorer.metrics.load import max_violation
from explorer.queries.load import (
    BatchRouting,
    hidden_layers,
    routing,
    window_loads,
)
from explorer.queries.lookups import cache_lookups
from explorer.run import Run

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_DISPATCHED = 20_000  # tokens a layer whose ways are followed


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


class Judgement(NamedTuple):
    """Placements on traffic that they were not made from.

    Attributes
    ----------
    table : DataFrame
        ``policy`` (the last row may be ``CHOSEN``: the policy that was best on the other windows),
        ``own`` (mean over windows of the overall balancedness under the placement made from all of
        them), ``own_low, own_high``, ``held_out`` (under that made from all others), ``low, high``
        (95% intervals over windows), ``worst``. No rows with fewer than two windows.
    best : str
        The policy that is best on held-out windows; "" without any.
    stragglers : DataFrame
        ``policy, layer, site, straggler``: largest over mean GPU load of a layer, held out.
    ages : DataFrame
        Of ``best``, for windows in time: ``windows_later`` (0 = predicted), ``balancedness``,
        ``low, high``.
    renewals : DataFrame
        Of ``best``: ``every`` (windows; missing = never), ``held_out``, ``low, high``, ``copies``
        that are loaded each time, ``most`` of them by one GPU.
    windows : int
    """

    table: pd.DataFrame
    best: str
    stragglers: pd.DataFrame
    ages: pd.DataFrame
    renewals: pd.DataFrame
    windows: int


CHOSEN = "the best of other windows"
# of comparing two copies in one window of one layer, measured on 58 layers of 288 copies
_SECONDS = 7e-8


def seconds_to_judge(windows: int, layers: int, replicas: int) -> float:
    """Return about how long :func:`judged` takes: windows are left out one by one, in folds too."""
    return (5 * windows + 1) * layers * replicas**2 * windows * _SECONDS


def judged(
    run: Run,
    *,
    by: str,
    windows: int,
    n_experts: int,
    gpus: int,
    nodes: int,
    groups: int,
    replicas: int,
    phase: str | None = None,
) -> Judgement:
    """Judge placements on windows that they were not made from, one window at a time."""
    found = window_loads(run, by, windows, n_experts=n_experts, phase=phase)
    loads, in_time = found.loads, found.in_time
    cluster = {"gpus": gpus, "nodes": nodes, "groups": groups}
    sizes = cluster | {"replicas": replicas}
    held: dict[str, traffic.HeldOut] = {}
    if len(loads) > 1:
        names = placement.policies(n_experts, **cluster)
        held = {policy: traffic.held_out(loads, policy, **sizes) for policy in names}
    rows = [
        (policy, one.own.mean(), *_interval(one.own, in_time), *_means(one.held_out, in_time))
        for policy, one in held.items()
    ]
    best = max(held, key=lambda policy: held[policy].held_out.mean(), default="")
    choice = traffic.choose(held) if held else None
    if choice is not None:
        nan = float("nan")
        rows.append((CHOSEN, nan, nan, nan, *_means(choice.held_out, in_time)))
    places = pd.DataFrame(found.sites, columns=["layer", "site"])
    stragglers = [
        places.assign(policy=policy, straggler=one.stragglers) for policy, one in held.items()
    ]
    ages, again = [], []
    if best and in_time:
        later = traffic.rebalanced_later(loads, best, **sizes)
        for age in range(len(later)):
            values = np.diagonal(later, age)
            ages.append((age, np.nanmean(values), *_interval(values, in_time)))
        again = [
            (one.every, *_means(one.held_out, in_time)[:3], one.copies, one.most)
            for one in traffic.renewals(loads, best, **sizes)
        ]
    interval = ["low", "high"]
    return Judgement(
        pd.DataFrame(
            rows,
            columns=["policy", "own", "own_low", "own_high", "held_out", *interval, "worst"],
        ),
        best,
        pd.concat(stragglers, ignore_index=True) if stragglers else pd.DataFrame(),
        pd.DataFrame(ages, columns=["windows_later", "balancedness", *interval]),
        pd.DataFrame(again, columns=["every", "held_out", *interval, "copies", "most"]).astype(
            {"every": "Int64"}
        ),
        len(loads),
    )


def _interval(values: placement.Floats, in_time: bool) -> tuple[float, float]:
    return traffic.mean_interval(values, in_time=in_time)


def _means(values: placement.Floats, in_time: bool) -> tuple[float, float, float, float]:
    return float(np.nanmean(values)), *_interval(values, in_time), float(np.nanmin(values))


class Dispatch(NamedTuple):
    """What an all-to-all sends, summed over layers, a token.

    Attributes
    ----------
    sent : array [G, G], bytes
        From the GPU of the request to those of the experts; the diagonal stays at home.
    gpus, nodes : float
        That a token visits a layer.
    tokens : int
        That were looked at.
    """

    sent: npt.NDArray[np.float64]
    gpus: float
    nodes: float
    tokens: int


class Placed(NamedTuple):
    """A placement of all windows: as files, and what it makes tokens travel.

    Attributes
    ----------
    files : dict of str to str
        Text of each of ``engine_files.PLACEMENT_FORMATS``; empty where no engine could load one.
    refused : str
        Why there is none.
    dispatch : Dispatch or None
        None where the run holds no expert ids.
    """

    files: dict[str, str]
    refused: str
    dispatch: Dispatch | None


def placed(
    run: Run,
    *,
    policy: str,
    by: str,
    windows: int,
    n_experts: int,
    gpus: int,
    nodes: int,
    groups: int,
    replicas: int,
    phase: str | None = None,
) -> Placed:
    """Make the placement of a policy from all windows."""
    found = window_loads(run, by, windows, n_experts=n_experts, phase=phase)
    made = placement.place(
        found.loads, policy, gpus=gpus, nodes=nodes, groups=groups, replicas=replicas
    )
    try:
        n_layers, refused = hidden_layers(run), ""
        layers = [layer for layer, _ in found.sites]
        files = {kind: placement_file(made, layers, kind, n_layers) for kind in PLACEMENT_FORMATS}
    except RunError as error:
        files, refused = {}, str(error)
    if not run.records_ids:
        return Placed(files, refused, None)
    token_bytes = placement.STATE_BYTES * int(run.info["hidden_size"])
    sent, on_gpus, on_nodes, tokens = np.zeros((gpus, gpus)), [], [], 0
    for row, (layer, site) in enumerate(found.sites):
        one = routing(run, layer, site=site, phase=phase, max_tokens=MAX_DISPATCHED)
        tokens = max(tokens, len(one.expert_ids))
        if len(one.expert_ids):
            visits = placement.visited(one.expert_ids, made, row, gpus=gpus, nodes=nodes)
            on_gpus.append(visits[0].mean())
            on_nodes.append(visits[1].mean())
            # requests are dealt to GPUs in turn
            sent += placement.dispatch(
                one.expert_ids, one.prompt_id % gpus, made, row, gpus=gpus, token_bytes=token_bytes
            )
    if not tokens:
        return Placed(files, refused, None)
    means = float(np.mean(on_gpus)), float(np.mean(on_nodes))
    return Placed(files, refused, Dispatch(sent / tokens, *means, tokens))


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


class CacheTables(NamedTuple):
    """Caches of experts on every other prompt, fitted on the rest.

    Attributes
    ----------
    rates : DataFrame
        ``cache`` (a name in ``metrics.cache.LINES``), ``slots`` a layer, ``hit_rate``, and
        ``loaded``: experts loaded a token, all layers.
    drafts : DataFrame
        ``tokens, one_request, many_requests, uniform``: different experts read together, mean of
        layers; empty where requests take turns.
    pins : dict of int to dict of str to str
        Budget (experts of all layers) -> the file of each of ``engine_files.PIN_FORMATS``.
    n_experts, tokens, fitted : int
        Experts a layer; tokens that were judged, and fitted on.
    """

    rates: pd.DataFrame
    drafts: pd.DataFrame
    pins: dict[int, dict[str, str]]
    n_experts: int
    tokens: int
    fitted: int


REQUESTS = {
    "one": "One after another",
    "eight": "8 taking turns",
    "thirty_two": "32 taking turns",
    "recorded": "As recorded",
}
_TOGETHER = {"eight": 8, "thirty_two": 32}
_SECONDS_A_LOOKUP = 2e-6  # reading it, and 20 passes of caches


def seconds_to_cache(run: Run) -> float:
    """Return about how long :func:`cached` takes."""
    return float(run.info["n_tokens"]) * sum(one.top_k for one in run.sites) * _SECONDS_A_LOOKUP


def cached(
    run: Run, *, phase: str | None = None, domain: str | None = None, requests: str = "one"
) -> CacheTables:
    """Simulate caches of experts, and list what is worth keeping in fast memory.

    Parameters
    ----------
    requests : str
        A name in ``REQUESTS``: the order in which requests reach the cache.
    """
    layers = cache_lookups(
        run,
        phase=phase,
        domain=domain,
        interleaved=requests == "recorded",
        together=_TOGETHER.get(requests, 1),
    )
    n_experts, n_layers = layers[0].n_experts, len(layers)
    slots = sorted({max(1, n_experts * share // 8) for share in range(1, 9)})
    per_token = sum(float((layer.judged >= 0).sum(1).mean()) for layer in layers)
    rates = [
        (name, size, hit, loaded * per_token)
        for name, found in cache.simulate(layers, slots).items()
        for size, (hit, loaded) in zip(slots, found, strict=True)
    ]
    drafts = []
    if requests == "one":
        reads = [
            placement.draft_reads(layer.judged, layer.prompt_id, n_experts) for layer in layers
        ]
        means = [np.mean([one[i] for one in reads], axis=0) for i in range(4)]
        drafts = list(zip(*means, strict=True))
    load = np.stack([layer.load for layer in layers])
    numbers = [layer.layer for layer in layers]
    pinned: dict[int, dict[str, str]] = {}
    for size in slots:
        budget = size * n_layers
        kinds = [kind for kind in PIN_FORMATS if kind != "llama-cpp" or budget >= n_experts]
        pinned[budget] = {kind: pins_file(load, numbers, budget, kind) for kind in kinds}
    return CacheTables(
        pd.DataFrame(rates, columns=["cache", "slots", "hit_rate", "loaded"]),
        pd.DataFrame(drafts, columns=["tokens", "one_request", "many_requests", "uniform"]),
        pinned,
        n_experts,
        len(layers[0].judged),
        len(layers[0].fit),
    )


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


# finer where a limit is chosen
_STEPS = ((0.5, 4.0, 0.05), (4.0, 16.0, 0.25), (16.0, 1024.0, 4.0))


def factors_to(zero_from: float) -> list[float]:
    """Return capacity factors up to the first one that drops nothing, which is the last of them."""
    end = np.ceil(100 * max(zero_from, 1.5) - 1e-6) / 100 if np.isfinite(zero_from) else 4.0
    found = np.concatenate([np.arange(*steps) for steps in _STEPS])
    return [*np.round(found[found < end - 1e-9], 2).tolist(), float(end)]


def capacity_of(
    run: Run, *, layer: int, site: int, phase: str | None
) -> tuple[pd.DataFrame, float, int, int, int]:
    """Return the capacity curve of a site, the safe factor, batches, tokens used, and all."""
    chosen = routing(run, layer, site=site, phase=phase, max_tokens=MAX_CAPACITY_TOKENS)
    n_experts = run.site_info(layer, site).n_routed
    safe = smallest_safe_factor(chosen, n_experts)
    return (
        capacity_table(chosen, n_experts, factors_to(safe)),
        safe,
        len(np.unique(chosen.batch)),
        len(chosen.token_id),
        chosen.n_tokens,
    )
