"""What every router did in a run over texts: a tape to force on another run, and margins."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capture.model.context import Passes
from capture.model.hooks import SiteObservation, tap
from capture.model.scoring import statistics_by
from capture.model.sites import Site
from capture.swap.playback import RoutingTape
from capture.swap.routers import site_key
from capture.swap.rules import Choice, as_rows
from explorer.comparison.conditions.base import Subject
from kernels.gate import gate

Key = tuple[int, int]  # layer, site
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class Trace:
    """Routing of all passes over the same texts; rows are the ``T`` real tokens in their order.

    Attributes
    ----------
    tape : RoutingTape
        To be forced on another run over the same texts.
    """

    tape: RoutingTape = field(default_factory=RoutingTape)
    _ids: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    _heaviest: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    _margins: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    _entropies: dict[Key, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def keys(self) -> list[Key]:
        """The (layer, site) of every router, in order."""
        return sorted(self._ids)

    def sets(self, key: Key) -> Ids:
        """Return the chosen experts of every token [T, K], ascending; -1 = empty slot."""
        return torch.cat(self._ids[key]).sort(dim=-1).values.cpu().numpy()

    def heaviest(self, key: Key) -> Ids:
        """Return the expert of the largest weight of every token [T]; the lower id in a tie."""
        return torch.cat(self._heaviest[key]).cpu().numpy()

    def margins(self, key: Key) -> Floats | None:
        """Return how far the last chosen expert was ahead of the best one left out [T].

        In logits where the model sorts by them, else in its selection scores; None where scores,
        bias and groups do not explain its choice.
        """
        parts = self._margins.get(key)
        return None if parts is None else torch.cat(parts).double().cpu().numpy()

    def entropies(self, key: Key) -> Floats | None:
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
    bias = site.selection_bias
    return gate(
        scores,
        top_k=expert_ids.shape[-1],
        score_function=statistics_by(site.info.score_function),
        selection_bias=None if bias is None else bias.float(),
        n_groups=site.n_groups,
        top_groups=site.top_groups,
        expert_ids=expert_ids,
        weights=torch.ones_like(expert_ids, dtype=torch.float32),
    ).margin


@contextmanager
def traced(subject: Subject) -> Iterator[Trace]:
    """Record the routing of every forward pass until the block is left.

    Inside a swap or a condition, what the experts are really told is recorded.
    """
    trace = Trace()
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
