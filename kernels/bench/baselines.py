"""What the ops are compared with, written as a user of PyTorch would without them."""

from collections.abc import Callable

import torch
from torch.nn import functional

Baseline = Callable[[], object]
# Qwen3-30B-A3B: hidden size, experts chosen of a token, width of an expert
HIDDEN, CHOSEN, EXPERT_WIDTH = 2048, 8, 768


def observe_chain(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, importance: bool
) -> Baseline:
    """Return the statistics of a model's own choice, one PyTorch call after the other."""
    n_experts = logits.shape[-1]

    def run() -> object:
        x = logits.float()
        probabilities, lse = x.softmax(-1), x.logsumexp(-1)
        entropy = lse - (probabilities * x).sum(-1)
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, ids, True)
        last = probabilities.masked_fill(~chosen, torch.inf).amin(-1)
        margin = last - probabilities.masked_fill(chosen, -torch.inf).amax(-1)
        mass = probabilities.gather(-1, ids).sum(-1)
        ordered, order = weights.float().sort(stable=True, dim=-1, descending=True)
        slots = ids.gather(-1, order)
        flat = slots.flatten()
        load = flat.new_zeros(n_experts).index_add_(0, flat, torch.ones_like(flat))
        weight_sum = x.new_zeros(n_experts).index_add_(0, flat, ordered.flatten())
        statistics = [value.half() for value in (entropy, margin, lse, mass)]
        sums = (load, weight_sum, probabilities.sum(0) if importance else None)
        return slots.to(torch.uint8 if n_experts <= 255 else torch.int32), ordered, statistics, sums

    return run


def select_chain(logits: torch.Tensor, k: int) -> Baseline:
    """Return a router's choice with statistics, one PyTorch call after the other."""
    n_experts = logits.shape[-1]

    def run() -> object:
        x = logits.float()
        probabilities, lse = x.softmax(-1), x.logsumexp(-1)
        entropy = lse - (probabilities * x).sum(-1)
        # one more than chosen: the best expert left out
        values, ids = probabilities.topk(min(k + 1, n_experts))
        margin = values[:, k - 1] - values[:, -1]
        mass = values[:, :k].sum(-1)
        flat = ids[:, :k].flatten()
        load = flat.new_zeros(n_experts).index_add_(0, flat, torch.ones_like(flat))
        weights = values[:, :k] / mass.unsqueeze(-1)
        weight_sum = x.new_zeros(n_experts).index_add_(0, flat, weights.flatten())
        sums = (load, weight_sum, probabilities.sum(0))
        return ids[:, :k].int(), weights, entropy, margin, lse, mass, sums

    return run


def all_logits(hidden: torch.Tensor, projections: torch.Tensor) -> Baseline:
    """Return the matrix product alone, with the logits of all routers in memory."""
    stacked = projections.flatten(0, 1).T
    return lambda: hidden @ stacked


def project_chain(hidden: torch.Tensor, projections: torch.Tensor, k: int) -> Baseline:
    """Return the product, then the choice from the logits in memory."""
    stacked = projections.flatten(0, 1).T

    def run() -> object:
        logits = (hidden @ stacked).view(len(hidden), *projections.shape[:2])
        return logits.topk(k), logits.float().logsumexp(-1)

    return run


def model_attention(query: torch.Tensor, key: torch.Tensor, scaling: float) -> Baseline:
    """Return the model's own attention: PyTorch's fused one, on the same queries and keys."""
    value = torch.randn_like(key)
    grouped = query.shape[1] != key.shape[1]
    return lambda: functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def logsumexp_of_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return what a fused attention hands out beside its output, [B, H, T] float32."""
    n_tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    positions = torch.arange(n_tokens, device=query.device)
    parts = []
    for block in torch.split(positions, 256):
        scores = query[:, :, block].float() @ keys.mT * scaling
        later = positions[None, :] > block[:, None]
        parts.append(scores.masked_fill(later, -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=-1)


def decoder_layer(
    n_tokens: int, heads: int, key_heads: int, width: int, like: torch.Tensor
) -> Baseline:
    """Return a lower bound on a decoder layer of Qwen3-30B-A3B's shape.

    Its experts are replaced by one dense network as wide as those a token visits: the same
    arithmetic, without the routing and without what grouping costs. A share of this time is an
    upper bound on the share of the layer's.
    """
    make = torch.Generator().manual_seed(1)

    def weight(rows: int, columns: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(rows, columns, generator=make) / rows**0.5
        return values.to(like.device, like.dtype)

    x = weight(n_tokens, HIDDEN)
    to_query, to_key = weight(HIDDEN, heads * width), weight(HIDDEN, key_heads * width)
    to_value, back = weight(HIDDEN, key_heads * width), weight(heads * width, HIDDEN)
    up, gate = weight(HIDDEN, CHOSEN * EXPERT_WIDTH), weight(HIDDEN, CHOSEN * EXPERT_WIDTH)
    down = weight(CHOSEN * EXPERT_WIDTH, HIDDEN)

    def split(flat: torch.Tensor, n: int) -> torch.Tensor:
        return flat.view(1, n_tokens, n, width).transpose(1, 2)

    def run() -> object:
        normed = functional.rms_norm(x, (HIDDEN,))
        attended = functional.scaled_dot_product_attention(
            split(normed @ to_query, heads),
            split(normed @ to_key, key_heads),
            split(normed @ to_value, key_heads),
            is_causal=True,
            enable_gqa=heads != key_heads,
        )
        y = x + attended.transpose(1, 2).reshape(n_tokens, -1) @ back
        normed = functional.rms_norm(y, (HIDDEN,))
        return y + (functional.silu(normed @ gate) * (normed @ up)) @ down

    return run
