"""The prompts of a run."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.queries.where import Params, Part, prompt_conditions
from explorer.run import Run

SHOWN = 2_000  # characters of a prompt in a list; all of its tokens have the whole text


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
