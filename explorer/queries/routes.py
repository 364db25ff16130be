"""The experts of all tokens of one prompt, or of several, at one site."""

from collections.abc import Sequence

import pandas as pd

from explorer.queries.where import PLACES, near_prompt
from explorer.run import Run


def prompt_experts(run: Run, prompt_id: int, layer: int, *, site: int = 0) -> pd.DataFrame:
    """Return which experts the tokens of a prompt used at one site.

    Returns
    -------
    DataFrame
        ``token_id``, ``slot`` (0 = heaviest), ``expert_id``, ``weight`` (as applied),
        ``weight_share`` (of the token's weight at the site; missing where that is 0); ordered by
        token and slot. No rows at level ``stats``.
    """
    run.site_info(layer, site)
    near, params = near_prompt(run, prompt_id)
    return run.query(
        f"""
        SELECT token_id, slot, expert_id, weight,
            weight / nullif(sum(weight) OVER (PARTITION BY token_id), 0) AS weight_share
        FROM assignments
        WHERE {near} AND layer = $layer AND site = $site
            AND token_id IN (SELECT token_id FROM tokens WHERE prompt_id = $prompt_id)
        ORDER BY token_id, slot
        """,
        params | {"layer": layer, "site": site},
    )


def prompts_experts(
    run: Run, prompt_ids: Sequence[int], layer: int, *, site: int = 0
) -> pd.DataFrame:
    """Return which experts the prompt tokens of several prompts used at one site.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``position``, ``slot``, ``expert_id``; ordered by the first three. What
        was generated after the prompts is left out. No rows at level ``stats``.
    """
    run.site_info(layer, site)
    return run.query(
        f"""
        WITH places AS ({PLACES}), ends AS (
            SELECT min(token_id) AS low, max(token_id) AS high FROM places
        )
        SELECT prompt_id, position, slot, expert_id
        FROM assignments JOIN places USING (token_id)
        WHERE layer = $layer AND site = $site
            AND token_id BETWEEN (SELECT low FROM ends) AND (SELECT high FROM ends)
        ORDER BY prompt_id, position, slot
        """,
        {"prompts": list(prompt_ids), "layer": layer, "site": site},
    )
