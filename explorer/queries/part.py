"""A part of a run's tokens: those of prompts that contain a text, those of a slice, or both."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

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
        When the slice was saved: one of its name may have been deleted and saved anew.
    step : int
        Only every so manieth token of the run, where all would make a page wait.
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
