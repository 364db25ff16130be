"""Interventions on the routing of a text, written as one line of an address; read without torch.

An edit is ``ACTION/LAYER/VALUE/WHERE``, several are joined by ``,``:

    forbid/3/12/t17       token 17 chooses again without expert 12 of layer 3
    force/3/12/word       every word gets expert 12 of layer 3, in its last slot if need be
    swap/3/12-7/all       whoever chose expert 12 of layer 3 gets expert 7 with its weight
    k/*/1/from17          one expert a token in every layer, from token 17 on
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capture.errors import quoted
from capture.store import SiteInfo
from explorer.errors import ComparisonError
from explorer.maps import map_cache
from explorer.run import Run

ACTIONS = ("forbid", "force", "swap", "k")
KINDS = ("word", "number", "punctuation", "space", "other")
ANSWER_VERSION = 1
MOST_EDITS = 40
_EDIT = re.compile(
    r"(forbid|force|swap|k)/(\*|\d{1,6}(?:\.\d{1,3})?)/(\d{1,6})(?:-(\d{1,6}))?/"
    rf"(all|(?:t|from|like)\d{{1,7}}|{'|'.join(KINDS)})"
)


class Edit(NamedTuple):
    """One change of the routing.

    Attributes
    ----------
    action : {"forbid", "force", "swap", "k"}
    layer : str
        As addresses call a router: ``3``, or ``3.1`` where a layer has several; ``*`` = all.
    value : int
        An expert, or how many a token gets.
    other : int or None
        The expert that takes its place in a swap.
    where : str
        ``all``, ``tN`` (token N), ``fromN`` (N and later), ``likeN`` (all with the same vocabulary
        entry as N), or one of ``KINDS``.
    """

    action: str
    layer: str
    value: int
    other: int | None
    where: str

    def __str__(self) -> str:
        """Return the edit as an address has it."""
        other = "" if self.other is None else f"-{self.other}"
        return f"{self.action}/{self.layer}/{self.value}{other}/{self.where}"


def read_edits(text: str, sites: Sequence[SiteInfo], *, n_tokens: int) -> list[Edit]:
    """Return the edits of an address.

    Raises
    ------
    ComparisonError
        If one cannot be read, or names a layer, expert or token that is not there.
    """
    edits = []
    several = any(site.site for site in sites)
    known = {f"{s.layer}.{s.site}" if several else str(s.layer): s for s in sites}
    for part in [one for one in text.split(",") if one][:MOST_EDITS]:
        found = _EDIT.fullmatch(part)
        if found is None:
            raise ComparisonError(
                f"An edit such as forbid/3/12/t17 or k/*/1/all was expected, got {quoted(part)}."
            )
        action, layer, value, other, where = found.groups()
        edit = Edit(action, layer, int(value), None if other is None else int(other), where)
        infos = list(known.values()) if layer == "*" else [known[layer]] if layer in known else []
        place = int("".join(filter(str.isdecimal, where)) or 0)
        if not infos or (layer == "*") > (action == "k") or place >= n_tokens:
            raise ComparisonError(f"{quoted(part)} names a layer or a token that is not there.")
        if (edit.other is not None) != (action == "swap"):
            raise ComparisonError(f"A swap names two experts, got {quoted(part)}.")
        least, most = (1, 0) if action == "k" else (0, -1)
        top = min(info.n_experts for info in infos) + most
        if any(not least <= one <= top for one in (edit.value, edit.other or edit.value)):
            raise ComparisonError(f"{quoted(part)}: {least} to {top} was expected.")
        edits.append(edit)
    return edits


def write_edits(edits: Sequence[Edit]) -> str:
    """Return edits as an address has them."""
    return ",".join(map(str, edits))


def kind_of(text: str) -> str:
    """Return which of ``KINDS`` a token is, by its text."""
    inner = text.strip()
    if not inner:
        return "space"
    if any(map(str.isalpha, inner)):
        return "word"
    if any(map(str.isdigit, inner)):
        return "number"
    return "other" if "\ufffd" in inner else "punctuation"


def answer_path(run: Run, prompt_id: int, position: int, edits: str, router: str) -> Path:
    """Return where the answer to an intervention is kept, in the user's cache folder."""
    model = map_cache.cosines_path(run).name  # changes when the model's weights do
    facts = [ANSWER_VERSION, run.fingerprint, model, prompt_id, position, edits, router]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return map_cache.folder().parent / "what-if" / f"{digest}.json"


def read_answer(path: Path) -> dict[str, Any] | None:
    """Return a kept answer, None where there is none; see ``explorer.worker.what_if``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("version") == ANSWER_VERSION else None


def write_answer(path: Path, answer: dict[str, Any]) -> Path:
    """Keep an answer, written in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"version": ANSWER_VERSION, **answer}), encoding="utf-8")
    os.replace(partial, path)
    return path
