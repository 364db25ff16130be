"""From a click on an expert or a token to the tokens page that shows it."""

import streamlit as st

from explorer.pages import address
from explorer.pages.components import token_strip
from explorer.pages.state import View, several_sites

_TARGET = "jump to tokens"


def aim(view: View, data: list[float]) -> None:
    """Remember the expert that was clicked; ``data`` starts with layer, site, expert.

    A callback cannot change the page, so `follow` does it in the run that comes after.
    """
    layer, site, expert = (int(value) for value in data[:3])
    name = f"{layer}.{site}" if several_sites(view.run) else str(layer)
    st.session_state[_TARGET] = {"layer": name, "expert": str(expert)}


def aim_at_token(prompt: str, token: str = "") -> None:
    """Remember the token, or the prompt, that was picked."""
    st.session_state[_TARGET] = {"prompt": prompt} | ({"token": token} if token else {})
    token_strip.reveal()


def follow() -> None:
    """Go to what was clicked, if something was."""
    target = st.session_state.pop(_TARGET, None)
    if target is None:
        return
    st.switch_page("explorer/pages/tokens.py", query_params=address.kept() | target)
