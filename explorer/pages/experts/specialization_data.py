"""What an expert's tokens are: prompt by prompt, by the text they are part of, and in a sample."""

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.queries.load import load_of
from explorer.queries.where import Part, conditions
from explorer.run import Run

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
        ``stats`` one row per domain and phase, with a missing ``prompt_id``.
    """
    where, params = conditions(domain=domain, phase=phase, part=part)
    params |= {"layer": layer, "site": site, "expert": expert_id}
    if not run.records_ids:
        return run.query(
            f"""
            WITH listed AS (
                SELECT coalesce(domain, '') AS domain, phase, count(*) AS tokens
                FROM tokens JOIN prompts USING (prompt_id) WHERE {where} GROUP BY ALL
            ), used AS (
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
    """Return the load of every expert in every domain.

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
        FROM {source} WHERE {where} GROUP BY ALL ORDER BY layer, site, expert_id, domain
        """,
        params | more,
    )


class Found(NamedTuple):
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
) -> Found:
    """Find the tokens that a word or phrase is made of, upper or lower case.

    A word is not a token: the same letters are one token here and three there, so occurrences are
    looked for in the text of whole prompts.
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
    return Found(np.unique(ids).astype(np.int64), occurrences, table, len(searched), len(listed))


def _covered(rows: pd.DataFrame, text: str) -> tuple[list[int], list[str], int]:
    """Return the tokens that occurrences cover, their texts, and how many occurrences there are."""
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    ids: list[int] = []
    pieces: list[str] = []
    occurrences = 0
    for _, tokens in rows.groupby("prompt_id", sort=False):
        texts = [piece or "" for piece in tokens["text"]]
        ends = np.cumsum([len(piece) for piece in texts])
        starts = ends - [len(piece) for piece in texts]
        token_ids, kept = tokens["token_id"].to_numpy(), tokens["kept"].to_numpy(dtype=bool)
        for match in pattern.finditer("".join(texts)):
            inside = (starts < match.end()) & (ends > match.start()) & kept
            occurrences += bool(inside.any())
            ids += token_ids[inside].tolist()
            pieces += [texts[row] for row in np.flatnonzero(inside)]
    return ids, pieces, occurrences


class Sample(NamedTuple):
    """Tokens and what all routers chose for them.

    Attributes
    ----------
    tokens : DataFrame
        One row per token: ``token_id``, ``token`` (vocabulary id), ``prompt_id``, ``domain``.
    routes : DataFrame
        One row per assignment: ``layer``, ``site``, ``row`` (in ``tokens``), ``expert_id``.
    step : int
        Every so manieth token of the run is in it.
    """

    tokens: pd.DataFrame
    routes: pd.DataFrame
    step: int


def route_sample(
    run: Run,
    *,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> Sample:
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
    return Sample(tokens, pd.DataFrame(routes), step)
