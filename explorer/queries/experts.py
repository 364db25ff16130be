"""The tokens that went to one expert of one site."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.queries.load import load_of
from explorer.queries.where import Params, Part, conditions
from explorer.run import Run


def expert_tokens(
    run: Run,
    layer: int,
    expert_id: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    limit: int = 50,
    context: int = 8,
) -> pd.DataFrame:
    """Return the tokens that gave an expert the largest weight, with the text around them.

    Parameters
    ----------
    limit : int
        How many tokens; ``expert_token_count`` says how many there are.
    context : int
        Tokens of text on either side.

    Returns
    -------
    DataFrame
        Heaviest first: ``token_id``, ``prompt_id``, ``position``, ``phase``, ``domain``
        (``""`` = none), ``slot``, ``weight``, ``before``, ``text``, ``after``, ``loss`` (nats).
        The three texts are None without a tokenizer. No rows at level ``stats``.
    """
    where, params = _of_expert(layer, expert_id, site, domain, phase, part)
    hits = f"""
        SELECT token_id, prompt_id, position, phase, coalesce(domain, '') AS domain, slot,
            weight, tokens.text AS text, loss
        FROM assignments JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)
        WHERE {where}
    """
    return run.query(
        in_context(hits, "slot, weight, loss", "weight DESC, token_id"),
        params | {"limit": limit, "context": context},
    )


def in_context(hits: str, columns: str, order: str) -> str:
    """Write the query of tokens with the text around them.

    Parameters
    ----------
    hits : str
        A SELECT of ``token_id``, ``prompt_id``, ``position``, ``phase``, ``domain``, ``text`` and
        the ``columns``; the first ``$limit`` in this order are taken, with ``$context`` tokens of
        text on either side.
    """
    return f"""
        WITH hits AS ({hits} ORDER BY {order} LIMIT $limit), around AS (
            SELECT hits.token_id,
                string_agg(near.text, '' ORDER BY near.position)
                    FILTER (near.position < hits.position) AS before,
                string_agg(near.text, '' ORDER BY near.position)
                    FILTER (near.position > hits.position) AS after
            FROM hits JOIN tokens AS near ON near.prompt_id = hits.prompt_id
                AND near.position BETWEEN hits.position - $context AND hits.position + $context
            GROUP BY hits.token_id
        )
        SELECT token_id, prompt_id, position, phase, domain, {columns},
            CASE WHEN text IS NOT NULL THEN coalesce(before, '') END AS before, text,
            CASE WHEN text IS NOT NULL THEN coalesce(after, '') END AS after
        FROM hits JOIN around USING (token_id) ORDER BY {order}
    """


def expert_token_count(
    run: Run,
    layer: int,
    expert_id: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> int:
    """Return how many tokens went to an expert, from the run's totals where they know it."""
    where, params = _of_expert(layer, expert_id, site, domain, phase, None)
    source, more = load_of(run, part)
    rows = run.query(
        f"SELECT coalesce(sum(assignments), 0)::BIGINT AS n FROM {source} WHERE {where}",
        params | more,
    )
    return int(rows["n"].iloc[0])


def expert_token_ids(
    run: Run,
    layer: int,
    expert_id: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> npt.NDArray[np.int64]:
    """Return the ids of all tokens that went to an expert, ascending; none at level ``stats``."""
    where, params = _of_expert(layer, expert_id, site, domain, phase, part)
    rows = run.query(
        "SELECT token_id FROM assignments JOIN tokens USING (token_id) JOIN prompts "
        f"USING (prompt_id) WHERE {where} ORDER BY token_id",
        params,
    )
    return np.asarray(rows["token_id"], dtype=np.int64)


def expert_vocabulary(
    run: Run,
    layer: int,
    expert_id: int,
    *,
    site: int = 0,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
    min_count: int = 5,
    limit: int = 30,
) -> pd.DataFrame:
    """Return the vocabulary entries that go to an expert most often.

    Parameters
    ----------
    min_count : int
        Entries seen less often are left out: one that occurs once always goes to its experts
        in full.

    Returns
    -------
    DataFrame
        ``token`` (vocabulary id), ``text``, ``occurrences`` in the run, ``assignments`` to this
        expert, ``share`` = assignments / occurrences; uniform routing gives top_k / n_experts.
        Largest share first.
    """
    where, params = _of_expert(layer, expert_id, site, domain, phase, part)
    every, every_params = conditions(domain=domain, phase=phase, part=part)
    return run.query(
        f"""
        WITH seen AS (
            SELECT token, any_value(tokens.text) AS text, count(*) AS occurrences
            FROM tokens JOIN prompts USING (prompt_id) WHERE {every} GROUP BY token
        ), used AS (
            SELECT token, count(*) AS assignments
            FROM assignments JOIN tokens USING (token_id) JOIN prompts USING (prompt_id)
            WHERE {where} GROUP BY token
        )
        SELECT token, text, occurrences, assignments,
            assignments / occurrences::DOUBLE AS share
        FROM seen JOIN used USING (token) WHERE occurrences >= $min_count
        ORDER BY share DESC, assignments DESC, token LIMIT $limit
        """,
        params | every_params | {"min_count": min_count, "limit": limit},
    )


def _of_expert(
    layer: int,
    expert_id: int,
    site: int,
    domain: str | None,
    phase: str | None,
    part: Part | None,
) -> tuple[str, Params]:
    where, params = conditions(layer=layer, site=site, domain=domain, phase=phase, part=part)
    return f"{where} AND expert_id = $expert_id", params | {"expert_id": expert_id}
