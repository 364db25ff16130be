"""ZAYA: one more class than experts, "skip", which the router hides as expert 0 with weight 0."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model.adapters.base import Channel, Choice, Decider, Parts, Seat
from capture.model.adapters.standard import StandardAdapter
from capture.model.attributes import inner


class SkipExpertAdapter:
    """Count "skip this block" as one more expert, with the highest id and weight 0.

    The router scores E experts and the class E, "skip"; where that class is chosen, the experts
    are told expert 0 with weight 0, which a naive count takes for expert 0. A softmax never gives
    exactly 0 to a class it chose by itself, so weight 0 marks the skipped tokens.
    """

    name = "skip-expert"
    _standard = StandardAdapter()

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise a standard block whose router has exactly one class more than experts."""
        parts = self._standard.find(block, config)
        scorer = inner(parts.router) if parts else None
        classes = getattr(scorer, "num_router_classes", None)
        experts = getattr(scorer, "num_experts", None)
        if parts is None or not isinstance(experts, int) or classes != experts + 1:
            return None
        return parts._replace(n_experts=classes, skips=True)

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen as usual, and name the skipped slots."""

        def named(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return ids.masked_fill((weights == 0) & (ids == 0), parts.n_experts - 1)

        channel.translate = named
        return self._standard.listen(parts, channel)

    def replace(self, seat: Seat, decider: Decider) -> AbstractContextManager[None]:
        """Replace as usual, with the class "skip" among the ids that are decided on."""
        return self._standard.replace(seat, _Skipping(decider, seat.parts.n_experts - 1))


class _Skipping:
    """Shows a decider the class "skip", and turns it into what the experts are told."""

    def __init__(self, decider: Decider, skip: int) -> None:
        self._decider, self._skip = decider, skip
        self.replays, self.reads, self.hears = decider.replays, decider.reads, decider.hears

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Hand on the router's input and output."""
        self._decider.see(hidden, scores)

    def decide(self, native: Choice | None) -> Choice:
        """Name the skipped slots, and hide them in the answer."""
        if native is not None:
            hidden = (native.weights == 0) & (native.expert_ids == 0)
            native = Choice(native.expert_ids.masked_fill(hidden, self._skip), native.weights)
        choice = self._decider.decide(native)
        skipped = choice.expert_ids == self._skip
        # an empty slot, or what the model itself makes of it
        ids = choice.expert_ids.masked_fill(skipped, 0 if self.replays else -1)
        return Choice(ids, choice.weights.masked_fill(skipped, 0.0))
