"""What the worker does for a map: read the vectors, lay them out or group them, measure, keep."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from explorer.errors import RunError
from explorer.maps import cache
from explorer.maps.clustering import Method, cluster
from explorer.maps.features import Points, Source, read_points
from explorer.maps.projection import MapOptions, Report, pca, project
from explorer.maps.quality import cluster_domain, trustworthiness
from explorer.run import Run, open_run


def make_map(run_path: str, source: Source, out: Path, options: MapOptions, report: Report) -> Path:
    """Lay out the vectors of a run and keep the map at ``out``.

    Raises
    ------
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
    _check(points, out, cache.map_path(points.digest, options))
    xy = project(points.values, options, report)
    report("Measuring", 0.96)
    flat = pca(points.values, seed=options.seed)
    facts = {
        "trustworthiness": _known(trustworthiness(points.values, xy, seed=options.seed)),
        "trustworthiness_pca": _known(trustworthiness(points.values, flat, seed=options.seed)),
        "landmarks": min(len(xy), options.n_landmarks),
        "options": options._asdict(),
    }
    return cache.write(out, {"x": xy[:, 0], "y": xy[:, 1]}, facts)


def make_clusters(
    run_path: str,
    source: Source,
    out: Path,
    method: Method,
    n_clusters: int,
    seed: int,
    report: Report,
) -> Path:
    """Group the vectors of a run and keep the clusters at ``out``.

    Raises
    ------
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
        domains = _domains(run, points, source)
    _check(points, out, cache.clusters_path(points.digest, method, n_clusters, seed))
    report("Looking for clusters", 0.1)
    found = cluster(points.values, method, n_clusters=n_clusters, seed=seed)
    report("Comparing with domains", 0.8)
    facts: dict[str, Any] = {
        "n_clusters": found.n_clusters,
        "fitted": found.n_fitted,
        "converged": found.converged,
        "noise": float((found.labels < 0).mean()),
    }
    if domains is not None:
        agreement = cluster_domain(found.labels, domains, points.groups, seed=seed)
        facts["domains"] = {k: _known(v) for k, v in agreement._asdict().items()}
    return cache.write(out, {"cluster": found.labels}, facts)


def make_rerouted(
    run_path: str, source: Source, out: Path, router: str, seed: int, report: Report
) -> Path:
    """Route the tokens of a map by another router and keep its choices at ``out``.

    Raises
    ------
    RouterError
        If the router cannot route what the run holds.
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
        _check(points, out, cache.router_path(points.digest, run.fingerprint, router, seed))
        report("Loading the routers", 0.1)
        from explorer.maps.rerouted import rerouted

        report("Fitting and routing", 0.4)
        ids = points.ids[:, 0]
        found = rerouted(run, source.layer, ids, router, site=source.site, seed=seed)
    return cache.write(out, {"router": found}, {"known": float((found >= 0).mean())})


def _check(points: Points, out: Path, expected: Path) -> None:
    if out.name != expected.name:
        raise RunError(
            "Expected the vectors that the page showed, but the run's file or a library changed "
            "since. Reload the page."
        )


def _domains(run: Run, points: Points, source: Source) -> npt.NDArray[np.object_] | None:
    """Return the domain of every point, None for units that have none of their own."""
    if source.unit == "experts":
        return None
    rows = run.query("SELECT prompt_id, coalesce(domain, '') AS domain FROM prompts ORDER BY ALL")
    at = np.searchsorted(rows["prompt_id"].to_numpy(dtype=np.int64), points.groups)
    return np.asarray(rows["domain"].to_numpy(dtype=object)[at])


def _known(value: float) -> float | None:
    """Return a number as JSON has it: what is not defined is null."""
    return None if np.isnan(value) else float(value)
