"""The attention of a forward pass as three tensors on their way to the writer, and back."""

import math
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from capture.errors import SiteError
from capture.recorder.attention.summary import (
    TOP_QUERIES,
    AttentionOptions,
    AttentionSite,
    PromptRow,
    Summary,
)
from capture.recorder.transfer import Arrays
from capture.store.records import AttentionRows, LayerAttention
from kernels.ops.attention import bin_width, n_bins, used_queries

FLOATS, IDS, DOUBTS = "attention.floats", "attention.ids", "attention.doubts"

Number = TypeVar("Number", bound=np.generic)


def pack_attention(
    summaries: Sequence[Sequence[Summary]], doubts: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Lay the summaries of all sites and prompts end to end; nothing waits for the device."""
    if not summaries:
        return {}
    device = summaries[0][0].maps.device
    floats, ids = [], []
    for summary in (summary for site in summaries for summary in site):
        parts = (summary.statistics, summary.maps, summary.received, summary.top_weights)
        floats += [part.reshape(-1).to(device, non_blocking=True) for part in parts]
        ids.append(summary.top_ids.reshape(-1).to(device, non_blocking=True))
    found = {FLOATS: torch.cat(floats), IDS: torch.cat(ids)}
    if doubts:
        found[DOUBTS] = torch.stack([doubt.to(device, non_blocking=True) for doubt in doubts])
    return found


def unpack_attention(
    arrays: Arrays,
    rows: Sequence[PromptRow],
    sites: Sequence[AttentionSite],
    options: AttentionOptions,
    first_token: npt.NDArray[np.int64],
) -> list[AttentionRows]:
    """Return the attention of every prompt of a forward pass.

    Parameters
    ----------
    arrays : dict
        What :func:`pack_attention` named, on the host.
    rows : sequence of PromptRow
        The prompts, in the order of the summaries.
    sites : sequence of AttentionSite
    options : AttentionOptions
    first_token : array [P]
        Token id of the first token of every prompt of the run.

    Raises
    ------
    SiteError
        If a mask hid other keys than the rule says.
    """
    if DOUBTS in arrays and arrays[DOUBTS].any():
        raise SiteError(
            "A layer's attention mask hides other keys than those after a token or outside its "
            "window, so its weights cannot be recorded from queries and keys. Record the layers "
            "that have a plain mask (attention_layers), or level 'scores'."
        )
    floats, ids = _Reader(arrays[FLOATS]), _Reader(arrays[IDS])
    layers: list[list[LayerAttention]] = [[] for _ in rows]
    for site in sites:
        for place, row in enumerate(rows):
            layers[place].append(_layer(site, row, options, floats, ids))
    return [
        AttentionRows(
            prompt_id=row.prompt,
            first_token=int(first_token[row.prompt]),
            tokens=row.length,
            bin_width=bin_width(row.length, options.bins),
            every=options.every,
            layers=found,
        )
        for row, found in zip(rows, layers, strict=True)
    ]


class _Reader(Generic[Number]):
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
    floats: _Reader[np.float32],
    ids: _Reader[np.int32],
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
