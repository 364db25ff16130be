"""Fitting a router in every layer, each its own or one for all."""

from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from explorer.routers.base import Decision, Router, RouterInputs, Routing, Site


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
