"""What capture hands to the store, one record per forward pass, and what must not be stored.

Shapes: N real tokens (padding never gets here), S sites, E experts, K slots, G domains, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from capture.errors import StoreError
from capture.store.codec import NO_WEIGHT, encode_half, encode_weights, id_dtype
from capture.store.schema import STATISTICS

# counts: sums per expert that another program recorded, without its tokens
Level = Literal["counts", "stats", "ids", "scores", "attention"]
LEVELS: tuple[Level, ...] = ("counts", "stats", "ids", "scores", "attention")
RECORDED_LEVELS = LEVELS[1:]  # those of a capture
DTYPES = ("float32", "bfloat16", "float16")
Phase = Literal["prompt", "generated"]
PHASES: tuple[Phase, ...] = ("prompt", "generated")
Place = tuple[int, int]  # decoder layer, router within it
Array = TypeVar("Array")  # of torch where the sites ran, of numpy where it is stored
# row numbers [M] into N, and one array [M, E or D] a site, or one of all sites
Vectors = tuple[npt.NDArray[np.int64], Array | Sequence[Array]]


class SiteInfo(NamedTuple):
    """One router and its experts, as stored in the view ``sites``."""

    layer: int  # decoder layer, counted as the model counts
    site: int  # 0 unless a layer has several routers
    module: str  # full module name of the block that owns router and experts
    n_experts: int  # routed experts; shared experts are not counted
    top_k: int
    n_shared_experts: int
    score_function: str  # softmax | sigmoid | softmax_topk | sigmoid_topk | probabilities | other
    side: str | None = None  # encoder | decoder, in a model that has both
    # a word of ``schema.KINDS`` for each expert; None = the experts were not seen
    expert_kinds: tuple[str, ...] | None = None

    @property
    def n_routed(self) -> int:
        """How many experts compute: the others pass a token on, give nothing or skip."""
        kinds = self.expert_kinds
        return self.n_experts if kinds is None else kinds.count("routed")

    def routed_numbers(self) -> npt.NDArray[np.int64]:
        """Return each expert's number among the routed ones [E + 1]; -1 for the others, and -1."""
        kinds = self.expert_kinds or ("routed",) * self.n_experts
        is_routed = np.array([*(kind == "routed" for kind in kinds), False])
        return np.where(is_routed, is_routed.cumsum() - 1, -1)

    def routed_ids(self) -> npt.NDArray[np.int64]:
        """Return the ids of the routed ones, rising."""
        return np.flatnonzero(self.routed_numbers()[:-1] >= 0)

    def reads(self, phase: str) -> bool:
        """Whether tokens of a phase get here: an encoder reads prompts, its decoder the rest."""
        return self.side is None or (self.side == "encoder") == (phase == "prompt")


def sites_of(rows: Sequence[Sequence[Any]]) -> list[SiteInfo]:
    """Return the sites in the rows of ``schema.SELECT_SITES`` or ``SELECT_PACKED_SITES``."""
    found = [SiteInfo(*row) for row in rows]
    return [
        site if site.expert_kinds is None else site._replace(expert_kinds=tuple(site.expert_kinds))
        for site in found
    ]


class PromptInfo(NamedTuple):
    """One prompt, as stored in the view ``prompts``."""

    text: str | None  # None when the prompt came as token ids and no tokenizer is known
    domain: str | None
    source: str | None  # file and line, or "given"
    n_tokens: int  # tokens recorded
    truncated: int  # tokens cut off because the model's context is shorter


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The N real tokens of one forward pass, in the order of the routing rows."""

    token_id: npt.NDArray[np.uint32]  # row in the run: prompt tokens first, in prompt order
    prompt_id: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]  # 0 is the first token of the prompt
    token: npt.NDArray[np.int32]  # id in the model's vocabulary
    text: Sequence[str | None] | None  # pieces that join to the prompt; None without a tokenizer
    loss: "np.ma.MaskedArray[Any, Any]"  # of the next token, nats; masked where there is none
    phase: Phase


@dataclass(frozen=True, slots=True)
class SiteBlock(Generic[Array]):
    """What S sites with equal E and K did in one forward pass, as the gate packs it.

    The one form from the op that observes the routers to the writer: the op fills it with tensors,
    :class:`capture.recorder.transfer.Staging` brings it to the host as numpy arrays, and the writer
    keeps these until it commits: nobody may write to them.

    Attributes
    ----------
    site_indices : tuple of S int
        Indices into the run's list of sites.
    assignments, weight_sum, prob_sum : array [S, G, E]
        Per domain of the forward pass: how often each expert was chosen (int64), the sum of its
        combine weights, and the sum of its probability over all tokens (None when the routers'
        scores are not known).
    expert_ids : array [S, N, K], uint8 (E <= 255) or uint16, or None at level stats
        Best first; all ones = empty slot.
    weights : array [S, N, K], uint16, or None at level stats
        Codes of the combine weights as the model applied them, see ``codec.encode_weights``; 0 in
        an empty slot.
    entropy, margin, logsumexp, topk_mass : array [S, N], float16, or None
        None at level stats and where the routers' scores are not known.
    scores, hidden : tuple (rows [M], vectors), or None
        Numbers of rows among N, and float32 vectors of these rows at every site: the scores as the
        router put them out [M, E], and the router inputs [M, D].
    """

    site_indices: tuple[int, ...]
    assignments: Array
    weight_sum: Array
    prob_sum: Array | None
    expert_ids: Array | None = None
    weights: Array | None = None
    entropy: Array | None = None
    margin: Array | None = None
    logsumexp: Array | None = None
    topk_mass: Array | None = None
    scores: Vectors[Array] | None = None
    hidden: Vectors[Array] | None = None


Block = SiteBlock[npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class SiteRows:
    """What one site did in one forward pass, in plain numbers; the store packs a copy of it.

    As :class:`SiteBlock` without its first axis: -1 is an empty slot, with weight 0. Weights that
    are not known are all nan, and so is their sum; readers see NULL.
    """

    site_index: int
    assignments: npt.NDArray[np.int64]  # [G, E], as the next two
    weight_sum: npt.NDArray[np.float64]
    prob_sum: npt.NDArray[np.float64] | None
    expert_ids: npt.NDArray[np.int32] | None = None  # [N, K], as the weights
    weights: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None  # [N], as the next three
    margin: npt.NDArray[np.float32] | None = None
    logsumexp: npt.NDArray[np.float32] | None = None
    topk_mass: npt.NDArray[np.float32] | None = None
    scores: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
    hidden: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True, slots=True)
class PairSums:
    """Experts that met at one site since the last hand-over, for ``RunWriter.append_pairs``.

    The writer adds them up. They arrive seldom and once at the end, not with every forward pass,
    so that decoding costs no copy; a killed run gets them from its rows. There are transitions at
    the last site of a layer, if a later layer has experts, see :func:`next_sites`.
    """

    site_index: int
    pairs: npt.NDArray[np.int64]  # [E, E], tokens that chose both; the diagonal is the load
    transitions: npt.NDArray[np.int64] | None = None  # [E, E2], tokens that went on to the next
    next_index: int | None = None


def next_sites(sites: Sequence[SiteInfo]) -> list[int | None]:
    """Return for every site which site its transitions lead to, or None.

    From the last site of a layer to the last site of the next layer that has experts. An encoder's
    last layer leads nowhere: the decoder reads other tokens.
    """
    last: dict[int, int] = {}
    for index, site in enumerate(sites):
        if site.layer not in last or sites[last[site.layer]].site < site.site:
            last[site.layer] = index
    order = [last[layer] for layer in sorted(last)]
    following = {a: b for a, b in pairwise(order) if sites[a].side == sites[b].side}
    return [following.get(index) for index in range(len(sites))]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One decoder layer, as stored in the view ``attention_layers``."""

    layer: int
    module: str  # full name of the module that mixes tokens
    heads: int | None  # query heads; None without an attention map
    kind: str  # "attention", or the class of a module whose weights over keys are not known
    reason: str | None = None  # why there is no attention map
    recorded: tuple[int, ...] = ()  # heads whose attention is recorded, ascending


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention of one prompt in one layer: H recorded heads, n bins, Q queries, K keys.

    The four statistics [H] are means over the queries used: nats; mass on the prompt's first
    token; tokens; mass on the latest keys.
    """

    layer: int
    queries: int  # how many were used
    entropy: npt.NDArray[np.float32]
    sink_mass: npt.NDArray[np.float32]
    mean_distance: npt.NDArray[np.float32]
    window_mass: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]  # [H, n, n], rows sum to 1; nan in a row without a used query
    received: npt.NDArray[np.float32]  # [H, n], mass summed over the used queries
    top_queries: npt.NDArray[np.int64]  # [Q], places of queries whose heaviest keys are kept
    top_ids: npt.NDArray[np.int32]  # [H, Q, K], places of the keys, heaviest first; -1 = none
    top_weights: npt.NDArray[np.float32]  # [H, Q, K]


@dataclass(frozen=True, slots=True)
class PromptAttention:
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
    sites: Sequence[Block | SiteRows]


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


def as_block(rows: Block | SiteRows, site: SiteInfo) -> Block:
    """Pack the plain numbers of one site; a block is returned as it is.

    Raises
    ------
    StoreError
        If a number has no code.
    """
    if isinstance(rows, SiteBlock):
        return rows
    ids, weights = rows.expert_ids, rows.weights
    return SiteBlock(
        site_indices=(rows.site_index,),
        assignments=np.array(rows.assignments)[None],
        weight_sum=np.array(rows.weight_sum)[None],
        prob_sum=None if rows.prob_sum is None else np.array(rows.prob_sum)[None],
        expert_ids=None if ids is None else _id_codes(ids, site)[None],
        weights=None if weights is None else _weight_codes(rows)[None],
        **{name: _half(name, getattr(rows, name)) for name in STATISTICS},
        scores=_copied(rows.scores),
        hidden=_copied(rows.hidden),
    )


def describe(site: SiteInfo) -> str:
    """Name a site in a message."""
    return f"site {site.site} of layer {site.layer} ({site.module})"


def _id_codes(ids: npt.NDArray[np.int32], site: SiteInfo) -> npt.NDArray[Any]:
    if ids.size:
        _check_range(int(ids.min()), int(ids.max()), site)
    # -1 wraps to all ones, which is the code of an empty slot
    return ids.astype(id_dtype(site.n_experts))


def _weight_codes(rows: SiteRows) -> npt.NDArray[np.uint16]:
    weights, ids = rows.weights, rows.expert_ids
    assert weights is not None
    if ids is not None and np.isnan(rows.weight_sum).all() and np.isnan(weights).all():
        return np.where(ids >= 0, NO_WEIGHT, 0).astype(np.uint16)
    return encode_weights(weights)


def _half(name: str, values: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float16] | None:
    if values is None:
        return None
    return encode_half(name, np.ma.filled(values, np.inf))[None]


def _copied(
    given: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None,
) -> Vectors[npt.NDArray[Any]] | None:
    if given is None:
        return None
    return np.array(given[0], np.int64), [np.array(given[1], np.float32)]


def check_block(
    block: Block, sites: Sequence[SiteInfo], level: Level, n_tokens: int, n_domains: int
) -> None:
    """Refuse arrays that do not fit together or hold what a run file must not.

    ``sites`` are those of the block, in its order.

    Raises
    ------
    StoreError
        If a shape, an id or a number is not what the records promise; the message names the site.
    """
    _check_rollups(block, sites, n_domains)
    _check_routes(block, sites, level, n_tokens)
    for name in STATISTICS:
        values = getattr(block, name)
        if values is not None:
            _check_statistic(name, values, sites, n_tokens)
    for name in ("scores", "hidden"):
        given = getattr(block, name)
        if given is not None:
            _check_vectors(name, given, sites, level, n_tokens)


def _check_rollups(block: Block, sites: Sequence[SiteInfo], n_domains: int) -> None:
    shape = (n_domains, sites[0].n_experts)
    sums: dict[str, npt.NDArray[Any]] = {
        "assignments": block.assignments, "weight_sum": block.weight_sum
    }  # fmt: skip
    if block.prob_sum is not None:
        sums["prob_sum"] = block.prob_sum
    if _unweighted(block):
        del sums["weight_sum"]
    for name, values in sums.items():
        if values.shape != (len(sites), *shape):
            raise StoreError(
                f"{name} of {describe(sites[0])} must have shape {list(shape)} (domains, "
                f"experts), got {list(values.shape[1:])}. Pass one row per domain."
            )
        # nan is neither, and infinity is not a sum
        bad = ~((values >= 0) & (values < np.inf))
        if bad.any():
            index = int(np.argwhere(bad)[0][0])
            raise StoreError(
                f"{name} of {describe(sites[index])} must be finite and not negative, got "
                f"{values[index].min()}..{values[index].max()}. Check the model's precision "
                "(dtype)."
            )


def _check_routes(block: Block, sites: Sequence[SiteInfo], level: Level, n_tokens: int) -> None:
    wanted = LEVELS.index(level) >= LEVELS.index("ids")
    ids, weights = block.expert_ids, block.weights
    if wanted != (ids is not None) or wanted != (weights is not None):
        raise StoreError(
            f"At level {level} expert ids and weights are "
            f"{'stored' if wanted else 'not stored'}, but {describe(sites[0])} was handed over "
            f"{'without' if wanted else 'with'} them. Pass {'both' if wanted else 'None'}."
        )
    if ids is None or weights is None:
        return
    shape = ids.shape[1:]
    if ids.ndim != 3 or shape[0] != n_tokens or not 0 < shape[1] <= sites[0].top_k:
        raise StoreError(
            f"expert_ids of {describe(sites[0])} must have shape [{n_tokens}, {sites[0].top_k}], "
            f"got {list(shape)}. Pass one row per real token."
        )
    if weights.shape != ids.shape:
        raise StoreError(
            f"weights of {describe(sites[0])} must have the shape of its expert_ids "
            f"{list(shape)}, got {list(weights.shape[1:])}. Pass one weight per slot."
        )
    wide = id_dtype(sites[0].n_experts)
    if ids.dtype != wide or weights.dtype != np.uint16:
        raise StoreError(
            f"Packed ids and weights of {describe(sites[0])} must be {wide} and uint16, got "
            f"{ids.dtype} and {weights.dtype}. Pass SiteRows where they are plain numbers."
        )
    if n_tokens:
        for index, site in enumerate(sites):
            _check_ids(ids[index], block.assignments[index], site)
        if not _unweighted(block):
            _check_weights(weights, sites)


def _unweighted(block: Block) -> bool:
    """Whether weights are not known at any of the sites."""
    return bool(np.isnan(block.weight_sum).all())


def _check_range(low: int, high: int, site: SiteInfo) -> None:
    if low < -1 or high >= site.n_experts:
        raise StoreError(
            f"expert_ids of {describe(site)} must lie from -1 to {site.n_experts - 1}, got "
            f"{low}..{high}. Count routed experts from 0, without shared ones."
        )


def _check_ids(codes: npt.NDArray[Any], assignments: npt.NDArray[np.int64], site: SiteInfo) -> None:
    empty = int(np.iinfo(codes.dtype).max)
    counts = np.bincount(codes.ravel(), minlength=site.n_experts)
    beyond = counts[site.n_experts : empty]
    if beyond.any():
        _check_range(0, site.n_experts + int(np.flatnonzero(beyond)[-1]), site)
    counts, load = counts[: site.n_experts], assignments.sum(axis=0)
    if not np.array_equal(counts, load):
        expert = int(np.flatnonzero(counts != load)[0])
        raise StoreError(
            f"assignments of {describe(site)} must count its expert_ids, but expert {expert} "
            f"has {counts[expert]} ids and a count of {int(load[expert])}. Count the real tokens "
            "only."
        )


def _check_weights(codes: npt.NDArray[np.uint16], sites: Sequence[SiteInfo]) -> None:
    # slots fall by weight, so that the first one tells whether any is out of range
    refused = codes[..., 0] == NO_WEIGHT
    if refused.any():
        raise StoreError(
            f"Combine weights of {describe(sites[int(np.argwhere(refused)[0][0])])} must be finite "
            "and from 0 to 512, got one that is not. Check the model's precision (dtype), or the "
            "site's adapter."
        )
    rises = codes[..., 1:] > codes[..., :-1]
    if rises.any():
        raise StoreError(
            f"weights of {describe(sites[int(np.argwhere(rises)[0][0])])} must fall from slot to "
            "slot, got a heavier expert after a lighter one. Sort ids and weights by weight first."
        )


def _check_statistic(
    name: str, values: npt.NDArray[np.float16], sites: Sequence[SiteInfo], n_tokens: int
) -> None:
    if values.shape != (len(sites), n_tokens):
        raise StoreError(
            f"{name} of {describe(sites[0])} must have one value per token, {n_tokens}, got shape "
            f"{list(values.shape[1:])}. Pass None where it is not known."
        )
    if np.isnan(values).any():
        raise StoreError(
            f"The statistic {name} must be a number, got nan. Pass None where it is not known."
        )


def _check_vectors(
    name: str,
    given: Vectors[npt.NDArray[Any]],
    sites: Sequence[SiteInfo],
    level: Level,
    n_tokens: int,
) -> None:
    rows, vectors = given
    if len(vectors) != len(sites):
        raise StoreError(f"{name} must have one array per site, {len(sites)}, got {len(vectors)}.")
    everywhere = name == "scores" and LEVELS.index(level) >= LEVELS.index("scores")
    for site, values in zip(sites, vectors, strict=True):
        width = site.n_experts if name == "scores" else None
        if values.ndim != 2 or len(rows) != len(values) or width not in (None, values.shape[1]):
            raise StoreError(
                f"{name} of {describe(site)} must have shape [{len(rows)}, {width or 'D'}], got "
                f"{list(values.shape)}. Pass one row per row number."
            )
        if everywhere and len(rows) != n_tokens:
            raise StoreError(
                f"At level {level} every token has scores, but {describe(site)} has "
                f"{len(rows)} of {n_tokens}. Pass the scores of every row."
            )
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= n_tokens):
            raise StoreError(
                f"Row numbers of {name} of {describe(site)} must lie from 0 to {n_tokens - 1}, "
                f"got {rows.min()}..{rows.max()}. Count rows within the forward pass."
            )
        bad = ~np.isfinite(values)
        if name == "scores" and bad.any():
            bad &= ~np.isneginf(values)
        if bad.any():
            raise StoreError(
                f"{name} of {describe(site)} must be finite, got {values[bad][0]}. Check the "
                "model's precision (dtype)."
            )
