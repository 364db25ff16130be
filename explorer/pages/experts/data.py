"""What an expert's tokens are: prompt by prompt, by the text they are part of, and in a sample."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.metrics.load import Floor
from explorer.metrics.specialization import (
    MIN_COUNT,
    MIN_PROMPTS,
    by_prompt,
    divergence,
    favourite_share,
    information,
    lift,
    shuffled_favourite,
    shuffled_information,
    shuffled_top,
    wilson,
)
from explorer.queries.experts import expert_vocabulary
from explorer.queries.load import expert_load, load_of
from explorer.queries.overview import token_count
from explorer.queries.routed import ROUTED
from explorer.queries.where import Part, conditions
from explorer.run import Run
from explorer.text import covering

Ids = npt.NDArray[np.int64]

# assignments that are read for figures over all layers; more would make the page wait
MAX_ASSIGNMENTS = 400_000
# prompts that are searched for a text, character by character
MAX_PROMPTS = 2_000


def expert_hits(
    run: Run,
    layer: int,
    expert_id: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> pd.DataFrame:
    """Return how many tokens of every prompt went to an expert.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``domain`` (``""`` = none), ``phase``, ``tokens``, ``hits``. At level
        ``stats`` and ``counts`` one row per domain and phase, with a missing ``prompt_id``.
    """
    where, params = conditions(domain=domain, phase=phase, part=part)
    params |= {"layer": layer, "site": site, "expert": expert_id}
    if not run.records_ids:
        source = "tokens JOIN prompts USING (prompt_id)"
        tokens = f"SELECT coalesce(domain, '') AS domain, phase, count(*) AS tokens FROM {source}"
        if run.sums_only:
            tokens = (
                "SELECT coalesce(domain, '') AS domain, phase,"
                " round(sum(assignments) / any_value(top_k))::BIGINT AS tokens FROM expert_load_by"
                " JOIN sites USING (layer, site)"
            )
            where += " AND layer = $layer AND site = $site"
        tokens += f" WHERE {where} GROUP BY ALL"
        return run.query(
            f"""
            WITH listed AS ({tokens}), used AS (
                SELECT coalesce(domain, '') AS domain, phase, sum(assignments)::BIGINT AS hits
                FROM expert_load_by
                WHERE layer = $layer AND site = $site AND expert_id = $expert GROUP BY ALL
            )
            SELECT NULL::INTEGER AS prompt_id, domain, phase, tokens, coalesce(hits, 0) AS hits
            FROM listed LEFT JOIN used USING (domain, phase) ORDER BY domain, phase
            """,
            params,
        )
    return run.query(
        f"""
        WITH used AS (
            SELECT token_id, 1 AS hit FROM assignments
            WHERE layer = $layer AND site = $site AND expert_id = $expert
        )
        SELECT prompt_id, coalesce(domain, '') AS domain, phase, count(*) AS tokens,
            count(hit) AS hits
        FROM tokens JOIN prompts USING (prompt_id) LEFT JOIN used USING (token_id)
        WHERE {where} GROUP BY ALL ORDER BY prompt_id, phase
        """,
        params,
    )


def occurrences(
    run: Run, *, domain: str | None = None, phase: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return how often every vocabulary entry occurs: ``token`` and ``tokens``."""
    where, params = conditions(domain=domain, phase=phase, part=part)
    return run.query(
        "SELECT token, count(*) AS tokens FROM tokens JOIN prompts USING (prompt_id) "
        f"WHERE {where} GROUP BY token ORDER BY token",
        params,
    )


def loads_by_domain(
    run: Run, *, domain: str | None = None, phase: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return the load of every routed expert in every domain.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``expert_id``, ``domain`` (``""`` = none), ``assignments``.
    """
    where, params = conditions(domain=domain, phase=phase)
    source, more = load_of(run, part)
    return run.query(
        f"""
        SELECT layer, site, expert_id, coalesce(domain, '') AS domain,
            sum(assignments)::BIGINT AS assignments
        FROM {source} SEMI JOIN {ROUTED} USING (layer, site, expert_id)
        WHERE {where} GROUP BY ALL ORDER BY layer, site, expert_id, domain
        """,
        params | more,
    )


class TextTokens(NamedTuple):
    """Tokens that a text covers.

    Attributes
    ----------
    token_ids : array [N]
        Of the tokens that share a character with an occurrence.
    occurrences : int
    pieces : DataFrame
        ``text`` of these tokens and how often (``tokens``), most first: how the model cuts it.
    n_prompts, n_all : int
        Prompts searched, and prompts that contain the text.
    """

    token_ids: Ids
    occurrences: int
    pieces: pd.DataFrame
    n_prompts: int
    n_all: int


def tokens_of_text(
    run: Run,
    text: str,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> TextTokens:
    """Find the tokens that a word or phrase is made of, upper or lower case.

    Looked for in the text of whole prompts, see :func:`~explorer.text.covering`.
    """
    where, params = conditions(domain=domain, phase=phase, part=part)
    listed = run.query(
        f"""
        WITH written AS (
            SELECT prompt_id, string_agg(tokens.text, '' ORDER BY position) AS whole
            FROM tokens GROUP BY prompt_id
        ), matching AS (
            SELECT DISTINCT prompt_id FROM tokens JOIN prompts USING (prompt_id) WHERE {where}
        )
        SELECT prompt_id FROM written SEMI JOIN matching USING (prompt_id)
        WHERE contains(lower(whole), lower($text)) ORDER BY prompt_id
        """,
        params | {"text": text},
    )
    searched = listed["prompt_id"].tolist()[:MAX_PROMPTS]
    rows = run.query(
        f"""
        SELECT prompt_id, token_id, tokens.text AS text, {where} AS kept
        FROM tokens JOIN prompts USING (prompt_id)
        WHERE prompt_id IN (SELECT unnest($searched::INTEGER[])) ORDER BY prompt_id, position
        """,
        params | {"searched": searched},
    )
    ids, pieces, occurrences = _covered(rows, text)
    counts = pd.Series(pieces, dtype=object).value_counts()
    table = pd.DataFrame({"text": counts.index.astype(object), "tokens": counts.to_numpy()})
    return TextTokens(
        np.unique(ids).astype(np.int64), occurrences, table, len(searched), len(listed)
    )


def _covered(rows: pd.DataFrame, text: str) -> tuple[list[int], list[str], int]:
    """Return the tokens that occurrences cover, their texts, and how many occurrences there are."""
    ids: list[int] = []
    pieces: list[str] = []
    n = 0
    for _, tokens in rows.groupby("prompt_id", sort=False):
        texts = [piece or "" for piece in tokens["text"]]
        token_ids, kept = tokens["token_id"].tolist(), tokens["kept"].tolist()
        for covered in covering(texts, text):
            inside = [row for row in covered if kept[row]]
            n += bool(inside)
            ids += [token_ids[row] for row in inside]
            pieces += [texts[row] for row in inside]
    return ids, pieces, n


class RouteSample(NamedTuple):
    """Tokens and what all routers chose for them.

    Attributes
    ----------
    tokens : DataFrame
        One row per token: ``token_id``, ``token`` (vocabulary id), ``prompt_id``, ``domain``.
    routes : DataFrame
        One row per assignment: ``layer``, ``site``, ``row`` (in ``tokens``), ``expert_id``.
    step : int
        Every n-th token of the run is in it, n = ``step``.
    """

    tokens: pd.DataFrame
    routes: pd.DataFrame
    step: int


def route_sample(
    run: Run, *, domain: str | None = None, phase: str | None = None, part: Part | None = None
) -> RouteSample:
    """Return the assignments of evenly spread tokens, about ``MAX_ASSIGNMENTS`` at most.

    No rows at level ``stats``.
    """
    where, params = conditions(domain=domain, phase=phase, part=part.whole() if part else None)
    source = f"FROM tokens JOIN prompts USING (prompt_id) WHERE {where}"
    n_tokens = int(run.query(f"SELECT count(*) AS n {source}", params)["n"].iloc[0])
    per_token = sum(site.top_k for site in run.sites)
    step = max(1, -(-n_tokens * per_token // MAX_ASSIGNMENTS))
    params |= {"step": step}
    tokens = run.query(
        "SELECT token_id, token, prompt_id, coalesce(domain, '') AS domain "
        f"{source} AND token_id % $step = 0 ORDER BY token_id",
        params,
    )
    table = run.table(
        f"""
        SELECT layer, site, token_id, expert_id FROM assignments
        SEMI JOIN (SELECT token_id {source} AND token_id % $step = 0) USING (token_id)
        ORDER BY layer, site
        """,
        params,
    )
    names = ("layer", "site", "token_id", "expert_id")
    routes = {name: table[name].to_numpy().astype(np.int64) for name in names}
    ids = routes.pop("token_id")
    routes["row"] = np.searchsorted(tokens["token_id"].to_numpy(dtype=np.int64), ids)
    return RouteSample(tokens, pd.DataFrame(routes), step)


# fewest tokens of a text that went to an expert before its lift means anything
MIN_HITS = 5


def shares_of(run: Run, layer: int, expert_id: int, *, by: str, **filters: Any) -> pd.DataFrame:
    """Return the specialisation of an expert for every domain, or for both phases.

    Parameters
    ----------
    by : {"domain", "phase"}
    **filters
        As ``expert_hits`` takes them.

    Returns
    -------
    DataFrame
        ``by``, ``prompts``, ``tokens``, ``hits``, ``share`` = hits / tokens, ``low``, ``high``
        (90% interval), ``interval`` (``prompts`` or ``tokens``: what was taken as independent);
        largest share first. The last row, with ``by`` missing, is of all together.
    """
    rows = expert_hits(run, layer, expert_id, **filters)
    found: list[dict[Hashable, Any]] = []
    groups: list[tuple[Any, pd.DataFrame]] = list(rows.groupby(by, sort=True)) if len(rows) else []
    for name, part in [*groups, (None, rows)]:
        whole = part.groupby("prompt_id", dropna=False)[["tokens", "hits"]].sum()
        tokens, hits = int(whole["tokens"].sum()), int(whole["hits"].sum())
        prompts = int(part["prompt_id"].nunique())
        low, high = by_prompt(whole["hits"], whole["tokens"])
        found.append(
            {
                by: name,
                "prompts": prompts if run.records_ids else pd.NA,
                "tokens": tokens,
                "hits": hits,
                "share": hits / tokens if tokens else float("nan"),
                "low": float(low),
                "high": float(high),
                "interval": "prompts" if prompts >= MIN_PROMPTS else "tokens",
            }
        )
    table = pd.DataFrame(found)
    ordered = table.iloc[:-1].sort_values(["share", by], ascending=[False, True])
    return pd.concat([ordered, table.iloc[-1:]], ignore_index=True)


def vocabulary_of(
    run: Run, layer: int, expert_id: int, *, min_count: int = MIN_COUNT, **filters: Any
) -> tuple[pd.DataFrame, Floor]:
    """Return the vocabulary entries of an expert, and what its luckiest one would have by chance.

    Returns
    -------
    DataFrame
        Of ``queries.experts.expert_vocabulary``, with ``low`` and ``high`` (90%, tokens taken as
        independent).
    Floor
        The largest share of any entry when as many tokens are drawn at random.
    """
    found = expert_vocabulary(run, layer, expert_id, min_count=min_count, limit=40, **filters)
    where = {name: filters[name] for name in ("domain", "phase", "part") if name in filters}
    every = occurrences(run, **where)["tokens"]
    often = every[every >= min_count]
    rest = int(every.sum() - often.sum())
    hits = expert_hits(run, layer, expert_id, **filters)["hits"].sum() if len(every) else 0
    floor = shuffled_top([*often.tolist(), rest], int(hits))
    low, high = wilson(found["assignments"], found["occurrences"])
    return found.assign(low=low, high=high), floor


def divergences(run: Run, **filters: Any) -> pd.DataFrame:
    """Return how far the domains of every routed expert's tokens are from those of all tokens.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``expert_id``, ``assignments``, ``divergence`` (nats; missing for an
        idle expert), ``domain`` (where its share is furthest above the layer's) and ``lift`` (how
        many times). No rows where fewer than two domains occur.
    """
    counts = loads_by_domain(run, **filters)
    rows = []
    for (layer, site), part in counts.groupby(["layer", "site"]):
        table = part.pivot_table(
            index="domain", columns="expert_id", values="assignments", aggfunc="sum", fill_value=0
        ).reindex(columns=run.site_info(layer, site).routed_ids(), fill_value=0)
        if len(table) < 2:
            continue
        values = table.to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = (values / values.sum(axis=0)) / (
                values.sum(axis=1, keepdims=True) / values.sum()
            )
        best = np.nan_to_num(lift, nan=-1).argmax(axis=0)
        rows.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "site": site,
                    "expert_id": table.columns,
                    "assignments": values.sum(axis=0).astype(np.int64),
                    "divergence": divergence(values),
                    "domain": table.index.to_numpy()[best],
                    "lift": lift[best, np.arange(values.shape[1])],
                }
            )
        )
    names = ["layer", "site", "expert_id", "assignments", "divergence", "domain", "lift"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=names)


def layers_of(run: Run, *, min_count: int = MIN_COUNT, **filters: Any) -> tuple[pd.DataFrame, int]:
    """Return the specialisation of every layer, with the floors of shuffled labels.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``n_experts``, ``top_k``; ``vocabulary`` (mean share of the favourite
        expert) and ``information`` (domain and expert, nats), each also with ``_floor``,
        ``_floor_low`` and ``_floor_high``; missing where not enough was recorded.
    int
        Every n-th token was looked at; this n.
    """
    sample = route_sample(run, **filters)
    entry = np.unique(sample.tokens["token"], return_inverse=True)[1]
    prompt_numbers = np.unique(sample.tokens["prompt_id"], return_inverse=True)[1]
    first = np.unique(prompt_numbers, return_index=True)[1]
    names = sample.tokens["domain"].to_numpy(dtype=object)
    labels = np.unique(names[first].astype(str), return_inverse=True)[1]
    rows = []
    for info in run.sites:
        mine = _routes(sample, info.layer, info.site)
        row: dict[Hashable, Any] = {
            "layer": info.layer,
            "site": info.site,
            "n_experts": info.n_experts,
            "top_k": info.top_k,
        }
        row |= _with_floor("vocabulary", *_vocabulary(mine, entry, info.n_experts, min_count))
        row |= _with_floor(
            "information", *_information(mine, prompt_numbers, labels, info.n_experts)
        )
        rows.append(row)
    return pd.DataFrame(rows), sample.step


def _routes(sample: RouteSample, layer: int, site: int) -> pd.DataFrame:
    routes = sample.routes
    return routes[(routes["layer"] == layer) & (routes["site"] == site)]


def _vocabulary(
    routes: pd.DataFrame, entry: Any, n_experts: int, min_count: int
) -> tuple[float, Floor]:
    rows, experts = routes["row"].to_numpy(), routes["expert_id"].to_numpy()
    often = np.bincount(entry) if len(entry) else np.zeros(0, np.int64)
    if not len(rows):
        return _MISSING
    value = favourite_share(entry[rows], experts, often, n_experts, min_count=min_count)
    return value, shuffled_favourite(rows, experts, entry, n_experts, min_count=min_count)


def _information(
    routes: pd.DataFrame, prompt_numbers: Any, labels: Any, n_experts: int
) -> tuple[float, Floor]:
    if not len(routes) or len(np.unique(labels)) < 2:
        return _MISSING
    cells = prompt_numbers[routes["row"].to_numpy()] * n_experts + routes["expert_id"].to_numpy()
    counts = np.bincount(cells, minlength=len(labels) * n_experts).reshape(-1, n_experts)
    grouped = np.zeros((int(labels.max()) + 1, n_experts))
    np.add.at(grouped, labels, counts)
    return information(grouped), shuffled_information(counts, labels)


_MISSING = (float("nan"), Floor(float("nan"), float("nan"), float("nan")))


def _with_floor(name: str, value: float, floor: Floor) -> dict[Hashable, Any]:
    return {
        name: value,
        f"{name}_floor": floor.mean,
        f"{name}_floor_low": floor.low,
        f"{name}_floor_high": floor.high,
    }


def experts_of_text(run: Run, text: str, **filters: Any) -> tuple[pd.DataFrame, TextTokens]:
    """Return which experts the tokens of a word or phrase go to more often than other tokens.

    Returns
    -------
    DataFrame
        Every (layer, site, expert) that took at least ``MIN_HITS`` of these tokens: ``layer``,
        ``site``, ``expert_id``, ``hits``, ``tokens``, ``share`` = hits / tokens, ``base`` (share
        of all tokens of the filters), ``lift`` = share / base, ``low``, ``high`` (of the lift,
        90%, tokens taken as independent). Those whose lift is surely largest come first.
    TextTokens
        The tokens, from ``tokens_of_text``.
    """
    found = tokens_of_text(run, text, **filters)
    names = ["layer", "site", "expert_id", "hits", "tokens", "share", "base", "lift", "low", "high"]
    n = len(found.token_ids)
    if not n:
        return pd.DataFrame(columns=names), found
    part = Part(token_ids=found.token_ids)
    here = expert_load(run, part=part, weights=False)
    every = expert_load(run, weights=False, **filters)
    n_all = token_count(run, **filters)
    table = here[["layer", "site", "expert_id"]].assign(
        hits=here["assignments"],
        tokens=n,
        share=here["assignments"] / n,
        base=every["assignments"] / n_all,
    )
    table = table[(table["hits"] >= MIN_HITS) & (table["base"] > 0)]
    low, high = wilson(table["hits"], table["tokens"])
    table = table.assign(
        lift=table["share"] / table["base"], low=low / table["base"], high=high / table["base"]
    )
    ordered = table.sort_values(["low", "layer", "expert_id"], ascending=[False, True, True])
    return ordered.reset_index(drop=True)[names], found


def experts_of_domains(
    run: Run, domains: Sequence[str], *, phase: str | None = None, part: Part | None = None
) -> tuple[pd.DataFrame, int]:
    """Return which experts the tokens of some domains, taken together, go to more than others.

    Returns
    -------
    DataFrame
        Every (layer, site, expert) with at least ``specialization.MIN_WHOLE`` assignments in all
        domains:
        ``layer``, ``site``, ``expert_id``, ``hits`` (assignments from these domains), ``share``
        of the router's assignments from these domains, ``base`` (share of those from all
        domains), ``lift`` = share / base, ``low``, ``high`` (of the lift, 90%) and ``interval``
        (``prompts`` or ``tokens``: what was taken as independent). Those whose lift is surely
        largest come first.
    int
        Every n-th token of the domains was looked at; this n.
    """
    every = expert_load(run, phase=phase, part=part, weights=False)
    counts, step = _by_prompt(run, domains, phase=phase, part=part)
    tables = []
    for (layer, site), whole in every.groupby(["layer", "site"]):
        mine = counts[(counts["layer"] == layer) & (counts["site"] == site)]
        columns = pd.Index(whole["expert_id"])
        mine = mine[mine["expert_id"].isin(columns)]
        prompts, rows = np.unique(mine["prompt_id"].to_numpy(dtype=np.int64), return_inverse=True)
        table = np.zeros((len(prompts), len(columns)))
        table[rows, columns.get_indexer(mine["expert_id"])] = mine["assignments"]
        known = run.records_ids and len(prompts) >= MIN_PROMPTS
        found = lift(table, whole["assignments"])
        base = whole["share"].to_numpy(dtype=np.float64)
        total = table.sum()
        low, high = found.low, found.high
        if not known and total:
            ends = wilson(found.part, total)
            with np.errstate(invalid="ignore", divide="ignore"):
                low, high = ends.low / base, ends.high / base
        tables.append(
            whole[["layer", "site", "expert_id"]].assign(
                hits=found.part.astype(np.int64),
                share=found.part / total if total else np.nan,
                base=base,
                lift=found.lift,
                low=low,
                high=high,
                interval="prompts" if known else "tokens",
            )
        )
    joined = pd.concat(tables, ignore_index=True).dropna(subset=["lift"])
    ordered = joined.sort_values(["low", "layer", "expert_id"], ascending=[False, True, True])
    return ordered.reset_index(drop=True), step


def _by_prompt(
    run: Run, domains: Sequence[str], *, phase: str | None, part: Part | None
) -> tuple[pd.DataFrame, int]:
    """Count assignments by prompt; by domain, with its number for a prompt, without ids."""
    if not run.records_ids:
        loads = loads_by_domain(run, phase=phase, part=part)
        loads = loads[loads["domain"].isin(domains)]
        return loads.assign(prompt_id=loads["domain"].factorize()[0]), 1
    where, params = conditions(phase=phase, part=part)
    params |= {"domains": list(domains)}
    source = (
        "FROM tokens JOIN prompts USING (prompt_id) "
        f"WHERE list_contains($domains::VARCHAR[], coalesce(domain, '')) AND {where}"
    )
    n_tokens = int(run.query(f"SELECT count(*) AS n {source}", params)["n"].iloc[0])
    step = max(1, -(-n_tokens * sum(site.top_k for site in run.sites) // MAX_ASSIGNMENTS))
    counts = run.query(
        f"""
        SELECT layer, site, expert_id, prompt_id, count(*) AS assignments FROM assignments JOIN (
            SELECT token_id, prompt_id {source} AND token_id % $step = 0
        ) USING (token_id) GROUP BY ALL ORDER BY ALL
        """,
        params | {"step": step},
    )
    return counts, step
