"""From the records of a forward pass, or a prompt's attention, to Arrow tables, all checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError
from capture.store.codec import Layout, encode_weights, pack_ids, pack_weights
from capture.store.records import (
    LEVELS,
    AttentionLayer,
    Block,
    ForwardRows,
    LayerAttention,
    Level,
    PromptAttention,
    SiteBlock,
    SiteInfo,
    SiteRows,
    Vectors,
    as_block,
    check_block,
)
from capture.store.schema import ATTENTION_STATISTICS, MAP_PARTS, STATISTICS, Column

MAX_TOKEN_ID = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")
_HALF_INFINITY = 0x7C00  # the exponent of infinity in float16
# float32 sums of a row of shares
ROW_TOLERANCE = 1e-4


def clean(text: str | None) -> str | None:
    """Replace each half of a surrogate pair, which UTF-8 cannot hold, by U+FFFD.

    Character by character, so that pieces of a text still join to the whole.
    """
    return None if text is None else _SURROGATE.sub("\ufffd", text)


def strings(values: Sequence[str | None]) -> pa.Array:
    """Make an Arrow column of text, which is kept as it is but for :func:`clean`."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([clean(value) for value in values], pa.string())


def as_table(columns: Sequence[Column], arrays: Sequence[Any]) -> pa.Table:
    """Name and type the arrays of one table."""
    typed = [
        array if isinstance(array, pa.Array | pa.ChunkedArray) else pa.array(array, column.arrow)
        for column, array in zip(columns, arrays, strict=True)
    ]
    return pa.Table.from_arrays(typed, names=[column.name for column in columns])


def rows_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Make a table of rows; an array in a row is a list, nan in it is NULL."""
    values = zip(*rows, strict=True) if rows else ([] for _ in columns)
    return as_table(columns, [_column(v, c) for v, c in zip(values, columns, strict=True)])


def _column(values: Sequence[Any], column: Column) -> pa.Array:
    if not values or not all(isinstance(value, np.ndarray) for value in values):
        return pa.array(values, column.arrow)
    # large matrices: put together by numpy, not number by number
    ends = np.cumsum([0, *(len(value) for value in values)])
    flat = pa.array(np.concatenate(values), from_pandas=True)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat).cast(column.arrow)


@dataclass(frozen=True)
class RowBuilder:
    """Checks and packs the forward passes of one run."""

    level: Level
    sites: Sequence[SiteInfo]  # a forward pass has the rows of every one
    layout: Layout
    columns_of: Mapping[str, Sequence[Column]]  # from ``schema.tables``

    def build(
        self, forward: ForwardRows, blocks: Sequence[Block], batch_id: int, seconds: float
    ) -> dict[str, pa.Table]:
        """Return the rows of one forward pass by table; large arrays are not copied.

        ``blocks`` is what :meth:`blocks` gave for it; ``seconds`` count from the run's start.

        Raises
        ------
        StoreError
            If a number of a token is not what the records promise.
        """
        tokens = forward.tokens
        n_tokens = len(tokens.token_id)
        arrays: dict[str, list[list[Any]]] = {
            "token": [self._token_columns(forward, batch_id)],
            "batch": [[[batch_id], [tokens.phase], [n_tokens], [seconds]]],
        }
        for block in blocks:
            if block.expert_ids is not None:
                columns = self._route_columns(tokens.token_id, block)
                arrays.setdefault("route", []).append(columns)
            for table, vectors in (("score", block.scores), ("hidden", block.hidden)):
                if vectors is not None and len(vectors[0]):
                    columns = self._vector_columns(tokens.token_id, block, vectors)
                    arrays.setdefault(table, []).append(columns)
        sample = self._sampled(forward, blocks)
        if len(sample):
            arrays["sample"] = [[sample]]
        return {
            name: pa.concat_tables(as_table(self.columns_of[name], columns) for columns in parts)
            for name, parts in arrays.items()
        }

    def blocks(self, forward: ForwardRows) -> list[Block]:
        """Return the sites of a forward pass packed and checked.

        Raises
        ------
        StoreError
            If a site is missing, or its arrays hold what a run file must not.
        """
        wanted = [i for i, site in enumerate(self.sites) if site.reads(forward.tokens.phase)]
        given = [
            index
            for rows in forward.sites
            for index in (rows.site_indices if isinstance(rows, SiteBlock) else (rows.site_index,))
        ]
        if sorted(given) != wanted:
            raise StoreError(
                f"A forward pass needs the rows of each of the {len(wanted)} sites once, got "
                f"site indices {sorted(given)}. Check that every site fired."
            )
        blocks = []
        n_tokens, n_domains = len(forward.tokens.token_id), len(forward.domains)
        for rows in forward.sites:
            if isinstance(rows, SiteRows):
                rows = as_block(rows, self.sites[rows.site_index])
            sites = [self.sites[index] for index in rows.site_indices]
            check_block(rows, sites, self.level, n_tokens, n_domains)
            blocks.append(rows)
        return blocks

    def _token_columns(self, forward: ForwardRows, batch_id: int) -> list[Any]:
        tokens = forward.tokens
        n_tokens = len(tokens.token_id)
        if n_tokens and int(tokens.token_id.max()) > MAX_TOKEN_ID:
            raise StoreError(
                f"A run holds token ids up to {MAX_TOKEN_ID}, got {tokens.token_id.max()}. Split "
                "the prompts over several runs."
            )
        loss = np.ma.MaskedArray(tokens.loss)
        missing = np.ma.getmaskarray(loss)
        plain = np.ma.getdata(loss).astype(np.float32)
        if (np.isnan(plain) & ~missing).any():
            raise StoreError("loss must be a number where it is not masked, got nan. Mask it.")
        return [
            tokens.token_id.astype(np.int32),
            tokens.prompt_id.astype(np.int32),
            tokens.position.astype(np.int32),
            pa.repeat(pa.scalar(tokens.phase), n_tokens),
            tokens.token.astype(np.int32),
            pa.nulls(n_tokens, pa.string()) if tokens.text is None else strings(tokens.text),
            pa.array(plain, pa.float32(), mask=missing | np.isinf(plain)),
            np.full(n_tokens, batch_id, np.int32),
            np.arange(n_tokens, dtype=np.int32),
        ]

    def _places(self, token_id: npt.NDArray[Any], block: Block) -> list[Any]:
        """Return token_id, layer and site, site after site."""
        infos = [self.sites[index] for index in block.site_indices]
        return [
            np.tile(token_id.astype(np.int32), len(infos)),
            np.repeat(np.array([info.layer for info in infos], np.int32), len(token_id)),
            np.repeat(np.array([info.site for info in infos], np.int32), len(token_id)),
        ]

    def _route_columns(self, token_id: npt.NDArray[Any], block: Block) -> list[Any]:
        ids, weights = block.expert_ids, block.weights
        assert ids is not None and weights is not None  # checked before
        id_words = pack_ids(ids.reshape(-1, ids.shape[-1]), self.layout)
        weight_words = pack_weights(weights.reshape(-1, weights.shape[-1]), self.layout)
        return [
            *self._places(token_id, block),
            *(_statistic(getattr(block, name), ids.shape[0] * ids.shape[1]) for name in STATISTICS),
            *(np.ascontiguousarray(word) for word in id_words.T),
            *(np.ascontiguousarray(word) for word in weight_words.T),
        ]

    def _vector_columns(
        self, token_id: npt.NDArray[Any], block: Block, vectors: Vectors[npt.NDArray[Any]]
    ) -> list[Any]:
        """Return the columns of ``score`` or ``hidden``; the lists of a site are one chunk."""
        rows, arrays = vectors
        return [*self._places(token_id[rows], block), pa.chunked_array(map(_lists, arrays))]

    def _sampled(self, forward: ForwardRows, blocks: Sequence[Block]) -> npt.NDArray[np.int32]:
        """Return the token ids of the forward pass that belong to the sample."""
        everywhere = LEVELS.index(self.level) >= LEVELS.index("scores")
        rows = [block.hidden[0] for block in blocks if block.hidden is not None]
        if not everywhere:
            rows += [block.scores[0] for block in blocks if block.scores is not None]
        if not rows:
            return np.empty(0, np.int32)
        chosen = rows[0] if len(rows) == 1 else np.unique(np.concatenate(rows))
        return forward.tokens.token_id[chosen].astype(np.int32)


def _statistic(values: npt.NDArray[np.float16] | None, n_rows: int) -> pa.Array:
    """Return the bits of a statistic, NULL where it is not known or has no finite value."""
    if values is None:
        return pa.nulls(n_rows, pa.uint16())
    codes = values.reshape(-1).view(np.uint16)
    infinite = (codes & np.uint16(_HALF_INFINITY)) == _HALF_INFINITY
    return pa.array(codes, pa.uint16(), mask=infinite if infinite.any() else None)


def _lists(values: npt.NDArray[np.float32]) -> pa.Array:
    """Return one list per row of values [M, E], without a copy where all are numbers."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    offsets = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
    # the score of an expert that was ruled out is -inf, which is not a number: NULL
    ruled_out = np.isneginf(flat)
    items = pa.array(flat, pa.float32(), mask=ruled_out if ruled_out.any() else None)
    return pa.LargeListArray.from_arrays(pa.array(offsets), items)


class AttentionBuilder:
    """Checks and packs the attention of the prompts of one run, in each layer that is recorded."""

    def __init__(
        self, layers: Sequence[AttentionLayer], columns_of: Mapping[str, list[Column]]
    ) -> None:
        self._layers = {layer.layer: layer for layer in layers if layer.recorded}
        self._columns_of = columns_of
        self._seen: set[int] = set()

    def build(self, rows: PromptAttention) -> dict[str, pa.Table]:
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

    def _check(self, rows: PromptAttention) -> None:
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

    def _check_layer(self, layer: LayerAttention, bins: int, rows: PromptAttention) -> None:
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

    def _prompt(self, rows: PromptAttention, bins: int) -> pa.Table:
        values = (rows.prompt_id, rows.first_token, rows.tokens, bins, rows.bin_width, rows.every)
        return as_table(self._columns_of["attention_prompt"], [[value] for value in values])

    def _heads(self, rows: PromptAttention, bins: int) -> pa.Table:
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
                _cut_lists(pa.array(received.astype(np.float32).ravel()), n_rows),
                _cut_lists(pa.chunked_array(cells).combine_chunks(), n_rows),
            ],
        )

    def _keys(self, rows: PromptAttention, layer: LayerAttention) -> pa.Table:
        """Return one row per query whose heaviest keys are kept."""
        n_queries = len(layer.top_queries) if layer.top_ids.shape[-1] else 0
        ids = layer.top_ids.transpose(1, 0, 2)[:n_queries].astype(np.int64)  # [Q, H, K]
        codes = encode_weights(layer.top_weights.transpose(1, 0, 2)[:n_queries])
        distances = np.where(ids >= 0, layer.top_queries[:n_queries, None, None] - ids, 0)
        missing = pa.array(distances.astype(np.uint32).ravel(), mask=(ids < 0).ravel())
        columns: list[Any] = [
            (rows.first_token + layer.top_queries[:n_queries]).astype(np.int32),
            np.full(n_queries, layer.layer, np.int32),
            _cut_lists(missing, n_queries),
            _cut_lists(pa.array(codes.ravel()), n_queries),
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


def _cut_lists(values: pa.Array, n_rows: int) -> pa.Array:
    """Cut values into ``n_rows`` lists of equal length."""
    offsets = np.linspace(0, len(values), n_rows + 1).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def layer_rows(layers: Sequence[AttentionLayer]) -> list[list[Any]]:
    """Return the values of the table ``attention_layer``."""
    return [[*_facts(layer), list(layer.recorded)] for layer in layers]


def _facts(layer: AttentionLayer) -> tuple[Any, ...]:
    return layer.layer, layer.module, layer.heads, layer.kind, layer.reason
