"""Which experts serve the same token: from a layer to the next, and within a layer."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.store import SiteInfo
from explorer.errors import RunError
from explorer.queries.experts import in_context
from explorer.queries.where import Params, Part, conditions
from explorer.run import Run

Counts = npt.NDArray[np.int64]
Place = tuple[int, int, int]  # layer, site, expert
Filters = tuple[str | None, str | None, Part | None]  # domain, phase, part

# tokens that are counted again where the totals cannot answer; more would make the page wait
MAX_TOKENS = 16_000


class PairCounts(NamedTuple):
    """Tokens that chose two experts.

    Attributes
    ----------
    tokens : array [A, B]
        Experts that never met have 0.
    n_tokens : int
        That were counted.
    n_all : int
        That match the filters; more than ``n_tokens`` when only every n-th was counted.
    """

    tokens: Counts
    n_tokens: int
    n_all: int


def last_sites(run: Run) -> list[SiteInfo]:
    """Return the last router of every layer that has one, in order; transitions join these."""
    last = {site.layer: site for site in run.sites}
    return [last[layer] for layer in sorted(last)]


def transitions(
    run: Run,
    layer: int,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> PairCounts:
    """Return how many tokens went from each expert of a layer to each of the next MoE layer.

    Parameters
    ----------
    layer : int
        Any layer with a router but the last one.
    domain, phase, part : optional
        The run holds totals over all tokens only: with a filter, the tokens are counted one by one.

    Returns
    -------
    PairCounts
        ``tokens[a, b]``: expert a of the layer's last router, expert b of the next layer's.

    Raises
    ------
    RunError
        If there is no next layer, or neither totals nor expert ids were recorded.
    """
    sites = last_sites(run)
    place = next((i for i, site in enumerate(sites) if site.layer == layer), None)
    if place is None or place + 1 == len(sites):
        raise RunError(
            f"Expected a layer with another MoE layer after it, got layer {layer}. "
            f"Choose one of {', '.join(str(site.layer) for site in sites[:-1]) or 'none'}."
        )
    first, second = sites[place], sites[place + 1]
    totals = (
        "SELECT expert_id AS a, next_expert_id AS b, tokens FROM transitions "
        "WHERE layer = $layer AND next_layer = $next_layer",
        {"layer": first.layer, "next_layer": second.layer},
    )
    return _counts(run, first, second, totals, (domain, phase, part))


def coactivation(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> PairCounts:
    """Return how many tokens chose each pair of experts at one router.

    Parameters
    ----------
    domain, phase, part : optional
        As for ``transitions``.

    Returns
    -------
    PairCounts
        ``tokens[a, b] == tokens[b, a]``; the diagonal is the load.

    Raises
    ------
    RunError
        If there is no such router, or neither totals nor expert ids were recorded.
    """
    info = run.site_info(layer, site)
    totals = (
        "SELECT expert_a AS a, expert_b AS b, tokens FROM coactivation "
        "WHERE layer = $layer AND site = $site",
        {"layer": layer, "site": site},
    )
    return _counts(run, info, info, totals, (domain, phase, part))


def _counts(
    run: Run, first: SiteInfo, second: SiteInfo, totals: tuple[str, Params], filters: Filters
) -> PairCounts:
    shape = (first.n_experts, second.n_experts)
    n_all = _count_tokens(run, filters, step=1)
    if filters == (None, None, None):
        rows = run.query(*totals)
        if len(rows):
            return PairCounts(_table(rows, shape), n_all, n_all)
    run.refuse_without_ids("Counting pairs of experts")
    step = -(-n_all // MAX_TOKENS) or 1
    rows = run.query(*_count_pairs(first, second, filters, step))
    return PairCounts(_table(rows, shape), _count_tokens(run, filters, step=step), n_all)


def _count_pairs(
    first: SiteInfo, second: SiteInfo, filters: Filters, step: int
) -> tuple[str, Params]:
    where, params = _conditions(filters)
    params |= {"a_layer": first.layer, "a_site": first.site, "step": step}
    params |= {"b_layer": second.layer, "b_site": second.site}
    return (
        f"""
        WITH counted AS (
            SELECT token_id FROM tokens JOIN prompts USING (prompt_id)
            WHERE {where} AND token_id % $step = 0
        ), one AS (
            SELECT token_id, expert_id AS a FROM assignments SEMI JOIN counted USING (token_id)
            WHERE layer = $a_layer AND site = $a_site
        ), other AS (
            SELECT token_id, expert_id AS b FROM assignments SEMI JOIN counted USING (token_id)
            WHERE layer = $b_layer AND site = $b_site
        )
        SELECT a, b, count(*) AS tokens FROM one JOIN other USING (token_id) GROUP BY a, b
        """,
        params,
    )


def _conditions(filters: Filters) -> tuple[str, Params]:
    domain, phase, part = filters
    # what is sampled here is sampled by this module
    return conditions(domain=domain, phase=phase, part=part.whole() if part else None)


def _count_tokens(run: Run, filters: Filters, *, step: int) -> int:
    where, params = _conditions(filters)
    rows = run.query(
        "SELECT count(*) AS n FROM tokens JOIN prompts USING (prompt_id) "
        f"WHERE {where} AND token_id % $step = 0",
        params | {"step": step},
    )
    return int(rows["n"].iloc[0])


def _table(rows: pd.DataFrame, shape: tuple[int, int]) -> Counts:
    table = np.zeros(shape, dtype=np.int64)
    table[rows["a"].to_numpy(dtype=np.int64), rows["b"].to_numpy(dtype=np.int64)] = rows["tokens"]
    return table


def tokens_of_both(
    run: Run,
    first: Place,
    second: Place,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    limit: int = 50,
    context: int = 8,
) -> pd.DataFrame:
    """Return the tokens that chose two experts, those that gave both much weight first.

    Parameters
    ----------
    first, second : (layer, site, expert)
    limit : int
        How many tokens; ``both_count`` says how many there are.
    context : int
        Tokens of text on either side.

    Returns
    -------
    DataFrame
        Largest product of the weights first: ``token_id``, ``prompt_id``, ``position``, ``phase``,
        ``domain`` (``""`` = none), ``first_weight``, ``second_weight``, ``before``, ``text``,
        ``after``. The three texts are None without a tokenizer. No rows at level ``stats``.
    """
    both, params = _both(first, second, (domain, phase, part))
    order = "first_weight * second_weight DESC, token_id"
    return run.query(
        in_context(both, "first_weight, second_weight", order),
        params | {"limit": limit, "context": context},
    )


def both_count(
    run: Run,
    first: Place,
    second: Place,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> int:
    """Return how many tokens chose two experts; 0 at level ``stats``."""
    both, params = _both(first, second, (domain, phase, part))
    return int(run.query(f"SELECT count(*) AS n FROM ({both})", params)["n"].iloc[0])


def _both(first: Place, second: Place, filters: Filters) -> tuple[str, Params]:
    where, params = _conditions(filters)
    for name, place in (("a", first), ("b", second)):
        params |= {f"{name}_layer": place[0], f"{name}_site": place[1], f"{name}_expert": place[2]}
    return (
        f"""
        SELECT token_id, prompt_id, position, phase, coalesce(domain, '') AS domain,
            tokens.text AS text, first_weight, second_weight
        FROM (
            SELECT token_id, weight AS first_weight FROM assignments
            WHERE layer = $a_layer AND site = $a_site AND expert_id = $a_expert
        ) JOIN (
            SELECT token_id, weight AS second_weight FROM assignments
            WHERE layer = $b_layer AND site = $b_site AND expert_id = $b_expert
        ) USING (token_id) JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)
        WHERE {where}
        """,
        params,
    )
