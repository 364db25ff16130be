"""Untrusted text, made safe and visible for figures and pages.

Plotly reads a subset of HTML in titles, labels and hovers, so every text from a prompt, a token,
a domain or a file name goes through ``label``.
"""

import html
import unicodedata

_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_CONTROL_PICTURES = 0x2400
_DELETE = 0x7F
# Cc and Cf: control, bidirectional and zero-width; Co and Cs: no meaning of their own; Zl, Zp:
# line and paragraph separators
_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
# not of these categories, yet without width or ink
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\u00a0\u2800")


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
    shown = []
    for character in text:
        code = ord(character)
        if character in _NAMED:
            shown.append(_NAMED[character])
        elif code < 0x20:
            shown.append(chr(_CONTROL_PICTURES + code))
        elif code == _DELETE:
            shown.append("␡")
        elif character == " " and spaces:
            shown.append("·")
        elif unicodedata.category(character) in _HIDDEN or character in _INVISIBLE:
            shown.append(f"⟨U+{code:04X}⟩")
        else:
            shown.append(character)
    return "".join(shown)


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
