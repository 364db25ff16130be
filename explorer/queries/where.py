"""The conditions that questions share; every value is a parameter."""

from explorer.queries.part import Params, Part
from explorer.run import Run

__all__ = ["PLACES", "Params", "Part", "conditions", "near_prompt", "prompt_conditions"]

# the prompt tokens of the prompts in the parameter ``prompts``
PLACES = """
    SELECT token_id, prompt_id, position FROM tokens
    WHERE phase = 'prompt' AND list_contains($prompts::INTEGER[], prompt_id)
"""


def conditions(
    *,
    layer: int | None = None,
    site: int | None = None,
    domain: str | None = None,
    phase: str | None = None,
    part: Part | None = None,
) -> tuple[str, Params]:
    """Return a condition on columns of these names, and its parameters.

    None means no condition; the domain ``""`` means prompts without a domain; a part is a
    condition on ``token_id`` and ``prompt_id``.
    """
    parts: list[str] = []
    params: Params = {}
    for column, value in (("layer", layer), ("site", site), ("phase", phase)):
        if value is not None:
            parts.append(f"{column} = ${column}")
            params[column] = value
    if domain is not None:
        parts.append("coalesce(domain, '') = $domain")
        params["domain"] = domain
    if part is not None:
        where, more = part.of_tokens()
        parts.append(where)
        params |= more
    return " AND ".join(parts) or "true", params


def prompt_conditions(*, domain: str | None = None, part: Part | None = None) -> tuple[str, Params]:
    """Return a condition on whole prompts: ``domain``, and those with a token of the part."""
    where, params = conditions(domain=domain)
    if part is None:
        return where, params
    of_part, more = part.of_prompts()
    return f"{where} AND {of_part}", params | more


def near_prompt(run: Run, prompt_id: int) -> tuple[str, Params]:
    """Write a condition that holds for a prompt's tokens and few others.

    DuckDB skips most of a large run for ranges of token ids, but not for a list of them. Prompt
    tokens of a prompt are a range; generated ones lie between those of its batch.
    """
    ranges = run.query(
        "SELECT min(token_id) AS first, max(token_id) AS last FROM tokens "
        "WHERE prompt_id = $prompt_id GROUP BY phase",
        {"prompt_id": prompt_id},
    )
    params: Params = {"prompt_id": prompt_id}
    parts = []
    for number, (first, last) in enumerate(ranges.itertuples(index=False)):
        parts.append(f"token_id BETWEEN $first{number} AND $last{number}")
        params |= {f"first{number}": int(first), f"last{number}": int(last)}
    return f"({' OR '.join(parts) or 'false'})", params
