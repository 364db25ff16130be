"""Counts of experts that tokens choose together or one after the other, kept on the device."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from capture.model.sites import Site
from capture.recorder.observe import SiteGroup
from capture.store.records import next_sites
from kernels.ops.coactivation import coactivation

# ids wait until there are so many tokens: a decoding step alone would cost more than it counts
COUNT_TOKENS = 4096
# counts are sent to the host after so many tokens, and at the end
SEND_TOKENS = 65_536


class Stretch(NamedTuple):
    """Sites of one group whose transitions lead to sites of one group.

    Attributes
    ----------
    group : int
    places : tuple of int
        Of the sites in their group.
    sites : tuple of int
        Indices of the sites.
    next_group : int or None
        None where the transitions lead nowhere.
    next_places : tuple of int
    next_sites : tuple of int
    """

    group: int
    places: tuple[int, ...]
    sites: tuple[int, ...]
    next_group: int | None
    next_places: tuple[int, ...]
    next_sites: tuple[int, ...]


def stretches(sites: Sequence[Site], groups: Sequence[SiteGroup]) -> list[Stretch]:
    """Sort the sites by their group and that of the site their transitions lead to."""
    place = {
        index: (number, position)
        for number, group in enumerate(groups)
        for position, index in enumerate(group.members)
    }
    following = next_sites([site.info for site in sites])
    found: dict[tuple[int, int | None], list[int]] = {}
    for index in range(len(sites)):
        target = following[index]
        key = (place[index][0], None if target is None else place[target][0])
        found.setdefault(key, []).append(index)
    result = []
    for (group, next_group), members in found.items():
        after = [i for i in (following[index] for index in members) if i is not None]
        result.append(
            Stretch(
                group=group,
                places=tuple(place[index][1] for index in members),
                sites=tuple(members),
                next_group=next_group,
                next_places=tuple(place[index][1] for index in after),
                next_sites=tuple(after),
            )
        )
    return result


class PairCounter:
    """Adds up the pairs and transitions of every forward pass.

    Parameters
    ----------
    sites : sequence of Site
    groups : sequence of SiteGroup
    """

    def __init__(self, sites: Sequence[Site], groups: Sequence[SiteGroup]) -> None:
        self.stretches = stretches(sites, groups)
        self._groups = groups
        self._waiting: list[list[torch.Tensor]] = [[] for _ in groups]
        self._waiting_tokens = 0
        self._unsent_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, expert_ids: Sequence[torch.Tensor]) -> None:
        """Add one forward pass.

        Parameters
        ----------
        expert_ids : sequence of Tensor [S, N, K]
            For every group, as the gate packs them; kept until they are counted.
        """
        for waiting, ids in zip(self._waiting, expert_ids, strict=True):
            waiting.append(ids)
        n_tokens = expert_ids[0].shape[1] if expert_ids else 0
        self._waiting_tokens += n_tokens
        self._unsent_tokens += n_tokens
        if self._waiting_tokens >= COUNT_TOKENS:
            self._count()

    @property
    def is_full(self) -> bool:
        """Whether it is time to send the counts."""
        return self._unsent_tokens >= SEND_TOKENS

    def take(self) -> dict[str, torch.Tensor]:
        """Return the counts since the last call, ``pairs.i`` and ``transitions.i`` by stretch."""
        self._count()
        sums, self._sums, self._unsent_tokens = self._sums, {}, 0
        return sums

    def _count(self) -> None:
        if not self._waiting_tokens:
            return
        ids = [w[0] if len(w) == 1 else torch.cat(w, dim=1) for w in self._waiting]
        for waiting in self._waiting:
            waiting.clear()
        self._waiting_tokens = 0
        for number, stretch in enumerate(self.stretches):
            here = _chosen(ids[stretch.group], stretch.places)
            there, n_next = None, None
            if stretch.next_group is not None:
                n_next = self._groups[stretch.next_group].n_experts
                there = _chosen(ids[stretch.next_group], stretch.next_places)
                there = there.to(here.device, non_blocking=True)
            n_experts = self._groups[stretch.group].n_experts
            out = coactivation(here, there, n_experts=n_experts, n_next_experts=n_next)
            self._add(f"pairs.{number}", out.pairs)
            if out.transitions is not None:
                self._add(f"transitions.{number}", out.transitions)

    def _add(self, name: str, counts: torch.Tensor) -> None:
        if name in self._sums:
            self._sums[name] += counts
        else:
            self._sums[name] = counts


def _chosen(ids: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Return the sites at these places of ids [S, N, K], a view where they lie together."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return ids[first : last + 1]
    return torch.stack([ids[place] for place in places])


def by_site(
    stretches: Sequence[Stretch],
) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield (stretch, row in its counts, site, next site) for every site."""
    for number, stretch in enumerate(stretches):
        for row, site in enumerate(stretch.sites):
            after = stretch.next_sites[row] if stretch.next_sites else None
            yield number, row, site, after
