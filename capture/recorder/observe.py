"""What the sites did in one forward pass, reduced on the device: real rows, statistics and sums.

And counts of experts that tokens choose together or one after the other, which stay on the device
until many tokens have been counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple

import numpy as np
import torch

from capture.model.forward import Ints
from capture.model.hooks import SiteObservation
from capture.model.scoring import RANKED, RANKINGS, statistics_by
from capture.model.sites import Site
from capture.store.records import LEVELS, Array, Level, SiteBlock, Vectors, next_sites
from kernels.ops.coactivation import coactivation
from kernels.ops.gate import ScoreFunction, gate_batch

NO_ROWS: Ints = np.empty(0, dtype=np.int64)
# ids wait until there are so many tokens: a decoding step alone would cost more than it counts
COUNT_TOKENS = 4096
# counts are sent to the host after so many tokens, and at the end
SEND_TOKENS = 65_536


Observed = Mapping[int, SiteObservation] | Sequence[SiteObservation]  # by the number of the site


class SiteGroup(NamedTuple):
    """Sites that are computed together: of equal shape, rule and device.

    Attributes
    ----------
    members : tuple of int
        Indices of the sites.
    side : str or None
        Of an encoder-decoder.
    n_experts, top_k : int
    score_function : str
        By which the statistics are taken.
    selection_bias : tuple of Tensor [E] or None, or None
        The sites' biases; None where no site has one.
    n_groups, top_groups : int or None
    ranking : str or None
        What margins compare, see :class:`capture.model.sites.Site`.
    margin_known : bool
    logsumexp_known : bool
    """

    members: tuple[int, ...]
    side: str | None
    n_experts: int
    top_k: int
    score_function: ScoreFunction
    selection_bias: tuple[torch.Tensor | None, ...] | None
    n_groups: int | None
    top_groups: int | None
    ranking: str | None
    margin_known: bool
    logsumexp_known: bool


class RealRows(NamedTuple):
    """The real tokens of one forward pass, on the device.

    Attributes
    ----------
    rows : Tensor [N], int64, or None
        Their places among the R rows of the batch; None when all rows are real.
    domain : Tensor [N], int64
        Index of each token's domain among the ``n_domains`` of this pass.
    n_domains : int
    sampled : array [M], int64
        Which of the N belong to the sample.
    sampled_here : Tensor [M], int64, or None
        The same on the device; None for none.
    valid : Tensor [N], bool, or None
        False where a row turned out not to count; None when all count.
    """

    rows: torch.Tensor | None
    domain: torch.Tensor
    n_domains: int
    sampled: Ints = NO_ROWS
    sampled_here: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def on(self, device: torch.device) -> "RealRows":
        """Return the same on a device; nothing waits for it."""
        if device == self.domain.device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if isinstance(value, torch.Tensor)
        }
        return self._replace(**moved)


def group_sites(sites: Sequence[Site]) -> list[SiteGroup]:
    """Group the sites that one launch of the gate can serve."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, site in enumerate(sites):
        info = site.info
        device = next((p.device for p in site.parent.parameters()), None)
        key = (
            info.side, info.n_experts, info.top_k, info.score_function, site.margin_known,
            site.n_groups, site.top_groups, site.ranking, str(device),
        )  # fmt: skip
        groups.setdefault(key, []).append(index)
    return [_group(tuple(members), sites) for members in groups.values()]


def _group(members: tuple[int, ...], sites: Sequence[Site]) -> SiteGroup:
    site = sites[members[0]]
    given = (sites[i].selection_bias for i in members)
    biases = tuple(None if bias is None else bias.float() for bias in given)
    score_function = statistics_by(site.info.score_function)
    return SiteGroup(
        members=members,
        side=site.info.side,
        n_experts=site.info.n_experts,
        top_k=site.info.top_k,
        score_function=score_function,
        selection_bias=None if all(bias is None for bias in biases) else biases,
        n_groups=site.n_groups,
        top_groups=site.top_groups,
        ranking=site.ranking,
        margin_known=site.margin_known and site.info.top_k < site.info.n_experts,
        logsumexp_known=score_function != "probabilities",
    )


def observe(
    group: SiteGroup, seen: Observed, rows: RealRows, level: Level
) -> tuple[SiteBlock[torch.Tensor], torch.Tensor]:
    """Reduce what the sites of one group did to what the run file keeps, in one launch.

    The gate reads the model's own tensors and picks the real rows itself; only the scores and
    router inputs that are kept whole are gathered here.

    Returns
    -------
    block : SiteBlock of Tensor
        On the device, packed as the run file holds it.
    expert_ids : Tensor [S, N, K], uint8 or uint16
        The choice at every level, for counting pairs.
    """
    picked = [seen[i] for i in group.members]
    scores = [o.scores for o in picked if o.scores is not None]
    known = len(scores) == len(picked)
    gate = partial(
        gate_batch,
        expert_ids=[o.expert_ids for o in picked],
        weights=[o.weights for o in picked],
        rows=rows.rows,
        n_experts=group.n_experts,
        top_k=group.top_k,
        selection_bias=group.selection_bias if known else None,
        n_groups=group.n_groups,
        top_groups=group.top_groups,
        valid=rows.valid,
        segments=rows.domain,
        n_segments=rows.n_domains,
        packed=True,
    )
    out = gate(scores if known else None, score_function=group.score_function)
    routed = LEVELS.index(level) >= LEVELS.index("ids")
    margin = out.margin
    if routed and known and group.ranking is not None:
        ranked = [RANKINGS[group.ranking](values.float()) for values in scores]
        margin = gate(ranked, score_function=RANKED, importance=False).margin
    hidden = [o.hidden for o in picked if o.hidden is not None]
    sampled = rows.sampled_here is not None
    block = SiteBlock(
        site_indices=group.members,
        assignments=out.load,
        weight_sum=out.weight_sum,
        prob_sum=out.importance,
        expert_ids=out.expert_ids if routed else None,
        weights=out.weights if routed else None,
        entropy=out.entropy if routed else None,
        margin=margin if routed and group.margin_known else None,
        logsumexp=out.logsumexp if routed and group.logsumexp_known else None,
        topk_mass=out.topk_mass if routed else None,
        scores=_scores(scores, rows, level) if known else None,
        hidden=(rows.sampled, _together(hidden, None))
        if sampled and len(hidden) == len(picked)
        else None,
    )
    return block, out.expert_ids


def _scores(
    scores: Sequence[torch.Tensor], rows: RealRows, level: Level
) -> Vectors[torch.Tensor] | None:
    """Return the scores that are kept: of every token from level scores on, else of the sample."""
    if LEVELS.index(level) >= LEVELS.index("scores"):
        return np.arange(len(rows.domain)), _together(scores, rows.rows)
    if rows.sampled_here is None:
        return None
    wanted = rows.sampled_here
    if rows.rows is not None:
        wanted = rows.rows.index_select(0, wanted)
    return rows.sampled, _together(scores, wanted)


def _together(
    values: Sequence[torch.Tensor], wanted: torch.Tensor | None
) -> torch.Tensor | list[torch.Tensor]:
    """Pick rows of each site's [R, E] as float32, [S, M, E] or one tensor a site.

    On a CPU every site keeps its own tensor, which saves a copy; elsewhere few launches count.
    """
    if values[0].device.type == "cpu":
        chosen = [v if wanted is None else v.index_select(0, wanted) for v in values]
        return [value.float() for value in chosen]
    stacked = torch.stack(list(values))
    return (stacked if wanted is None else stacked.index_select(1, wanted)).float()


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
    for index in sorted(place):
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


class StretchSums(NamedTuple, Generic[Array]):
    """Counts of one stretch: ``pairs`` [S, E, E] and ``transitions`` [S, E, E2], int64."""

    stretch: Stretch
    pairs: Array
    transitions: Array | None

    def by_site(self) -> Iterator[tuple[int, int, int | None]]:
        """Yield (row in the counts, site, next site) for every site."""
        for row, site in enumerate(self.stretch.sites):
            yield row, site, self.stretch.next_sites[row] if self.stretch.next_sites else None


class PairCounter:
    """Adds up the pairs and transitions of every forward pass.

    Parameters
    ----------
    sites : sequence of Site
        All of the model.
    groups : sequence of SiteGroup
        Those that see the same tokens.
    """

    def __init__(self, sites: Sequence[Site], groups: Sequence[SiteGroup]) -> None:
        self.stretches = stretches(sites, groups)
        self._groups = groups
        self._waiting: list[list[torch.Tensor]] = [[] for _ in groups]
        self._waiting_tokens = 0
        self._unsent_tokens = 0
        self._sums: list[StretchSums[torch.Tensor]] = []

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

    def take(self) -> list[StretchSums[torch.Tensor]]:
        """Return the counts since the last call; none where no token came since."""
        self._count()
        sums, self._sums, self._unsent_tokens = self._sums, [], 0
        return sums

    def _count(self) -> None:
        if not self._waiting_tokens:
            return
        ids = [w[0] if len(w) == 1 else torch.cat(w, dim=1) for w in self._waiting]
        for waiting in self._waiting:
            waiting.clear()
        self._waiting_tokens = 0
        counted = [self._counted(stretch, ids) for stretch in self.stretches]
        if not self._sums:
            self._sums = counted
            return
        for sums, new in zip(self._sums, counted, strict=True):
            sums.pairs.add_(new.pairs)
            if sums.transitions is not None and new.transitions is not None:
                sums.transitions.add_(new.transitions)

    def _counted(self, stretch: Stretch, ids: Sequence[torch.Tensor]) -> StretchSums[torch.Tensor]:
        here = _chosen(ids[stretch.group], stretch.places)
        there, n_next = None, None
        if stretch.next_group is not None:
            n_next = self._groups[stretch.next_group].n_experts
            there = _chosen(ids[stretch.next_group], stretch.next_places)
            there = there.to(here.device, non_blocking=True)
        n_experts = self._groups[stretch.group].n_experts
        out = coactivation(here, there, n_experts=n_experts, n_next_experts=n_next)
        return StretchSums(stretch, out.pairs, out.transitions)


def _chosen(ids: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Return the sites at these places of ids [S, N, K], a view where they lie together."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return ids[first : last + 1]
    return torch.stack([ids[place] for place in places])
