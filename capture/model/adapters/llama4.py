"""Llama 4: experts run densely on inputs that the router's sigmoid already scaled."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.errors import SwapError
from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Choice, Decider, Parts, Seat
from capture.model.adapters.replacing import Forward, deaf, forward_replaced
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

    @contextmanager
    def replace(self, seat: Seat, decider: Decider) -> Iterator[None]:
        """Replace the scores that scale the experts' inputs, and run chosen rows only."""
        if inner(seat.parts.experts) is not seat.parts.experts:
            raise SwapError(
                f"{seat.module}: experts with an adapter around them run on all their inputs, so "
                "no other choice can be put in. Merge the adapter into the model first."
            )
        chosen: list[Choice] = []

        @deaf
        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            applied, logits = output
            decider.see(args[0] if args else kwargs["hidden_states"], logits)
            weights, ids = applied.topk(seat.parts.top_k, dim=-1)
            choice = decider.decide(Choice(ids.masked_fill(weights == 0, -1), weights))
            chosen[:] = [choice]
            # added, as an empty slot must not erase the weight of expert 0
            scores = torch.zeros_like(applied).scatter_add(
                -1, choice.expert_ids.clamp_min(0), choice.weights.to(applied.dtype)
            )
            return scores, logits

        def wrap(stock: Forward) -> Forward:
            def forward(hidden: torch.Tensor) -> torch.Tensor:
                if decider.replays:
                    return stock(hidden)  # type: ignore[no-any-return]
                return _run_scaled(seat.parts.experts, hidden, chosen[0].expert_ids)

            return forward

        handle = seat.parts.router.register_forward_hook(on_router, with_kwargs=True)
        with ExitStack() as stack:
            stack.callback(handle.remove)
            stack.enter_context(forward_replaced(seat.parts.experts, wrap))
            yield


def _run_scaled(experts: Any, hidden: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Run the experts on the chosen rows of their scaled inputs [E * T, D]; the rest stays 0."""
    n_tokens = len(expert_ids)
    output = torch.zeros_like(hidden)
    filled = expert_ids >= 0
    token = torch.arange(n_tokens, device=hidden.device)[:, None].expand_as(expert_ids)[filled]
    expert, order = expert_ids[filled].sort()
    counts = expert.bincount(minlength=len(experts.gate_up_proj)).tolist()
    for e, rows in enumerate(torch.split(expert * n_tokens + token[order], counts)):
        if len(rows):
            gate, up = (hidden[rows] @ experts.gate_up_proj[e]).chunk(2, dim=-1)
            out = (up * experts.act_fn(gate)) @ experts.down_proj[e]
            output = output.index_copy(0, rows, out)
    return output
