"""What a rule costs: operations, bytes that have to be moved, and a proxy of energy.

Operations are those of :mod:`capture.model.flops`, with the experts that ran and the rule's own.
Bytes and energy are estimates for decoding, relative to the unchanged model, and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from capture.model.flops import LayerFlops, ModelFlops
from capture.store.records import Place
from explorer.metrics.cache import hit_rate
from explorer.metrics.load import max_violation
from explorer.metrics.placement import draft_windows

# sequences that are decoded side by side: weights of an expert are read once for all of them
DECODED = 16
# Horowitz, "Computing's energy problem", ISSCC 2014: 45 nm, a multiplication and an addition each,
# picojoule; and a 32-bit word from memory
OPERATION = {4: (3.7 + 0.9) / 2, 2: (1.1 + 0.4) / 2}
MEMORY = 640.0 / 4  # a byte


CACHE_SHARE = 4  # a cache of 1 in so many experts a layer
DRAFT = 4  # tokens that speculative decoding checks in one pass


def memory_reads(
    expert_ids: npt.ArrayLike, texts: npt.ArrayLike, n_experts: int
) -> dict[str, float]:
    """Return what a site's choices ask of memory, by the names of a comparison's columns.

    Parameters
    ----------
    expert_ids : array [T, K], int
        Of tokens in any order of texts, in their order within each; -1 = empty slot.
    texts : array [T], int

    Returns
    -------
    dict
        ``hit_rate``: lookups that an LRU cache of a quarter of the experts answers, text after
        text. ``draft_experts``: different experts of ``DRAFT`` consecutive tokens of a text, mean
        over windows. ``max_violation``: of the load.
    """
    order = np.argsort(np.asarray(texts), kind="stable")
    # a token's experts are looked up in the order of their ids: not all that choose rank them
    ids, of = np.sort(np.asarray(expert_ids)[order], axis=1), np.asarray(texts)[order]
    windows = draft_windows(ids, of, DRAFT)
    load = np.bincount(ids[ids >= 0].astype(np.int64), minlength=n_experts)
    return {
        "hit_rate": hit_rate(ids, slots=max(1, n_experts // CACHE_SHARE)),
        "draft_experts": float(windows.mean()) if len(windows) else float("nan"),
        "max_violation": max_violation(load),
    }


class TokenCost(NamedTuple):
    """What one token costs.

    Attributes
    ----------
    flops : float
        Whole model, the rule's own included.
    expert_flops : float
        Routed experts only.
    router_flops : float
        The rule, or the model's own router where it stays, in all layers.
    moved : float, bytes
        Weights and keys read while ``DECODED`` sequences are decoded side by side.
    energy : float, picojoule
        A proxy: relative to another rule only.
    """

    flops: float
    expert_flops: float
    router_flops: float
    moved: float
    energy: float


@dataclass(frozen=True)
class Usage:
    """What ran of a model.

    Attributes
    ----------
    keys : float
        Keys that a query meets.
    experts : dict of (layer, site) to float
        Experts with weights that ran, a token.
    load : dict of (layer, site) to array [E]
        Share of the tokens that each expert ran on.
    rule : dict of (layer, site) to float
        Operations a token of the rule in place of the model's router.
    beside : dict of layer to float
        Operations a token of a rule beside the model's router, which gates parts.
    layers, blocks, heads : dict of layer to float, 0..1
        Share of the tokens that used the layer, its MoE block, or of its heads; 1 where not given.
    """

    keys: float
    experts: Mapping[Place, float]
    load: Mapping[Place, npt.NDArray[np.float64]]
    rule: Mapping[Place, float] = field(default_factory=dict)
    beside: Mapping[int, float] = field(default_factory=dict)
    layers: Mapping[int, float] = field(default_factory=dict)
    blocks: Mapping[int, float] = field(default_factory=dict)
    heads: Mapping[int, float] = field(default_factory=dict)


def cost_of(model: ModelFlops, used: Usage, *, itemsize: int) -> TokenCost:
    """Return what a token costs.

    Parameters
    ----------
    model : ModelFlops
    used : Usage
        ``experts`` and ``load`` count what ran, so that they hold what was skipped already.
    itemsize : int, bytes
        Of a weight.

    Notes
    -----
    A weight takes part in one multiplication and one addition a token, so half the operations are
    the weights; of experts, those that at least one of ``DECODED`` tokens uses are read. A closed
    head saves its query, its mixing of values and its way back, not its keys and values, which
    later tokens meet. Heads are masked, not skipped: their row says that the saving is simulated.
    """
    flops, weights = model.head, model.head / 2
    experts_flops = router_flops = keys_read = 0.0
    for layer in model.layers:
        share, block = used.layers.get(layer.layer, 1.0), used.blocks.get(layer.layer, 1.0)
        heads = used.heads.get(layer.layer, 1.0)
        own = sum(used.rule.get(key, cost) for key, cost in layer.router.items())
        routers = share * block * own + used.beside.get(layer.layer, 0.0)
        attention = layer.attention - (1 - heads) * layer.attention_heads
        fixed = share * (attention + block * layer.shared + layer.dense)
        # tokens that use a layer see only each other there
        meeting = (layer.attention_key or 0.0) * used.keys * share**2 * heads
        running = sum(cost * used.experts[key] for key, cost in layer.expert.items())
        flops += fixed + meeting + routers + running
        experts_flops += running
        router_flops += routers
        weights += (fixed + routers) / 2 + _read(layer, used)
        keys_read += meeting / 2
    moved = itemsize * (weights / DECODED + keys_read)
    energy = flops * OPERATION[4 if itemsize >= 4 else 2] + moved * MEMORY
    return TokenCost(flops, experts_flops, router_flops, moved, energy)


def _read(layer: LayerFlops, used: Usage) -> float:
    """Return the weights of a layer's experts that a step of ``DECODED`` tokens reads."""
    total = 0.0
    for key, operations in layer.expert.items():
        distinct = (1 - (1 - used.load[key].clip(0, 1)) ** DECODED).sum()
        total += operations / 2 * float(distinct)
    return total
