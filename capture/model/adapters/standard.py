"""The usual block: a router, and an experts module that is told ids and weights."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Parts
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
            channel.put_scores(scores_of(output, parts.n_experts), hidden)

        return [
            parts.experts.register_forward_pre_hook(on_experts, with_kwargs=True),
            parts.router.register_forward_hook(on_router, with_kwargs=True),
        ]


def router_of(block: nn.Module) -> nn.Module | None:
    """Return the block's router: its child ``router`` or ``gate``."""
    return next((found for name in ROUTER_NAMES if (found := child(block, name))), None)


def scores_of(output: Any, n_experts: int) -> torch.Tensor | None:
    """Return the first floating tensor [..., E] of a router's output, or None."""
    for value in output if isinstance(output, tuple | list) else (output,):
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape[-1] == n_experts
        ):
            return value
    return None


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
