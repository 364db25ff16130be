"""The conditions that questions share; every value is a parameter."""

from typing import Any

Params = dict[str, Any]


def conditions(
    *,
    layer: int | None = None,
    site: int | None = None,
    domain: str | None = None,
    phase: str | None = None,
) -> tuple[str, Params]:
    """Return a condition on columns of these names, and its parameters.

    None means no condition; the domain ``""`` means prompts without a domain.
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
    return " AND ".join(parts) or "true", params
