"""Tokens of a prompt, and what every layer did with them."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from explorer.errors import RunError
from explorer.queries.where import Params, near_prompt
from explorer.registry import Registry
from explorer.run import Run

Pin = tuple[int, int, int]  # layer, site, expert


class Quantity(NamedTuple):
    """Something known of a token at a layer, that text or a heatmap can be coloured by.

    Attributes
    ----------
    label : str
        With its unit, for titles.
    meaning : str
        One sentence for a newcomer.
    source : str
        ``gates`` or ``assignments``: the view it comes from.
    sql : str
        Expression over one (token, layer, site) of that view, grouped for ``assignments``.
    uniform : str
        What a router without any preference would give; '' where that is not a number.
    """

    label: str
    meaning: str
    source: str
    sql: str
    uniform: str = ""


QUANTITIES: Registry[Quantity] = Registry(
    "quantity",
    expert=Quantity(
        "heaviest expert (id)",
        "The expert that counts most for the token; where weights are unknown, the first listed.",
        "assignments",
        "(any_value(expert_id) FILTER (slot = 0))::DOUBLE",
    ),
    entropy=Quantity(
        "gate entropy (share of ln E)",
        "How undecided the router was: 0 = sure of one expert, 1 = all experts alike.",
        "gates",
        "entropy / nullif(ln(n_experts), 0)",
        "1 = uniform over the experts",
    ),
    margin=Quantity(
        "margin (selection score)",
        "How far the last chosen expert was ahead of the first one not chosen; near 0, a tiny "
        "change would have picked another expert.",
        "gates",
        "margin",
        "0 = a tie, as uniform scores give",
    ),
    top1_weight=Quantity(
        "top-1 weight (combine weight, as applied)",
        "Weight of the expert that counts most for this token.",
        "assignments",
        "max(weight)",
        "equal weights = their sum / top-k",
    ),
    pinned_weight=Quantity(
        "combine weight of the pinned experts (as applied)",
        "Weight that the pinned experts have together; 0 = none of them was chosen.",
        "assignments",
        "coalesce(sum(weight) FILTER (pinned), 0)",
    ),
)


def tokens(run: Run, prompt_id: int) -> pd.DataFrame:
    """Return the tokens of a prompt in order.

    Returns
    -------
    DataFrame
        ``token_id``, ``position``, ``phase``, ``token`` (vocabulary id), ``text`` (joins to the
        prompt; None without a tokenizer), ``loss`` (nats, of the next token; missing at the end).
    """
    return run.query(
        "SELECT token_id, position, phase, token, text, loss FROM tokens "
        "WHERE prompt_id = $prompt_id ORDER BY position",
        {"prompt_id": prompt_id},
    )


def token_quantity(
    run: Run, prompt_id: int, quantity: str, *, pinned: Sequence[Pin] = ()
) -> pd.DataFrame:
    """Return a quantity of every token of a prompt at every site.

    Parameters
    ----------
    quantity : str
        A name in ``QUANTITIES``.
    pinned : sequence of (layer, site, expert)
        For ``pinned_weight``; a site without a pinned expert has no value there.

    Returns
    -------
    DataFrame
        ``token_id``, ``position``, ``text``, ``layer``, ``site``, ``value``; ordered by layer,
        site and position. ``value`` is missing where it was not recorded.
    """
    kind = QUANTITIES[quantity]
    near, params = near_prompt(run, prompt_id)
    if kind.source == "gates":
        values = (
            f"SELECT token_id, layer, site, {kind.sql} AS value "
            f"FROM gates JOIN sites USING (layer, site) WHERE {near}"
        )
    else:
        marked, params = _pinned(quantity, pinned, params)
        # from gates, so that a token with nothing chosen has a row too
        values = f"""
            SELECT token_id, layer, site, {kind.sql} AS value
            FROM (SELECT token_id, layer, site FROM gates {_only_pinned_sites(quantity)}
                WHERE {near})
            LEFT JOIN (SELECT *, {marked} FROM assignments
                WHERE {near}) USING (token_id, layer, site)
            GROUP BY token_id, layer, site
        """
    return run.query(
        f"""
        WITH listed AS (
            SELECT token_id, position, text FROM tokens WHERE prompt_id = $prompt_id
        ), known AS ({values})
        SELECT token_id, position, text, layer, site, value
        FROM listed CROSS JOIN (SELECT layer, site FROM sites) AS places
        LEFT JOIN known USING (token_id, layer, site)
        ORDER BY layer, site, position
        """,
        params,
    )


def _pinned(quantity: str, pinned: Sequence[Pin], params: Params) -> tuple[str, Params]:
    """Write the column that marks pinned experts, as parameters."""
    if quantity != "pinned_weight":
        return "false AS pinned", params
    if not pinned:
        raise RunError("Expected at least one pinned expert to colour by; pin an expert first.")
    keys = {"pins": [f"{layer}.{site}.{expert}" for layer, site, expert in pinned]}
    places = {"places": sorted({f"{layer}.{site}" for layer, site, _ in pinned})}
    key = "concat(layer, '.', site, '.', expert_id)"
    return f"list_contains($pins::VARCHAR[], {key}) AS pinned", params | keys | places


def _only_pinned_sites(quantity: str) -> str:
    if quantity != "pinned_weight":
        return ""
    return (
        "SEMI JOIN (SELECT layer, site FROM sites "
        "WHERE list_contains($places::VARCHAR[], concat(layer, '.', site))) USING (layer, site)"
    )


def token_experts(run: Run, token_id: int) -> pd.DataFrame:
    """Return the experts that one token used, layer by layer.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``slot`` (0 = heaviest), ``expert_id``, ``weight`` (as applied),
        ``weight_share`` (of the token's weight at the site; missing where that is 0),
        ``n_experts``, ``top_k``, ``n_shared_experts``. No rows at level ``stats``.
    """
    return run.query(
        """
        SELECT layer, site, slot, expert_id, weight,
            weight / nullif(sum(weight) OVER (PARTITION BY layer, site), 0) AS weight_share,
            n_experts, top_k, n_shared_experts
        FROM assignments JOIN sites USING (layer, site) WHERE token_id = $token_id
        ORDER BY layer, site, slot
        """,
        {"token_id": token_id},
    )


def token_gates(run: Run, token_id: int) -> pd.DataFrame:
    """Return one token's statistics at every site; missing where not recorded.

    Returns
    -------
    DataFrame
        ``layer``, ``site``, ``n_experts``, ``top_k``, ``score_function``, ``entropy`` (nats),
        ``normalized_entropy`` (/ ln E), ``margin``, ``logsumexp``, ``topk_mass``.
    """
    return run.query(
        """
        SELECT layer, site, n_experts, top_k, score_function, entropy,
            entropy / nullif(ln(n_experts), 0) AS normalized_entropy,
            margin, logsumexp, topk_mass
        FROM sites
        LEFT JOIN (SELECT * FROM gates WHERE token_id = $token_id) USING (layer, site)
        ORDER BY layer, site
        """,
        {"token_id": token_id},
    )


def token_scores(run: Run, token_id: int, layer: int, *, site: int = 0) -> pd.DataFrame:
    """Return every expert's score of one token at one site.

    Returns
    -------
    DataFrame
        One row per expert: ``expert_id``, ``recorded`` (whether this token's scores were),
        ``score`` (as the router put it out; missing where not recorded, and where the router
        ruled the expert out), ``slot`` and ``weight`` (missing where the expert was not chosen or
        ids were not recorded).
    """
    run.site_info(layer, site)
    return run.query(
        """
        WITH experts AS (
            SELECT unnest(range(n_experts))::INTEGER AS expert_id FROM sites
            WHERE layer = $layer AND site = $site
        ), recorded AS (
            SELECT unnest(scores) AS score, unnest(range(len(scores)))::INTEGER AS expert_id
            FROM scores WHERE token_id = $token_id AND layer = $layer AND site = $site
        ), chosen AS (
            SELECT expert_id, slot, weight FROM assignments
            WHERE token_id = $token_id AND layer = $layer AND site = $site
        )
        SELECT expert_id, (SELECT count(*) > 0 FROM recorded) AS recorded, score, slot, weight
        FROM experts LEFT JOIN recorded USING (expert_id) LEFT JOIN chosen USING (expert_id)
        ORDER BY expert_id
        """,
        {"token_id": token_id, "layer": layer, "site": site},
    )


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
