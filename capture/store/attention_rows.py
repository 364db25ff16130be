"""From the attention of one prompt to Arrow tables, refusing what must not be stored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError
from capture.store.codec import encode_weights
from capture.store.records import AttentionLayer, AttentionRows, LayerAttention
from capture.store.rows import as_table
from capture.store.schema import ATTENTION_STATISTICS, MAP_PARTS, Column

# float32 sums of a row of shares
ROW_TOLERANCE = 1e-4


class AttentionBuilder:
    """Checks and packs the attention of the prompts of one run.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        What the run said about its layers; a prompt has rows of each that is recorded.
    columns_of : dict
        Columns of every table, from ``schema.tables``.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], columns_of: Mapping[str, list[Column]]
    ) -> None:
        self._layers = {layer.layer: layer for layer in layers if layer.recorded}
        self._columns_of = columns_of
        self._seen: set[int] = set()

    def build(self, rows: AttentionRows) -> dict[str, pa.Table]:
        """Check the attention of one prompt and return its rows by table.

        Raises
        ------
        StoreError
            If a layer is missing, a shape does not fit or a number is not finite.
        """
        self._check(rows)
        bins = -(-rows.tokens // rows.bin_width)
        tables = {"attention_prompt": self._prompt(rows, bins)}
        if rows.layers:
            tables["attention_head"] = self._heads(rows, bins)
            keys = [self._keys(rows, layer) for layer in rows.layers]
            tables["attention_key"] = pa.concat_tables(keys)
        self._seen.add(rows.prompt_id)
        return tables

    def _check(self, rows: AttentionRows) -> None:
        given = sorted(layer.layer for layer in rows.layers)
        if given != sorted(self._layers):
            raise StoreError(
                f"Attention is recorded in layers {sorted(self._layers)}, got {given} of prompt "
                f"{rows.prompt_id}. Pass every layer once, as the run was told."
            )
        if rows.prompt_id in self._seen or rows.tokens < 1 or rows.bin_width < 1:
            raise StoreError(
                f"The attention of prompt {rows.prompt_id} must come once and cover a token, got "
                f"{rows.tokens} tokens in bins of {rows.bin_width}, "
                f"{'again' if rows.prompt_id in self._seen else 'once'}."
            )
        bins = -(-rows.tokens // rows.bin_width)
        for layer in rows.layers:
            self._check_layer(layer, bins, rows)

    def _check_layer(self, layer: LayerAttention, bins: int, rows: AttentionRows) -> None:
        n_heads, ids = len(self._layers[layer.layer].recorded), layer.top_ids
        shapes = {
            **{name: [n_heads] for name in ATTENTION_STATISTICS},
            "maps": [n_heads, bins, bins],
            "received": [n_heads, bins],
            "top_ids": [n_heads, len(layer.top_queries), ids.shape[-1]],
            "top_weights": [n_heads, len(layer.top_queries), ids.shape[-1]],
        }
        where = f"layer {layer.layer} of prompt {rows.prompt_id}"
        for name, shape in shapes.items():
            values = getattr(layer, name)
            if list(values.shape) != shape:
                raise StoreError(
                    f"{name} of {where} must have shape {shape}, got {list(values.shape)}. Pass "
                    "the recorded heads only."
                )
            if name not in ("maps", "top_ids") and not np.isfinite(values).all():
                raise StoreError(
                    f"{name} of {where} must be finite, got {values[~np.isfinite(values)][0]}. "
                    "Check the model's precision (dtype)."
                )
        keys = np.broadcast_to(layer.top_queries[:, None], ids.shape)
        if ids.size and (int(ids.min()) < -1 or (ids > keys).any() or keys.max() >= rows.tokens):
            raise StoreError(
                f"A query of {where} attends to itself and to earlier tokens, got the key "
                f"{int(ids.max())} of {rows.tokens} tokens. Count places within the prompt."
            )

    def _prompt(self, rows: AttentionRows, bins: int) -> pa.Table:
        values = (rows.prompt_id, rows.first_token, rows.tokens, bins, rows.bin_width, rows.every)
        return as_table(self._columns_of["attention_prompt"], [[value] for value in values])

    def _heads(self, rows: AttentionRows, bins: int) -> pa.Table:
        """Return one row per layer and recorded head."""
        recorded = [self._layers[layer.layer].recorded for layer in rows.layers]
        counts = [len(heads) for heads in recorded]
        n_rows = sum(counts)
        received = np.concatenate([layer.received for layer in rows.layers])
        cells = [pack_maps(layer.maps, layer.layer) for layer in rows.layers]
        return as_table(
            self._columns_of["attention_head"],
            [
                np.full(n_rows, rows.prompt_id, np.int32),
                np.repeat([layer.layer for layer in rows.layers], counts).astype(np.int32),
                np.concatenate(recorded).astype(np.int32),
                np.full(n_rows, bins, np.int32),
                np.repeat([layer.queries for layer in rows.layers], counts).astype(np.int32),
                *(
                    np.concatenate([getattr(layer, name) for layer in rows.layers])
                    for name in ATTENTION_STATISTICS
                ),
                _lists(pa.array(received.astype(np.float32).ravel()), n_rows),
                _lists(pa.chunked_array(cells).combine_chunks(), n_rows),
            ],
        )

    def _keys(self, rows: AttentionRows, layer: LayerAttention) -> pa.Table:
        """Return one row per query whose heaviest keys are kept."""
        n_queries = len(layer.top_queries) if layer.top_ids.shape[-1] else 0
        ids = layer.top_ids.transpose(1, 0, 2)[:n_queries].astype(np.int64)  # [Q, H, K]
        codes = encode_weights(layer.top_weights.transpose(1, 0, 2)[:n_queries])
        distances = np.where(ids >= 0, layer.top_queries[:n_queries, None, None] - ids, 0)
        missing = pa.array(distances.astype(np.uint32).ravel(), mask=(ids < 0).ravel())
        columns: list[Any] = [
            (rows.first_token + layer.top_queries[:n_queries]).astype(np.int32),
            np.full(n_queries, layer.layer, np.int32),
            _lists(missing, n_queries),
            _lists(pa.array(codes.ravel()), n_queries),
        ]
        return as_table(self._columns_of["attention_key"], columns)


def pack_maps(maps: npt.NDArray[np.float32], layer: int) -> pa.Array:
    """Return the lower triangles of maps [H, n, n] in parts of their rows, NULL for nan.

    Sums from the left are rounded, not the cells, so that the parts of a row sum to ``MAP_PARTS``
    and each is less than one part off.

    Raises
    ------
    StoreError
        If a row does not sum to 1, has a negative share, or looks ahead.
    """
    n_bins = maps.shape[-1]
    shares = maps.astype(np.float64)
    unused = np.asarray(np.isnan(shares).all(axis=-1))  # [H, n]
    shares[unused] = 0
    shares[unused, 0] = 1  # rounds to itself; NULL in the end
    wrong = np.abs(shares.sum(axis=-1) - 1) > ROW_TOLERANCE
    if not np.isfinite(shares).all() or (shares < 0).any() or wrong.any():
        raise StoreError(
            f"Rows of the maps of layer {layer} must be shares that sum to 1, got rows from "
            f"{shares.sum(axis=-1).min():g} to {shares.sum(axis=-1).max():g}. Divide by the sum."
        )
    if np.triu(shares, 1).any():
        raise StoreError(
            f"A map holds keys up to the query's own bin, but layer {layer} looks ahead. Such a "
            "layer cannot be stored; label it instead."
        )
    upto = np.cumsum(shares, axis=-1)
    upto *= MAP_PARTS / upto[..., -1:]
    parts = np.diff(np.rint(upto), axis=-1, prepend=0)
    row, column = np.tril_indices(n_bins)
    mask: npt.NDArray[np.bool_] = np.broadcast_to(unused[..., None], parts.shape)
    return pa.array(
        parts[:, row, column].astype(np.uint32).ravel(), mask=mask[:, row, column].ravel()
    )


def _lists(values: pa.Array, n_rows: int) -> pa.Array:
    """Cut values into ``n_rows`` lists of equal length."""
    offsets = np.linspace(0, len(values), n_rows + 1).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def layer_rows(layers: Sequence[AttentionLayer]) -> list[list[Any]]:
    """Return the values of the table ``attention_layer``."""
    return [[*_facts(layer), list(layer.recorded)] for layer in layers]


def _facts(layer: AttentionLayer) -> tuple[Any, ...]:
    return layer.layer, layer.module, layer.heads, layer.kind, layer.reason
