"""What every router is: a rule from what is known of a token to experts, or to parts of a model.

Fitting one in every layer, each its own or one for all, is part of the contract.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, cast

import torch

from explorer.errors import RouterError
from explorer.registry import Registry

Family = Literal["attention", "clustering", "gating", "rl", "literature", "control"]
Fits = Literal["statistics", "distilled", "trained"]
Part = Literal["head", "layer", "expert"]
Weighing = Literal["host", "at_most", "own"]
Site = tuple[int, int]  # decoder layer, router within it

# stands in ``RouterInfo.identity`` for the number of experts that the model takes
MODEL_K = "the model's k"

FAMILIES: tuple[Family, ...] = ("attention", "clustering", "gating", "rl", "literature", "control")

# how each field of RouterInputs gets filled, for the error that says it is missing
_HOW = {
    "hidden": "record router inputs: python -m capture MODEL --sample-tokens N",
    "logits": "record scores: python -m capture MODEL --level scores (or --sample-tokens N)",
    "native": "record the model's choices: python -m capture MODEL --level ids",
    "token_ids": "any run file holds them; pass token_ids",
    "positions": "any run file holds them; pass positions",
    "starts": "any run file holds positions; pass starts=(positions == 0)",
    "attention": "record attention: python -m capture MODEL --level attention",
    "received": "record attention: python -m capture MODEL --level attention",
    "gate_weight": "run live, or pass the weight of the model's own gate",
    "previous": "route layers in order and pass the layer before",
    "previous_state": "route layers in order and pass the state of the layer before",
}


class Routing(NamedTuple):
    """One router's decision for ``T`` tokens.

    Attributes
    ----------
    scores : Tensor [T, E], float32
        The router's score of every expert before selection, on the scale of the host model's own
        scores (probabilities of a softmax, or sigmoids) unless the router says otherwise.
    expert_ids : Tensor [T, K], int64
        Chosen experts, heaviest first; -1 fills the slots of tokens with fewer than ``K``, the
        number of experts of the widest token.
    weights : Tensor [T, K], float32
        Combine weights; 0 where ``expert_ids`` is -1. What they sum to is the host model's
        convention, see ``weighing`` of :class:`RouterInfo`.
    state : Tensor [T, P], float32, or None
        What a recurrent router hands to the next layer.
    """

    scores: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    state: torch.Tensor | None = None


class PartMask(NamedTuple):
    """Which parts of one layer a token uses.

    Attributes
    ----------
    part : {"head", "layer", "expert"}
        What the columns are: attention heads of the layer, the layer itself (one column), or
        experts of the site.
    gate : Tensor [T, P], float32, 0..1
        0 = not executed; between 0 and 1 the part's output is multiplied.
    state : Tensor [T, W], float32, or None
        What a recurrent rule hands to the next layer.
    """

    part: Part
    gate: torch.Tensor
    state: torch.Tensor | None = None


Decision = Routing | PartMask


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterInputs:
    """What is known of ``T`` tokens at one router; every tensor is present or None.

    Attributes
    ----------
    layer, site : int
        Where the router sits.
    n_experts, top_k : int
        Routed experts, and how many the model's own rule takes.
    score_function : str
        What the model makes of its logits, see :class:`capture.store.SiteInfo`.
    renormalize : bool
        Whether the model's combine weights sum to ``scaling`` for each token.
    scaling : float
        Factor on the model's combine weights (``routed_scaling_factor``).
    selection_bias : Tensor [E] or None
        Added to the model's scores for the choice only.
    n_groups, top_groups : int or None
        The model chooses within the ``top_groups`` best of ``n_groups`` groups.
    gate_weight, gate_bias : Tensor [E, D], [E] or None
        The model's own linear gate.
    hidden : Tensor [T, D], float32
        Router input.
    logits : Tensor [T, E], float32
        Router output as recorded; ``score_function`` says what it is.
    native : Routing or None
        The model's own decision.
    token_ids, positions : Tensor [T], int64
        Token id, and position in its sequence from 0.
    starts : Tensor [T], bool
        True at the first token of each sequence; a sequence's tokens are consecutive rows.
    previous_state : Tensor [T, P] or None
        ``Routing.state`` of the layer before; None in the first layer.
    previous : Routing or None
        The decision of the layer before.
    attention : Tensor [T, A] or None
        Statistics of each token's own attention row, averaged over heads; known from the past.
    attention_names : tuple of str
        What the columns of ``attention`` are, such as ``"entropy"``.
    received : Tensor [T] or None
        Attention that the sequence's queries give to the token; later tokens take part in it.
    """

    layer: int
    n_experts: int
    top_k: int
    score_function: str
    site: int = 0
    renormalize: bool = True
    scaling: float = 1.0
    selection_bias: torch.Tensor | None = None
    n_groups: int | None = None
    top_groups: int | None = None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    native: Routing | None = None
    token_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    previous_state: torch.Tensor | None = None
    previous: Routing | None = None
    attention: torch.Tensor | None = None
    attention_names: tuple[str, ...] = ()
    received: torch.Tensor | None = None

    @property
    def place(self) -> Site:
        """The layer and site."""
        return self.layer, self.site

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                return len(value if isinstance(value, torch.Tensor) else value.expert_ids)
        raise RouterError(f"Layer {self.layer} has no tokens: pass one of {', '.join(_PER_TOKEN)}.")

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that must be there.

        Raises
        ------
        RouterError
            If it is None.
        """
        value = getattr(self, name)
        if not isinstance(value, torch.Tensor):
            raise RouterError(f"Layer {self.layer} has no {name}. To get it, {_HOW[name]}.")
        return value

    def decision(self) -> Routing:
        """Return the model's own decision, which must be there."""
        if self.native is None:
            raise RouterError(f"Layer {self.layer} has no native decision; {_HOW['native']}.")
        return self.native

    def statistic(self, name: str) -> torch.Tensor:
        """Return one statistic of each token's own attention row, [T]."""
        if name not in self.attention_names:
            raise RouterError(
                f"Layer {self.layer} has no attention statistic {name!r}; there are: "
                f"{', '.join(self.attention_names) or 'none'}. To get it, {_HOW['attention']}."
            )
        return self.tensor("attention")[:, self.attention_names.index(name)]

    def take(self, rows: torch.Tensor) -> "RouterInputs":
        """Return the inputs of some tokens, by row numbers [N] or a mask [T].

        ``starts`` is taken as it is: rows must keep a sequence whole or be read one by one.
        """
        picked: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _PER_TOKEN:
            value = picked[name]
            if isinstance(value, torch.Tensor):
                picked[name] = value[rows]
            elif value is not None:
                state = None if value.state is None else value.state[rows]
                chosen = (value.scores[rows], value.expert_ids[rows], value.weights[rows])
                picked[name] = Routing(*chosen, state)
        return RouterInputs(**picked)


_PER_TOKEN = (
    *("hidden", "logits", "native", "token_ids", "positions", "starts"),
    *("previous_state", "previous", "attention", "received"),
)


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """What a router's card says.

    Attributes
    ----------
    name : str
        Name in ``ROUTERS``.
    family : {"attention", "clustering", "gating", "rl", "literature", "control"}
    title : str
    summary : str
        What it does, in at most two sentences.
    formula : str
        In plain characters.
    paper : str
        arXiv id and equation or section; ``""`` for rules without a paper.
    differs : str or None
        How the rule differs from the paper, in a sentence; ``""`` = as published. Every rule with
        a paper declares one or the other.
    needs : frozenset of str
        Fields of :class:`RouterInputs` that ``route`` cannot do without.
    fits : {"statistics", "distilled", "trained"} or None
        What ``fit`` does: nothing (None), counts and means, gradient steps towards the target's
        decisions, or, with ``train`` in its place, learning on the model's own loss; see
        :mod:`explorer.routers.learning.training`.
    causal : bool
        Whether a token's decision depends on itself and earlier tokens of its sequence only.
        Declared here; :mod:`explorer.routers.probe` finds out.
    batch_dependent : bool
        Whether other sequences of the batch change a token's decision.
    variable_k : bool
        Whether tokens differ in their number of experts.
    across_layers : bool
        Whether one router serves all layers and is fitted on them together.
    weighing : {"host", "at_most", "own"}
        On which scale its combine weights are. Experts were trained with the model's, and another
        one changes what the layer adds, whoever is chosen.

        - ``"host"``: by the model's convention, as :func:`explorer.routers.scores.weigh` does it.
          Where the model renormalises (``RouterInputs.renormalize``), the weights of a token with
          any expert sum to ``scaling``; elsewhere a weight is the router's own score of the expert
          times ``scaling``.
        - ``"at_most"``: as in ``"host"``, but never more: some of it is missing for some tokens,
          because assignments were dropped or a raw score stands for a sum (Switch). On a model
          that renormalises, sums are at most ``scaling``; elsewhere a weight is at most the score
          times ``scaling``.
        - ``"own"``: on a scale of the rule's own, at least on models that do not renormalise; its
          summary or formula gives it.

        Rules about parts weigh nothing: their gates, 0..1, multiply what the model's weights are.
    identity : mapping of str to value, or str
        The arguments with which the rule repeats the model's own decision exactly, ids and weights,
        whatever the model chooses and weighs by; ``{}`` = its defaults, ``MODEL_K`` as a value =
        as many as the model takes. A rule about parts then leaves every part as it is. A rule that
        no arguments make so says why, in a sentence. Every rule declares one or the other.
    shelved : str
        Why the rule is out of the default set: lists name it last, and pages offer it only to
        those who type it. ``""`` for all others.
    """

    name: str
    family: Family
    title: str
    summary: str
    formula: str
    paper: str
    needs: frozenset[str]
    fits: Fits | None = None
    causal: bool = True
    batch_dependent: bool = False
    variable_k: bool = False
    across_layers: bool = False
    weighing: Weighing = "host"
    identity: Mapping[str, Any] | str | None = field(default=None, hash=False)
    shelved: str = ""
    differs: str | None = None

    def identity_for(self, top_k: int) -> dict[str, Any] | None:
        """Return the arguments that make the rule repeat a model with ``top_k``, None = none do.

        Raises
        ------
        RouterError
            If the card declares neither arguments nor why there are none.
        """
        if self.identity is None:
            raise RouterError(
                f"Router {self.name!r} does not say with which arguments it repeats the model's "
                "own decision. Declare RouterInfo.identity: a mapping, or why there is none."
            )
        if isinstance(self.identity, str):
            return None
        return {k: top_k if v == MODEL_K else v for k, v in self.identity.items()}


class Router(ABC):
    """The contract; ``tests/router_checks.py`` runs it against every registered router.

    A constructor keeps its arguments, all with defaults, and does no work. Fitted values end in
    an underscore. ``route`` changes nothing, neither in the router nor in its inputs. A subclass
    gives ``info``, ``_route``, ``flops``, and ``_fit`` when it has something to learn.
    """

    info: RouterInfo

    def fit(self, inputs: RouterInputs, target: Decision | None = None) -> Self:
        """Learn from recorded tokens and return the router.

        Parameters
        ----------
        inputs : RouterInputs
            Tokens of the fit split, and only those.
        target : Routing or PartMask, optional
            What to imitate; None = the model's own scores. For a rule about parts, ``gate`` holds
            the parts' measured importance, 0..1.

        Raises
        ------
        RouterError
            If something that the router needs was not recorded.
        """
        self.check(inputs)
        self._fit(inputs, target)
        return self

    def route(self, inputs: RouterInputs) -> Decision:
        """Decide for every token.

        Raises
        ------
        RouterError
            If something that the router needs was not recorded, or it must be fitted first.
        """
        self.check(inputs)
        if self.info.fits is not None and not self.fitted:
            how = "fit(inputs) with tokens"
            if self.info.fits == "trained":
                how = "train(TrainingSession(...)) with a model and texts"
            raise RouterError(
                f"Router {self.info.name!r} has learned nothing yet. "
                f"Call {how} of the fit split first."
            )
        if not torch.is_grad_enabled():
            return self._route(inputs)
        with torch.no_grad():
            return self._route(inputs)

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` has run."""
        return any(name.endswith("_") and not name.startswith("_") for name in vars(self))

    def check(self, inputs: RouterInputs) -> None:
        """Refuse inputs that lack what the router needs."""
        missing = sorted(name for name in self.info.needs if getattr(inputs, name) is None)
        if missing:
            raise RouterError(
                f"Router {self.info.name!r} needs {', '.join(sorted(self.info.needs))}; layer "
                f"{inputs.layer} has no {' and no '.join(missing)}. "
                f"To get {missing[0]}, {_HOW.get(missing[0], f'pass {missing[0]}')}."
            )

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:  # noqa: B027
        """Learn; most rules have nothing to learn."""

    @abstractmethod
    def _route(self, inputs: RouterInputs) -> Decision:
        """Decide for every token; what the router needs is there."""

    @abstractmethod
    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the floating-point operations of deciding for one token.

        A multiplication and an addition count as two. A rule that starts from the model's own
        logits counts the ``2 * d * n_experts`` of computing them.
        """


class RoutingRouter(Router):
    """A router that chooses experts and weights."""

    def route(self, inputs: RouterInputs) -> Routing:
        """Choose experts and weights for every token; see :meth:`Router.route`."""
        return cast(Routing, super().route(inputs))

    @abstractmethod
    def _route(self, inputs: RouterInputs) -> Routing:
        """Choose experts and weights for every token; what the router needs is there."""


class PartRouter(Router):
    """A router that chooses heads, the layer, or experts that its tokens use.

    Attributes
    ----------
    part : {"head", "layer", "expert"}
    preceding : bool
        Whether it asks for the attention of the layer before, also where a layer's own is known;
        a layer without one before it gets none.
    """

    part: Part
    preceding: bool = False

    def route(self, inputs: RouterInputs) -> PartMask:
        """Return the gates of every token; see :meth:`Router.route`."""
        return cast(PartMask, super().route(inputs))

    @abstractmethod
    def _route(self, inputs: RouterInputs) -> PartMask:
        """Return the gates of every token; what the router needs is there."""


ROUTERS: Registry[Callable[..., Router]] = Registry("router")


class AcrossLayers(Router):
    """A router that serves all layers and is fitted on them together."""

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        self.fit_across({inputs.place: inputs}, {} if target is None else {inputs.place: target})

    @abstractmethod
    def fit_across(
        self, inputs: Mapping[Site, RouterInputs], targets: Mapping[Site, Decision]
    ) -> None:
        """Learn from the same tokens in several layers, in the model's order of layers."""


def fit_layers(
    router: Router,
    inputs: Mapping[Site, RouterInputs],
    targets: Mapping[Site, Decision] | None = None,
) -> dict[Site, Router]:
    """Fit one copy of a router per layer, or one router for all layers where it says so.

    Parameters
    ----------
    router : Router
        Left as it is. One that learned on a model's loss already is not fitted again.
    inputs : mapping of (layer, site) to RouterInputs
        The fit split, the same tokens in every layer.
    targets : mapping of (layer, site) to Routing or PartMask, optional
        What to imitate.

    Returns
    -------
    dict of (layer, site) to Router
    """
    wanted: Mapping[Site, Decision] = targets or {}
    if router.info.fits == "trained" and router.fitted:
        return dict.fromkeys(inputs, deepcopy(router))
    if isinstance(router, AcrossLayers):
        shared = deepcopy(router)
        shared.fit_across(inputs, wanted)
        return dict.fromkeys(inputs, shared)
    return {
        place: deepcopy(router).fit(recorded, wanted.get(place))
        for place, recorded in inputs.items()
    }


def route_layers(
    routers: Mapping[Site, Router], inputs: Mapping[Site, RouterInputs]
) -> dict[Site, Decision]:
    """Route the same tokens in every layer, in order, each layer knowing the one before.

    Parameters
    ----------
    routers : mapping of (layer, site) to Router
    inputs : mapping of (layer, site) to RouterInputs
        From the second layer on, ``previous`` and ``previous_state`` are replaced by what the
        layer before decided here.
    """
    decisions: dict[Site, Decision] = {}
    before: Decision | None = None
    for place in sorted(inputs):
        here = inputs[place]
        if before is not None:
            routing = before if isinstance(before, Routing) else None
            here = replace(here, previous=routing, previous_state=before.state)
        before = decisions[place] = routers[place].route(here)
    return decisions
