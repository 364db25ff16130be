"""What capture hands to the store: plain numpy, one object per forward pass.

Shapes: N real tokens (padding never gets here), S sites, E experts, K slots, G domains, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Level = Literal["stats", "ids", "scores", "attention"]
LEVELS: tuple[Level, ...] = ("stats", "ids", "scores", "attention")
DTYPES = ("float32", "bfloat16", "float16")
Phase = Literal["prompt", "generated"]
Vectors = tuple[npt.NDArray[np.int64], Sequence[npt.NDArray[np.float32]]]


class SiteInfo(NamedTuple):
    """One router and its experts, as stored in the view ``sites``."""

    layer: int  # decoder layer, counted as the model counts
    site: int  # 0 unless a layer has several routers
    module: str  # full module name of the block that owns router and experts
    n_experts: int  # routed experts; shared experts are not counted
    top_k: int
    n_shared_experts: int
    score_function: str  # softmax | sigmoid | softmax_topk | sigmoid_topk | probabilities | other


class PromptInfo(NamedTuple):
    """One prompt, as stored in the view ``prompts``."""

    text: str | None  # None when the prompt came as token ids and no tokenizer is known
    domain: str | None
    source: str | None  # file and line, or "given"
    n_tokens: int  # tokens recorded
    truncated: int  # tokens cut off because the model's context is shorter


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The real tokens of one forward pass, in the order of the routing rows.

    Attributes
    ----------
    token_id : array [N], uint32
        Row number of the token in the run: prompt tokens first, in prompt order.
    prompt_id : array [N], uint32
    position : array [N], uint32
        0 is the first token of the prompt.
    token : array [N], int32
        Id in the model's vocabulary.
    text : list [N] or None
        Pieces that join to the prompt; None without a tokenizer.
    loss : masked array [N], float32, nats
        Loss of the next token; masked where there is none.
    phase : {"prompt", "generated"}
    """

    token_id: npt.NDArray[np.uint32]
    prompt_id: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]
    token: npt.NDArray[np.int32]
    text: Sequence[str] | None
    loss: "np.ma.MaskedArray[Any, Any]"
    phase: Phase


@dataclass(frozen=True, slots=True)
class SiteBlock:
    """What S sites with equal E and K did in one forward pass, as the gate packs it.

    The writer keeps these arrays until it commits: nobody may write to them.

    Attributes
    ----------
    site_indices : tuple of S int
        Indices into the run's list of sites.
    assignments, weight_sum, prob_sum : array [S, G, E]
        Per domain of the forward pass: how often each expert was chosen, the sum of its combine
        weights, and the sum of its probability over all tokens (None when the routers' scores
        are not known).
    expert_ids : array [S, N, K], uint8 (E <= 255) or uint16, or None at level stats
        Best first; all ones = empty slot.
    weights : array [S, N, K], uint16, or None at level stats
        Codes of the combine weights as the model applied them, see ``codec.encode_weights``; 0 in
        an empty slot.
    entropy, margin, logsumexp, topk_mass : array [S, N], float16, or None
        None at level stats and where the routers' scores are not known.
    scores : tuple (array [M], S arrays [M, E]) or None
        Row indices into N and the scores of these rows, as the router put them out.
    hidden : tuple (array [M], S arrays [M, D]) or None
        Row indices into N and the router inputs of these rows.
    """

    site_indices: tuple[int, ...]
    assignments: npt.NDArray[np.int64]
    weight_sum: npt.NDArray[np.floating[Any]]
    prob_sum: npt.NDArray[np.floating[Any]] | None
    expert_ids: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    weights: npt.NDArray[np.uint16] | None = None
    entropy: npt.NDArray[np.float16] | None = None
    margin: npt.NDArray[np.float16] | None = None
    logsumexp: npt.NDArray[np.float16] | None = None
    topk_mass: npt.NDArray[np.float16] | None = None
    scores: Vectors | None = None
    hidden: Vectors | None = None


@dataclass(frozen=True, slots=True)
class SiteRows:
    """What one site did in one forward pass, in plain numbers; the store packs a copy of it.

    Attributes
    ----------
    site_index : int
        Index into the run's list of sites.
    assignments, weight_sum, prob_sum : array [G, E]
        As in :class:`SiteBlock`.
    expert_ids : array [N, K], int32, or None at level stats
        Best first; -1 = empty slot.
    weights : array [N, K], float32, or None at level stats
        Combine weights as the model applied them; 0 in an empty slot.
    entropy, margin, logsumexp, topk_mass : array [N], float32, or None
        As in :class:`SiteBlock`.
    scores, hidden : tuple (array [M], array [M, E or D]) or None
        Row indices into N and the vectors of these rows.
    """

    site_index: int
    assignments: npt.NDArray[np.int64]
    weight_sum: npt.NDArray[np.float64]
    prob_sum: npt.NDArray[np.float64] | None
    expert_ids: npt.NDArray[np.int32] | None = None
    weights: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None
    margin: npt.NDArray[np.float32] | None = None
    logsumexp: npt.NDArray[np.float32] | None = None
    topk_mass: npt.NDArray[np.float32] | None = None
    scores: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
    hidden: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True, slots=True)
class PairSums:
    """Experts that met at one site since the last hand-over, for ``RunWriter.append_pairs``.

    The writer adds them up. They arrive seldom and once at the end, not with every forward pass,
    so that decoding costs no copy; a killed run gets them from its rows.

    Attributes
    ----------
    site_index : int
        Index into the run's list of sites.
    pairs : array [E, E], int64
        How many tokens chose both experts, in both orders; the diagonal is the load.
    transitions : array [E, E2], int64, or None
        How many tokens chose an expert here and one at ``next_index``; None where there is no
        next layer with experts, and at all but the last site of a layer.
    next_index : int or None
        The last site of the next layer that has experts, as :func:`next_sites` says.
    """

    site_index: int
    pairs: npt.NDArray[np.int64]
    transitions: npt.NDArray[np.int64] | None = None
    next_index: int | None = None


def next_sites(sites: Sequence[SiteInfo]) -> list[int | None]:
    """Return for every site which site its transitions lead to, or None.

    From the last site of a layer to the last site of the next layer that has experts.
    """
    last: dict[int, int] = {}
    for index, site in enumerate(sites):
        if site.layer not in last or sites[last[site.layer]].site < site.site:
            last[site.layer] = index
    order = [last[layer] for layer in sorted(last)]
    following = dict(pairwise(order))
    return [following.get(index) for index in range(len(sites))]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decoder layer, as stored in the view ``attention_layers``.

    Attributes
    ----------
    layer : int
    module : str
        Full name of the module that mixes tokens.
    heads : int or None
        Query heads of the layer; None without an attention map.
    kind : str
        "attention", or the class of a module whose weights over keys do not exist or are not
        known.
    reason : str or None
        Why there is no attention map.
    recorded : tuple of int
        Heads whose attention is recorded, ascending.
    """

    layer: int
    module: str
    heads: int | None
    kind: str
    reason: str | None = None
    recorded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention of one prompt in one layer: H recorded heads, n bins, Q queries, K keys.

    Attributes
    ----------
    layer : int
    queries : int
        Queries that were used, of which the four statistics are means.
    entropy, sink_mass, mean_distance, window_mass : array [H], float32
        Nats; mass on the prompt's first token; tokens; mass on the latest keys.
    maps : array [H, n, n], float32
        Query bins by key bins; rows sum to 1, nan in a row without a used query.
    received : array [H, n], float32
        Mass that each key bin receives, summed over the used queries.
    top_queries : array [Q], int64
        Places in the prompt of the queries whose heaviest keys are kept.
    top_ids : array [H, Q, K], int32
        Places of these keys in the prompt, heaviest first; -1 = there are fewer keys.
    top_weights : array [H, Q, K], float32
    """

    layer: int
    queries: int
    entropy: npt.NDArray[np.float32]
    sink_mass: npt.NDArray[np.float32]
    mean_distance: npt.NDArray[np.float32]
    window_mass: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]
    received: npt.NDArray[np.float32]
    top_queries: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int32]
    top_weights: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """The attention of one prompt, for ``RunWriter.append_attention``.

    Hand it over just before the forward pass it comes from, so that both are committed together.
    """

    prompt_id: int
    first_token: int  # token_id of the prompt's first token; the others follow it
    tokens: int
    bin_width: int  # tokens of a bin of the maps
    every: int  # every n-th block of queries was used
    layers: Sequence[LayerAttention]


@dataclass(frozen=True, slots=True)
class ForwardRows:
    """One forward pass: its tokens, and what every site did with them."""

    tokens: TokenRows
    domains: Sequence[str | None]  # the G domains that occur here, in the order of the [G, E] rows
    sites: Sequence[SiteBlock | SiteRows]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known of a run before its first token."""

    model: str
    revision: str | None
    architecture: str
    dtype: str
    device: str
    level: Level
    vocab_size: int
    hidden_size: int
    backends: dict[str, str] = field(default_factory=dict)  # kernel -> backend that ran
    packages: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # the CaptureConfig, as JSON
    sample: dict[str, Any] = field(default_factory=dict)  # requested, planned, strata, seed
