"""Text of strangers as a reader can see it: characters that show nothing, Markdown, table cells.

Tokens, prompts, domains, notes, names and files come from anybody. Whatever shows them makes the
invisible ``visible``, and text inside a page's Markdown goes through ``plain``, so that it is shown
as it is: no link, icon, emoji, arrow, formula or colour comes of it.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

ABSENT = "–"  # in the place of a value that is missing
# under a table whose dashes are of several kinds
ABSENT_NOTE = (
    f"{ABSENT} = not recorded, or not defined there: for one expert, without an assignment, or "
    "where no expert is left out."
)
CONTINUATION = "·"  # a token without text of its own, in running text
NOT_RECORDED, _NO_TEXT = "(text not recorded)", "(no text)"
_QUOTES = "“”"
_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_CONTROL_PICTURES = 0x2400

# without ink by category: controls, formats, no character at all, private, half of a character,
# separators; a plain space is the one among them that is text
_HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
# without ink although their category has some: Default_Ignorable_Code_Point of the Unicode
# Character Database (fillers, joiners, variation selectors) and blank symbols
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U0001d159\U000e0000-\U000e0fff]"
)
_JOINERS = "\u200c\u200d"
_EMOJI_STYLE = "\ufe0e\ufe0f"
_VIRAMA = 9  # canonical combining class
_CIRCLE = "\u25cc"  # what Unicode draws a combining mark on that stands alone

# inside a page's Markdown. A backslash takes the meaning of a sign away while the text is parsed;
# links, icons, emoji and arrows are found afterwards, in what was parsed, so that there the text
# has to be in pieces: a colour without a colour is a piece and nothing else
_SIGNS = re.compile(r"[\\`*_{}\[\]()<>#+\-.!|$~:&^=]")
_PIECES = re.compile(
    r":(?=//|material[/_]|[\w+/-]+:)"  # addresses, icons, emoji
    r"|(?<=[\w.+-])@(?=[\w-])"  # e-mail addresses
    r"|(?<=www)\."
    # arrows and other drawn signs, alone between spaces, ends and pieces
    r"|(?<![^\s:@.])(?:<->|->|<-|--|>=|<=|~=)(?![^\s:@])",
    re.IGNORECASE,
)
_PIECE = re.compile(r":color\[(\\.)\]")

# of a spreadsheet (OWASP, CSV injection), also in the width of East Asian text
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?\s?%?", re.IGNORECASE)


def visible(text: str | None, *, spaces: bool = False, running: bool = False) -> str:
    """Return a text with a sign in place of every character that shows nothing.

    Joiners and variation selectors stay where they shape a character beside them (in emoji, and in
    scripts such as Persian and Hindi); marks that combine with nothing stand on a dotted circle.

    Parameters
    ----------
    text : str or None
        None is a token without text; ``""`` a token without characters of its own.
    spaces : bool
        Also mark plain spaces, for single tokens, where they matter.
    running : bool
        Text that is read on: line ends and tabs keep their room behind their signs, and ``""``, a
        token in the middle of a character, is a dot.

    Returns
    -------
    str
        Not escaped for figures: see ``explorer.ui.wording.label``.
    """
    if text is None:
        return NOT_RECORDED
    if not text:
        return CONTINUATION if running else _NO_TEXT
    if running:
        return _marked(text, lambda c: _sign(c) + (c if c in "\n\t" else ""))
    if text.strip(_QUOTES) in (NOT_RECORDED, _NO_TEXT):
        return f"“{text}”"
    shown = _marked(text, _sign)
    return shown.replace(" ", "·") if spaces else shown


def _sign(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character < " ":
        return chr(_CONTROL_PICTURES + ord(character))
    return f"⟦U+{ord(character):04X}⟧"


def one_line(text: str, length: int) -> str:
    """Return the beginning of a text on one line, with an ellipsis where it was cut."""
    text = text.strip()
    head = text[: 8 * length]  # room for white space, which is shown as one space
    flat = " ".join(visible(head, running=True).replace("↵\n", " ").split()) if head else ""
    whole = len(flat) <= length and len(head) == len(text)
    return flat if whole else flat[: length - 1].rstrip() + "…"


def _marked(text: str, sign: Callable[[str], str]) -> str:
    if text.isascii() and text.isprintable():
        return text
    if text and all(map(_combines, text)):
        text = _CIRCLE + text
    if text.isprintable() and not _BLANK.search(text):
        return text
    around = ["", *text, ""]
    return "".join(
        sign(character)
        if _shows_nothing(character) and not _shapes(before, character, after)
        else character
        for (before, character), after in zip(pairwise(around[:-1]), around[2:], strict=True)
    )


def _shows_nothing(character: str) -> bool:
    """Return whether a character has no ink of its own; a plain space counts as text."""
    if character == " ":
        return False
    return unicodedata.category(character) in _HIDDEN or bool(_BLANK.match(character))


def _combines(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me") and not _BLANK.match(character)


def _shapes(before: str, character: str, after: str) -> bool:
    """Return whether an invisible character changes how its neighbours look."""
    if character in _JOINERS:
        return _joins(before) or _joins(after)
    return (
        character in _EMOJI_STYLE
        and bool(before)
        and unicodedata.category(before) in ("So", "Sm", "Sk", "Po", "Nd")
    )


def _joins(character: str) -> bool:
    """Return whether a character takes a joiner: of a joined script, or of an emoji."""
    return bool(character) and (
        character in _EMOJI_STYLE
        or unicodedata.bidirectional(character) == "AL"
        or unicodedata.combining(character) == _VIRAMA
        or unicodedata.category(character) in ("So", "Sk")
    )


def plain(text: str, *, lines: bool = False) -> str:
    """Return a text so that a page's Markdown shows it as it is.

    Parameters
    ----------
    lines : bool
        Keep the lines of the text, for a note; else they run on, for a name within a sentence.
    """
    if lines:
        return "  \n".join(plain(line) for line in text.splitlines())
    shown = _marked(text, lambda c: c if c in "\n\t" else _sign(c))
    pieces: list[str] = []
    end = 0
    for piece in _PIECES.finditer(shown):
        pieces.append(_escaped(shown[end : piece.start()]))
        pieces += [rf":color[\{sign}]" for sign in piece[0]]
        end = piece.end()
    pieces.append(_escaped(shown[end:]))
    # a line that begins with spaces would be code
    return re.sub(r"\A[ \t]", lambda space: f"&#{ord(space[0])};", "".join(pieces))


def _escaped(text: str) -> str:
    return _SIGNS.sub(r"\\\g<0>", text).replace("\n", "&#10;")


def unpieced(text: str) -> str:
    """Return a page's Markdown without what only the app needs to keep text in pieces."""
    return _PIECE.sub(r"\1", text)


def covering(pieces: Sequence[str], text: str) -> Iterator[range]:
    """Yield the pieces that each occurrence of a text covers, upper or lower case.

    A word is not a token: the same letters are one here and three there, so the text is looked for
    in what the pieces make together.
    """
    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    for match in re.finditer(re.escape(text), "".join(pieces), re.IGNORECASE):
        yield range(bisect_right(ends, match.start()), bisect_left(starts, match.end()))


def cell(value: object) -> object:
    """Return what a cell of a CSV file holds: text that no spreadsheet takes for a formula.

    Controls become pictures, a carriage return for one, because some readers end a row there.
    Numbers stay numbers.
    """
    if not isinstance(value, str):
        return value
    text = "".join(
        chr(_CONTROL_PICTURES + ord(c)) if c < " " and c not in "\n\t" else c for c in value
    )
    if _FORMULA.match(text) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text


def duration(seconds: float) -> str:
    """Return a time as somebody would say it, such as ``"12 minutes"``."""
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}s"
    return counted(max(1, round(seconds)), "second")


def counted(amount: float, what: str, many: str = "") -> str:
    """Return a number of things, such as 1 prompt or 1,200 prompts.

    Parameters
    ----------
    amount : int
        Of whatever numeric type.
    what : str
        One of them.
    many : str, optional
        Several of them, where that is more than an s at the end.
    """
    return f"{int(amount):,} {what if amount == 1 else many or what + 's'}"
