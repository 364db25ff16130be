"""Doge: experts that are a row of two embeddings each, found by a pair of keys."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Parts
from capture.model.attributes import child, flat_rows

SEED, TRIED = 0, (1, 24)  # batch and sequence of the try-out
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2  # of the largest row
HALVES = 2
MIXES = (
    "Experts are found by product keys, whose scores are split across all tokens of a forward "
    "pass: a token's experts depend on what else is in it."
)


class ProductKeyAdapter:
    """Ids from what the experts' embedding is asked for, weights from the gate's scores.

    Expert ``i * n + j`` of n * n scores what key i of the first half and key j of the second do
    together, and the weights are the softmax of those that were chosen. Which of the gate's
    numbers are a token's halves is what the block does: it takes its output [T, 2n] for [2, T, n],
    so that tokens share their scores (transformers leaves that as it is, for the checkpoints). A
    block is recognised where that, tried out on it, adds up to what it puts out, row by row.
    """

    name = "product-keys"

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise two embeddings beside a gate with two halves of keys."""
        gate, experts = child(block, "router_gate"), child(block, "down_embed")
        n_keys, top_k = getattr(block, "num_keys", None), probe.first_int([block], probe.TOP_KS)
        if gate is None or not isinstance(experts, nn.Embedding) or not isinstance(n_keys, int):
            return None
        if top_k is None or probe.weight_rows(gate) != HALVES * n_keys:
            return None
        parts = Parts(gate, experts, n_keys**2, top_k, is_proven=True, note=MIXES)
        return parts if self._adds_up(block, parts) else None

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen at the gate and at the embedding; the scores wait for the choice."""
        scores: list[torch.Tensor] = []

        def on_gate(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            scores[:] = [_scores(output.detach())]
            channel.put_scores(scores[0], args[0])

        def on_experts(_: nn.Module, args: tuple[Any, ...]) -> None:
            ids = flat_rows(args[0])
            if not scores or len(scores[0]) != len(ids):
                channel.problems.append("its experts were asked for before its gate had run")
                return
            channel.put_choice(ids, scores.pop().gather(-1, ids).softmax(dim=-1))

        return [
            parts.router.register_forward_hook(on_gate),
            parts.experts.register_forward_pre_hook(on_experts),
        ]

    @torch.no_grad()
    def _adds_up(self, block: Any, parts: Parts) -> bool:
        """Whether the experts, weighted so, are what the block puts out more than without them."""
        up, down = child(block, "up_embed"), parts.experts.weight
        if not isinstance(up, nn.Embedding) or not isinstance(down, torch.Tensor) or down.is_meta:
            return False
        generator = torch.Generator().manual_seed(SEED)
        hidden = torch.randn(*TRIED, down.shape[1], generator=generator)
        hidden = hidden.to(down.device, down.dtype)
        channel = Channel()
        handles = [*self.listen(parts, channel)]
        try:
            full = block.forward(hidden)[0]
            handles.append(up.register_forward_hook(lambda _, __, out: torch.zeros_like(out)))
            rest = block.forward(hidden)[0]
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return False  # the block takes more than hidden states, or calls something else
        finally:
            for handle in handles:
                handle.remove()
        ids, weights = channel.expert_ids, channel.weights
        if ids is None or weights is None:
            return False
        rows, routed = flat_rows(hidden), flat_rows(full - rest).float()
        worked = block.act_fn(torch.einsum("tkd,td->tk", down[ids], rows)) * weights
        summed = torch.einsum("tk,tkd->td", worked, up.weight[ids]).float()
        half = hidden.element_size() < torch.float32.itemsize
        limit = (HALF_TOLERANCE if half else TOLERANCE) * float(routed.norm(dim=-1).max())
        return bool(routed.any()) and float((summed - routed).norm(dim=-1).max()) <= limit


def _scores(output: torch.Tensor) -> torch.Tensor:
    """Return the scores [T, n * n] of pairs of keys from a gate's output [..., T, 2n]."""
    rows = flat_rows(output)
    first, second = rows.reshape(HALVES, len(rows), -1).unbind()
    return (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)
