"""An adapter of your own: a kind of MoE block that capture does not know is recorded and re-routed.

PYTHONPATH=. python .github/examples/own_adapter.py runs/own-adapter.duckdb

The block below names its parts in its own way and tells its experts a share for every expert, 0 for
those that were not chosen, where other blocks tell ids and weights. Without the adapter, capture
refuses the model by the name of the block. ``replace`` lets another rule take the router's place;
an adapter without it records only.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import capture
from capture.errors import SiteError
from capture.model.adapters import ADAPTERS, Channel, Choice, Decider, Parts, Seat
from capture.model.adapters.replacing import heard_router
from capture.model.load import load_model
from capture.swap.routers import swap
from capture.swap.rules import RouterInputs

TOP_K = 2


class Workers(nn.Module):
    """Experts that are told how much of every one of them a token wants, [T, E]."""

    def __init__(self, bank: nn.Module) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, hidden: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the sum of the chosen experts' outputs by their shares, [T, D]."""
        weights, ids = shares.topk(TOP_K, dim=-1)
        out: torch.Tensor = self.bank(hidden, ids, weights)
        return out


class SharesBlock(nn.Module):
    """A MoE block whose parts are called ``scorer`` and ``workers``."""

    def __init__(self, matrix: nn.Parameter, experts: nn.Module) -> None:
        super().__init__()
        n_experts, d = matrix.shape
        self.scorer = nn.Linear(d, n_experts, bias=False)
        self.scorer.weight = matrix
        self.workers = Workers(experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Send each token [B, S, D] to its best experts."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        probs = self.scorer(flat).softmax(-1)
        best = probs.topk(TOP_K, dim=-1)
        shares = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
        out: torch.Tensor = self.workers(flat, shares / shares.sum(-1, keepdim=True))
        return out.reshape(hidden.shape)


class SharesAdapter:
    """Read the choice off the shares that the workers are told."""

    name = "shares"

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise the block by its structure."""
        scorer, workers = getattr(block, "scorer", None), getattr(block, "workers", None)
        if not isinstance(scorer, nn.Linear) or not isinstance(workers, nn.Module):
            return None
        return Parts(scorer, workers, n_experts=scorer.out_features, top_k=TOP_K)

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Install hooks that fill the channel and change nothing."""

        def on_workers(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            weights, ids = args[1].topk(parts.top_k, dim=-1)
            channel.put_choice(ids, weights)

        def on_scorer(_: nn.Module, args: tuple[torch.Tensor, ...], scores: torch.Tensor) -> None:
            channel.put_scores(scores, args[0])

        return [
            parts.experts.register_forward_pre_hook(on_workers),
            parts.router.register_forward_hook(on_scorer),
        ]

    @contextmanager
    def replace(self, seat: Seat, decider: Decider) -> Iterator[None]:
        """Tell the workers the shares that another rule gives, of up to ``TOP_K`` experts."""

        def on_workers(
            _: nn.Module, args: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, told = args
            weights, ids = told.topk(TOP_K, dim=-1)
            choice = decider.decide(Choice(ids, weights))
            # added, as an empty slot must not erase the share of expert 0
            places, shares = choice.expert_ids.clamp_min(0), choice.weights.to(told.dtype)
            return hidden, torch.zeros_like(told).scatter_add(-1, places, shares)

        with heard_router(seat, decider):
            handle = seat.parts.experts.register_forward_pre_hook(on_workers)
            try:
                yield
            finally:
                handle.remove()


class BestOnly:
    """A rule: of the model's own choice, each token visits the first expert."""

    def route(self, inputs: RouterInputs) -> Choice:
        """Keep the first slot, with the whole weight."""
        assert inputs.native is not None
        best = inputs.native.expert_ids[:, :1]
        return Choice(best, torch.ones(best.shape))


def odd_model() -> PreTrainedModel:
    """Return the demo model with its MoE blocks rebuilt in the odd way; it computes the same."""
    model: Any = load_model("demo").model
    for layer in model.model.layers:
        layer.mlp = SharesBlock(layer.mlp.gate.weight, layer.mlp.experts)
    odd: PreTrainedModel = model.eval()
    return odd


def main(out: str) -> None:
    """Record the odd model: refused as it is, recorded with the adapter."""
    model = odd_model()
    prompts = ["The quick brown fox jumps over the lazy dog."]
    try:
        capture.record(model, prompts, out, progress=False)
    except SiteError as error:
        print("without:", error)
    ADAPTERS.insert(0, SharesAdapter())  # the first that recognises a block counts
    try:
        print("with:", capture.record(model, prompts, out, progress=False))
        with torch.inference_mode(), swap(model, None, BestOnly()) as swapped:
            model(input_ids=torch.arange(20)[None], use_cache=False)
        print("swapped:", swapped.experts_per_token, "experts a token")
    finally:
        del ADAPTERS[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
