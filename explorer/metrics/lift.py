"""What is over-represented in a chosen part, with an interval that knows tokens come in prompts."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MIN_COUNT = 20  # of a row in the whole; below, a ratio is mostly luck
_DRAWS = 200


class Lift(NamedTuple):
    """How much more often things occur in a part than in the whole.

    Attributes
    ----------
    lift, low, high : array [M]
        Share in the part over share in the whole, and its 90 % interval; nan where the whole has
        fewer than ``MIN_COUNT``.
    part, whole : array [M], counts
    """

    lift: Floats
    low: Floats
    high: Floats
    part: Floats
    whole: Floats


def lift(part: npt.ArrayLike, whole: npt.ArrayLike, *, seed: int = 0) -> Lift:
    """Compare shares in a part with shares in the whole that it is of.

    The interval comes from drawing the part's prompts anew with replacement: tokens of a prompt
    are alike, so that counting them as independent would make it far too narrow.

    Parameters
    ----------
    part : array [P, M], counts
        One row per prompt of the part, one column per thing, such as an expert.
    whole : array [M], counts
        Of everything, the part included.
    seed : int
    """
    rows = np.asarray(part, dtype=np.float64)
    total = np.asarray(whole, dtype=np.float64)
    counts = rows.sum(axis=0)
    expected = total / max(total.sum(), 1.0)
    known = (total >= MIN_COUNT) & (counts.sum() > 0)

    def ratio(found: Floats) -> Floats:
        share = found / np.maximum(found.sum(axis=-1, keepdims=True), 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(known, share / expected, np.nan))

    if not len(rows) or not known.any():
        nothing = np.full(len(total), np.nan)
        return Lift(nothing, nothing, nothing, counts, total)
    random = np.random.default_rng(seed)
    times = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_DRAWS)
    low, high = np.percentile(ratio(times @ rows), [5, 95], axis=0)
    return Lift(ratio(counts), low, high, counts, total)
