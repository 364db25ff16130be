"""Numbers as text: what is not defined is a dash, and never ``nan``."""

import math

import numpy as np
import numpy.typing as npt

from explorer.text import ABSENT


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number in a format; a dash where there is none, or it is not finite."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def span(values: npt.ArrayLike, form: str = ".3g") -> str:
    """Return ``from SMALLEST to LARGEST`` of what is defined, for sentences.

    Parameters
    ----------
    values : array [N]
        Where none is defined, the text says so.
    """
    found = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    if not found.size:
        return "not defined for any"
    return f"from {found.min():{form}} to {found.max():{form}}"
