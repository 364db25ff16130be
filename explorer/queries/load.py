"""How much work every expert got. Only ``routing`` reads rows per token."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.errors import RunError
from explorer.metrics.load import LOAD_METRICS, sampling_floor
from explorer.queries.routed import ROUTED
from explorer.queries.where import Params, Part, conditions
from explorer.run import Run


def expert_load(
    run: Run,
    *,
    layer: int | None = None,
    site: int | None = None,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    weights: bool = True,
) -> pd.DataFrame:
    """Return the load of every routed expert, idle experts included.

    Experts that compute nothing, such as those that pass a token on, have no load: shares are of
    the assignments to the others, see
    :func:`explorer.queries.routed.left_out`.

    Parameters
    ----------
    part : Part, optional
        The run has no totals of it, so that its tokens are counted one by one.
    weights : bool
        False leaves ``weight_sum`` missing of a part, where it costs half as much again.

    Returns
    -------
    DataFrame
        One row per layer, site and routed expert, in this order: ``layer``, ``site``,
        ``expert_id``, ``n_experts`` (routed ones), ``top_k``, ``assignments``, ``weight_sum``,
        ``prob_sum``; ``share`` = assignments / the site's assignments, and ``ratio`` = share /
        uniform share, so 1 is a fair load. ``share`` and ``ratio`` are missing where the site has
        no assignment, ``weight_sum`` where weights were not recorded, ``prob_sum`` where the
        router's scores were not known, and of a part.

    Raises
    ------
    RunError
        For a part of a run that does not hold expert ids.
    """
    place, place_params = conditions(layer=layer, site=site)
    where, params = conditions(domain=domain, phase=phase)
    source, source_params = load_of(run, part)
    known = weights or part is None
    if part is None and where == "true":
        source = "expert_load"
    return run.query(
        f"""
        WITH experts AS (
            SELECT layer, site, count(*) OVER of_site AS n_experts, top_k, expert_id
            FROM {ROUTED} JOIN sites USING (layer, site) WHERE {place}
            WINDOW of_site AS (PARTITION BY layer, site)
        ), load AS (
            SELECT layer, site, expert_id, sum(assignments)::BIGINT AS assignments,
                {"sum(weight_sum)" if known else "NULL::DOUBLE"} AS weight_sum,
                CASE WHEN count(prob_sum) = count(*) THEN sum(prob_sum) END AS prob_sum
            FROM {source}
            WHERE {where} AND {place} GROUP BY layer, site, expert_id
        )
        SELECT layer, site, expert_id, n_experts, top_k,
            coalesce(assignments, 0) AS assignments,
            {"CASE WHEN assignments IS NULL THEN 0 ELSE weight_sum END" if known else "weight_sum"}
                AS weight_sum, prob_sum,
            coalesce(assignments, 0) / nullif(sum(assignments) OVER of_site, 0)::DOUBLE AS share,
            n_experts * share AS ratio
        FROM experts LEFT JOIN load USING (layer, site, expert_id)
        WINDOW of_site AS (PARTITION BY layer, site)
        ORDER BY layer, site, expert_id
        """,
        place_params | params | source_params,
    )


def load_of(run: Run, part: Part | None) -> tuple[str, Params]:
    """Write where load comes from: the run's totals, or the tokens of a part, counted one by one.

    Both have the columns of the view ``expert_load_by``, with any number of rows per expert.
    """
    if part is None:
        return "expert_load_by", {}
    run.refuse_without_ids("A search or a slice")
    where, params = conditions(part=part)
    # tokens are chosen before the join: then DuckDB leaves out rows before it unpacks their slots
    return (
        f"""(
            SELECT layer, site, expert_id, domain, phase, 1 AS assignments, weight AS weight_sum,
                NULL::DOUBLE AS prob_sum
            FROM assignments JOIN (
                SELECT token_id, domain, phase FROM tokens JOIN prompts USING (prompt_id)
                WHERE {where}
            ) USING (token_id)
        ) AS counted""",
        params,
    )


def expert_load_by_domain(
    run: Run, layer: int, *, site: int = 0, phase: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return the load of one site's experts in each domain that occurs.

    Returns
    -------
    DataFrame
        One row per domain and expert: ``domain`` (``""`` = no domain), ``layer``, ``site``,
        ``expert_id``, ``n_experts``, ``assignments``, ``share`` of the domain's assignments,
        ``ratio`` = share / uniform share (missing where the domain has no assignment).
    """
    return _load_by(run, "coalesce(domain, '')", "domain", layer, site, phase=phase, part=part)


def expert_load_by_phase(
    run: Run, layer: int, *, site: int = 0, domain: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return the load of one site's experts in each phase, prompt first; columns as by domain."""
    return _load_by(run, "phase", "phase", layer, site, domain=domain, part=part)


def _load_by(
    run: Run,
    key: str,
    name: str,
    layer: int,
    site: int,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> pd.DataFrame:
    where, params = conditions(layer=layer, site=site, domain=domain, phase=phase)
    source, source_params = load_of(run, part)
    return run.query(
        f"""
        WITH load AS (
            SELECT {key} AS part, layer, site, expert_id, sum(assignments)::BIGINT AS assignments
            FROM {source} WHERE {where} GROUP BY ALL
        ), experts AS (
            SELECT part, layer, site, count(*) OVER of_part AS n_experts, expert_id
            FROM (SELECT DISTINCT part, layer, site FROM load) JOIN {ROUTED} USING (layer, site)
            WINDOW of_part AS (PARTITION BY part, layer, site)
        )
        SELECT part AS {name}, layer, site, expert_id, n_experts,
            coalesce(load.assignments, 0) AS assignments,
            coalesce(load.assignments, 0)
                / nullif(sum(load.assignments) OVER (PARTITION BY part), 0)::DOUBLE AS share,
            n_experts * share AS ratio
        FROM experts LEFT JOIN load USING (part, layer, site, expert_id)
        ORDER BY part IN ('', 'generated'), part, expert_id
        """,
        params | source_params,
    )


WINDOWS = {
    "prompts": "consecutive prompts",
    "time": "consecutive forward passes, at level counts steps",
    "domains": "a domain each",
}
# windows of equally many steps each
_OF_STEPS = """
    SELECT layer, site, expert_id, part, assignments, NULL::VARCHAR AS domain, 'any' AS phase
    FROM load_windows JOIN (
        SELECT step, floor($windows * (row_number() OVER (ORDER BY step) - 1) / count(*) OVER ())
            ::INTEGER AS part
        FROM (SELECT DISTINCT step FROM load_windows)
    ) USING (step)
"""
# the window of each token, of about equally many tokens each
_PARTS = {
    "prompts": """
        JOIN (
            SELECT prompt_id, domain, floor($windows * (
                sum(n_tokens) OVER (ORDER BY prompt_id) - n_tokens / 2
            ) / sum(n_tokens) OVER ())::INTEGER AS part
            FROM prompts JOIN prompt_sizes USING (prompt_id)
        ) USING (prompt_id)
    """,
    "time": """
        JOIN prompts USING (prompt_id) JOIN token_batches USING (token_id) JOIN (
            SELECT batch_id, floor($windows * (
                sum(tokens) OVER (ORDER BY batch_id) - tokens / 2
            ) / sum(tokens) OVER ())::INTEGER AS part FROM batches
        ) USING (batch_id)
    """,
}


def steps_of(run: Run) -> list[int]:
    """Return the steps of a recorder or a training that the run keeps sums of, in order."""
    found = run.query("SELECT DISTINCT step FROM load_windows ORDER BY step")
    return [int(step) for step in found["step"]]


def expert_load_by_step(run: Run, layer: int, *, site: int = 0, most: int = 24) -> pd.DataFrame:
    """Return the load of one site's experts over a recorder's steps, in at most so many windows.

    Returns
    -------
    DataFrame
        As by domain; ``step`` is the window's first and last one.
    """
    n_experts = run.site_info(layer, site).n_routed
    steps = steps_of(run)
    found = window_loads(run, "time", min(most, len(steps)), n_experts=n_experts)
    loads = found.loads[:, found.sites.index((layer, site))]
    parts = np.arange(len(steps)) * min(most, len(steps)) // len(steps)
    total = loads.sum(1, keepdims=True)
    share = np.divide(loads, total, out=np.full(loads.shape, np.nan), where=total > 0)
    named = {}
    for name in found.names:
        inside = np.flatnonzero(parts == int(name) - 1)
        first, last = steps[inside[0]], steps[inside[-1]]
        named[name] = str(first) if first == last else f"{first} to {last}"
    return pd.DataFrame(
        {
            "step": np.repeat([named[name] for name in found.names], n_experts),
            "layer": layer,
            "site": site,
            "expert_id": np.tile(np.arange(n_experts), len(loads)),
            "n_experts": n_experts,
            "assignments": loads.astype(np.int64).ravel(),
            "share": share.ravel(),
            "ratio": share.ravel() * n_experts,
        }
    )


class WindowLoads(NamedTuple):
    """Loads of W windows of a run's traffic, at the L routers with E experts each.

    Attributes
    ----------
    by : str
        A name in ``WINDOWS``.
    names : list of str
        Domains, or the numbers of the windows from 1.
    sites : list of (layer, site)
    loads : array [W, L, E], assignments
    """

    by: str
    names: list[str]
    sites: list[tuple[int, int]]
    loads: npt.NDArray[np.float64]

    @property
    def in_time(self) -> bool:
        """Whether windows follow each other; domains do not."""
        return self.by != "domains"


def window_loads(
    run: Run,
    by: str = "domains",
    windows: int = 8,
    *,
    n_experts: int | None = None,
    domain: str | None = None,
    phase: str | None = None,
) -> WindowLoads:
    """Return the loads of windows of the run's traffic.

    Parameters
    ----------
    by : str
        A name in ``WINDOWS``: what a window is made of; at level counts time, unless domains.
    windows : int
        How many, with about equally many tokens or, at level counts, steps, unless they are
        domains. Windows without a token are left out.
    n_experts : int, optional
        Routed ones, of the routers that are wanted; needed where a run has several sizes.

    Raises
    ------
    RunError
        For windows of a run that holds neither expert ids nor steps of a recorder, and for routers
        of several sizes.
    """
    if by not in WINDOWS:
        raise RunError(f"Windows are of {', '.join(WINDOWS)}, got {by!r}.")
    sizes = sorted({site.n_routed for site in run.sites})
    if n_experts is None:
        if len(sizes) > 1:
            raise RunError(
                f"The routers of this run have {', '.join(map(str, sizes))} experts. Say which of "
                "these sizes is meant."
            )
        n_experts = sizes[0]
    infos = [one for one in run.sites if one.n_routed == n_experts]
    sites = [(one.layer, one.site) for one in infos]
    where, params = conditions(domain=domain, phase=phase)
    if by == "domains":
        source = "SELECT *, coalesce(domain, '') AS part FROM expert_load_by"
    else:
        if run.sums_only and steps_of(run):
            by, source = "time", _OF_STEPS  # which is all that counts know
        else:
            run.refuse_without_ids("Telling windows other than domains apart")
            source = (
                "SELECT layer, site, expert_id, domain, phase, part, 1 AS assignments"
                f" FROM assignments JOIN tokens USING (token_id) {_PARTS[by]}"
            )
        params["windows"] = windows
    table = run.query(
        f"SELECT part, layer, site, expert_id, sum(assignments)::BIGINT AS assignments "
        f"FROM ({source}) WHERE {where} GROUP BY ALL ORDER BY part",
        params,
    )
    table = table[table["assignments"] > 0]
    found = list(dict.fromkeys(table["part"].tolist()))
    index = {place: i for i, place in enumerate(sites)}
    at = [index.get(place, -1) for place in zip(table["layer"], table["site"], strict=True)]
    kept = np.array(at, dtype=np.int64) >= 0
    number = table["part"].map({part: i for i, part in enumerate(found)}).to_numpy(np.int64)
    loads = np.zeros((len(found), len(sites), n_experts + 1))
    # one cell more takes what is not routed
    place = np.array(at, dtype=np.int64)[kept]
    numbers = np.stack([one.routed_numbers() for one in infos])
    expert = numbers[place, table["expert_id"].to_numpy()[kept]]
    loads[number[kept], place, expert] = table["assignments"].to_numpy()[kept]
    loads = loads[..., :-1]
    names = [str(p) if by == "domains" else str(p + 1) for p in found]
    return WindowLoads(by, names, sites, loads)


def hidden_layers(run: Run, given: int | None = None) -> int:
    """Return how many decoder layers the model has, as far as is known.

    Parameters
    ----------
    given : int, optional
        What somebody says; without it the run knows of layers up to the last one with experts.

    Raises
    ------
    RunError
        For fewer than the run has, and for several routers in a layer.
    """
    if any(site.site for site in run.sites):
        raise RunError(
            "A placement file has one row a layer, and layers of this model have several routers. "
            "No engine serves such a model with expert parallelism."
        )
    least = max(run.layers) + 1
    if given is not None and given < least:
        raise RunError(f"The model has at least {least} decoder layers, got {given}.")
    return given or least


def calibration(
    run: Run, at_least: int = 256, *, phase: str | None = None, layer: int | None = None
) -> pd.DataFrame:
    """Return how many tokens of each domain reach each expert, and how many texts are missing.

    Statistics that quantisation and pruning take from these texts are worth little for an expert
    that fewer than ``at_least`` tokens reach.

    Returns
    -------
    DataFrame
        One row per ``domain`` (``""`` = none; ``None`` = all domains together), ``layer``,
        ``site`` and ``expert_id``: ``tokens`` that reach it, ``texts`` of the domain, ``missing``
        tokens, and ``more_texts`` like these that bring them at the rate seen so far. Of an expert
        that no token reached the rate is not known: ``more_texts`` is what it takes at least, with
        95% confidence (its rate is under 3 tokens in ``texts`` texts), and ``unseen`` is true.
    """
    if at_least < 1:
        raise RunError(f"Expected a number of tokens of 1 or more, got {at_least}.")
    if run.sums_only:
        raise RunError(
            "Calibration coverage counts texts, and a run that was imported from counts has none."
        )
    where, params = conditions(phase=phase, layer=layer)
    place, place_params = conditions(layer=layer)
    rows = run.query(
        f"""
        WITH texts AS (
            SELECT coalesce(domain, '') AS domain, count(*) AS texts FROM prompts GROUP BY ALL
        ), load AS (
            SELECT coalesce(domain, '') AS domain, layer, site, expert_id,
                sum(assignments)::BIGINT AS tokens
            FROM expert_load_by WHERE {where} GROUP BY ALL
        ), experts AS (
            SELECT layer, site, expert_id FROM {ROUTED} WHERE {place}
        )
        SELECT domain, layer, site, expert_id, coalesce(tokens, 0) AS tokens, texts
        FROM texts CROSS JOIN experts LEFT JOIN load USING (domain, layer, site, expert_id)
        ORDER BY domain = '', domain, layer, site, expert_id
        """,
        params | place_params,
    )
    whole = rows.groupby(["layer", "site", "expert_id"], as_index=False)[["tokens", "texts"]].sum()
    table = pd.concat([whole.assign(domain=None), rows], ignore_index=True)
    missing = (at_least - table["tokens"]).clip(lower=0)
    rate = table["tokens"].clip(lower=3).where(table["tokens"] == 0, table["tokens"])
    more = np.ceil(missing * table["texts"] / rate).astype("int64")
    unseen = table["tokens"] == 0
    return table.assign(missing=missing, more_texts=more, unseen=unseen)[
        [
            "domain",
            "layer",
            "site",
            "expert_id",
            "tokens",
            "texts",
            "missing",
            "more_texts",
            "unseen",
        ]
    ]


class BatchRouting(NamedTuple):
    """What one site chose, in the order of the forward passes.

    Attributes
    ----------
    token_id : array [T]
    batch : array [T]
        The forward pass of each token.
    prompt_id : array [T]
    expert_ids : array [T, K], int32
        Numbers among the routed experts; -1 = empty slot, or an expert that computes nothing.
    weights : array [T, K], float32
    n_tokens : int
        Tokens that the run has at this site under the filters; more than T when ``max_tokens``
        cut.
    """

    token_id: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    prompt_id: npt.NDArray[np.int64]
    expert_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    n_tokens: int


def routing(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    max_tokens: int | None = None,
) -> BatchRouting:
    """Return a site's choices batch by batch, for what acts within a batch.

    Parameters
    ----------
    domain : str, optional
        As a part, it leaves some tokens of a batch only: not for a limit on whole batches.
    phase : str, optional
        A forward pass is of one phase, so that this keeps batches whole.
    part : Part, optional
    max_tokens : int, optional
        Take the first batches up to about this many tokens, all that the filters leave of each,
        at least one batch.

    Raises
    ------
    RunError
        If the run does not hold expert ids.
    """
    info = run.site_info(layer, site)
    run.refuse_without_ids("Reading choices in order")
    where, params = conditions(phase=phase)
    passes, sizes_of = "token_batches JOIN batches USING (batch_id)", "batches"
    if domain is not None or part is not None:
        of_tokens, more = conditions(domain=domain, part=part)
        params |= more
        passes += (
            " SEMI JOIN (SELECT token_id FROM tokens JOIN prompts USING (prompt_id) "
            f"WHERE {of_tokens}) USING (token_id)"
        )
        sizes_of = f"(SELECT batch_id, phase, count(*) AS tokens FROM {passes} GROUP BY ALL)"
    sizes = run.query(
        f"SELECT batch_id, tokens FROM {sizes_of} WHERE {where} ORDER BY batch_id", params
    )
    before = sizes["tokens"].cumsum() - sizes["tokens"]
    kept = sizes["batch_id"] if max_tokens is None else sizes["batch_id"][before < max_tokens]
    last = -1 if kept.empty else int(kept.max())
    order = run.table(
        f"SELECT token_id, batch_id, prompt_id FROM (SELECT * FROM {passes} WHERE {where} AND "
        "batch_id <= $last) JOIN (SELECT token_id, prompt_id FROM tokens) USING (token_id) "
        "ORDER BY batch_id, row_in_batch",
        params | {"last": last},
    )
    token_id = order["token_id"].to_numpy().astype(np.int64)
    # tokens of a batch may lie anywhere in the run, so that a range of ids would be most of it
    rows = run.table(
        "SELECT token_id, slot, expert_id, weight FROM assignments SEMI JOIN (SELECT token_id "
        f"FROM {passes} WHERE {where} AND batch_id <= $last) "
        "USING (token_id) WHERE layer = $layer AND site = $site",
        params | {"layer": layer, "site": site, "last": last},
    )
    ids = np.full((len(token_id), info.top_k), -1, dtype=np.int32)
    weights = np.zeros((len(token_id), info.top_k), dtype=np.float32)
    if len(token_id):
        row_of = np.full(int(token_id.max()) + 1, -1, dtype=np.int32)
        row_of[token_id] = np.arange(len(token_id))
        row, slot = row_of[rows["token_id"].to_numpy()], rows["slot"].to_numpy()
        ids[row, slot] = rows["expert_id"].to_numpy()
        weights[row, slot] = rows["weight"].to_numpy()
    batch, prompt_id = (
        order[name].to_numpy().astype(np.int64) for name in ("batch_id", "prompt_id")
    )
    n_tokens = int(sizes["tokens"].sum())
    numbers = info.routed_numbers()[ids].astype(np.int32)
    return BatchRouting(token_id, batch, prompt_id, numbers, weights, n_tokens)


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
