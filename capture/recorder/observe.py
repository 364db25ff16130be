"""What the sites did in one forward pass: real rows only, statistics and sums, on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from capture.model.hooks import SiteObservation
from capture.model.scoring import statistics_by
from capture.model.sites import Site
from capture.store.records import LEVELS, Level
from kernels.ops.gate import ScoreFunction, gate_batch


class SiteGroup(NamedTuple):
    """Sites that are computed together: of equal shape, rule and device.

    Attributes
    ----------
    members : tuple of int
        Indices of the sites.
    n_experts, top_k : int
    score_function : str
        By which the statistics are taken.
    selection_bias : tuple of Tensor [E] or None, or None
        The sites' biases; None where no site has one.
    n_groups, top_groups : int or None
    margin_known : bool
    logsumexp_known : bool
    """

    members: tuple[int, ...]
    n_experts: int
    top_k: int
    score_function: ScoreFunction
    selection_bias: tuple[torch.Tensor | None, ...] | None
    n_groups: int | None
    top_groups: int | None
    margin_known: bool
    logsumexp_known: bool


class Observed(NamedTuple):
    """What the S sites of one group did with the N real tokens of one forward pass, packed.

    Attributes
    ----------
    expert_ids : Tensor [S, N, K], uint8 or uint16
        Best first, all ones = empty slot; at every level, for counting pairs.
    tensors : dict
        By the names of :class:`capture.store.SiteBlock`: ``assignments``, ``weight_sum`` and,
        where scores are known, ``prob_sum``, each [S, G, E]; from level ids on ``expert_ids``,
        ``weights`` and the statistics that are known. ``scores`` and ``hidden`` of the sample (at
        level scores: scores of all) as [S, M, E], or one tensor a site: ``scores.0``, ...
    """

    expert_ids: torch.Tensor
    tensors: dict[str, torch.Tensor]


class Rows(NamedTuple):
    """The real tokens of one forward pass, on the device.

    Attributes
    ----------
    rows : Tensor [N], int64, or None
        Their places among the R rows of the batch; None when all rows are real.
    domain : Tensor [N], int64
        Index of each token's domain among the ``n_domains`` of this pass.
    n_domains : int
    sampled : Tensor [M], int64, or None
        Which of the N belong to the sample.
    valid : Tensor [N], bool, or None
        False where a row turned out not to count; None when all count.
    """

    rows: torch.Tensor | None
    domain: torch.Tensor
    n_domains: int
    sampled: torch.Tensor | None
    valid: torch.Tensor | None = None


def group_sites(sites: Sequence[Site]) -> list[SiteGroup]:
    """Group the sites that one launch of the gate can serve."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, site in enumerate(sites):
        info = site.info
        device = next((p.device for p in site.parent.parameters()), None)
        key = (
            info.n_experts, info.top_k, info.score_function, site.margin_known, site.n_groups,
            site.top_groups, str(device),
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
        n_experts=site.info.n_experts,
        top_k=site.info.top_k,
        score_function=score_function,
        selection_bias=None if all(bias is None for bias in biases) else biases,
        n_groups=site.n_groups,
        top_groups=site.top_groups,
        margin_known=site.margin_known and site.info.top_k < site.info.n_experts,
        logsumexp_known=score_function != "probabilities",
    )


def observe(
    group: SiteGroup, seen: Sequence[SiteObservation], rows: Rows, level: Level
) -> Observed:
    """Reduce what the sites of one group did to what the run file keeps, in one launch.

    The gate reads the model's own tensors and picks the real rows itself; only the scores and
    router inputs that are kept whole are gathered here.
    """
    picked = [seen[i] for i in group.members]
    scores = [o.scores for o in picked if o.scores is not None]
    known = len(scores) == len(picked)
    out = gate_batch(
        scores if known else None,
        expert_ids=[o.expert_ids for o in picked],
        weights=[o.weights for o in picked],
        rows=rows.rows,
        n_experts=group.n_experts,
        top_k=group.top_k,
        score_function=group.score_function,
        selection_bias=group.selection_bias if known else None,
        n_groups=group.n_groups,
        top_groups=group.top_groups,
        valid=rows.valid,
        segments=rows.domain,
        n_segments=rows.n_domains,
        packed=True,
    )
    found: dict[str, torch.Tensor | None] = {
        "assignments": out.load, "weight_sum": out.weight_sum, "prob_sum": out.importance
    }  # fmt: skip
    if LEVELS.index(level) >= LEVELS.index("ids"):
        found |= {"expert_ids": out.expert_ids, "weights": out.weights}
        found |= {"entropy": out.entropy, "topk_mass": out.topk_mass}
        found |= {"margin": out.margin} if group.margin_known else {}
        found |= {"logsumexp": out.logsumexp} if group.logsumexp_known else {}
    everywhere = LEVELS.index(level) >= LEVELS.index("scores")
    if known and (everywhere or rows.sampled is not None):
        found |= _vectors("scores", scores, rows.rows, None if everywhere else rows.sampled)
    hidden = [o.hidden for o in picked if o.hidden is not None]
    if rows.sampled is not None and len(hidden) == len(picked):
        found |= _vectors("hidden", hidden, None, None)
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return Observed(out.expert_ids, tensors)


def _vectors(
    name: str,
    values: Sequence[torch.Tensor],
    rows: torch.Tensor | None,
    sampled: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """Pick rows of each site's [R, E] as float32: ``name`` [S, M, E], or ``name.i`` one by one.

    On a CPU every site keeps its own tensor, which saves a copy; elsewhere few launches count.
    """
    wanted = rows if sampled is None else sampled if rows is None else rows.index_select(0, sampled)
    if values[0].device.type == "cpu":
        chosen = [v if wanted is None else v.index_select(0, wanted) for v in values]
        return {f"{name}.{place}": value.float() for place, value in enumerate(chosen)}
    stacked = torch.stack(list(values))
    return {name: (stacked if wanted is None else stacked.index_select(1, wanted)).float()}
