"""Summarise where the heads of a model look while it runs, for chosen prompts and layers.

Every attention module asks ``AttentionInterface.get_interface`` for the function that its model
was set to (sdpa, eager, flash, ...) and calls it. While somebody listens, the function handed out
first does exactly what it does otherwise, mask included, and then shows what it was given.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.errors import SiteError
from capture.model.forward import to_device
from capture.model.load import transformers_library
from capture.store.records import Array, LayerAttention, PromptAttention
from kernels.ops.attention import AttentionOutput, attention, bin_width, n_bins, used_queries

# arguments of attention functions that weigh keys by more than queries, keys and positions
UNKNOWN_ARGUMENTS = {
    "position_bias": "it adds a learned bias to every weight",
    "indices": "it attends to keys that another module picks",
    "block_indices": "it attends to blocks of keys that another module picks",
}
MASK_BLOCK = 256  # queries of a mask that are looked at together
# a prompt's first queries whose heaviest keys are kept: what a page can show, and no more than
# the map takes on disk
TOP_QUERIES = 512
Number = TypeVar("Number", bound=np.generic)


class AttentionCall(NamedTuple):
    """One call of a model's attention function.

    Attributes
    ----------
    query : Tensor [B, H, T, D]
    key : Tensor [B, Hkv, S, D]
    value : Tensor [B, Hkv, S, Dv]
    mask : Tensor or None
        As the function got it; what it means depends on the implementation.
    output : Tensor [B, T, H, Dv]
    options : mapping
        The other arguments.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    output: Any
    options: Mapping[str, Any]


AttentionListener = Callable[[AttentionCall], None]

_lock = threading.Lock()
_listeners: "WeakKeyDictionary[nn.Module, AttentionListener]" = WeakKeyDictionary()
_open = 0


@contextmanager
def listen(listeners: Mapping[nn.Module, AttentionListener]) -> Iterator[None]:
    """Call the listener of a module after every call of its attention function.

    Modules without a listener, of this and of other models, compute as ever. What transformers
    hands out is as before once no listener is open.

    Raises
    ------
    SiteError
        If a module is listened to already.
    """
    taken = [module for module in listeners if module in _listeners]
    if taken:
        raise SiteError(
            f"The attention of {type(taken[0]).__name__} is recorded already: one capture of a "
            "model at a time. Wait for the other one."
        )
    with _lock:
        _install()
        _listeners.update(listeners)
    try:
        yield
    finally:
        with _lock:
            for module in listeners:
                _listeners.pop(module, None)
            _remove()


_plain_get_interface: Callable[..., Any] | None = None


def _install() -> None:
    """Put our word in front of what transformers hands out, once for all open listeners."""
    global _open, _plain_get_interface
    if _open == 0:
        interface = transformers_library().modeling_utils.AttentionInterface
        plain = interface.get_interface

        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _heard(plain(self, *args, **kwargs))

        _plain_get_interface = plain
        interface.get_interface = get_interface
    _open += 1


def _remove() -> None:
    global _open, _plain_get_interface
    _open -= 1
    if _open == 0 and _plain_get_interface is not None:
        interface = transformers_library().modeling_utils.AttentionInterface
        interface.get_interface = _plain_get_interface
        _plain_get_interface = None


def _heard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap one attention function; results and arguments pass unchanged."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = function(module, *args, **kwargs)
        listener = _listeners.get(module)
        if listener is not None:
            names = ("query", "key", "value", "attention_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key, value, mask = (given.pop(name, None) for name in names)
            if query is not None and key is not None and value is not None:
                listener(AttentionCall(query, key, value, mask, result[0], given))
        return result

    return call


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module whose weights follow from its queries and keys.

    Attributes
    ----------
    layer : int
    name : str
        Full name of the module.
    module : Module
    heads : tuple of int
        Heads to record, ascending.
    n_heads : int
    layer_window : int or None
        A query of this layer sees keys at a distance below this, where the model does not tell
        its attention function.
    """

    layer: int
    name: str
    module: nn.Module
    heads: tuple[int, ...]
    n_heads: int
    layer_window: int | None = None


class AttentionRule(NamedTuple):
    """How weights follow from queries and keys in one call."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def rule_of(module: nn.Module, call: AttentionCall, layer_window: int | None) -> AttentionRule:
    """Read the rule from the arguments of a call.

    Raises
    ------
    ValueError
        If queries and keys do not make the weights; the message is the reason.
    """
    options = call.options
    for name, reason in UNKNOWN_ARGUMENTS.items():
        if options.get(name) is not None:
            raise ValueError(reason)
    if call.key.shape[2] != call.query.shape[2]:
        raise ValueError("its keys are not the tokens of the prompt")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError("a token sees later ones")
    scaling = options.get("scaling")
    sinks = options.get("s_aux")
    return AttentionRule(
        scaling=float(call.query.shape[-1] ** -0.5 if scaling is None else scaling),
        window=options.get("sliding_window", layer_window),
        softcap=options.get("softcap"),
        sinks=options.get("sinks") if sinks is None else sinks,
    )


class PromptRow(NamedTuple):
    """Where one prompt lies in a batch: columns ``start`` to ``start + length`` of row ``row``."""

    prompt: int
    row: int
    start: int
    length: int


class AttentionOptions(NamedTuple):
    """What to keep of the attention of a prompt; as in :class:`capture.CaptureConfig`."""

    bins: int
    every: int
    top_keys: int


class Summary(NamedTuple):
    """The attention of one prompt at one site, on the device, without the batch axis.

    Attributes
    ----------
    statistics : Tensor [4, H]
        Means over the queries: entropy, sink mass, mean distance, window mass.
    maps : Tensor [H, n, n]
    received : Tensor [H, n]
    top_ids : Tensor [H, Q, K]
    top_weights : Tensor [H, Q, K]
    """

    statistics: torch.Tensor
    maps: torch.Tensor
    received: torch.Tensor
    top_ids: torch.Tensor
    top_weights: torch.Tensor


class AttentionTaps:
    """Summarises the attention of chosen prompts while the model runs.

    Attributes
    ----------
    sites : tuple of AttentionSite
    options : AttentionOptions
    rows : sequence of PromptRow
        The prompts of the next forward pass to look at; set it before, and it is empty after
        :meth:`take`.
    """

    def __init__(self, sites: Sequence[AttentionSite], options: AttentionOptions) -> None:
        self.sites = tuple(sites)
        self.options = options
        self.rows: Sequence[PromptRow] = ()
        self._found: dict[int, list[Summary]] = {}
        self._doubts: dict[tuple[int, int, int | None], torch.Tensor] = {}

    @contextmanager
    def open(
        self, guard: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator["AttentionTaps"]:
        """Listen to every site inside the block; ``guard`` stands around what is done there."""

        def listener(index: int) -> AttentionListener:
            def hear(call: AttentionCall) -> None:
                with guard(), torch.no_grad():
                    self._on_call(index, call)

            return hear

        with listen({site.module: listener(i) for i, site in enumerate(self.sites)}):
            yield self

    def take(self) -> tuple[list[list[Summary]], list[torch.Tensor]]:
        """Return the summaries of every site, prompt by prompt, since the last call.

        Returns
        -------
        summaries : list over sites of lists over ``rows``
        doubts : list of Tensor [], bool
            True where a mask hides other keys than the site's rule says: the summaries are not
            those of the model then.

        Raises
        ------
        SiteError
            If a site did not run.
        """
        rows, found, doubts = self.rows, self._found, list(self._doubts.values())
        self.rows, self._found, self._doubts = (), {}, {}
        if not rows:
            return [], []
        for index, site in enumerate(self.sites):
            if len(found.get(index, ())) != len(rows):
                raise SiteError(
                    f"{site.name} should run its attention once in a forward pass, but gave "
                    f"{len(found.get(index, ()))} of {len(rows)} prompts. A compiled model hides "
                    "its attention; run it uncompiled, or record level 'scores'."
                )
        return [found[index] for index in range(len(self.sites))], doubts

    def _on_call(self, index: int, call: AttentionCall) -> None:
        if not self.rows:
            return
        site = self.sites[index]
        try:
            rule = rule_of(site.module, call, site.layer_window)
        except ValueError as error:
            raise SiteError(
                f"The attention of {site.name} cannot be recorded: {error}. Leave its layer out "
                "(attention_layers)."
            ) from None
        for row in self.rows:
            self._doubt(site, call, row, rule.window)
            out = summarise(call, row, rule, site.heads, self.options)
            self._found.setdefault(index, []).append(out)

    def _doubt(
        self, site: AttentionSite, call: AttentionCall, row: PromptRow, window: int | None
    ) -> None:
        """Compare the mask with the rule, once for all sites that share them."""
        key = (id(call.mask), row.row, window)
        if key not in self._doubts:
            wrong = mask_differs(call.mask, row, window, implementation_of(site.module))
            if wrong is not None:
                self._doubts[key] = wrong


def implementation_of(module: nn.Module) -> str:
    """Return the name of the attention function that a module asks for."""
    return str(getattr(getattr(module, "config", None), "_attn_implementation", None) or "sdpa")


def mask_differs(
    mask: Any, row: PromptRow, window: int | None, implementation: str
) -> torch.Tensor | None:
    """Return whether a mask hides other keys of a prompt than causality and the window do.

    Returns
    -------
    Tensor [], bool, or None
        None where there is no mask to look at, and none is missing: flash and flex functions get a
        rule, not a mask, and sdpa without one is causal.
    """
    if implementation.startswith(("flash", "flex")) or "|" in implementation:
        return None
    start, length = row.start, row.length
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        sees_all = implementation == "sdpa" and (window is None or window >= length)
        return None if sees_all or length == 1 else torch.ones((), dtype=torch.bool)
    batch = mask[min(row.row, mask.shape[0] - 1)]
    hidden = batch[:, start : start + length, start : start + length]  # [1 or H, T, T]
    position = torch.arange(length, device=mask.device)
    wrong = torch.zeros((), dtype=torch.bool, device=mask.device)
    for first in range(0, length, MASK_BLOCK):
        block = hidden[:, first : first + MASK_BLOCK]
        distance = position[first : first + MASK_BLOCK, None] - position
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if mask.dtype == torch.bool:
            wrong |= (block != seen).any()
        else:
            wrong |= torch.where(seen, block != 0, block > torch.finfo(mask.dtype).min / 2).any()
    return wrong


def summarise(
    call: AttentionCall,
    row: PromptRow,
    rule: AttentionRule,
    heads: Sequence[int],
    options: AttentionOptions,
    backend: str = "auto",
) -> Summary:
    """Summarise the weights of one prompt's real tokens, as if it were alone in its batch."""
    out = weights_of(call, row, rule, heads, options, backend)
    kept = min(TOP_QUERIES, len(out.queries))
    statistics = (out.entropy, out.sink_mass, out.mean_distance, out.window_mass)
    return Summary(
        statistics=torch.stack([values[0] for values in statistics]).mean(dim=-1),
        maps=out.map[0],
        received=out.received[0],
        top_ids=out.top_ids[0, :, :kept].contiguous(),
        top_weights=out.top_weights[0, :, :kept].contiguous(),
    )


def weights_of(
    call: AttentionCall,
    row: PromptRow,
    rule: AttentionRule,
    heads: Sequence[int],
    options: AttentionOptions,
    backend: str = "auto",
) -> AttentionOutput:
    """Run the kernel on one prompt's real tokens and the chosen heads."""
    columns = slice(row.start, row.start + row.length)
    query = call.query[row.row : row.row + 1, :, columns]
    key = call.key[row.row : row.row + 1, :, columns]
    sinks = rule.sinks
    if len(heads) < query.shape[1]:
        chosen = to_device(np.array(heads, dtype=np.int64), query.device)
        shared = query.shape[1] // key.shape[1]
        query = query.index_select(1, chosen)
        key = key.index_select(1, torch.div(chosen, shared, rounding_mode="floor"))
        sinks = None if sinks is None else sinks.index_select(0, chosen)
    return attention(
        query,
        key.to(query.dtype),
        scaling=rule.scaling,
        window=rule.window,
        softcap=rule.softcap,
        sinks=sinks,
        bins=options.bins,
        every=options.every,
        top_keys=options.top_keys,
        backend=backend,
    )


class PackedAttention(NamedTuple, Generic[Array]):
    """Summaries of all sites and prompts, end to end, and where a mask differs from its rule."""

    floats: Array
    ids: Array
    doubts: Array | None


def pack_attention(
    summaries: Sequence[Sequence[Summary]], doubts: Sequence[torch.Tensor]
) -> PackedAttention[torch.Tensor] | None:
    """Lay the summaries of all sites and prompts end to end; nothing waits for the device."""
    if not summaries:
        return None
    device = summaries[0][0].maps.device
    floats, ids = [], []
    for summary in (summary for site in summaries for summary in site):
        parts = (summary.statistics, summary.maps, summary.received, summary.top_weights)
        floats += [part.reshape(-1).to(device, non_blocking=True) for part in parts]
        ids.append(summary.top_ids.reshape(-1).to(device, non_blocking=True))
    moved = [doubt.to(device, non_blocking=True) for doubt in doubts]
    return PackedAttention(torch.cat(floats), torch.cat(ids), torch.stack(moved) if moved else None)


def unpack_attention(
    packed: PackedAttention[npt.NDArray[Any]],
    rows: Sequence[PromptRow],
    sites: Sequence[AttentionSite],
    options: AttentionOptions,
) -> list[PromptAttention]:
    """Return the attention of every prompt of a forward pass; its first token is not known here.

    Parameters
    ----------
    packed : PackedAttention
        On the host.
    rows : sequence of PromptRow
        The prompts, in the order of the summaries.
    sites : sequence of AttentionSite
    options : AttentionOptions

    Raises
    ------
    SiteError
        If a mask hid other keys than the rule says.
    """
    if packed.doubts is not None and packed.doubts.any():
        raise SiteError(
            "A layer's attention mask hides other keys than those after a token or outside its "
            "window, so its weights cannot be recorded from queries and keys. Record the layers "
            "that have a plain mask (attention_layers), or level 'scores'."
        )
    floats, ids = _PieceReader(packed.floats), _PieceReader(packed.ids)
    layers: list[list[LayerAttention]] = [[] for _ in rows]
    for site in sites:
        for place, row in enumerate(rows):
            layers[place].append(_layer(site, row, options, floats, ids))
    return [
        PromptAttention(
            prompt_id=row.prompt,
            first_token=0,
            tokens=row.length,
            bin_width=bin_width(row.length, options.bins),
            every=options.every,
            layers=found,
        )
        for row, found in zip(rows, layers, strict=True)
    ]


class _PieceReader(Generic[Number]):
    """Hands out one array piece by piece."""

    def __init__(self, values: npt.NDArray[Number]) -> None:
        self._values = values
        self._place = 0

    def take(self, *shape: int) -> npt.NDArray[Number]:
        """Return the next piece in this shape."""
        start, self._place = self._place, self._place + math.prod(shape)
        return self._values[start : self._place].reshape(shape)


def _layer(
    site: AttentionSite,
    row: PromptRow,
    options: AttentionOptions,
    floats: _PieceReader[np.float32],
    ids: _PieceReader[np.int32],
) -> LayerAttention:
    n_heads, bins = len(site.heads), n_bins(row.length, options.bins)
    queries = used_queries(row.length, row.length, options.every).numpy()
    kept = min(TOP_QUERIES, len(queries))
    entropy, sink_mass, mean_distance, window_mass = floats.take(4, n_heads)
    return LayerAttention(
        layer=site.layer,
        queries=len(queries),
        entropy=entropy,
        sink_mass=sink_mass,
        mean_distance=mean_distance,
        window_mass=window_mass,
        maps=floats.take(n_heads, bins, bins),
        received=floats.take(n_heads, bins),
        top_weights=floats.take(n_heads, kept, options.top_keys),
        top_queries=queries[:kept],
        top_ids=ids.take(n_heads, kept, options.top_keys),
    )
