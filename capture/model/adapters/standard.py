"""The usual block: a router, and an experts module that is told ids and weights."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.errors import SwapError
from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Choice, Decider, Parts, Seat
from capture.model.adapters.replacing import (
    Forward,
    OwnRouterCall,
    deaf,
    forward_replaced,
    run_filled,
)
from capture.model.attributes import child, inner

ROUTER_NAMES = ("router", "gate")
# hidden states, expert ids, weights
EXPERTS_ARGUMENTS = 3


class StandardAdapter:
    """Ids and weights from the experts' pre-hook, scores and input from the router's hook.

    Covers every family whose experts module is called with ``(hidden, ids [T, K], weights
    [T, K])``: what the experts are told is what the model does, whatever the router's rule.
    """

    name = "standard"

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise a block that owns ``experts`` and a router called ``router`` or ``gate``."""
        experts, router = child(block, "experts"), router_of(block)
        if router is None or experts is None or not _is_told_ids(inner(experts)):
            return None
        # an adapter around a module has counts of its own under the same names
        scorer, workers = inner(router), inner(experts)
        owners = (scorer, workers, block, getattr(scorer, "config", None), config)
        n_experts = (
            probe.first_int([scorer], ("n_routed_experts",))
            or probe.first_int([scorer, workers], probe.EXPERT_COUNTS)
            or probe.weight_rows(scorer)
            or probe.first_int([block, config], probe.EXPERT_COUNTS)
        )
        top_k = probe.first_int(owners, probe.TOP_KS)
        if n_experts is None or top_k is None:
            return None
        return Parts(router, experts, n_experts, top_k)

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen at the experts' arguments and the router's output."""

        def on_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, weights = _choice((*args, *kwargs.values()))
            if ids is None or weights is None:
                channel.problems.append("its experts were not told ids [T, K] and weights [T, K]")
            else:
                channel.put_choice(ids, weights)

        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            channel.put_scores(probe.scores_of(output, parts.n_experts), hidden)

        return [
            parts.experts.register_forward_pre_hook(on_experts, with_kwargs=True),
            parts.router.register_forward_hook(on_router, with_kwargs=True),
        ]

    @contextmanager
    def replace(self, seat: Seat, decider: Decider) -> Iterator[None]:
        """Replace ids and weights among the experts' arguments."""
        own = OwnRouterCall(seat, decider)

        @deaf
        def on_experts(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            values = _named(args, kwargs)
            ids_at, weights_at = _places(seat, values)
            ids, weights = values[ids_at], values[weights_at]
            native = Choice(ids.long(), weights) if own.ran else None
            choice = decider.decide(native)
            stays = native is not None and choice.expert_ids is native.expert_ids
            values[ids_at] = choice.expert_ids.to(ids.dtype)
            values[weights_at] = choice.weights.to(weights.dtype)
            own.fills = stays or not bool((choice.expert_ids < 0).any())
            return tuple(values[i] for i in range(len(args))), {k: values[k] for k in kwargs}

        def wrap(stock: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if own.fills:
                    return stock(*args, **kwargs)
                values = _named(args, kwargs)
                ids_at, weights_at = _places(seat, values)

                def call(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
                    ids, weights = _second_slot(seat, ids, weights)
                    values.update({next(iter(values)): hidden, ids_at: ids, weights_at: weights})
                    given = {k: values[k] for k in kwargs}
                    return stock(*(values[i] for i in range(len(args))), **given)

                return run_filled(
                    call, next(iter(values.values())), values[ids_at], values[weights_at]
                )

            return forward

        handle = seat.parts.experts.register_forward_pre_hook(on_experts, with_kwargs=True)
        with ExitStack() as stack:
            stack.callback(handle.remove)
            own.open(stack)
            stack.enter_context(forward_replaced(seat.parts.experts, wrap))
            yield


def router_of(block: nn.Module) -> nn.Module | None:
    """Return the block's router: its child ``router`` or ``gate``."""
    return next((found for name in ROUTER_NAMES if (found := child(block, name))), None)


def _is_told_ids(experts: nn.Module) -> bool:
    """Whether the experts' forward takes hidden states, ids and weights."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return False
    # the class's: device maps and expert parallelism replace forward on the instance
    parameters = list(inspect.signature(type(experts).forward).parameters.values())[1:]
    flexible = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return flexible or len(parameters) >= EXPERTS_ARGUMENTS


def _choice(
    arguments: tuple[Any, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (ids, weights): the integer and the floating tensor after the hidden states."""
    tensors = [a for a in arguments[1:] if isinstance(a, torch.Tensor)]
    ids = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool]
    weights = [t for t in tensors if t.is_floating_point()]
    if len(ids) != 1 or len(weights) != 1 or ids[0].shape != weights[0].shape:
        return None, None
    return ids[0], weights[0]


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Return the arguments by place or name, in their order."""
    values: dict[int | str, Any] = dict(enumerate(args))
    return values | cast(dict[int | str, Any], kwargs)


def _places(seat: Seat, values: dict[int | str, Any]) -> tuple[int | str, int | str]:
    """Return where ids and weights are among the experts' arguments."""
    after = {k: v for k, v in list(values.items())[1:] if isinstance(v, torch.Tensor)}
    ids = [k for k, v in after.items() if not v.is_floating_point() and v.dtype != torch.bool]
    weights = [k for k, v in after.items() if v.is_floating_point()]
    if len(ids) != 1 or len(weights) != 1:
        raise SwapError(
            f"{seat.module}: its experts were not told ids [T, K] and weights [T, K], so no "
            "other choice can be put in."
        )
    return ids[0], weights[0]


def _second_slot(
    seat: Seat, expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a weightless slot [N, 2] where experts cannot be called with one; it computes nothing.

    LongCat drops the axis of the slots when there is only one of them.
    """
    if not hasattr(inner(seat.parts.experts), "identity_expert"):
        return expert_ids, weights
    free = seat.parts.n_experts - 1
    if probe.n_computing(seat.parts.experts, seat.parts.n_experts) > free:
        raise SwapError(
            f"{seat.module}: empty slots need a zero-computation expert in this family, but "
            "the model has none. Fill every slot."
        )
    ids = torch.cat((expert_ids, torch.full_like(expert_ids, free)), dim=-1)
    return ids, torch.cat((weights, torch.zeros_like(weights)), dim=-1)
