"""The control of gates before layers: the same blocks dropped for all tokens, found by the loss."""

from math import ceil

import torch

from capture.swap.live import summed, token_losses
from capture.swap.parts import gate_parts, part_modules
from capture.swap.rules import RouteInputs
from explorer.routers.base import (
    ROUTERS,
    Part,
    PartMask,
    PartRouter,
    RouterInfo,
    RouterInputs,
)
from explorer.routers.learning.context import CURVE_POINTS, TrainedRouter, TrainingSession
from explorer.routers.learning.exploration import Passes
from explorer.routers.parts import check_keep
from explorer.routers.subsets import best_to_drop

TOKENS = 8192  # of the fit split that subsets are judged on
MOST_SUBSETS = 256
_WHOLE = 0.01  # blocks: keep=0.667 of 6 layers means 4


@ROUTERS.add("static_layers")
class StaticLayersRouter(TrainedRouter, PartRouter):
    """Run the same MoE blocks for all tokens: those without which the loss rises least.

    Parameters
    ----------
    keep : float
        Share of the blocks that run, rounded up to whole blocks.
    seed : int
        Not used; the texts are drawn by the session's.

    Attributes
    ----------
    dropped_ : frozenset of int
        Layers whose block does not run.
    """

    part: Part = "layer"
    info = RouterInfo(
        name="static_layers",
        family="control",
        title="Static best blocks",
        summary=(
            "The MoE blocks of some layers run for no token. Which ones was found by trying: the "
            "loss on the fit split rises least without them."
        ),
        formula="D = argmin CE without blocks D, |D| = floor((1 - keep) L)",
        paper="",
        needs=frozenset(),
        fits="trained",
        across_layers=True,
        identity={"keep": 1.0},
    )

    def __init__(self, *, keep: float = 0.75, seed: int = 0) -> None:
        self.keep = check_keep(keep)
        self.seed = seed

    def _train(self, session: TrainingSession) -> None:
        layers = sorted(part_modules(session.model, session.sites, "block"))
        n_dropped = len(layers) - ceil(self.keep * len(layers) - _WHOLE)
        drawn = Passes(session, n_tokens=TOKENS)
        texts = [drawn.ids[number] for batch in drawn.batches for number in batch]
        tried: list[float] = []

        def loss(members: tuple[int, ...]) -> float:
            session.report(min(0.99, len(tried) / MOST_SUBSETS), "trying subsets of blocks")
            rule = _Closed(frozenset(layers[at] for at in members))
            losses = token_losses(
                session.model,
                texts,
                swapped=lambda: gate_parts(session.model, session.sites, rule, part="block"),
            )
            tried.append(summed(losses).mean)
            return tried[-1]

        found = best_to_drop(len(layers), n_dropped, loss, most=MOST_SUBSETS)
        self.dropped_ = frozenset(layers[at] for at in found.members)
        every = max(1, len(tried) // CURVE_POINTS)
        self.curves_ = [
            {
                "router": self.info.name,
                "seed": self.seed,
                "lambda": 0.0,
                "step": step,
                "layer": None,
                "reward": -value,
                "policy_entropy": 0.0,
                "gate_rate": 1 - n_dropped / len(layers),
            }
            for step, value in enumerate(tried)
            if step % every == 0
        ]

    def _route(self, inputs: RouterInputs) -> PartMask:
        gate = float(inputs.layer not in self.dropped_)
        return PartMask(self.part, torch.full((inputs.n_tokens, 1), gate))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


class _Closed:
    """The rule that closes some layers' blocks."""

    def __init__(self, layers: frozenset[int]) -> None:
        self.layers = layers

    def route(self, inputs: RouteInputs, /) -> PartMask:
        """Return a gate of 0 or 1 for all tokens of a layer."""
        gate = float(inputs.layer not in self.layers)
        return PartMask("layer", torch.full((len(inputs.hidden), 1), gate))
