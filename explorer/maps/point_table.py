"""Questions to the points of a map: how dense they are, what is where, and which are in a region.

The points are a table of their own in memory, not of the run file: places and clusters are not
recorded, they are worked out.
"""

import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from explorer.run import frame

Floats = npt.NDArray[np.float64]


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


class Density(NamedTuple):
    """Points of a map, counted in square bins.

    Attributes
    ----------
    counts : array [Y, X]
        Shown points; the first row is the lowest.
    values : array [Y, X] or None
        Mean, or share, of the shown points of a bin; nan in an empty bin.
    x0, y0, dx, dy : float
        Middle of the first bin, and size of a bin.
    """

    counts: npt.NDArray[np.int64]
    values: Floats | None
    x0: float
    y0: float
    dx: float
    dy: float


class PointTable:
    """The points of one map, in DuckDB; safe to share between threads.

    Parameters
    ----------
    table : Table
        ``x``, ``y`` and ``shown`` (whether the filters leave the point), and columns of facts.
    """

    def __init__(self, table: pa.Table) -> None:
        self._lock = threading.Lock()
        self._connection = duckdb.connect()
        self._connection.register("incoming", table)
        self._connection.execute(
            "CREATE TABLE points AS SELECT row_number() OVER () - 1 AS row, * FROM incoming"
        )
        self._connection.unregister("incoming")
        counts = self._table("SELECT count(*) AS n, count(*) FILTER (shown) AS shown FROM points")
        self.n_points = int(counts["n"][0].as_py())
        self.n_shown = int(counts["shown"][0].as_py())

    def _table(self, sql: str, params: dict[str, Any] | None = None) -> pa.Table:
        with self._lock:
            cursor = self._connection.cursor()
        try:
            return cursor.sql(sql, params=params or {}).to_arrow_table()
        finally:
            cursor.close()

    def extent(self) -> tuple[float, float, float, float]:
        """Return the least and greatest x and y of all points, with a margin."""
        row = self._table("SELECT min(x), max(x), min(y), max(y) FROM points").to_pylist()[0]
        left, right, low, high = (float(value or 0.0) for value in row.values())
        wide = max(right - left, high - low, 1e-6) * 0.02
        return left - wide, right + wide, low - wide, high + wide

    def density(
        self, bins: int, *, mean: str | None = None, share: tuple[str, Any] | None = None
    ) -> Density:
        """Count the shown points in bins.

        Parameters
        ----------
        bins : int
            Along the longer side.
        mean : str, optional
            Column whose mean each bin has as its value.
        share : (str, value), optional
            Column and value: the share of a bin's points that have it.
        """
        left, right, low, high = self.extent()
        size = max(right - left, high - low) / bins
        columns, rows = (max(1, int(np.ceil(d / size))) for d in (right - left, high - low))
        value, params = "NULL", {"x0": left, "y0": low, "size": size}
        if mean is not None:
            value = f"avg({mean})"
        elif share is not None:
            value = f"avg(({share[0]} IS NOT DISTINCT FROM $wanted)::DOUBLE)"
            params["wanted"] = share[1]
        found = self._table(
            f"""
            SELECT floor((x - $x0) / $size)::INTEGER AS i, floor((y - $y0) / $size)::INTEGER AS j,
                count(*) AS n, ({value})::DOUBLE AS v
            FROM points WHERE shown GROUP BY i, j
            """,
            params,
        )
        at = found["j"].to_numpy(), found["i"].to_numpy()
        counts = np.zeros((rows, columns), dtype=np.int64)
        counts[at] = found["n"].to_numpy()
        values = None
        if mean is not None or share is not None:
            values = np.full((rows, columns), np.nan)
            values[at] = found["v"].to_numpy()
        return Density(counts, values, left + size / 2, low + size / 2, size, size)

    def select(self, region: Region) -> npt.NDArray[np.int64]:
        """Return the rows of the shown points in a region, rising."""
        names = ("left", "right", "low", "high")
        found = self._table(
            "SELECT row, x, y FROM points WHERE shown AND x BETWEEN $left AND $right "
            "AND y BETWEEN $low AND $high ORDER BY row",
            dict(zip(names, region.bounds, strict=True)),
        )
        rows, x, y = (found[name].to_numpy() for name in ("row", "x", "y"))
        return np.asarray(rows[inside(x, y, region)], dtype=np.int64)

    def rows(self, columns: str, rows: npt.NDArray[np.int64] | None = None) -> pd.DataFrame:
        """Return columns of some points, or of all, in order.

        Parameters
        ----------
        columns : str
            Names, divided by commas.
        """
        if rows is None:
            return frame(self._table(f"SELECT {columns} FROM points ORDER BY row"))
        return frame(
            self._table(
                f"SELECT {columns} FROM points JOIN (SELECT unnest($rows::BIGINT[]) AS row) "
                "USING (row) ORDER BY row",
                {"rows": rows},
            )
        )

    def values(self, column: str) -> pd.DataFrame:
        """Count the points by the value of a column: ``value``, ``n``, ``shown``, most first."""
        return frame(
            self._table(
                f"SELECT {column} AS value, count(*) AS n, count(*) FILTER (shown) AS shown "
                f"FROM points WHERE {column} IS NOT NULL GROUP BY value ORDER BY n DESC, value"
            )
        )


MAX_CORNERS = 60  # of a region in an address; a hand-drawn line has hundreds
_NUMBER = r"-?\d{1,7}(?:\.\d{1,4})?"
_WRITTEN = re.compile(rf"(?:{_NUMBER}_{_NUMBER}~)+{_NUMBER}_{_NUMBER}")


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


def drawn_region(selection: Any) -> Region | None:
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


def write_region(region: Region) -> str:
    """Return a region as text for an address."""
    return "~".join(f"{x:.4f}_{y:.4f}" for x, y in zip(region.x, region.y, strict=True))


def read_region(text: str) -> Region | None:
    """Return the region of a text that ``write_region`` wrote; None for any other text."""
    if len(text) > 40 * MAX_CORNERS or not _WRITTEN.fullmatch(text):
        return None
    pairs = [corner.split("_") for corner in text.split("~")]
    if len(pairs) > MAX_CORNERS:
        return None
    return Region(tuple(float(x) for x, _ in pairs), tuple(float(y) for _, y in pairs))
