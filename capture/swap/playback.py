"""Record the routing of one condition, slot by slot, and force it onto another."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from capture.errors import SwapError
from capture.model.adapters import Channel
from capture.model.attributes import flat_rows
from capture.model.context import PassTokens
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.rules import Choice


class RoutingTape:
    """What every site was told in every forward pass, in the model's own order of slots.

    The order matters: implementations add up a token's experts in it, so that only the model's
    own order gives its logits back bit for bit.
    """

    def __init__(self) -> None:
        self._choices: dict[Place, list[Choice]] = {}
        self._next: dict[Place, int] = {}

    def append(self, key: Place, choice: Choice) -> None:
        """Add what site ``key`` was told in one more pass, for all rows or the real ones."""
        self._choices.setdefault(key, []).append(choice)

    def rewind(self) -> None:
        """Start again at the first pass."""
        self._next.clear()

    def choices(self, key: Place) -> Sequence[Choice]:
        """Return what site ``key`` was told, one entry a pass."""
        return tuple(self._choices.get(key, ()))

    @property
    def n_passes(self) -> int:
        """Passes recorded at every site."""
        return min((len(choices) for choices in self._choices.values()), default=0)

    def next_choice(self, key: Place, native: Choice, tokens: PassTokens) -> Choice:
        """Return the choice [R, K] to force in the pass that runs.

        A tape of real tokens only leaves the padding its own routing; nobody reads that.

        Raises
        ------
        SwapError
            If the tape ends, lacks the site or was recorded from other rows.
        """
        number = self._next.get(key, 0)
        recorded = self._choices.get(key, [])
        if number >= len(recorded):
            raise SwapError(
                f"Layer {key[0]}, site {key[1]}: the tape holds {len(recorded)} forward passes, "
                f"but pass {number + 1} runs. Replay the same batches, or rewind() first."
            )
        self._next[key] = number + 1
        choice = recorded[number]
        ids = choice.expert_ids.to(native.expert_ids.device)
        weights = choice.weights.to(native.weights)
        if len(ids) == tokens.n_rows:
            return Choice(ids, weights)
        if tokens.real is None or len(ids) != len(tokens.real) or ids.shape[1] > _width(native):
            raise SwapError(
                f"Layer {key[0]}, site {key[1]}: a recording of {tokens.n_rows} rows was expected "
                f"in pass {number + 1}, got {len(ids)}. Replay the same batches."
            )
        missing = (0, _width(native) - ids.shape[1])
        ids = torch.nn.functional.pad(ids, missing, value=-1)
        weights = torch.nn.functional.pad(weights, missing)
        return Choice(
            native.expert_ids.index_copy(0, tokens.real, ids),
            native.weights.index_copy(0, tokens.real, weights),
        )


@contextmanager
def recorded(sites: Sequence[Site]) -> Iterator[RoutingTape]:
    """Record the routing of every forward pass until the block is left.

    Parameters
    ----------
    sites : sequence of Site
        From :func:`capture.model.selftest.attach`; of a model in evaluation mode.

    Yields
    ------
    RoutingTape
        To be given to :func:`capture.swap.routers.swap` in place of a rule. Its choices are copies.

    Raises
    ------
    SwapError
        If a site's choice cannot be read.
    """
    tape = RoutingTape()
    with ExitStack() as stack:
        for site in sites:
            channel = Channel()
            for handle in site.adapter.listen(site.parts, channel):
                stack.callback(handle.remove)
            # registered last, so that it runs when the channel is complete
            keep = _Keep(tape, site, channel)
            stack.callback(site.experts.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield tape


class _Keep:
    """Moves a site's choice from its channel to the tape, once a pass."""

    def __init__(self, tape: RoutingTape, site: Site, channel: Channel) -> None:
        self.tape, self.site, self.channel = tape, site, channel

    def __call__(self, *_: object) -> None:
        """Copy ids and weights: the model may go on to write into them."""
        info, channel = self.site.info, self.channel
        if channel.problems or channel.expert_ids is None or channel.weights is None:
            problem = channel.problems[0] if channel.problems else "its choice was not seen"
            raise SwapError(f"{info.module} cannot be recorded: {problem}.")
        ids = flat_rows(channel.expert_ids).long().clone()
        self.tape.append((info.layer, info.site), Choice(ids, flat_rows(channel.weights).clone()))
        channel.clear()


def _width(choice: Choice) -> int:
    return int(choice.expert_ids.shape[1])
