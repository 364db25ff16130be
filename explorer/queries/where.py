"""The conditions that questions share; every value is a parameter."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from explorer.run import Run

Params = dict[str, Any]

_SEARCHED = (
    "prompt_id IN (SELECT prompt_id FROM prompts WHERE contains(lower(text), lower($part_search)))"
)
_SLICED = (
    "token_id BETWEEN $part_first AND $part_last "
    "AND token_id IN (SELECT unnest($part_ids::INTEGER[]))"
)


@dataclass(frozen=True)
class Part:
    """What tokens must have beside a domain and a phase.

    Attributes
    ----------
    search : str or None
        Text that the prompt contains, upper or lower case; no wildcards.
    slice : str or None
        Name of the slice.
    saved : str or None
        When the slice was saved: one of its name may have been deleted and saved again.
    step : int
        Only every n-th token of the run, where all of them would make a page wait.
    token_ids : array [N], optional
        Of the slice.
    """

    search: str | None = None
    slice: str | None = None
    saved: str | None = None
    step: int = 1
    token_ids: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> tuple[str | None, str | None, str | None, int]:
        """What makes two parts of a run the same."""
        return self.search, self.slice, self.saved, self.step

    def whole(self) -> Self:
        """Return the part with every token."""
        return replace(self, step=1)

    def of_tokens(self) -> tuple[str, Params]:
        """Write the condition on ``token_id`` and ``prompt_id``, and its parameters."""
        parts, params = self._searched()
        if self.token_ids is not None:
            parts.append(_SLICED)
            params |= self._ids()
        if self.step > 1:
            parts.append("token_id % $part_step = 0")
            params["part_step"] = self.step
        return " AND ".join(parts) or "true", params

    def of_prompts(self) -> tuple[str, Params]:
        """Write the condition on ``prompt_id`` alone: prompts with at least one token."""
        parts, params = self._searched()
        if self.token_ids is not None:
            parts.append(f"prompt_id IN (SELECT prompt_id FROM tokens WHERE {_SLICED})")
            params |= self._ids()
        return " AND ".join(parts) or "true", params

    def _searched(self) -> tuple[list[str], Params]:
        if not self.search:
            return [], {}
        return [_SEARCHED], {"part_search": self.search}

    def _ids(self) -> Params:
        ids = self.token_ids
        if ids is None or not len(ids):
            return {"part_ids": [], "part_first": 0, "part_last": -1}
        return {"part_ids": ids, "part_first": int(ids.min()), "part_last": int(ids.max())}


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
