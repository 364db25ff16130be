"""What ran while parts of a model were gated: the parts themselves, and the experts in them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from capture.model.context import Passes
from capture.model.sites import Site
from capture.swap.inject import can_inject, flat_choice, injected
from capture.swap.routers import Key, SiteCount, site_key
from capture.swap.row_subset import Kept
from capture.swap.rules import OWN_ROUTER, Choice

Part = Literal["head", "layer", "block"]


@dataclass
class PartCount:
    """What one layer executed since its gate was put in.

    Attributes
    ----------
    passes : int
    tokens : int
        Real tokens that came by.
    kept : float
        Tokens that used the part; for heads, the mean over heads.
    rows : int
        Rows that were computed, padding between sequences of different length included.
    """

    passes: int = 0
    tokens: int = 0
    kept: float = 0.0
    rows: int = 0

    @property
    def share(self) -> float:
        """Share of the real tokens that used the part."""
        return self.kept / max(self.tokens, 1)


@dataclass
class Gated:
    """Open gates.

    Attributes
    ----------
    part : {"head", "layer", "block"}
    simulated : bool
        Whether gated parts were computed all the same, as heads are.
    counts : dict of int to PartCount
        By decoder layer.
    sites : dict of (layer, site) to SiteCount
        What the experts executed. ``tokens`` and ``passes`` are those that came to the site, so
        a token that skipped it is not among them. Sites whose kind cannot be reached are missing.
    """

    part: Part
    simulated: bool
    counts: dict[int, PartCount] = field(default_factory=dict)
    sites: dict[Key, SiteCount] = field(default_factory=dict)

    @property
    def per_token(self) -> float:
        """Parts that a token used, summed over layers; a layer's heads count as one."""
        return sum(count.share for count in self.counts.values())

    @property
    def passes(self) -> int:
        """Forward passes of the model."""
        return max((count.passes for count in self.counts.values()), default=0)


class Reached:
    """Which rows that come to a layer now are tokens.

    Attributes
    ----------
    rows : Tensor [R], bool, or None
        Where some tokens skip the layer, the rows that are no filling; None = as the pass has it.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.rows: torch.Tensor | None = None

    @contextmanager
    def only(self, kept: Kept) -> Iterator[None]:
        """Take it that only some tokens come, until the block is left."""
        self.rows = kept.filled.flatten()
        try:
            yield
        finally:
            self.rows = None

    def real(self, device: torch.device) -> torch.Tensor | None:
        """Return what tells tokens from other rows, None where all rows are tokens."""
        return self.passes.tokens.on(device).real if self.rows is None else self.rows.to(device)


def count_experts(gated: Gated, sites: Sequence[Site], reached: Reached, stack: ExitStack) -> None:
    """Count in ``gated.sites`` what experts execute, until the stack is left."""
    for site in sites:
        if can_inject(site):
            counter = _Counter(SiteCount.of(site), reached)
            gated.sites[site_key(site)] = counter.count
            stack.enter_context(injected(site, counter))


class _Counter:
    """Leaves the model's own choice as it is, and counts it."""

    replays = True
    reads = OWN_ROUTER
    hears = False

    def __init__(self, count: SiteCount, reached: Reached) -> None:
        self.count, self.reached = count, reached

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Take no interest in scores."""

    def decide(self, native: Choice | None) -> Choice:
        """Return the choice as it came."""
        assert native is not None  # what reads it gets it
        flat = flat_choice(native)
        self.count.add(flat, self.reached.real(flat.expert_ids.device))
        return native
