"""What errors quote of the input that they are about: at most a line, however long it is."""

import reprlib

MAX_QUOTED = 80  # characters
MAX_LINE = 200
_CUT = "…"
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_QUOTED


def quoted(value: object, most: int = MAX_QUOTED) -> str:
    """Return how Python writes a value, on one line and cut where it is long.

    Parameters
    ----------
    value : object
    most : int, characters
    """
    try:
        return cut(_repr.repr(value), most)
    except ValueError:  # a number of more digits than Python writes
        return "a number with too many digits to write"


def cut(text: str, most: int = MAX_LINE) -> str:
    """Return a text on one line, cut where it is longer than ``most`` characters."""
    line = " ".join(text[: most + 1].splitlines())
    return line if len(line) <= most else line[: most - 1] + _CUT


def first_line(error: object, most: int = MAX_LINE) -> str:
    """Return the first line of what an error of a library says, or its kind where it says nothing.

    Parameters
    ----------
    error : object
    most : int, characters
    """
    lines = str(error)[: 10 * most].strip().splitlines()
    return cut(lines[0].strip(), most) if lines else type(error).__name__
