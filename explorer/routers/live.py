"""Put a router into a running model: from what ``capture.swap`` knows to what routers are told."""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch

from capture.swap.rules import OWN_ROUTER, Choice, RouteInputs
from explorer.errors import RouterError
from explorer.routers.contract import Decision, Router, RouterInputs, Routing
from explorer.routers.native import host_best
from explorer.routers.scores import host_scores

_CONSTANT = 2e-2  # weights may be bfloat16, which has three significant digits


class Convention(NamedTuple):
    """How a model turns the scores of chosen experts into combine weights.

    Attributes
    ----------
    renormalize : bool
        Whether they are divided by their sum.
    scaling : float
        Factor on them.
    """

    renormalize: bool
    scaling: float


def convention_of(
    scores: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> Convention:
    """Find a model's convention from what it did.

    Parameters
    ----------
    scores : Tensor [T, E]
        On the model's own scale, see :func:`explorer.routers.scores.host_scores`.
    expert_ids : Tensor [T, K], int64
        -1 in empty slots.
    weights : Tensor [T, K]

    Returns
    -------
    Convention
        Where both readings fit, as they do for tokens with equal scores, weights that sum to 1
        are taken as divided by their sum, and other weights as scores times a factor.

    Raises
    ------
    RouterError
        If the weights are neither a constant sum for every token nor a constant times the scores,
        or there is no token.
    """
    filled = expert_ids >= 0
    total = weights.float().where(filled, 0.0).sum(-1)
    raw = scores.gather(-1, expert_ids.clamp_min(0)).where(filled, 0.0).sum(-1)
    used = filled.any(-1) & (raw > 0)
    if not bool(used.any()):
        raise RouterError(
            "Expected at least one token with an expert to see the model's weights by, got none. "
            "Run a pass with text, or pass the convention."
        )
    total, ratio = total[used], total[used] / raw[used]
    sums, factors = _spread(total), _spread(ratio)
    if sums <= _CONSTANT and (sums < factors or abs(float(total.median()) - 1) <= _CONSTANT):
        return Convention(True, float(total.median()))
    if factors <= _CONSTANT:
        return Convention(False, float(ratio.median()))
    raise RouterError(
        "The model's combine weights neither sum to a constant nor follow its scores by a factor "
        f"(they spread by {sums:.2g} and {factors:.2g}), so other routers cannot keep its "
        "convention. Pass the convention if you know it."
    )


def _spread(values: torch.Tensor) -> float:
    """Return the largest distance from the median, relative to it."""
    middle = values.median()
    return float((values - middle).abs().max() / middle.abs().clamp_min(1e-20))


def from_live(inputs: RouteInputs, convention: Convention | None = None) -> RouterInputs:
    """Return what a swap knows of a layer's tokens, as routers are told it.

    Parameters
    ----------
    inputs : RouteInputs
    convention : Convention, optional
        How the model weighs its experts; None = found from this pass.
    """
    native = None
    if inputs.native is not None and inputs.logits is not None:
        scores = host_scores(inputs.logits, _bare(inputs))
        if convention is None:
            convention = convention_of(scores, *inputs.native)
        native = Routing(scores, inputs.native.expert_ids, inputs.native.weights.float())
    convention = convention or Convention(True, 1.0)
    known = _LiveInputs(
        layer=inputs.layer,
        site=inputs.site,
        n_experts=inputs.n_experts,
        top_k=inputs.top_k,
        score_function=inputs.score_function,
        renormalize=convention.renormalize,
        scaling=convention.scaling,
        selection_bias=inputs.selection_bias,
        n_groups=inputs.n_groups,
        top_groups=inputs.top_groups,
        gate_weight=inputs.gate_weight,
        gate_bias=inputs.gate_bias,
        hidden=inputs.hidden,
        logits=inputs.logits,
        native=native,
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        starts=inputs.starts,
        previous_state=inputs.previous_state,
        attention=inputs.attention,
        attention_names=inputs.attention_names,
        received=inputs.received,
    )
    if inputs.previous is not None:
        known.follow(inputs.previous)
    return with_groups_as_counted(known)


def with_groups_as_counted(inputs: RouterInputs) -> RouterInputs:
    """Return the inputs of a model that counts groups by their best two although it has no bias.

    So do Mistral 4's routers. A bias of zeros says it, see
    :func:`explorer.routers.native.choice_scores`; which way a model counts is seen by its choice.
    """
    if inputs.n_groups is None or inputs.selection_bias is not None:
        return inputs
    if inputs.native is None or inputs.logits is None:
        return inputs
    own = inputs.native.expert_ids.sort(dim=-1).values
    zeros = inputs.native.scores.new_zeros(inputs.n_experts)
    for known in (inputs, replace(inputs, selection_bias=zeros)):
        found = host_best(known, own.shape[-1])[1].sort(dim=-1).values
        if torch.equal(found, own):
            return known
    return inputs


class _LiveInputs(RouterInputs):
    """Inputs whose layer before is looked at when it is first read: few rules do."""

    def follow(self, before: Choice) -> None:
        """Take what ran before."""
        vars(self).pop("previous")
        vars(self)["_before"] = before

    @cached_property
    def previous(self) -> Routing | None:
        """What ran before, by its choice; its scores stay with the router that made them."""
        before: Choice = vars(self)["_before"]
        ids, weights = before.expert_ids, before.weights.float()
        dense = weights.new_zeros(len(ids), self.n_experts + 1)
        wanted = ids.where((ids >= 0) & (ids < self.n_experts), self.n_experts)
        dense.scatter_(-1, wanted, weights)
        return Routing(dense[:, :-1], ids, weights)


def _bare(inputs: RouteInputs) -> RouterInputs:
    """Return the inputs as far as scores need them."""
    return RouterInputs(
        layer=inputs.layer,
        n_experts=inputs.n_experts,
        top_k=inputs.top_k,
        score_function=inputs.score_function,
    )


class LiveRule:
    """A router as ``capture.swap.routers`` takes it.

    Parameters
    ----------
    router : Router
        Fitted where it has to be.
    convention : Convention, optional
        How the model weighs its experts; None = found in each pass. Pass it for decoding one
        token at a time, from which it cannot always be told.
    """

    def __init__(self, router: Router, convention: Convention | None = None) -> None:
        self.router = router
        self.convention = convention

    @property
    def reads(self) -> frozenset[str]:
        """What the router needs of the model's own; a convention is read off the model's choice."""
        if self.convention is None:
            return OWN_ROUTER
        gates = {"native"} if getattr(self.router, "part", None) == "expert" else set()
        return (OWN_ROUTER & self.router.info.needs) | gates

    def route(self, inputs: RouteInputs, /) -> Decision:
        """Decide for the tokens of one layer in one forward pass."""
        return self.router.route(from_live(inputs, self.convention))

    def spanning(self, inputs: RouteInputs, /) -> torch.Tensor | None:
        """Return which tokens lie between the router's clusters [T], None if it has none."""
        between = getattr(self.router, "spanning", None)
        return None if between is None else between(from_live(inputs, self.convention))
