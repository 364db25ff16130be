"""Controls: what chance and constants achieve, at the cost of the rule they stand beside."""

from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import Literal, Self

import torch

from capture.swap.measure import summed, token_losses
from capture.swap.part_gates import gate_parts, part_modules
from capture.swap.rules import Decision, Part, PartMask, RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.contract import PartRouter, RoutingRouter, registered
from explorer.routers.heads_and_layers import check_keep
from explorer.routers.learning.exploration import TextPasses
from explorer.routers.learning.training import CURVE_POINTS, TrainedRouter, TrainingSession
from explorer.routers.native import GateRouter, choose, host_best
from explorer.routers.scores import slots, student_scores, target_importance, target_scores, weigh
from explorer.routers.selectors import top_ids
from explorer.routers.sequences import token_keys, uniform
from explorer.routers.subsets import best_to_drop

Choose = Literal["random", "best"]
_SETS, _COUNTS = 1, 2  # streams of random numbers


@registered("random")
class RandomRouter(GateRouter):
    """Choose experts by chance, as many on average as told, the same in every layer.

    Parameters
    ----------
    experts_per_token : float, optional
        Mean; with a fraction, some tokens take one more. None = as many as the model takes.
    choose : {"random", "best"}
        Whether chance picks the experts, or only how many of the model's best a token gets. The
        latter is the control of rules that skip experts.
    seed : int
    """

    experts_per_token: float | None = None
    choose: Choose = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.experts_per_token is not None and self.experts_per_token != int(
            self.experts_per_token
        ):
            self.info = replace(self.info, variable_k=True)

    def _shares(self, inputs: RouterInputs) -> torch.Tensor:
        """Return the share of tokens that take 0, 1, 2, ... experts."""
        mean = inputs.top_k if self.experts_per_token is None else self.experts_per_token
        if not 0 <= mean <= inputs.n_experts:
            raise RouterError(f"Expected 0 <= experts_per_token <= {inputs.n_experts}, got {mean}.")
        shares = torch.zeros(ceil(mean) + 1, dtype=torch.float64)
        shares[floor(mean)] = 1 - (mean - floor(mean))
        shares[ceil(mean)] += mean - floor(mean)
        return shares

    def _route(self, inputs: RouterInputs) -> Routing:
        shares = self._shares(inputs)
        widest = max(1, len(shares) - 1)
        scores, ids = host_best(inputs, widest)
        if self.choose == "random":
            ids = top_ids(uniform(token_keys(inputs, self.seed, _SETS), inputs.n_experts), widest)
        drawn = uniform(token_keys(inputs, self.seed, _COUNTS), 1)
        # a token takes its n-th expert if its number lies above those of tokens that take fewer
        fewer = shares.cumsum(dim=0)[:-1].to(drawn.device)
        taken = (drawn >= fewer)[:, :widest] if len(fewer) else torch.zeros_like(ids).bool()
        ids = ids.where(taken, -1)
        return slots(scores, ids, weigh(scores, ids, inputs))


@registered("random_matched")
class MatchedRandomRouter(RandomRouter):
    """Choose by chance with the numbers of experts that another rule uses in this layer.

    Parameters
    ----------
    choose : {"best", "random"}
        Whether chance decides only how many of the model's best experts a token gets, or also
        which.
    seed : int

    Notes
    -----
    Fitted on the routing of the rule that it stands beside: the shares of tokens with 0, 1, 2, ...
    experts are kept layer by layer. Most of what a skipping rule gains over uniform chance comes
    from such allocation to layers; this control leaves only what depends on the token.
    """

    choose: Choose = "best"
    experts_per_token: float | None = field(default=None, init=False)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        beside = inputs.native if target is None else target
        if beside is None or isinstance(beside, PartMask):
            raise RouterError(
                "Expected the routing of the rule to stand beside as the target of fit, got "
                f"{'nothing' if beside is None else 'a mask of parts'}. "
                "Pass target=other_router.route(inputs)."
            )
        self.match((beside.expert_ids >= 0).sum(dim=-1).bincount())

    def match(self, counts: torch.Tensor) -> Self:
        """Learn from the numbers of tokens with 0, 1, 2, ... experts, [K + 1]."""
        self.shares_ = counts.double() / counts.sum()
        return self

    def _shares(self, inputs: RouterInputs) -> torch.Tensor:
        return self.shares_


@registered("frozen_random")
class FrozenRandomRouter(RoutingRouter):
    """Route by a linear gate with random weights that nobody trained.

    Parameters
    ----------
    k : int, optional
        Experts per token; None = as many as the model takes.
    seed : int
        Draws the weights; each layer has its own.

    Notes
    -----
    The source trains the experts with such a gate and loses little; experts that were trained
    with another gate do not forgive it.
    """

    k: int | None = None
    seed: int = 0

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden = inputs.tensor("hidden").float()
        salt = (self.seed * 1009 + inputs.layer) * 101 + inputs.site
        generator = torch.Generator().manual_seed(salt)
        width = hidden.shape[-1]
        gate = torch.randn(inputs.n_experts, width, generator=generator) / width**0.5
        scores = student_scores(hidden @ gate.T.to(hidden.device), inputs)
        # the model's selection bias evens out another gate's load, and its groups that gate's
        ids = top_ids(scores, inputs.top_k if self.k is None else self.k)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of a linear gate."""
        return 2.0 * d * n_experts


@registered("static_best")
class StaticRouter(RoutingRouter):
    """Send every token to the experts that score highest on average.

    Parameters
    ----------
    k : int, optional
        Experts per token; None = as many as the model takes.
    """

    k: int | None = None

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        self.mean_ = target_scores(inputs, target).mean(dim=0)

    def _route(self, inputs: RouterInputs) -> Routing:
        scores = self.mean_.expand(inputs.n_tokens, -1)
        ids = choose(scores, inputs, k=self.k)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


@dataclass(kw_only=True, eq=False)
class _PartControl(PartRouter):
    """A control of rules about parts, which learns the kind and number of parts from its target.

    Parameters
    ----------
    keep : float, optional
        Share of the parts that a token uses; None = as often as in the target of fit.
    seed : int
    """

    keep: float | None = 0.75
    part: Part = "head"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = None if self.keep is None else check_keep(self.keep)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        gate = target_importance(target, self.part)
        n_parts = gate.shape[-1]
        if self.keep is None:
            shares = (gate > 0).sum(dim=-1).bincount(minlength=n_parts + 1).double()
        else:
            mean = self.keep * n_parts
            shares = torch.zeros(n_parts + 1, dtype=torch.float64)
            shares[floor(mean)] = 1 - (mean - floor(mean))
            shares[ceil(mean)] += mean - floor(mean)
        # share of tokens that use at most 0, 1, ... P - 1 parts
        self.at_most_ = (shares / shares.sum()).cumsum(dim=0)[:-1]
        self.mean_ = gate.mean(dim=0)

    def _gate(self, inputs: RouterInputs, order: torch.Tensor) -> PartMask:
        drawn = uniform(token_keys(inputs, self.seed, 2), 1)
        used = (drawn >= self.at_most_.to(drawn.device)).float()  # [T, P], ones first
        best = order.sort(dim=-1, descending=True, stable=True).indices
        return PartMask(self.part, torch.zeros_like(used).scatter(-1, best, used))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


@registered("random_parts")
class RandomPartRouter(_PartControl):
    """Choose heads, or whether a layer runs, by chance, as often as told in each layer."""

    def _route(self, inputs: RouterInputs) -> PartMask:
        return self._gate(inputs, uniform(token_keys(inputs, self.seed, 1), len(self.mean_)))


@registered("static_parts")
class StaticPartRouter(_PartControl):
    """Give every token the parts that matter most on average."""

    def _route(self, inputs: RouterInputs) -> PartMask:
        return self._gate(inputs, self.mean_.expand(inputs.n_tokens, -1))


@registered("constant_gate")
class ConstantGateRouter(PartRouter):
    """Multiply every part by the same number.

    Parameters
    ----------
    value : float, 0..1
        1 changes nothing, which is how a host of gates is tested; 0 removes the parts.
    part : {"head", "layer", "expert"}
    n_parts : int, optional
        Needed for heads; a layer is one part, and experts are known.
    """

    value: float = 1.0
    part: Part = "layer"
    n_parts: int | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.part == "head" and self.n_parts is None:
            raise RouterError(
                "Expected n_parts for heads: the router cannot see how many there are."
            )
        self.value = check_keep(self.value)

    def _route(self, inputs: RouterInputs) -> PartMask:
        known = inputs.n_experts if self.part == "expert" else 1
        gate = torch.full((inputs.n_tokens, self.n_parts or known), self.value)
        return PartMask(self.part, gate)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


TOKENS = 8192  # of the fit split that subsets are judged on
MOST_SUBSETS = 256
_WHOLE = 0.01  # blocks: keep=0.667 of 6 layers means 4


@registered("static_layers")
class StaticLayersRouter(PartRouter, TrainedRouter):
    """Run the same MoE blocks for all tokens: those without which the loss rises least.

    Parameters
    ----------
    keep : float
        Share of the blocks that run, rounded up to whole blocks.
    seed : int
        Not used; the texts are drawn by the session's.

    Attributes
    ----------
    dropped_ : frozenset of int
        Layers whose block does not run.
    """

    part = "layer"
    keep: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = check_keep(self.keep)

    def _train(self, session: TrainingSession) -> None:
        layers = sorted(part_modules(session.model, session.sites, "block"))
        n_dropped = len(layers) - ceil(self.keep * len(layers) - _WHOLE)
        drawn = TextPasses(session, n_tokens=TOKENS)
        texts = [drawn.ids[number] for batch in drawn.batches for number in batch]
        tried: list[float] = []

        def loss(members: tuple[int, ...]) -> float:
            session.report(min(0.99, len(tried) / MOST_SUBSETS), "trying subsets of blocks")
            rule = ClosedBlocks(frozenset(layers[at] for at in members))
            losses = token_losses(
                session.model,
                texts,
                swapped=lambda: gate_parts(session.model, session.sites, rule, part="block"),
            )
            tried.append(summed(losses).mean)
            return tried[-1]

        found = best_to_drop(len(layers), n_dropped, loss, most=MOST_SUBSETS)
        self.dropped_ = frozenset(layers[at] for at in found.members)
        every = max(1, len(tried) // CURVE_POINTS)
        self.curves_ = [
            {
                "router": self.info.name,
                "seed": self.seed,
                "lambda": 0.0,
                "step": step,
                "layer": None,
                "reward": -value,
                "policy_entropy": 0.0,
                "gate_rate": 1 - n_dropped / len(layers),
            }
            for step, value in enumerate(tried)
            if step % every == 0
        ]

    def _route(self, inputs: RouterInputs) -> PartMask:
        gate = float(inputs.layer not in self.dropped_)
        return PartMask(self.part, torch.full((inputs.n_tokens, 1), gate))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


class ClosedBlocks:
    """The rule that closes some layers' blocks."""

    def __init__(self, layers: frozenset[int]) -> None:
        self.layers = layers

    def route(self, inputs: RouterInputs, /) -> PartMask:
        """Return a gate of 0 or 1 for all tokens of a layer."""
        gate = float(inputs.layer not in self.layers)
        return PartMask("layer", torch.full((inputs.n_tokens, 1), gate))
