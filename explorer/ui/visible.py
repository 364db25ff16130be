"""Token text as a reader can see it: marks for what is invisible, nothing else changed."""

from explorer.text import code_point, marked

_NAMES = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}
CONTINUATION = "·"  # a token without text of its own


def visible(text: str) -> str:
    """Return the text of a token with a mark for every character that shows nothing.

    A line end keeps its line break after its mark, and spaces stay as they are; the empty text
    of a token in the middle of a character becomes a dot.
    """
    return marked(text, _mark) if text else CONTINUATION


def _mark(character: str) -> str:
    return _NAMES.get(character) or f"⟦{code_point(character)}⟧"


def one_line(text: str, length: int) -> str:
    """Return the beginning of a text on one line, with an ellipsis where it was cut."""
    text = text.strip()
    head = text[: 8 * length]  # room for white space, which is shown as one space
    flat = " ".join(visible(head).replace("↵\n", " ").split()) if head else ""
    whole = len(flat) <= length and len(head) == len(text)
    return flat if whole else flat[: length - 1].rstrip() + "…"
