"""What a page needs of a run before it can draw a map, without keeping the vectors."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from explorer.maps.data import expert_facts, prompt_facts, token_facts
from explorer.maps.features import Floats, Ids, Source, read_points
from explorer.maps.projection import has_umap, pca
from explorer.run import Run

# names of the columns of ``Prepared.ids``
ID_COLUMNS = {
    "tokens": ("token_id",),
    "prompts": ("prompt_id",),
    "experts": ("layer", "site", "expert_id"),
}


class Prepared(NamedTuple):
    """Points without their vectors.

    Attributes
    ----------
    ids : array [N, C]
    flat : array [N, 2]
        The first two principal components.
    digest : str
        Name of the vectors' content.
    dims : int
        Of a vector.
    n_all : int
        Units that the run has; more than N where some have no vector.
    has_umap : bool
        Whether UMAP can lay them out.
    is_point : bool
        Whether all vectors are equal.
    """

    ids: Ids
    flat: Floats
    digest: str
    dims: int
    n_all: int
    has_umap: bool
    is_point: bool


def prepare(run: Run, source: Source) -> Prepared:
    """Read the vectors once, and return what can be said of them at once.

    Raises
    ------
    RunError
        If the run did not record what is asked for.
    """
    points = read_points(run, source)
    values = points.values
    flat = pca(values)
    return Prepared(
        points.ids,
        flat,
        points.digest,
        values.shape[1],
        points.n_all,
        has_umap(values),
        not flat.any(),
    )


def point_facts(run: Run, source: Source, ids: Ids) -> pa.Table:
    """Return what is known of each point, one row per row of ``ids``; see ``queries.clusters``.

    Parameters
    ----------
    source : Source
        Its layer and site are the router that experts and entropies are of.
    ids : array [N, C]
        ``Prepared.ids``.
    """
    if source.unit == "tokens":
        facts = token_facts(run, source.feature, source.layer, site=source.site)
    elif source.unit == "prompts":
        facts = prompt_facts(run, source.layer, site=source.site)
    else:
        facts = expert_facts(run)
    names = ID_COLUMNS[source.unit]
    known = _keys(np.stack([facts[name].to_numpy().astype(np.int64) for name in names], axis=1))
    return facts.take(pa.array(np.searchsorted(known, _keys(ids))))


def _keys(ids: Ids) -> npt.NDArray[np.int64]:
    """Return one number per row that rises as the rows do; experts are numbered below 2**20."""
    key = np.zeros(len(ids), dtype=np.int64)
    for column in ids.T:
        key = key * 2**20 + column
    return key
