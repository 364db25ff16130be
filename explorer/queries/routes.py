"""The experts of all tokens of one prompt at one site."""

import pandas as pd

from explorer.queries._where import near_prompt
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
