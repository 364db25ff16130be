"""What every router did in a run over texts, and where routing changed against another run."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from capture.model.context import Passes
from capture.model.hooks import SiteObservation, tap
from capture.model.scoring import RANKED, RANKINGS, statistics_by
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.playback import RoutingTape
from capture.swap.routers import site_key
from capture.swap.rules import Choice, as_rows
from explorer.comparison.conditions.condition import Subject
from kernels.ops.gate import gate

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class RoutingTrace:
    """Routing of all passes over the same texts; rows are the ``T`` real tokens in their order.

    Attributes
    ----------
    tape : RoutingTape
        To be forced on another run over the same texts.
    """

    tape: RoutingTape = field(default_factory=RoutingTape)
    _ids: dict[Place, list[torch.Tensor]] = field(default_factory=dict)
    _heaviest: dict[Place, list[torch.Tensor]] = field(default_factory=dict)
    _margins: dict[Place, list[torch.Tensor]] = field(default_factory=dict)
    _entropies: dict[Place, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def keys(self) -> list[Place]:
        """The (layer, site) of every router, in order."""
        return sorted(self._ids)

    def sets(self, key: Place) -> Ids:
        """Return the chosen experts of every token [T, K], ascending; -1 = empty slot."""
        return torch.cat(self._ids[key]).sort(dim=-1).values.cpu().numpy()

    def heaviest(self, key: Place) -> Ids:
        """Return the expert of the largest weight of every token [T]; the lower id in a tie."""
        return torch.cat(self._heaviest[key]).cpu().numpy()

    def margins(self, key: Place) -> Floats | None:
        """Return how far the last chosen expert was ahead of the best one left out [T].

        In logits where the model sorts by them, else in its selection scores; None where scores,
        bias and groups do not explain its choice.
        """
        parts = self._margins.get(key)
        return None if parts is None else torch.cat(parts).double().cpu().numpy()

    def entropies(self, key: Place) -> Floats | None:
        """Return the gate entropy of every token [T], nats; None where the router hides scores."""
        parts = self._entropies.get(key)
        return None if parts is None else torch.cat(parts).double().cpu().numpy()

    def add(self, site: Site, seen: SiteObservation, real: torch.Tensor | None) -> None:
        """Add what a site did in one pass."""
        key, ids = site_key(site), seen.expert_ids.long()
        self.tape.append(key, Choice(ids.clone(), seen.weights.clone()))
        ids, weights = as_rows(ids, real), as_rows(seen.weights, real)
        self._ids.setdefault(key, []).append(ids.clone())
        # of equal weights the lower id: a flip of slots alone is no flip
        heaviest = weights.masked_fill(ids < 0, -1.0) == weights.amax(dim=-1, keepdim=True)
        first = ids.where(heaviest, site.info.n_experts).amin(dim=-1)
        self._heaviest.setdefault(key, []).append(first)
        if seen.scores is None:
            return
        scores = as_rows(seen.scores, real).float()
        self._entropies.setdefault(key, []).append(gate_entropy(site, scores))
        if site.margin_known:
            self._margins.setdefault(key, []).append(margin(site, scores, ids))


def gate_entropy(site: Site, scores: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the gate's distribution [T], nats, from its scores [T, E]."""
    rule = statistics_by(site.info.score_function)
    if rule in ("softmax", "softmax_topk"):
        probs = scores.softmax(dim=-1)
    else:
        values = scores.sigmoid() if rule == "sigmoid" else scores
        probs = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    entropy: torch.Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropy


def margin(site: Site, scores: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Return the lead of the last chosen expert over the best one left out, [T].

    Parameters
    ----------
    site : Site
    scores : Tensor [T, E]
        As the router put them out.
    expert_ids : Tensor [T, K]
    """
    groups = (site.n_groups or 1) > 1
    if site.selection_bias is None and not groups:
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(-1, expert_ids.clamp_min(0), expert_ids >= 0)
        last = scores.masked_fill(~kept, torch.inf).amin(dim=-1)
        return last - scores.masked_fill(kept, -torch.inf).amax(dim=-1)
    bias, ranking = site.selection_bias, site.ranking
    return gate(
        scores if ranking is None else RANKINGS[ranking](scores),
        top_k=expert_ids.shape[-1],
        score_function=statistics_by(site.info.score_function) if ranking is None else RANKED,
        selection_bias=None if bias is None else bias.float(),
        n_groups=site.n_groups,
        top_groups=site.top_groups,
        expert_ids=expert_ids,
        weights=torch.ones_like(expert_ids, dtype=torch.float32),
    ).margin


@contextmanager
def traced(subject: Subject) -> Iterator[RoutingTrace]:
    """Record the routing of every forward pass until the block is left.

    Inside a swap or a condition, what the experts are really told is recorded.
    """
    trace = RoutingTrace()
    with ExitStack() as stack:
        taps = stack.enter_context(tap(subject.sites))
        passes = Passes()

        def after(*_: Any) -> None:
            for site, seen in zip(subject.sites, taps.take(), strict=True):
                trace.add(site, seen, passes.tokens.on(seen.expert_ids.device).real)

        # before the one of Passes, which forgets the pass
        stack.callback(subject.model.register_forward_hook(after).remove)
        stack.enter_context(passes.follow(subject.model))
        yield trace


BINS = 10

Bools = npt.NDArray[np.bool_]


def set_changed(base: npt.NDArray[Any], other: npt.NDArray[Any]) -> Bools:
    """Return which tokens have another set of experts, [T], from sorted ids [T, K]."""
    if base.shape[1] != other.shape[1]:
        wide = max(base.shape[1], other.shape[1])
        base, other = (
            np.sort(np.pad(ids, ((0, 0), (0, wide - ids.shape[1])), constant_values=-1), axis=1)
            for ids in (base, other)
        )
    return np.asarray((base != other).any(axis=1))


def slots_changed(base: npt.NDArray[Any], other: npt.NDArray[Any]) -> Floats:
    """Return each token's share of filled slots whose expert is not in the base's set, [T]."""
    found = (other[:, :, None] == base[:, None, :]).any(axis=2)
    filled = other >= 0
    lost = (filled & ~found).sum(axis=1)
    return np.asarray(lost / np.maximum(filled.sum(axis=1), 1), dtype=np.float64)


def margin_auc(margins: Floats, changed: Bools) -> float:
    """Return the chance that a token that changed had a smaller margin than one that did not.

    Ties count half; NaN without tokens of both kinds.
    """
    n, m = int(changed.sum()), int((~changed).sum())
    if not n or not m:
        return float("nan")
    ranks = rankdata(-margins)
    return float((ranks[changed].sum() - n * (n + 1) / 2) / (n * m))


def first_divergence(changed: Sequence[Bools]) -> npt.NDArray[np.int64]:
    """Return the first router of each token [T] that changed, as its place in order; -1 = none."""
    stacked = np.stack(changed)
    return np.where(stacked.any(axis=0), stacked.argmax(axis=0), -1)


def flip_rows(
    label: str, base: RoutingTrace, traces: Sequence[RoutingTrace]
) -> list[dict[str, Any]]:
    """Return the flips of each router, and of all, averaged over draws."""
    draws = [_flips(base, trace) for trace in traces]
    rows = []
    for at, (layer, site) in enumerate([*base.keys, (-1, -1)]):
        values = {name: float(np.mean([draw[at][name] for draw in draws])) for name in draws[0][at]}
        tokens = len(base.heaviest(base.keys[0]))
        rows.append({"condition": label, "layer": layer, "site": site, "tokens": tokens, **values})
    return rows


def _flips(base: RoutingTrace, trace: RoutingTrace) -> list[dict[str, float]]:
    changed = [set_changed(base.sets(key), trace.sets(key)) for key in base.keys]
    first = first_divergence(changed)
    rows = []
    for at, key in enumerate(base.keys):
        margins = base.margins(key)
        auc = float("nan") if margins is None else margin_auc(margins, changed[at])
        rows.append(
            {
                "set_flips": float(changed[at].mean()),
                "top1_flips": float((base.heaviest(key) != trace.heaviest(key)).mean()),
                "slot_flips": float(slots_changed(base.sets(key), trace.sets(key)).mean()),
                "margin_auc": auc,
                "first_divergence": float((first == at).mean()),
            }
        )
    any_top1 = np.stack([base.heaviest(k) != trace.heaviest(k) for k in base.keys]).any(axis=0)
    aucs = [row["margin_auc"] for row in rows if not np.isnan(row["margin_auc"])]
    rows.append(
        {
            "set_flips": float((first >= 0).mean()),
            "top1_flips": float(any_top1.mean()),
            "slot_flips": float(np.mean([row["slot_flips"] for row in rows])),
            "margin_auc": float(np.mean(aucs)) if aucs else float("nan"),
            "first_divergence": float((first >= 0).mean()),
        }
    )
    return rows


def margin_rows(
    label: str, base: RoutingTrace, traces: Sequence[RoutingTrace]
) -> list[dict[str, Any]]:
    """Return flips by margin for each router whose margins are known, averaged over draws."""
    rows = []
    for key in base.keys:
        margins = base.margins(key)
        if margins is None:
            continue
        flips = np.mean([set_changed(base.sets(key), t.sets(key)) for t in traces], axis=0)
        for number, members in enumerate(margin_bins(margins)):
            rows.append(_bin_row(label, key, number, margins[members], flips[members]))
    return rows


def margin_bins(margins: Floats, bins: int = BINS) -> list[npt.NDArray[np.int64]]:
    """Return the tokens of equal bins by margin, smallest first; empty bins are left out."""
    order = np.argsort(margins, kind="stable")
    return [part for part in np.array_split(order, bins) if len(part)]


def _bin_row(label: str, key: Place, number: int, margins: Floats, flips: Floats) -> dict[str, Any]:
    return {
        "condition": label,
        "layer": key[0],
        "site": key[1],
        "bin": number,
        "margin_low": float(margins.min()),
        "margin_high": float(margins.max()),
        "tokens": len(margins),
        "set_flips": float(flips.mean()),
    }
