"""Untrusted text, made safe and visible for figures and pages.

Plotly reads a subset of HTML in titles, labels and hovers, so every text from a prompt, a token,
a domain or a file name goes through ``label``.
"""

import html

from explorer.text import code_point, marked

_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_NOT_RECORDED, _NO_TEXT = "(text not recorded)", "(no text)"
NO_DOMAIN = "(no domain)"
_ALL_DOMAINS = "All domains"  # of the filter at the side
_QUOTES = "“”"
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
        return _NOT_RECORDED
    if text == "":
        return _NO_TEXT
    if text.strip(_QUOTES) in (_NOT_RECORDED, _NO_TEXT):
        return f"“{text}”"
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
    return escaped(shown)


def escaped(text: str) -> str:
    """Return text that plotly shows as it is."""
    # it shows &quot; as it is, but knows numbers
    return html.escape(text).replace("&quot;", "&#34;")


def domain_name(domain: str | None) -> str:
    """Return what a domain is called, not escaped; prompts without one have the name ``""``.

    A domain that somebody named as pages name none or all of them stands in quotes.
    """
    if not domain:
        return NO_DOMAIN
    shown = visible(domain)
    return f"“{shown}”" if shown.strip(_QUOTES) in (NO_DOMAIN, _ALL_DOMAINS) else shown


def domain_label(domain: str | None) -> str:
    """Return a domain's name for a figure; see ``domain_name``."""
    return label(domain_name(domain))
