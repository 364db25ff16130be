"""Maps, clusters and likeness of weights kept between starts, in the user's cache folder.

Never in a run file. A file is named after the content of the vectors and everything that shapes the
result, so that a name is never right for other content, and any run with the same vectors finds it.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from capture import demo
from capture.errors import first_line
from explorer.errors import ExplorerError
from explorer.run import Run

# raised when the same vectors and options, or weights, come to give another result
VERSION, WEIGHTS_VERSION = 2, 1
WEIGHT_KINDS = ("router", "experts")  # whose cosines there are
KEPT_FILES = 300  # the oldest beyond these are removed when one is added
_FACTS = b"routescope map"


class MapOptions(NamedTuple):
    """How a map is laid out.

    Attributes
    ----------
    n_neighbors : int
        Of each point, that the layout tries to keep near it.
    min_dist : float
        How close points may come, in units of the map.
    n_landmarks : int
        Points that are laid out by UMAP; the others are placed between their nearest ones.
    n_epochs : int
        Passes over the neighbours.
    seed : int
    """

    n_neighbors: int = 15
    min_dist: float = 0.1
    n_landmarks: int = 15_000
    n_epochs: int = 120
    seed: int = 0


class CachedMap(NamedTuple):
    """What a file of the cache holds.

    Attributes
    ----------
    columns : dict of str to array [N]
        One value per point, in the order of ``features.read_points``.
    facts : dict
    """

    columns: dict[str, npt.NDArray[Any]]
    facts: dict[str, Any]


def folder() -> Path:
    """Return the folder; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "routescope" / "maps"


def map_path(digest: str, options: MapOptions) -> Path:
    """Return where the map of vectors with this digest is kept."""
    return _path("map", digest, options._asdict())


def clusters_path(digest: str, method: str, n_clusters: int, seed: int) -> Path:
    """Return where the clusters of vectors with this digest are kept."""
    options: dict[str, Any] = {"method": method, "seed": seed}
    if method != "hdbscan":
        options["n_clusters"] = n_clusters
    return _path("clusters", digest, options)


def router_path(digest: str, fingerprint: str, router: str, seed: int) -> Path:
    """Return where another router's choices for the tokens of these vectors are kept.

    Parameters
    ----------
    fingerprint : str
        Of the run: routers read more of it than the vectors of the map.
    """
    return _path("router", digest, {"run": fingerprint, "router": router, "seed": seed})


def _path(kind: str, digest: str, options: dict[str, Any]) -> Path:
    text = json.dumps([VERSION, kind, digest, options, versions()], sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return folder() / f"{kind}-{name}.parquet"


def cosines_path(run: Run) -> Path:
    """Return where the cosines of a run's model are kept."""
    model = str(run.info["model"])
    places = [(s.layer, s.site, s.n_experts) for s in run.sites]
    text = json.dumps([WEIGHTS_VERSION, model, run.info["revision"], _changed_at(model), places])
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return folder() / f"weights-{digest}.parquet"


def read_cosines(path: Path, layer: int, site: int) -> pd.DataFrame:
    """Return the cosines at one router.

    Returns
    -------
    DataFrame
        ``kind`` (of ``WEIGHT_KINDS``), ``a``, ``b`` (experts), ``cosine``. A kind that the model
        does not have in a form that can be compared has no rows.

    Raises
    ------
    ExplorerError
        If the file cannot be read.
    """
    where = [("layer", "=", layer), ("site", "=", site)]
    try:
        return pq.read_table(path, filters=where).drop(["layer", "site"]).to_pandas()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ExplorerError(f"{path} cannot be read ({first_line(error)}). Delete it.") from error


def write(path: Path, columns: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Path:
    """Write a file in one step; one that is there is replaced by the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    table = table.replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
    number, name = tempfile.mkstemp(prefix=".", suffix=".parquet", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            pq.write_table(table, file, compression="zstd")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _forget(path.parent)
    return path


def read(path: Path, n_points: int) -> CachedMap | None:
    """Return what a file holds, None where it is missing or damaged."""
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[_FACTS])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    if table.num_rows != n_points or not isinstance(facts, dict):
        return None
    columns = {name: np.asarray(table[name].to_numpy()) for name in table.column_names}
    return CachedMap(columns, facts)


def _forget(where: Path) -> None:
    files = sorted(where.glob("*-*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-KEPT_FILES]:
        with contextlib.suppress(OSError):
            file.unlink()


def versions() -> dict[str, Any]:
    """Return the versions of what lays maps out; another one may give another map."""
    return {name: version(name) for name in ("umap-learn", "scikit-learn", "numpy")}


def _changed_at(model: str) -> int:
    """Return when the weights of a local model changed, so that others are not taken for them."""
    folder = Path(demo.__file__).parent / "weights" if model == "demo" else Path(model)
    try:
        # not the folders within: a stranger's run may name any folder of this machine
        files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
        return max((file.stat().st_mtime_ns for file in files), default=0)
    except (OSError, ValueError):  # no name that a file can have
        return 0
