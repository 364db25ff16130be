"""Does a token go where the one before it went? Repetition of experts, against chance."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]


class Repetition(NamedTuple):
    """How often a token shares experts with the token before it.

    Attributes
    ----------
    first, first_chance : float, 0..1
        Share of tokens whose heaviest expert is that of the token before, and the same for two
        tokens drawn at random: the sum of the squared shares of the experts, which is above
        ``1 / E`` where some are used more.
    any, any_chance : float, 0..1
        Share of tokens that have any expert in common with the token before, and with a token
        drawn at random.
    pairs : int
        Neighbouring tokens that were looked at.
    """

    first: float
    first_chance: float
    any: float
    any_chance: float
    pairs: int


def repetition(expert_ids: Ids, sequence: Ids, *, seed: int = 0) -> Repetition:
    """Measure how often experts repeat from one token to the next.

    Parameters
    ----------
    expert_ids : array [T, K]
        Chosen experts of tokens in the order of the text, heaviest first; -1 = an empty slot.
    sequence : array [T]
        Which text each token belongs to; neighbours of different texts are no pair.
    seed : int
        Draws the random partners.

    Returns
    -------
    Repetition
        nan where there is no pair.

    References
    ----------
    Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088, table 5, which takes ``1 / E`` and
    ``1 - C(E - K, K) / C(E, K)`` for chance: what equal loads would give.
    """
    neighbours = sequence[1:] == sequence[:-1]
    pairs = int(neighbours.sum())
    if not pairs:
        return Repetition(*(float("nan"),) * 4, 0)
    before, after = expert_ids[:-1][neighbours], expert_ids[1:][neighbours]
    partner = np.random.default_rng(seed).permutation(len(before))
    heaviest = after[:, 0][after[:, 0] >= 0]
    share = np.bincount(heaviest) / max(1, len(heaviest))
    return Repetition(
        float(((before[:, 0] == after[:, 0]) & (after[:, 0] >= 0)).mean()),
        float((share**2).sum()),
        float(_common(before, after).mean()),
        float(_common(before[partner], after).mean()),
        pairs,
    )


def _common(first: Ids, second: Ids) -> npt.NDArray[np.bool_]:
    """Return which rows have an expert in common, [T]."""
    same = (first[:, :, None] == second[:, None, :]) & (first[:, :, None] >= 0)
    common: npt.NDArray[np.bool_] = same.any(axis=(1, 2))
    return common
