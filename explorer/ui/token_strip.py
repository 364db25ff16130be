"""The prompt's own text with a tint per token; click a token, or step with the arrow keys."""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

from explorer.text import CONTINUATION, visible

_HERE = Path(__file__).parent
_REVEAL = "reveal token strip"
_HTML = '<div class="legend"></div><div class="strip" role="group" dir="auto"></div>'

# tokens reach the page through textContent only: see token_strip.js
_render = st.components.v2.component(
    "token_strip",
    html=_HTML,
    css=(_HERE / "token_strip.css").read_text(encoding="utf-8"),
    js=(_HERE / "token_strip.js").read_text(encoding="utf-8"),
)


class Token(NamedTuple):
    """One token of the strip.

    Attributes
    ----------
    token_id : int
        What is reported when it is picked.
    text : str
        As recorded; '' inside a character that began on an earlier token.
    level : float or None, 0..1
        Strength of the tint; None = the quantity is not known here.
    hint : str
        Shown on hover and read by screen readers.
    hue : str or None
        Colour of the tint; None = the theme's.
    generated : bool
        Written by the model, not read; underlined.
    mark : str
        A few characters below the end of the token, which say what its colour says.
    found : bool
        Part of the text that was searched for.
    """

    token_id: int
    text: str
    level: float | None
    hint: str
    hue: str | None = None
    generated: bool = False
    mark: str = ""
    found: bool = False


class Legend(NamedTuple):
    """What the tint means: a scale from ``low`` to ``high``, or one swatch per entry."""

    title: str
    low: str = ""
    high: str = ""
    swatches: tuple[tuple[str, str], ...] = ()  # (colour, label)


def reveal() -> None:
    """Bring the reader to the strip and its chosen token when the page is drawn next."""
    st.session_state[_REVEAL] = uuid.uuid4().hex


def token_strip(
    tokens: Sequence[Token],
    *,
    selected: int | None,
    legend: Legend,
    label: str,
    key: str,
    on_pick: Callable[[int], None],
) -> None:
    """Draw the strip; ``on_pick`` gets the ``token_id`` of a picked token before the rerun.

    Parameters
    ----------
    selected : int or None
        ``token_id`` of the token that is marked as chosen.
    label : str
        Name of the strip for screen readers.
    """

    def picked() -> None:
        value = _picked(st.session_state.get(key))
        known = {token.token_id for token in tokens}
        if value in known:
            on_pick(value)

    texts = [visible(token.text, running=True) for token in tokens]
    data: dict[str, Any] = {
        "texts": texts,
        "muted": [text == CONTINUATION for text in texts],
        "ids": [token.token_id for token in tokens],
        "levels": [token.level for token in tokens],
        "hues": [token.hue for token in tokens],
        "hints": [token.hint for token in tokens],
        "generated": [token.generated for token in tokens],
        "marks": [token.mark for token in tokens],
        "found": [token.found for token in tokens],
        "legend": legend._asdict(),
        "label": label,
    }
    packed = json.dumps(data).encode()
    data["signature"] = hashlib.blake2b(packed, digest_size=12).hexdigest()
    data["selected"] = selected
    data["reveal"] = st.session_state.pop(_REVEAL, "")
    _render(data=data, key=key, on_pick_change=picked)


def _picked(state: Any) -> int:
    value = state.get("pick") if state is not None and hasattr(state, "get") else None
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
