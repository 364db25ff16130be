"""The best subset to drop: by trying all of them, or greedily where there are too many."""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

MOST_SUBSETS = 5000

Error = Callable[[tuple[int, ...]], float]


class Dropped(NamedTuple):
    """A choice of what to drop.

    Attributes
    ----------
    members : tuple of int
        Ascending.
    error : float
        Of dropping them, as the search measured it.
    tried : int
        Subsets that were measured.
    exhaustive : bool
        Whether all were; otherwise the search was greedy.
    """

    members: tuple[int, ...]
    error: float
    tried: int
    exhaustive: bool

    @property
    def method(self) -> str:
        """How it was found, for reports."""
        way = "enumeration" if self.exhaustive else "greedy"
        return f"{way}, {self.tried:,} subsets"


def best_to_drop(n: int, drop: int, error: Error, *, most: int = MOST_SUBSETS) -> Dropped:
    """Find which ``drop`` of ``n`` members to drop for the smallest error.

    Parameters
    ----------
    n, drop : int
    error : callable
        Takes an ascending tuple of members and returns the error without them.
    most : int
        Subsets up to which all are tried; ties go to the first in order.

    Returns
    -------
    Dropped
    """
    if comb(n, drop) <= most:
        measured = [(error(members), members) for members in combinations(range(n), drop)]
        least, members = min(measured, key=lambda pair: pair[0])
        return Dropped(members, least, len(measured), exhaustive=True)
    chosen: tuple[int, ...] = ()
    least, tried = float("nan"), 0
    for _ in range(drop):
        steps = [(error(members), members) for members in _one_more(chosen, n)]
        least, chosen = min(steps, key=lambda pair: pair[0])
        tried += len(steps)
    return Dropped(chosen, least, tried, exhaustive=False)


def _one_more(chosen: tuple[int, ...], n: int) -> Iterator[tuple[int, ...]]:
    """Yield the chosen members and one more, in the order of the new one."""
    for member in range(n):
        if member not in chosen:
            yield tuple(sorted((*chosen, member)))
