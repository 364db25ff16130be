"""Tokens in their contexts, one a line, with a number; click a line to go there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

from explorer.ui.visible import visible

_HERE = Path(__file__).parent

_render = st.components.v2.component(
    "concordance",
    html='<div class="rows" role="group"></div>',
    css=(_HERE / "concordance.css").read_text(encoding="utf-8"),
    js=(_HERE / "concordance.js").read_text(encoding="utf-8"),
)


class Line(NamedTuple):
    """One token with the text around it.

    Attributes
    ----------
    before, token, after : str
        As recorded.
    note : str
        Where it is from, such as the prompt's domain.
    share : float, 0..1
        Length of the bar.
    figure : str
        The number beside the bar.
    """

    before: str
    token: str
    after: str
    note: str
    share: float
    figure: str


def concordance(
    lines: Sequence[Line], *, label: str, key: str, on_pick: Callable[[int], None]
) -> None:
    """Draw the lines; ``on_pick`` gets the number of a picked line before the rerun."""

    def picked() -> None:
        state: Any = st.session_state.get(key)
        index = state.get("pick") if state is not None and hasattr(state, "get") else None
        if isinstance(index, int) and 0 <= index < len(lines):
            on_pick(index)

    rows = [
        [
            _flat(line.before),
            visible(line.token).replace("\n", ""),
            _flat(line.after),
            line.note,
            min(max(line.share, 0.0), 1.0),
            line.figure,
        ]
        for line in lines
    ]
    _render(data={"rows": rows, "label": label}, key=key, on_pick_change=picked)


def _flat(text: str) -> str:
    return visible(text).replace("↵\n", "↵") if text else ""
