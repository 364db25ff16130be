"""What the sites did in one forward pass: real rows only, statistics and sums, on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from capture.hooks import SiteObservation
from capture.scoring import statistics_by
from capture.sites import Site
from capture.store.records import LEVELS, Level
from kernels.gate import ScoreFunction, gate
from kernels.gate.reference import probabilities


class SiteGroup(NamedTuple):
    """Sites that are computed together because their tensors have equal shapes.

    Attributes
    ----------
    members : tuple of int
        Indices of the sites.
    n_experts, top_k : int
    score_function : str
        By which the statistics are taken.
    margin_known : bool
    logsumexp_known : bool
    """

    members: tuple[int, ...]
    n_experts: int
    top_k: int
    score_function: ScoreFunction
    margin_known: bool
    logsumexp_known: bool


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
    """Group the sites that one stacked computation can serve.

    A site with a selection bias, or with groups of experts, is alone in its group: the gate takes
    one bias.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, site in enumerate(sites):
        info = site.info
        alone = index if site.selection_bias is not None or site.n_groups is not None else None
        device = next((p.device for p in site.parent.parameters()), None)
        key = (
            info.n_experts, info.top_k, info.score_function, site.margin_known, alone, str(device)
        )  # fmt: skip
        groups.setdefault(key, []).append(index)
    return [_group(tuple(members), sites[members[0]]) for members in groups.values()]


def _group(members: tuple[int, ...], site: Site) -> SiteGroup:
    score_function = statistics_by(site.info.score_function)
    return SiteGroup(
        members=members,
        n_experts=site.info.n_experts,
        top_k=site.info.top_k,
        score_function=score_function,
        margin_known=site.margin_known and site.info.top_k < site.info.n_experts,
        logsumexp_known=score_function != "probabilities",
    )


def observe(
    group: SiteGroup,
    sites: Sequence[Site],
    seen: Sequence[SiteObservation],
    rows: Rows,
    level: Level,
) -> dict[str, torch.Tensor]:
    """Reduce what the sites of one group did to what the run file keeps.

    Returns
    -------
    dict
        ``assignments`` [S, G, E] int64, ``weight_sum`` [S, G, E] float64 and, where scores are
        known, ``prob_sum`` [S, G, E] float32. From level ids on also ``expert_ids``
        [S, N, K] int32, ``weights`` [S, N, K] float32 and the statistics that are known, each
        [S, N] float32. ``scores`` [S, M, E] and ``hidden`` [S, M, D] float32 for the sample;
        at level scores ``scores`` has all N rows.
    """
    picked = [seen[i] for i in group.members]
    expert_ids = torch.stack([_pick(o.expert_ids, rows.rows) for o in picked])  # [S, N, K]
    weights = torch.stack([_pick(o.weights, rows.rows) for o in picked]).float()
    scores = _scores(picked, rows.rows)
    if rows.valid is not None:
        expert_ids = expert_ids.masked_fill(~rows.valid[:, None], -1)
        weights = weights.masked_fill(~rows.valid[:, None], 0.0)
    out = _rollups(group, expert_ids, weights, scores, rows)
    if LEVELS.index(level) >= LEVELS.index("ids"):
        out["expert_ids"], out["weights"] = expert_ids.int(), weights
        if scores is not None:
            out |= _statistics(group, sites[group.members[0]], expert_ids, weights, scores, rows)
    if scores is not None and level == "scores":
        out["scores"] = scores
    elif scores is not None and rows.sampled is not None:
        out["scores"] = scores.index_select(1, rows.sampled)
    hidden = [o.hidden for o in picked if o.hidden is not None]
    if rows.sampled is not None and len(hidden) == len(picked):
        out["hidden"] = torch.stack(hidden).float()
    return out


def _pick(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return values if rows is None else values.index_select(0, rows)


def _scores(seen: Sequence[SiteObservation], rows: torch.Tensor | None) -> torch.Tensor | None:
    """Return the scores of all sites [S, N, E] float32, or None where a site hides them."""
    found = [o.scores for o in seen if o.scores is not None]
    if len(found) < len(seen):
        return None
    return torch.stack([_pick(scores, rows) for scores in found]).float()


def _rollups(
    group: SiteGroup,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    scores: torch.Tensor | None,
    rows: Rows,
) -> dict[str, torch.Tensor]:
    """Sum assignments, weights and probabilities per site, domain and expert."""
    n_sites, n_experts = len(group.members), group.n_experts
    shape = (n_sites, rows.n_domains, n_experts)
    first = torch.arange(n_sites, device=expert_ids.device)[:, None] * rows.n_domains
    cell = (first + rows.domain)[..., None] * n_experts + expert_ids  # [S, N, K]
    # one cell more than there are takes the empty slots
    size = n_sites * rows.n_domains * n_experts
    cell = torch.where(expert_ids >= 0, cell, size).flatten()
    count = torch.zeros(size + 1, dtype=torch.int64, device=cell.device)
    count.index_add_(0, cell, torch.ones_like(cell))
    weight = torch.zeros(size + 1, dtype=torch.float64, device=cell.device)
    weight.index_add_(0, cell, weights.flatten().double())
    out = {"assignments": count[:-1].view(shape), "weight_sum": weight[:-1].view(shape)}
    if scores is not None:
        probs = probabilities(scores, group.score_function)
        domains = torch.arange(rows.n_domains, device=cell.device)
        is_in = domains[:, None] == rows.domain  # [G, N]
        if rows.valid is not None:
            is_in = is_in & rows.valid
        out["prob_sum"] = torch.matmul(is_in.to(probs.dtype), probs)
    return out


def _statistics(
    group: SiteGroup,
    site: Site,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    scores: torch.Tensor,
    rows: Rows,
) -> dict[str, torch.Tensor]:
    """Return the per-token statistics that are known, each [S, N]."""
    shape = expert_ids.shape[:2]
    found = gate(
        scores.flatten(0, 1),
        top_k=group.top_k,
        score_function=group.score_function,
        selection_bias=site.selection_bias,
        n_groups=site.n_groups,
        top_groups=site.top_groups,
        expert_ids=expert_ids.flatten(0, 1),
        weights=weights.flatten(0, 1),
        valid=None if rows.valid is None else rows.valid.repeat(shape[0]),
        importance=False,
    )
    out = {"entropy": found.entropy.view(shape), "topk_mass": found.topk_mass.view(shape)}
    if group.margin_known:
        out["margin"] = found.margin.view(shape)
    if group.logsumexp_known:
        out["logsumexp"] = found.logsumexp.view(shape)
    return out
