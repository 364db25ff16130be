"""Parts of a map that somebody drew: a box or a closed line."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_CORNERS = 60  # of a region in an address; a hand-drawn line has hundreds
_NUMBER = r"-?\d{1,7}(?:\.\d{1,4})?"
_WRITTEN = re.compile(rf"(?:{_NUMBER}_{_NUMBER}~)+{_NUMBER}_{_NUMBER}")


class Region(NamedTuple):
    """A closed line on a map.

    Attributes
    ----------
    x, y : tuple of float
        Its corners in order; of a box, two opposite ones.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def is_box(self) -> bool:
        """Whether it is a box with sides along the axes."""
        return len(self.x) == 2

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least and greatest x, least and greatest y."""
        return min(self.x), max(self.x), min(self.y), max(self.y)

    def outline(self) -> tuple[list[float], list[float]]:
        """Return the corners of the line as it is drawn, the first one again at the end."""
        if not self.is_box:
            return [*self.x, self.x[0]], [*self.y, self.y[0]]
        (a, b), (c, d) = self.x, self.y
        return [a, b, b, a, a], [c, c, d, d, c]


def inside(x: npt.ArrayLike, y: npt.ArrayLike, region: Region) -> npt.NDArray[np.bool_]:
    """Return which points are in a region, by the even-odd rule.

    A point is inside when a straight way out crosses the line an odd number of times.

    Parameters
    ----------
    x, y : array [N]
    """
    px, py = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    left, right, low, high = region.bounds
    if region.is_box:
        return np.asarray((px >= left) & (px <= right) & (py >= low) & (py <= high))
    odd = np.zeros(px.shape, dtype=bool)
    ends = zip(region.x, region.y, np.roll(region.x, -1), np.roll(region.y, -1), strict=True)
    for x0, y0, x1, y1 in ends:
        if y0 == y1:
            continue  # along the way out, crossed by none
        crosses = (y0 > py) != (y1 > py)
        odd ^= crosses & (px < (x1 - x0) * (py - y0) / (y1 - y0) + x0)
    return odd


def drawn(selection: Any) -> Region | None:
    """Return the region of a figure's selection as Streamlit hands it over; None = nothing."""
    for shape in [*(selection.get("lasso") or ()), *(selection.get("box") or ())]:
        xs, ys = _numbers(shape.get("x")), _numbers(shape.get("y"))
        if len(xs) == len(ys) and len(xs) >= 2:
            return _fewer(xs, ys)
    return None


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    found = [float(v) for v in values if isinstance(v, int | float) and np.isfinite(v)]
    return found if len(found) == len(values) else []


def _fewer(xs: list[float], ys: list[float]) -> Region:
    """Return a line of few corners, rounded, as an address can hold it."""
    step = -(-len(xs) // MAX_CORNERS)
    x = tuple(round(v, 4) for v in xs[::step])
    return Region(x, tuple(round(v, 4) for v in ys[::step]))


def write(region: Region) -> str:
    """Return a region as text for an address."""
    return "~".join(f"{x:.4f}_{y:.4f}" for x, y in zip(region.x, region.y, strict=True))


def read(text: str) -> Region | None:
    """Return the region of a text that ``write`` wrote; None for any other text."""
    if len(text) > 40 * MAX_CORNERS or not _WRITTEN.fullmatch(text):
        return None
    pairs = [corner.split("_") for corner in text.split("~")]
    if len(pairs) > MAX_CORNERS:
        return None
    return Region(tuple(float(x) for x, _ in pairs), tuple(float(y) for _, y in pairs))
