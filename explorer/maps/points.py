"""Questions to the points of a map: how dense they are, what is where, and which are in a region.

The points are a table of their own in memory, not of the run file: places and clusters are not
recorded, they are worked out.
"""

import threading
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from explorer.maps.regions import Region, inside
from explorer.run import frame

Floats = npt.NDArray[np.float64]


class Density(NamedTuple):
    """Points of a map, counted in square bins.

    Attributes
    ----------
    counts : array [Y, X]
        Shown points; the first row is the lowest.
    values : array [Y, X] or None
        Mean, or share, of the shown points of a bin; nan where there is none.
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
