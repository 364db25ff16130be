"""Listen to a model's MoE sites during forward passes, without changing what it computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from capture.errors import SiteError
from capture.model import attributes as probe
from capture.model.adapters import Channel
from capture.model.adapters.base import listening
from capture.model.sites import Site

_tapped: WeakSet[nn.Module] = WeakSet()


class SiteObservation(NamedTuple):
    """What one site did in one forward pass over ``R`` rows (batch x sequence, padding included).

    The model's own tensors, not copied and not sorted.

    Attributes
    ----------
    scores : Tensor [R, E] or None
        As the router put them out, before squashing; None where the router hides them.
    expert_ids : Tensor [R, K], integer
        Chosen experts in the model's order; -1 = empty slot.
    weights : Tensor [R, K]
        Combine weights as the experts were told; 0 in an empty slot.
    hidden : Tensor [R', D] or None
        Router inputs of the rows asked for.
    """

    scores: torch.Tensor | None
    expert_ids: torch.Tensor
    weights: torch.Tensor
    hidden: torch.Tensor | None


class Taps:
    """The open hooks of :func:`tap`."""

    def __init__(self, sites: Sequence[Site], *, training: bool = False) -> None:
        self.sites = tuple(sites)
        self._training = training
        self._channels = [Channel() for _ in self.sites]

    def take(self) -> list[SiteObservation]:
        """Return what every site did since the last call, in the order of the sites.

        As :meth:`take_of`, of all of them.
        """
        return list(self.take_of(None).values())

    def take_of(self, phase: str | None) -> dict[int, SiteObservation]:
        """Return what the sites that read tokens of a phase did since the last call, by number.

        Nothing here waits for the device: only shapes are looked at.

        Raises
        ------
        SiteError
            If a site did not run, ran more than once, or gave shapes that do not fit.
        """
        try:
            return {
                number: _observe(site, channel, self._training)
                for number, (site, channel) in enumerate(
                    zip(self.sites, self._channels, strict=True)
                )
                if phase is None or site.info.reads(phase)
            }
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what was recorded since the last :meth:`take`."""
        for channel in self._channels:
            channel.clear()


@contextmanager
def tap(
    sites: Sequence[Site],
    *,
    hidden_rows: Callable[[], torch.Tensor | None] | None = None,
    training: bool = False,
) -> Iterator[Taps]:
    """Install hooks at the sites, yield the taps, and always remove every hook again.

    Call ``take()`` after every forward pass. Tensors are kept by reference and nothing is
    synchronised, so the model computes what it computes without hooks, bit for bit.

    Parameters
    ----------
    sites : sequence of Site
        From :func:`capture.model.sites.find_sites`, best after the self-test.
    hidden_rows : callable, optional
        Called once a site and forward pass; returns the rows [R'] (int64, on the model's device)
        of the router input to keep, or None. Without it no router input is kept.
    training : bool
        Whether the model may be in training mode. A pass that checkpointing runs again is then
        not to be taken: call ``discard()`` before every forward pass.

    Raises
    ------
    SiteError
        If the model is in training mode and may not be, or a site is tapped already.
    """
    for site in sites:
        if not training:
            _check_mode(site)
        if site.parent in _tapped:
            raise SiteError(
                f"{site.info.module} is tapped already: two captures of one model at a time would "
                "mix their tokens. Leave the first `with tap(...)` block first."
            )
    taps = Taps(sites, training=training)
    with ExitStack() as stack:
        stack.enter_context(listening(taps._channels))
        for site, channel in zip(sites, taps._channels, strict=True):
            channel.rows = hidden_rows
            _tapped.add(site.parent)
            stack.callback(_tapped.discard, site.parent)
            for handle in site.adapter.listen(site.parts, channel):
                stack.callback(handle.remove)
        yield taps
        taps.discard()


def heard(module: nn.Module, hear: Callable[[], None]) -> Callable[[], None]:
    """Call ``hear`` before every run of a module that is not compiled; returns what ends it."""

    def before(*_: object) -> None:
        # compilers follow hooks, and need not follow this one
        if not torch.compiler.is_compiling():
            hear()

    return module.register_forward_pre_hook(before).remove


def _check_mode(site: Site) -> None:
    if site.parent.training:
        raise SiteError(
            f"{site.info.module} is in training mode, where routers add noise and gradient "
            "checkpointing runs a site twice. Call model.eval() first."
        )


def _observe(site: Site, channel: Channel, training: bool) -> SiteObservation:
    """Check one site's channel and bring it into the common form."""
    module, top_k, n_experts = site.info.module, site.info.top_k, site.info.n_experts
    if not training:
        _check_mode(site)
    _check_fired(site, channel)
    ids, weights = channel.expert_ids, channel.weights
    scores = channel.scores if site.scores_known else None
    if ids is None or weights is None:
        raise SiteError(
            f"{module} ran, but its ids and weights were not seen. It cannot be tapped."
        )
    ids, weights = probe.flat_rows(ids), probe.flat_rows(weights)
    if ids.shape != weights.shape or ids.shape[-1] != top_k:
        raise SiteError(
            f"{module}: expert ids and weights of shape [rows, {top_k}] were expected, got "
            f"{list(ids.shape)} and {list(weights.shape)}. This site cannot be tapped."
        )
    if scores is not None:
        scores = probe.flat_rows(scores)
        if scores.shape != (len(ids), n_experts):
            raise SiteError(
                f"{module}: router scores of shape [{len(ids)}, {n_experts}] were expected, got "
                f"{list(scores.shape)}. This site cannot be tapped."
            )
    return SiteObservation(scores, ids, weights, channel.hidden)


def _check_fired(site: Site, channel: Channel) -> None:
    module = site.info.module
    if channel.problems:
        raise SiteError(f"{module} cannot be tapped: {channel.problems[0]}.")
    ran = (channel.n_scored, channel.n_routed)
    if ran == (1, 1):
        return
    if 0 in ran:
        raise SiteError(
            f"{module} should run once in a forward pass, but its router ran {ran[0]} and its "
            f"experts {ran[1]} times. A fused kernel, torch.compile before the tap, or a layer "
            "that was skipped hides it; run the model uncompiled."
        )
    raise SiteError(
        f"{module} should run once between two calls of take(), but its router ran {ran[0]} and "
        f"its experts {ran[1]} times. Call take() after every forward pass; a model that goes "
        "through its layers several times in one pass (loops) cannot be recorded."
    )
