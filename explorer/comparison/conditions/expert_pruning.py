"""Expert pruning: which experts a layer can do without, and a router that never picks them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from capture.model.flops import expert_parameters
from capture.store.records import Place
from capture.swap.routers import site_key, swap
from capture.swap.rules import RouterInputs, Routing
from explorer.comparison.conditions.calibration import (
    SeenSite,
    collect,
    drawn,
    expert_outputs,
)
from explorer.comparison.conditions.condition import (
    CONDITIONS,
    Applied,
    ConditionInfo,
    PartsDrawn,
    PartsKept,
    Subject,
)
from explorer.comparison.conditions.knock_out import routed_without, worth
from explorer.errors import ConditionError
from explorer.router_cards import RouterInfo
from explorer.routers.live_rule import LiveRule
from explorer.routers.native import GateRouter
from explorer.routers.subsets import MOST_SUBSETS, Dropped, best_to_drop

CALIBRATION_TOKENS = 16_384
CHUNK_TOKENS = 1024  # whose outputs of all experts are computed at a time
MOST_OUTPUTS = 2**28  # numbers of all experts' outputs that are kept at a time


@dataclass(eq=False)
class KeptExperts(GateRouter):
    """The model's own rule among the experts that are left, as if the others' rows were deleted.

    Parameters
    ----------
    pruned : mapping of (layer, site) to tuple of int
        Experts that must never be picked.
    """

    info = RouterInfo(
        name="kept_experts",
        family="control",
        title="The model's own router without some experts",
        summary="The rows of pruned experts are masked, so that only the others can be chosen.",
        formula="z_e = -inf for pruned e;  S = TopK(z, k)",
        paper="2402.14800",
        needs=frozenset({"logits"}),
        identity={"pruned": {}},
    )

    pruned: Mapping[Place, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Check what was given."""
        self.pruned = dict(self.pruned)

    def _route(self, inputs: RouterInputs) -> Routing:
        gone = torch.zeros(inputs.n_experts, dtype=torch.bool)
        gone[list(self.pruned.get(inputs.place, ()))] = True
        return routed_without(inputs, gone.to(inputs.tensor("logits").device))


@dataclass(eq=False)
class ExpertPruning(PartsKept):
    """Drop the same number of experts in every layer.

    Parameters
    ----------
    keep : float
        Share of each layer's experts that stays, rounded to whole experts; never fewer than the
        model's router takes.
    """

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        pruned = self.choose(subject, applied)
        for site in subject.sites:
            gone = pruned[site_key(site)]
            size = sum(p.numel() * p.element_size() for p in expert_parameters(site))
            applied.weight_bytes -= size * len(gone) / site.info.n_experts
            applied.chosen[f"layer {site.info.layer}"] = list(gone)
        return self.masked(subject, pruned)

    @staticmethod
    def masked(
        subject: Subject, pruned: Mapping[Place, tuple[int, ...]]
    ) -> AbstractContextManager[Any]:
        """Run the model without some experts until the block is left."""
        return swap(subject.model, subject.sites, LiveRule(KeptExperts(pruned)))

    @abstractmethod
    def choose(self, subject: Subject, applied: Applied) -> dict[Place, tuple[int, ...]]:
        """Return the experts to prune at each (layer, site)."""

    def n_pruned(self, n_experts: int, top_k: int) -> int:
        """Return how many experts of a layer go."""
        kept = max(round(self.keep * n_experts), 1)
        if kept < top_k:
            raise ConditionError(
                f"At least {top_k} experts must stay, as the router takes so many, but keep="
                f"{self.keep} of {n_experts} leaves {kept}. Keep more."
            )
        return n_experts - kept


class _LowestScorePruning(ExpertPruning):
    """Prune the experts of the lowest score on the fit split."""

    def choose(self, subject: Subject, applied: Applied) -> dict[Place, tuple[int, ...]]:
        """Score the experts of every layer and name the lowest, ties by the lower id."""
        tokens = subject.calibration_tokens()
        seen = collect(subject, tokens, tokens=CALIBRATION_TOKENS, seed=self.seed)
        found = {}
        for key, one in seen.items():
            n = self.n_pruned(one.inputs.n_experts, one.inputs.top_k)
            order = self.score(one).argsort(stable=True)[:n]
            found[key] = tuple(sorted(order.tolist()))
        applied.method = f"lowest {self.info.title.lower()}"
        return found

    @abstractmethod
    def score(self, seen: SeenSite) -> torch.Tensor:
        """Return the worth of each expert [E]."""


def load_of(routing: Routing, n_experts: int) -> torch.Tensor:
    """Return how many assignments each expert got, [E] int64."""
    return torch.bincount(routing.expert_ids.flatten() + 1, minlength=n_experts + 1)[1:]


@CONDITIONS.add("prune_frequency")
class FrequencyPruning(_LowestScorePruning):
    """Prune the experts that are chosen least."""

    info = ConditionInfo(
        name="prune_frequency",
        kind="pruning",
        title="Frequency",
        summary=(
            "Drops the experts that tokens chose least. In a model with balanced load, frequency "
            "says little about worth."
        ),
        formula="score_e = #{t : e in S_t}",
        calibrated=True,
        simulated=False,
        keeps_experts=False,
    )

    def score(self, seen: SeenSite) -> torch.Tensor:
        """Count assignments."""
        return load_of(seen.inputs.decision(), seen.inputs.n_experts).double()


@CONDITIONS.add("prune_reap")
class ReapPruning(_LowestScorePruning):
    """Prune the experts that add least to the tokens they serve."""

    info = ConditionInfo(
        name="prune_reap",
        kind="pruning",
        title="REAP",
        summary=(
            "Drops the experts with the smallest mean of weight times output norm, over the tokens "
            "that chose them."
        ),
        formula="score_e = mean over t with e in S_t of g_te ||f_e(h_t)||",
        paper="2510.13999",
        calibrated=True,
        simulated=False,
        keeps_experts=False,
    )

    def score(self, seen: SeenSite) -> torch.Tensor:
        """Measure every expert on the tokens that chose it; an unused expert is worth 0."""
        routing, total = seen.inputs.decision(), torch.zeros(seen.inputs.n_experts).double()
        hidden = seen.inputs.tensor("hidden")
        for rows in torch.split(torch.arange(len(hidden)), CHUNK_TOKENS):
            norms = expert_outputs(seen, hidden[rows]).norm(dim=-1).double()  # [T, E]
            total += reap_sums(norms, Routing(*(part[rows] for part in routing[:3])))
        return total / load_of(routing, len(total)).clamp_min(1)


def reap_sums(norms: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return the sum over tokens of weight times norm, for each expert.

    Parameters
    ----------
    norms : Tensor [T, E]
        Of every expert's output on every token.
    routing : Routing

    Returns
    -------
    Tensor [E], float64
    """
    ids = routing.expert_ids
    worth = routing.weights.double() * norms.double().gather(-1, ids.clamp_min(0))
    sums = torch.zeros(norms.shape[-1] + 1, dtype=torch.float64)
    return sums.index_add_(0, (ids + 1).flatten(), worth.flatten())[1:]


@CONDITIONS.add("prune_naee")
@dataclass(eq=False)
class ReconstructionPruning(ExpertPruning):
    """Prune the subset of experts without which the layer's output changes least.

    Parameters
    ----------
    keep : float
    seed : int
        Draws the calibration texts.
    most : int
        Subsets up to which all are tried in each layer; above, the search is greedy.
    tokens : int
        Of the fit split, on which the output is compared; fewer where the outputs of all experts
        would not fit in 1 GiB.

    Notes
    -----
    Few tokens choose badly: dropping 4 of 16 experts of the demo model cost 1.22 nats with 1,024
    tokens, 0.53 with 4,096 and 0.45 with 8,192, drawn from 130,000.
    """

    info = ConditionInfo(
        name="prune_naee",
        kind="pruning",
        title="NAEE reconstruction",
        summary=(
            "Tries the subsets of experts and drops the one without which the layer's output on "
            "calibration tokens changes least. Greedy where there are more than 5,000 subsets."
        ),
        formula="argmin over C of || F(X) - F_C(X) ||_F",
        paper="2402.14800",
        calibrated=True,
        simulated=False,
        keeps_experts=False,
    )

    _: KW_ONLY
    most: int = MOST_SUBSETS
    tokens: int = 4096

    def choose(self, subject: Subject, applied: Applied) -> dict[Place, tuple[int, ...]]:
        """Search every layer on its own, on the inputs it has in the whole model."""
        texts = subject.calibration_tokens()
        config: Any = subject.model.config
        experts = max(site.info.n_experts for site in subject.sites)
        outputs = experts * config.get_text_config().hidden_size  # numbers a token
        tokens = min(self.tokens, max(1, MOST_OUTPUTS // outputs))
        found = {}
        methods: dict[str, None] = {}
        for key, seen in collect(subject, texts, tokens=tokens, seed=self.seed).items():
            n = self.n_pruned(seen.inputs.n_experts, seen.inputs.top_k)
            dropped = self.search(seen, n)
            found[key] = dropped.members
            methods[dropped.method] = None
        applied.method = f"{'; '.join(methods)}, {tokens:,} tokens"
        return found

    def search(self, seen: SeenSite, n: int) -> Dropped:
        """Find the ``n`` experts of one layer to drop."""
        error = reconstruction_error(seen)
        return best_to_drop(seen.inputs.n_experts, n, error, most=self.most)


def reconstruction_error(seen: SeenSite) -> Callable[[tuple[int, ...]], float]:
    """Return a function that says how far a layer's output moves without some experts.

    Returns
    -------
    callable
        Takes expert ids; returns the Frobenius norm of the change over the tokens of ``seen``.
    """
    outputs = expert_outputs(seen, seen.inputs.tensor("hidden"))  # [T, E, D]
    full = combined(outputs, seen.inputs.decision())

    def error(members: tuple[int, ...]) -> float:
        routing = KeptExperts({seen.inputs.place: members}).route(seen.inputs)
        return float((combined(outputs, routing) - full).norm())

    return error


def combined(outputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return the weighted sum [T, D] of expert outputs [T, E, D]."""
    ids = routing.expert_ids.clamp_min(0)[..., None].expand(-1, -1, outputs.shape[-1])
    return (outputs.gather(1, ids) * routing.weights[..., None]).sum(dim=1)


@CONDITIONS.add("prune_atlas")
@dataclass(eq=False)
class KnockOutPruning(ExpertPruning):
    """Prune the experts whose absence costs the model least, measured one by one.

    Parameters
    ----------
    keep : float
    seed : int
        Draws the calibration texts.
    by : {"rerouted", "removed", "fisher"}
        How an expert is taken out, see :mod:`explorer.comparison.conditions.knock_out`; ``fisher``
        estimates all of them by one gradient.
    tokens : int
        Of the fit split; whole texts.
    """

    info = ConditionInfo(
        name="prune_atlas",
        kind="pruning",
        title="Knock-out",
        summary=(
            "Drops the experts without which the loss rises least when each is taken out alone. "
            "Experts that stand in for each other both look dispensable."
        ),
        formula="score_e = loss(model without e) - loss(model)",
        calibrated=True,
        simulated=False,
        keeps_experts=False,
    )

    _: KW_ONLY
    by: str = "rerouted"
    tokens: int = 8192

    @property
    def label(self) -> str:
        """Name and share, and the score where it is not the usual one."""
        return super().label + ("" if self.by == "rerouted" else f" by {self.by}")

    def choose(self, subject: Subject, applied: Applied) -> dict[Place, tuple[int, ...]]:
        """Knock every expert out and name those that are missed least, ties by the lower id."""
        texts = drawn(subject.calibration_tokens(), self.tokens, self.seed)
        top_k = {site_key(site): site.info.top_k for site in subject.sites}
        found = {}
        for place, scores in worth(subject, texts, self.by).items():
            n = self.n_pruned(len(scores), top_k[place])
            found[place] = tuple(sorted(np.argsort(scores, kind="stable")[:n].tolist()))
        applied.method = f"least missed of {sum(map(len, texts)):,} tokens, {self.by}"
        return found


@CONDITIONS.add("prune_random")
@dataclass(eq=False)
class RandomPruning(PartsDrawn, ExpertPruning):
    """Prune experts by chance."""

    info = ConditionInfo(
        name="prune_random",
        kind="pruning",
        title="Random pruning",
        summary="Drops experts by chance: what every other choice must beat. Mean of five draws.",
        formula="C uniform over subsets",
        simulated=False,
        keeps_experts=False,
    )

    def choose(self, subject: Subject, applied: Applied) -> dict[Place, tuple[int, ...]]:
        """Draw a subset for every layer."""
        random = np.random.default_rng(self.seed)
        applied.method = f"drawn with seed {self.seed}"
        found = {}
        for site in subject.sites:
            n = self.n_pruned(site.info.n_experts, site.info.top_k)
            drawn = random.choice(site.info.n_experts, size=n, replace=False)
            found[site_key(site)] = tuple(sorted(drawn.tolist()))
        return found
