"""Llama 4: experts run densely on inputs that the router's sigmoid already scaled."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Parts
from capture.model.adapters.standard import router_of
from capture.model.attributes import child, inner


class ScaledInputAdapter:
    """Read the choice off the router's own output, a score for every expert.

    The router returns ``(scores [T, E], logits [T, E])`` where scores are the sigmoid of the
    chosen logits and exactly 0 elsewhere; the block multiplies the experts' *inputs* by them and
    runs every expert on every token. The scores are what is applied, so the ``top_k`` largest are
    the choice. A chosen expert whose sigmoid underflows to 0 adds nothing and cannot be told from
    the others, so its slot counts as empty.
    """

    name = "scaled-input"

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise a linear router beside experts that are called with their inputs only."""
        router, experts = router_of(block), child(block, "experts")
        if router is None or experts is None or isinstance(experts, nn.ModuleList | nn.ModuleDict):
            return None
        scorer, forward = inner(router), type(inner(experts)).forward
        if not isinstance(scorer, nn.Linear):
            return None
        if len(inspect.signature(forward).parameters) != len(("self", "hidden")):
            return None
        top_k = probe.first_int([scorer, block, config], probe.TOP_KS)
        if top_k is None:
            return None
        return Parts(router, experts, scorer.out_features, top_k, "sigmoid_topk")

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen at the router, which says it all, and count the experts' runs."""

        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not (isinstance(output, tuple) and len(output) == len(("scores", "logits"))):
                channel.problems.append("its router did not return (scores, logits)")
                return
            applied, logits = output
            channel.put_scores(logits, hidden)
            weights, ids = applied.detach().topk(parts.top_k, dim=-1)
            channel.put_ids(ids.masked_fill(weights == 0, -1), weights)

        def on_experts(_: nn.Module, args: tuple[Any, ...]) -> None:
            channel.put_run()

        return [
            parts.router.register_forward_hook(on_router, with_kwargs=True),
            parts.experts.register_forward_pre_hook(on_experts),
        ]
