"""What every router is: a rule from what is known of a token to experts, or to parts of a model.

Fitting one in every layer, each its own or one for all, is part of the contract.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Self, TypeVar, cast, dataclass_transform

import torch

from capture.store.records import Place
from capture.swap.rules import Decision, Part, PartMask, RouterInputs, Routing, how_to_get
from explorer.errors import RouterError
from explorer.registry import Registry
from explorer.router_cards import CARDS, RouterInfo


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
                f"{how_to_get(missing[0])}"
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
Ours = TypeVar("Ours", bound=type[Router])


@dataclass_transform(kw_only_default=True, eq_default=False)
def registered(name: str) -> Callable[[Ours], Ours]:
    """Return a decorator for a router of ours: its card is in ``router_cards.toml``.

    The class becomes a dataclass, whose fields are the router's arguments, and an entry of
    ``ROUTERS``.
    """

    def register(owner: Ours) -> Ours:
        owner.info = CARDS[name]
        dataclass(kw_only=True, eq=False)(owner)  # changes the class, and returns it too
        ROUTERS.add(name)(owner)
        return owner

    return register


class AcrossLayers(Router):
    """A router that serves all layers and is fitted on them together."""

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        self.fit_across({inputs.place: inputs}, {} if target is None else {inputs.place: target})

    @abstractmethod
    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Learn from the same tokens in several layers, in the model's order of layers."""


def fit_layers(
    router: Router,
    inputs: Mapping[Place, RouterInputs],
    targets: Mapping[Place, Decision] | None = None,
) -> dict[Place, Router]:
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
    wanted: Mapping[Place, Decision] = targets or {}
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
    routers: Mapping[Place, Router], inputs: Mapping[Place, RouterInputs]
) -> dict[Place, Decision]:
    """Route the same tokens in every layer, in order, each layer knowing the one before.

    Parameters
    ----------
    routers : mapping of (layer, site) to Router
    inputs : mapping of (layer, site) to RouterInputs
        From the second layer on, ``previous`` and ``previous_state`` are replaced by what the
        layer before decided here.
    """
    decisions: dict[Place, Decision] = {}
    before: Decision | None = None
    for place in sorted(inputs):
        here = inputs[place]
        if before is not None:
            routing = before if isinstance(before, Routing) else None
            here = replace(here, previous=routing, previous_state=before.state)
        before = decisions[place] = routers[place].route(here)
    return decisions


def dense(decision: Decision) -> torch.Tensor:
    """Return what a decision applies, [T, E] combine weights or [T, P] gates."""
    if isinstance(decision, PartMask):
        return decision.gate
    weights = decision.weights.masked_fill(decision.expert_ids < 0, 0.0)
    empty = torch.zeros_like(decision.scores)
    return empty.scatter_add(-1, decision.expert_ids.clamp_min(0), weights)
