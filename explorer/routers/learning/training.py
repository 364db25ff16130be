"""Routers that learn on the model's own loss: what they are given, and how they are called.

A distilled router is fitted on recorded tokens; these need the model itself, which stays frozen:

    session = TrainingSession(model=model, sites=attach(model), sequences=fit_split)
    router = ROUTERS["policy_gradient"](price=0.02).train(session)
    with swap(model, sites, LiveRule(router)):
        ...

One trained router serves all layers, so ``dict.fromkeys(places, router)`` is what ``fit_layers``
gives for other routers. Training never sees held-out text: the session holds the fit split only.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar

import numpy.typing as npt
import torch
from torch import nn

from capture.store.records import Place
from capture.swap.rules import Decision, RouterInputs
from explorer.errors import RouterError
from explorer.routers.contract import AcrossLayers

if TYPE_CHECKING:
    from capture.model.sites import Site as ModelSite

Made = TypeVar("Made")
Progress = Callable[[float, str], None]

CURVE_POINTS = 40  # rows a curve keeps, whatever the number of steps

CurveRow = TypedDict(
    "CurveRow",
    {
        "router": str,
        "seed": int,
        "lambda": float,
        "step": int,
        "layer": int | None,
        "reward": float,
        "policy_entropy": float,
        "gate_rate": float,
    },
)
CurveRow.__doc__ = """One point of a training curve.

``lambda`` is the price of compute, nats. ``layer`` is None for a row about all layers. ``reward``
is the mean a token of minus the change in loss minus the price of what ran, nats.
``policy_entropy`` is the mean entropy of a token's distribution over actions, nats.
``gate_rate`` is the share 0..1 of the model's own experts, heads or blocks that run.
"""


class TrainingCancelled(RouterError):
    """The caller asked the training to stop; nothing of it is kept."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingSession:
    """A frozen model and the texts that a router may learn from.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode. Its weights are not changed.
    sites : sequence of capture.model.sites.Site
        All MoE sites of the model, from :func:`capture.model.selftest.attach`.
    sequences : sequence of array [S], int
        Token ids of the fit split, at least two a sequence.
    seed : int
        Of what routers of one session share; a router has a seed of its own.
    progress : callable, optional
        Called with the share done, 0..1, and what is being done.
    cancelled : callable, optional
        Asked between forward passes and steps; True ends the training with
        :class:`TrainingCancelled`.
    """

    model: nn.Module
    sites: "Sequence[ModelSite]"
    sequences: Sequence[npt.ArrayLike]
    seed: int = 0
    progress: Progress | None = None
    cancelled: Callable[[], bool] | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what ``make`` gives, made once a session: a sweep explores the model once."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def report(self, share: float, what: str) -> None:
        """Tell how far the training is, and end it if the caller said so."""
        if self.cancelled is not None and self.cancelled():
            raise TrainingCancelled(f"Cancelled while {what}; nothing was learned.")
        if self.progress is not None:
            self.progress(min(1.0, share), what)


class TrainedRouter(AcrossLayers):
    """A router that learns on the loss of a frozen model, with ``train`` in place of ``fit``.

    A subclass gives ``_train`` and what every router gives. It keeps no reference to the model.

    Attributes
    ----------
    curves_ : list of CurveRow
        How reward, policy entropy and gate rate went.
    """

    curves_: list[CurveRow]

    def train(self, session: TrainingSession) -> Self:
        """Learn from the session's texts and return the router.

        Raises
        ------
        RouterError
            If there is no text or no site to learn from.
        TrainingCancelled
            If the session's ``cancelled`` said so.
        """
        if session.model.training:
            raise RouterError("A model in evaluation mode was expected. Call model.eval() first.")
        if not len(session.sequences) or not len(session.sites):
            raise RouterError(
                f"Router {self.info.name!r} needs texts and MoE sites to learn from, got "
                f"{len(session.sequences)} sequences and {len(session.sites)} sites."
            )
        try:
            with torch.random.fork_rng(devices=[]):
                self._train(session)
        except BaseException:
            # half a training is none: the router says so when it is asked to route
            for name in [n for n in vars(self) if n.endswith("_") and not n.startswith("_")]:
                delattr(self, name)
            raise
        return self

    @abstractmethod
    def _train(self, session: TrainingSession) -> None:
        """Learn; values that are learned end in an underscore."""

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Refuse: recorded tokens do not hold what the model would have lost."""
        raise RouterError(
            f"Router {self.info.name!r} learns on the model's own loss, which recorded tokens do "
            "not hold. Call train(TrainingSession(model=..., sites=..., sequences=...)) instead "
            "of fit."
        )
