"""Untrusted text, made safe and visible for figures and pages.

Plotly reads a subset of HTML in titles, labels and hovers, so every text from a prompt, a token,
a domain or a file name goes through ``label``.
"""

import html

from explorer.text import code_point, marked

_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_CONTROL_PICTURES = 0x2400


def visible(text: str | None, *, spaces: bool = False) -> str:
    """Return text with every character that shows nothing replaced by a sign.

    Parameters
    ----------
    text : str or None
        None is a token without text; ``""`` a token without characters of its own.
    spaces : bool
        Also mark plain spaces, for single tokens, where they matter.

    Returns
    -------
    str
        Not escaped: see ``label``.
    """
    if text is None:
        return "(text not recorded)"
    if text == "":
        return "(no text)"
    shown = marked(text, _sign)
    return shown.replace(" ", "·") if spaces else shown


def _sign(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character < " ":
        return chr(_CONTROL_PICTURES + ord(character))
    return f"⟨{code_point(character)}⟩"


def label(text: str | None, *, limit: int = 40, spaces: bool = False) -> str:
    """Return text for a plotly title, tick or hover: visible, short, and escaped."""
    shown = visible(text, spaces=spaces)
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    # plotly shows &quot; as it is, but knows numbers
    return html.escape(shown).replace("&quot;", "&#34;")


def domain_label(domain: str | None) -> str:
    """Return a domain's name for a figure; prompts without a domain have the name ``""``."""
    return label(domain) if domain else "(no domain)"
