"""How long maps take: ``python -m explorer.maps.bench [--points 100000] [--dims 128]``.

Vectors are drawn around 200 centres, as real ones lie in groups too. The first map of a process is
timed apart: it pays for importing and compiling the libraries. CPU seconds are those of all threads
together; on a machine that others use too, they say more than the clock.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pyarrow as pa

from explorer.maps.make import project
from explorer.maps.map_cache import MapOptions
from explorer.maps.pca import pca
from explorer.maps.point_clusters import cluster, trustworthiness
from explorer.maps.point_table import PointTable, Region

T = TypeVar("T")


def main() -> None:
    """Time one size and print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=128)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    centres = 2 * random.normal(size=(200, options.dims))
    values = np.empty((options.points, options.dims), dtype=np.float32)
    for start in range(0, options.points, 50_000):
        part = slice(start, min(start + 50_000, options.points))
        n = part.stop - part.start
        values[part] = centres[random.integers(0, 200, n)] + random.normal(size=(n, options.dims))
    _say(f"{options.points:,} points of {options.dims} dimensions")
    flat = _timed("PCA, while the map is made", lambda: pca(values))
    _timed("imports and compilation", lambda: project(values[:2_000], MapOptions(n_epochs=2)))
    xy = _timed("UMAP of landmarks, and the others placed", lambda: project(values, MapOptions()))
    _timed("K-Means, 12 clusters", lambda: cluster(values, "kmeans"))
    good = _timed("trustworthiness", lambda: trustworthiness(values, xy))
    table = _timed("points into DuckDB", lambda: _table(xy))
    _timed("density map", lambda: table.density(240))
    left, right, low, high = table.extent()
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    line = Region(
        tuple((left + right) / 2 + (right - left) / 4 * np.cos(angle)),
        tuple((low + high) / 2 + (high - low) / 4 * np.sin(angle)),
    )
    inside = _timed("points inside a line of 60 corners", lambda: table.select(line))
    _say(f"{len(inside):,} points inside")
    _say(f"trustworthiness {good:.3f}, of the PCA {trustworthiness(values, flat):.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _say(f"peak memory {peak:.1f} GiB")


def _table(xy: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> PointTable:
    shown = np.ones(len(xy), dtype=bool)
    return PointTable(pa.table({"x": xy[:, 0], "y": xy[:, 1], "shown": shown}))


def _timed(what: str, work: Callable[[], T]) -> T:
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - start
    _say(f"{seconds:8.2f} s  {time.process_time() - cpu:8.2f} CPU s  {what}")
    return result


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
