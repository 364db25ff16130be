"""What attention that prefers no token would show: the baseline of a head's statistics."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# as kernels.attention counts them; tests hold them equal
RECENT = 16  # keys, the query itself among them
QUERY_BLOCK = 64  # queries; every n-th block is used


class HeadBaseline(NamedTuple):
    """Means over the used queries of uniform attention to all keys up to the query.

    Attributes
    ----------
    entropy : float, nats
    sink_mass, window_mass : float, 0..1
    mean_distance : float, tokens
    """

    entropy: float
    sink_mass: float
    mean_distance: float
    window_mass: float


def uniform_head(prompts: Iterable[tuple[int, int]]) -> HeadBaseline:
    """Return what uniform attention over a set of prompts gives.

    Parameters
    ----------
    prompts : iterable of (tokens, every)
        Length of each prompt, and that every n-th block of its queries is used.

    Returns
    -------
    HeadBaseline
        All nan without a query. A layer with a sliding window sees fewer keys than this.
    """
    parts = [used_queries(tokens, every) for tokens, every in prompts]
    keys = np.concatenate(parts) + 1.0 if parts else np.zeros(0)
    if not len(keys):
        return HeadBaseline(*(float("nan"),) * 4)
    return HeadBaseline(
        entropy=float(np.log(keys).mean()),
        sink_mass=float((1 / keys).mean()),
        mean_distance=float(((keys - 1) / 2).mean()),
        window_mass=float((np.minimum(keys, RECENT) / keys).mean()),
    )


def used_queries(tokens: int, every: int) -> npt.NDArray[np.int64]:
    """Return the positions of the queries that were used."""
    position = np.arange(tokens, dtype=np.int64)
    used = (position // QUERY_BLOCK) % max(1, every) == 0
    return np.asarray(position[used])
