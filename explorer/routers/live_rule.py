"""Put a router into a running model: what it is told beside what ``capture.swap`` knows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from capture.swap.rules import (
    OWN_ROUTER,
    PER_TOKEN,
    Choice,
    Decision,
    RouterInputs,
    Routing,
)
from explorer.errors import RouterError
from explorer.routers.contract import Router
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


def completed(inputs: RouterInputs, convention: Convention | None = None) -> RouterInputs:
    """Return what a swap knows of a layer's tokens, with how the model scores and weighs.

    Parameters
    ----------
    inputs : RouterInputs
        With the model's own choice alone; without logits it has no scores, and is left out.
    convention : Convention, optional
        How the model weighs its experts; None = found from this pass.
    """
    own, native = inputs.native, None
    if own is not None and inputs.logits is not None:
        scores = host_scores(inputs.logits, inputs)
        if convention is None:
            convention = convention_of(scores, own.expert_ids, own.weights)
        native = Routing(scores, own.expert_ids, own.weights.float())
    convention = convention or Convention(True, 1.0)
    return with_groups_as_counted(replace(inputs, native=native, **convention._asdict()))


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
    zeros = inputs.logits.new_zeros(inputs.n_experts)
    for known in (inputs, replace(inputs, selection_bias=zeros)):
        found = host_best(known, own.shape[-1])[1].sort(dim=-1).values
        if torch.equal(found, own):
            return known
    return inputs


def joined(passes: Sequence[RouterInputs]) -> RouterInputs:
    """Return the passes of one router as one set of inputs, with the model's convention.

    Parameters
    ----------
    passes : sequence of RouterInputs
        As a swap gives them. The state that another layer handed on is left out.
    """
    together: dict[str, Any] = {"previous_state": None}
    for name in PER_TOKEN:
        values = [getattr(one, name) for one in passes]
        if name in together or any(value is None for value in values):
            together[name] = None
        elif isinstance(values[0], torch.Tensor):
            together[name] = torch.cat(values)
        else:
            ids, weights = zip(*((one.expert_ids, one.weights) for one in values), strict=True)
            together[name] = Choice(_stacked(ids), _stacked(weights))
    whole = replace(passes[0], **together)
    unscored = whole.logits is None or whole.native is None or whole.score_function == "other"
    return completed(whole, Convention(True, 1.0) if unscored else None)


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors [T, K] of maybe different K below each other, empty slots -1 or 0."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    filler = 0 if tensors[0].is_floating_point() else -1
    return torch.cat(
        [nn.functional.pad(t, (0, widest - t.shape[-1]), value=filler) for t in tensors]
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

    def route(self, inputs: RouterInputs, /) -> Decision:
        """Decide for the tokens of one layer in one forward pass."""
        return self.router.route(completed(inputs, self.convention))

    def spanning(self, inputs: RouterInputs, /) -> torch.Tensor | None:
        """Return which tokens lie between the router's clusters [T], None if it has none."""
        between = getattr(self.router, "spanning", None)
        return None if between is None else between(completed(inputs, self.convention))
