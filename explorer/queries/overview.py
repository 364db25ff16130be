"""What is in a run: prompts and tokens, and what was recorded of them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.errors import RunError
from explorer.queries.where import Params, Part, conditions, prompt_conditions
from explorer.run import Run

SHOWN = 2_000  # characters of a prompt in a list; all of its tokens have the whole text


def token_count(
    run: Run, *, domain: str | None = None, phase: str | None = None, part: Part | None = None
) -> int:
    """Return how many tokens were recorded, at level counts those that the counts are of."""
    where, params = conditions(domain=domain, phase=phase, part=part)
    if where == "true":
        return int(run.info["n_tokens"])
    if run.sums_only:
        return run.tokens_of_sums(where, params)
    rows = run.query(
        f"SELECT count(*) AS n FROM tokens JOIN prompts USING (prompt_id) WHERE {where}", params
    )
    return int(rows["n"].iloc[0])


def domain_counts(run: Run) -> pd.DataFrame:
    """Return what was recorded of each domain.

    Returns
    -------
    DataFrame
        ``domain`` (``""`` = no domain), ``prompts``, ``tokens``, ``generated`` (tokens of phase
        generated, contained in ``tokens``), ``mean_loss`` in nats per token (missing where no
        token has a loss), ``truncated`` prompts. Ordered by domain.
    """
    return run.query(
        """
        WITH per_prompt AS (
            SELECT prompt_id, count(*) AS tokens,
                count(*) FILTER (phase = 'generated') AS generated,
                sum(loss) AS loss, count(loss) AS losses
            FROM tokens GROUP BY prompt_id
        )
        SELECT coalesce(domain, '') AS domain, count(*) AS prompts,
            coalesce(sum(tokens), 0)::BIGINT AS tokens,
            coalesce(sum(generated), 0)::BIGINT AS generated,
            sum(loss) / nullif(sum(losses), 0) AS mean_loss,
            count(*) FILTER (truncated > 0) AS truncated
        FROM prompts JOIN prompt_sizes USING (prompt_id) LEFT JOIN per_prompt USING (prompt_id)
        GROUP BY coalesce(domain, '')
        ORDER BY coalesce(prompts.domain, '') = '', coalesce(prompts.domain, '')
        """
    )


GATE_STATISTICS = ("entropy", "margin", "logsumexp", "topk_mass")


def gate_means(
    run: Run,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    statistics: Sequence[str] = GATE_STATISTICS,
) -> pd.DataFrame:
    """Return the means of each site's per-token statistics, from the run's totals.

    Parameters
    ----------
    part : Part, optional
        The run has no totals of it, so that the rows of its tokens are read.
    statistics : sequence of str
        Among ``GATE_STATISTICS``, ``entropy`` first; of a part each one costs as much again.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``tokens`` (with statistics), ``entropy`` (nats),
        ``normalized_entropy`` (entropy / ln E, missing for one expert), ``margin``,
        ``logsumexp``, ``topk_mass``, those that were asked for; missing where they were not
        recorded.
    """
    if statistics[:1] != GATE_STATISTICS[:1] or not set(statistics) <= set(GATE_STATISTICS):
        known = ", ".join(GATE_STATISTICS)
        raise RunError(f"Expected statistics among {known}, entropy first, got {statistics}.")
    where, params = conditions(domain=domain, phase=phase, part=part)
    others = "".join(f", {name}" for name in statistics[1:])
    return run.query(
        f"""
        SELECT layer, site, coalesce(n, 0) AS tokens, entropy,
            entropy / nullif(ln(n_experts), 0) AS normalized_entropy{others}
        FROM sites LEFT JOIN ({_means(where, statistics, of_part=part is not None)})
        USING (layer, site) ORDER BY layer, site
        """,
        params,
    )


def _means(where: str, statistics: Sequence[str], *, of_part: bool) -> str:
    """Write the query for ``layer, site, n`` and the means of the tokens that ``where`` leaves."""
    if of_part:
        means = ", ".join(f"avg({name}) AS {name}" for name in statistics)
        return (
            f"SELECT layer, site, count(entropy) AS n, {means} FROM gates SEMI JOIN "
            f"(SELECT token_id FROM tokens JOIN prompts USING (prompt_id) WHERE {where}) "
            "USING (token_id) GROUP BY layer, site"
        )
    # names are GATE_STATISTICS; written out, so that of an older run only their columns are read
    names = ", ".join(f"'{name}'" for name in statistics)
    means = ", ".join(
        f"sum(total) FILTER (statistic = '{name}') / sum(tokens) FILTER (statistic = '{name}')"
        f" AS {name}"
        for name in statistics
    )
    return (
        f"SELECT layer, site, sum(tokens) FILTER (statistic = 'entropy')::BIGINT AS n, {means} "
        f"FROM gate_sums WHERE statistic IN ({names}) AND {where} GROUP BY layer, site"
    )


def prompts(
    run: Run,
    *,
    domain: str | None = None,
    search: str | None = None,
    part: Part | None = None,
    limit: int = 200,
    offset: int = 0,
) -> pd.DataFrame:
    """Return prompts in the order of the run.

    Parameters
    ----------
    search : str, optional
        Text that the prompt contains, upper or lower case; no wildcards.
    part : Part, optional
        Prompts with at least one of its tokens.
    limit, offset : int
        Which part of the list; ``prompt_count`` says how many there are.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``text`` (its first SHOWN characters; None without a tokenizer), ``domain``
        (``""`` = none), ``source``,
        ``tokens`` recorded, ``generated`` (contained in ``tokens``), ``truncated`` (tokens cut
        off), ``mean_loss`` in nats per token (missing where no token has a loss).
    """
    where, params = _matching(domain, search, part)
    return _prompts(
        run,
        f"WHERE {where} ORDER BY prompt_id LIMIT $limit OFFSET $offset",
        params | {"limit": limit, "offset": offset},
    )


def prompt(run: Run, prompt_id: int) -> pd.DataFrame:
    """Return one prompt, columns as ``prompts``; no row if the run has no such prompt."""
    return _prompts(run, "WHERE prompt_id = $prompt_id", {"prompt_id": prompt_id})


def prompt_count(
    run: Run, *, domain: str | None = None, search: str | None = None, part: Part | None = None
) -> int:
    """Return how many prompts match."""
    where, params = _matching(domain, search, part)
    rows = run.query(f"SELECT count(*) AS n FROM prompts WHERE {where}", params)
    return int(rows["n"].iloc[0])


def prompt_tokens(run: Run, prompt_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the ids of all tokens of some prompts, those that were generated included."""
    rows = run.table(
        "SELECT token_id FROM tokens WHERE prompt_id IN (SELECT unnest($ids::INTEGER[])) "
        "ORDER BY token_id",
        {"ids": list(prompt_ids)},
    )
    return np.asarray(rows["token_id"].to_numpy(), dtype=np.int64)


def _matching(domain: str | None, search: str | None, part: Part | None) -> tuple[str, Params]:
    where, params = prompt_conditions(domain=domain, part=part)
    if search:
        where += " AND contains(lower(text), lower($search))"
        params["search"] = search
    return where, params


def _prompts(run: Run, tail: str, params: Params) -> pd.DataFrame:
    return run.query(
        f"""
        WITH listed AS (SELECT * FROM prompts {tail})
        SELECT prompt_id, any_value(left(listed.text, {SHOWN})) AS text,
            coalesce(any_value(domain), '') AS domain, any_value(source) AS source,
            count(token_id) AS tokens,
            count(token_id) FILTER (phase = 'generated') AS generated,
            any_value(truncated) AS truncated, avg(loss) AS mean_loss
        FROM listed JOIN prompt_sizes USING (prompt_id) LEFT JOIN tokens USING (prompt_id)
        GROUP BY prompt_id ORDER BY prompt_id
        """,
        params,
    )


def noted(run: Run) -> str:
    """Return what the capture noted that changes how the figures of its run are read."""
    told = (run.notes.get(name) for name in ("routers", "batches", "two_sides", "cache", "padding"))
    # a stranger's file may hold anything
    return " ".join(one[:600] for one in told if isinstance(one, str))
