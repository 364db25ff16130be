"""From a click to another page: an expert's page, or a token in its prompt."""

import streamlit as st

from explorer.ui import address, token_strip
from explorer.ui.state import View, several_sites

_TARGET = "jump to"
_EXPERTS, _TOKENS = "explorer/pages/experts/page.py", "explorer/pages/tokens/page.py"


def aim(view: View, data: list[float]) -> None:
    """Remember the expert that was clicked; ``data`` starts with layer, site, expert.

    A callback cannot change the page, so `follow` does it in the run that comes after.
    """
    layer, site, expert = (int(value) for value in data[:3])
    name = f"{layer}.{site}" if several_sites(view.run) else str(layer)
    there = {"run": view.name, "layer": name, "id": str(expert), "about": "expert"}
    st.session_state[_TARGET] = (_EXPERTS, there)


def aim_at_token(prompt_id: int, token_id: int) -> None:
    """Remember a token that was picked, as `aim` does."""
    st.session_state[_TARGET] = (_TOKENS, {"prompt": str(prompt_id), "token": str(token_id)})


def follow() -> None:
    """Go to what was clicked, if something was."""
    target = st.session_state.pop(_TARGET, None)
    if target is None:
        return
    page, there = target
    if there.get("run", address.read("run")) != address.read("run"):
        # filters and choices of the run before mean nothing there
        address.write_run(there["run"])
    if page == _TOKENS:
        token_strip.reveal()
    st.switch_page(page, query_params=address.kept() | there)
