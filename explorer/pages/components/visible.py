"""Token text as a reader can see it: marks for what is invisible, nothing else changed."""

import unicodedata

# characters that steer the direction of text, or take no room: they could hide or reorder text
_STEERING = {
    *range(0x200E, 0x2010),  # direction marks
    *range(0x202A, 0x202F),  # embeddings and overrides
    *range(0x2066, 0x206A),  # isolates
    0x061C,  # Arabic letter mark
    0x200B,  # zero-width space
    0xFEFF,  # byte order mark
}
_NAMES = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}
CONTINUATION = "·"  # a token without text of its own


def visible(text: str) -> str:
    """Return the text of a token with a mark for every character that shows nothing.

    A line end keeps its line break after its mark, and spaces stay as they are; the empty text
    of a token in the middle of a character becomes a dot.
    """
    if not text:
        return CONTINUATION
    if text.isprintable():
        return text
    return "".join(map(_mark, text))


def _mark(character: str) -> str:
    if character in _NAMES:
        return _NAMES[character]
    code = ord(character)
    # joiners stay: they are part of Persian words and of emoji, which may lie over several tokens
    if code in _STEERING or unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn"):
        return f"⟦U+{code:04X}⟧"
    return character


def one_line(text: str, length: int) -> str:
    """Return the beginning of a text on one line, with an ellipsis where it was cut."""
    text = text.strip()
    head = text[: 8 * length]  # room for white space, which is shown as one space
    flat = " ".join(visible(head).replace("↵\n", " ").split()) if head else ""
    whole = len(flat) <= length and len(head) == len(text)
    return flat if whole else flat[: length - 1].rstrip() + "…"
