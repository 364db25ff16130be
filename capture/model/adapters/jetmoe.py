"""JetMoE: two routers a layer, attention and MLP, that hand tokens over sorted by expert."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.errors import SwapError
from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Choice, Decider, Parts, Seat
from capture.model.adapters.replacing import deaf
from capture.model.adapters.standard import router_of
from capture.model.attributes import child, inner

FIELDS = 5


class SortedTokensAdapter:
    """Undo the sorting in the router's output, which is exactly what the experts get.

    The router returns ``(order [T * K], token [T * K], weight [T * K], size [E], logits)``: the
    assignments sorted by expert, where ``order`` is the place ``token * K + slot`` of each and
    ``size`` how many belong to each expert. Nothing is chosen again here.
    """

    name = "sorted-tokens"

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise a router beside two parallel linear layers with one matrix an expert."""
        router = router_of(block)
        first, second = child(block, "input_linear"), child(block, "output_linear")
        if router is None or first is None or second is None:
            return None
        scorer = inner(router)
        n_experts = probe.first_int([scorer], probe.EXPERT_COUNTS)
        top_k = probe.first_int([scorer, block], probe.TOP_KS)
        weight = getattr(inner(first), "weight", None)
        stacked = isinstance(weight, torch.Tensor) and weight.shape[0] == n_experts
        if n_experts is None or top_k is None or not stacked:
            return None
        return Parts(router, first, n_experts, top_k)

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen at the router, and count the runs of the experts' first layer."""

        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not (isinstance(output, tuple) and len(output) == FIELDS):
                channel.problems.append("its router did not return assignments sorted by expert")
                return
            order, _, sorted_weights, sizes, logits = output
            channel.put_scores(logits, hidden)
            channel.put_ids(*unsorted(order, sorted_weights.detach(), sizes, parts.top_k))

        def on_experts(_: nn.Module, args: tuple[Any, ...]) -> None:
            channel.put_run()

        return [
            parts.router.register_forward_hook(on_router, with_kwargs=True),
            parts.experts.register_forward_pre_hook(on_experts),
        ]

    @contextmanager
    def replace(self, seat: Seat, decider: Decider) -> Iterator[None]:
        """Replace the router's assignments, which are sorted by expert, without empty slots."""
        # the attention block gives every slot its own query, so it has no place for more of them
        top_k, is_attention = seat.parts.top_k, not hasattr(seat.block, "activation")

        @deaf
        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> tuple[Any, ...]:
            if not (isinstance(output, tuple) and len(output) == FIELDS):
                raise SwapError(f"{seat.module}: its router did not return sorted assignments.")
            order, _, sorted_weights, sizes, logits = output
            decider.see(args[0] if args else kwargs["hidden_states"], logits)
            choice = decider.decide(Choice(*unsorted(order, sorted_weights, sizes, top_k)))
            ids, weights = choice.expert_ids, choice.weights.to(sorted_weights.dtype)
            if is_attention and ids.shape[1] > top_k:
                raise SwapError(
                    f"{seat.module}: the attention of this model has {top_k} queries a token, "
                    f"so at most {top_k} experts, got {ids.shape[1]}."
                )
            if is_attention and ids.shape[1] < top_k:
                missing = (0, top_k - ids.shape[1])
                ids = nn.functional.pad(ids, missing, value=-1)
                weights = nn.functional.pad(weights, missing)
            n_slots = ids.shape[1]
            # empty slots sort to the front and are cut off
            order = ids.flatten().sort(0).indices[int((ids < 0).sum()) :]
            token = order.div(n_slots, rounding_mode="trunc")
            load = ids.flatten()[order].bincount(minlength=seat.parts.n_experts)
            return order, token, weights.flatten()[order], load.tolist(), logits

        handle = seat.parts.router.register_forward_hook(on_router, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def unsorted(
    order: torch.Tensor, weights: torch.Tensor, sizes: Sequence[int], top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights [T, K] from assignments [T * K] that are sorted by expert."""
    # the model made the sizes a list of numbers itself, so this does not wait for the device
    counts = torch.tensor(list(sizes), dtype=torch.int64)
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    expert = expert.to(order.device, non_blocking=True)
    ids = torch.empty_like(order).scatter_(0, order, expert)
    in_order = torch.empty_like(weights).scatter_(0, order, weights)
    return ids.reshape(-1, top_k), in_order.reshape(-1, top_k)
