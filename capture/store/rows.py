"""From the records of one forward pass to Arrow tables, refusing what must not be stored."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capture.errors import StoreError
from capture.store.codec import Layout, encode_half, pack_ids, pack_weights
from capture.store.records import LEVELS, ForwardRows, Level, SiteInfo, SiteRows
from capture.store.schema import STATISTICS, Column

MAX_TOKEN_ID = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")

Vector = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


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
        array if isinstance(array, pa.Array) else pa.array(array, column.arrow)
        for column, array in zip(columns, arrays, strict=True)
    ]
    return pa.Table.from_arrays(typed, names=[column.name for column in columns])


def _describe(site: SiteInfo) -> str:
    return f"site {site.site} of layer {site.layer} ({site.module})"


class RowBuilder:
    """Checks and packs the forward passes of one run.

    Parameters
    ----------
    level : Level
        What the run records.
    sites : sequence of SiteInfo
        The run's sites; a forward pass has the rows of every one.
    layout : Layout
        Bits and slots of a packed row.
    tables : dict
        Columns of every table, from ``schema.tables``.
    """

    def __init__(
        self,
        level: Level,
        sites: Sequence[SiteInfo],
        layout: Layout,
        tables: dict[str, list[Column]],
    ) -> None:
        self._sites = sites
        self._layout = layout
        self._tables = tables
        self._depth = LEVELS.index(level)
        self._level = level

    def build(self, forward: ForwardRows, batch_id: int, seconds: float) -> dict[str, pa.Table]:
        """Check one forward pass and return its rows by table.

        Raises
        ------
        StoreError
            If a shape, an id or a number is not what the records promise; the message names
            the site.
        """
        self._check_sites(forward)
        tokens = forward.tokens
        n_tokens = len(tokens.token_id)
        arrays: dict[str, list[Any]] = {
            "token": self._token_columns(forward, batch_id),
            "batch": [[batch_id], [tokens.phase], [n_tokens], [seconds]],
        }
        if self._depth >= LEVELS.index("ids"):
            arrays["route"] = self._route_columns(forward)
        for table in ("score", "hidden"):
            columns = self._vector_columns(forward, table)
            if columns:
                arrays[table] = columns
        sample = self._sampled(forward)
        if len(sample):
            arrays["sample"] = [sample]
        return {name: as_table(self._tables[name], columns) for name, columns in arrays.items()}

    def _check_sites(self, forward: ForwardRows) -> None:
        """Refuse a forward pass that lacks a site or whose arrays do not fit together."""
        given = sorted(site.site_index for site in forward.sites)
        if given != list(range(len(self._sites))):
            raise StoreError(
                f"A forward pass needs the rows of each of the {len(self._sites)} sites once, got "
                f"site indices {given}. Check that every site fired."
            )
        for rows in forward.sites:
            info = self._sites[rows.site_index]
            self._check_rollups(rows, info, len(forward.domains))
            self._check_routes(rows, info, len(forward.tokens.token_id))

    @staticmethod
    def _check_rollups(rows: SiteRows, info: SiteInfo, n_domains: int) -> None:
        shape = (n_domains, info.n_experts)
        sums = {"assignments": rows.assignments, "weight_sum": rows.weight_sum}
        if rows.prob_sum is not None:
            sums["prob_sum"] = rows.prob_sum
        for name, values in sums.items():
            if np.shape(values) != shape:
                raise StoreError(
                    f"{name} of {_describe(info)} must have shape {list(shape)} (domains, "
                    f"experts), got {list(np.shape(values))}. Pass one row per domain."
                )
            if not np.isfinite(values).all() or (values < 0).any():
                raise StoreError(
                    f"{name} of {_describe(info)} must be finite and not negative, got "
                    f"{values.min()}..{values.max()}. Check the model's precision (dtype)."
                )

    def _check_routes(self, rows: SiteRows, info: SiteInfo, n_tokens: int) -> None:
        wanted = self._depth >= LEVELS.index("ids")
        if wanted != (rows.expert_ids is not None) or wanted != (rows.weights is not None):
            raise StoreError(
                f"At level {self._level} expert ids and weights are "
                f"{'stored' if wanted else 'not stored'}, but {_describe(info)} was handed over "
                f"{'without' if wanted else 'with'} them. Pass {'both' if wanted else 'None'}."
            )
        if rows.expert_ids is None or rows.weights is None:
            return
        shape = rows.expert_ids.shape
        if rows.expert_ids.ndim != 2 or shape[0] != n_tokens or not 0 < shape[1] <= info.top_k:
            raise StoreError(
                f"expert_ids of {_describe(info)} must have shape [{n_tokens}, {info.top_k}], got "
                f"{list(shape)}. Pass one row per real token."
            )
        if rows.weights.shape != shape:
            raise StoreError(
                f"weights of {_describe(info)} must have the shape of its expert_ids "
                f"{list(shape)}, got {list(rows.weights.shape)}. Pass one weight per slot."
            )
        if n_tokens:
            self._check_ids(rows, info, rows.expert_ids, rows.weights)

    @staticmethod
    def _check_ids(
        rows: SiteRows,
        info: SiteInfo,
        expert_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> None:
        low, high = int(expert_ids.min()), int(expert_ids.max())
        if low < -1 or high >= info.n_experts:
            raise StoreError(
                f"expert_ids of {_describe(info)} must lie from -1 to {info.n_experts - 1}, got "
                f"{low}..{high}. Count routed experts from 0, without shared ones."
            )
        counts = np.bincount(expert_ids.ravel() + 1, minlength=info.n_experts + 1)[1:]
        if not np.array_equal(counts, rows.assignments.sum(axis=0)):
            expert = int(np.flatnonzero(counts != rows.assignments.sum(axis=0))[0])
            raise StoreError(
                f"assignments of {_describe(info)} must count its expert_ids, but expert {expert} "
                f"has {counts[expert]} ids and a count of "
                f"{int(rows.assignments.sum(axis=0)[expert])}. Count the real tokens only."
            )
        if (weights[:, 1:] > weights[:, :-1]).any():
            raise StoreError(
                f"weights of {_describe(info)} must fall from slot to slot, got a heavier expert "
                "after a lighter one. Sort ids and weights by weight first."
            )

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

    def _places(self, forward: ForwardRows, rows: Sequence[npt.NDArray[Any]]) -> list[Any]:
        """Return token_id, layer and site, site after site, given each site's row numbers."""
        token_id = forward.tokens.token_id
        lengths = [len(r) for r in rows]
        infos = [self._sites[site.site_index] for site in forward.sites]
        return [
            np.concatenate([token_id[r] for r in rows]).astype(np.int32),
            np.repeat(np.array([info.layer for info in infos], np.int32), lengths),
            np.repeat(np.array([info.site for info in infos], np.int32), lengths),
        ]

    def _route_columns(self, forward: ForwardRows) -> list[Any]:
        ids = [site.expert_ids for site in forward.sites if site.expert_ids is not None]
        weights = [site.weights for site in forward.sites if site.weights is not None]
        everything = [np.arange(len(forward.tokens.token_id))] * len(forward.sites)
        id_words = pack_ids(ids, self._layout)
        weight_words = pack_weights(weights, self._layout)
        return [
            *self._places(forward, everything),
            *(self._statistic(forward, name) for name in STATISTICS),
            *(np.ascontiguousarray(word) for word in id_words.T),
            *(np.ascontiguousarray(word) for word in weight_words.T),
        ]

    @staticmethod
    def _statistic(forward: ForwardRows, name: str) -> pa.Array:
        """Encode one statistic of all sites, NULL where a site does not have it."""
        n_tokens = len(forward.tokens.token_id)
        parts = [getattr(site, name) for site in forward.sites]
        if all(part is None for part in parts):
            return pa.nulls(n_tokens * len(parts), pa.uint16())
        # an infinite statistic has no finite value and becomes NULL, as one that is not known
        unknown = np.full(n_tokens, np.inf, np.float32)
        joined = np.concatenate(
            [unknown if part is None else np.ma.filled(part, np.inf) for part in parts]
        )
        codes = encode_half(name, joined)
        if len(codes) != n_tokens * len(parts):
            raise StoreError(
                f"{name} must have one value per token and site, {n_tokens} x {len(parts)}, got "
                f"{len(codes)} in all. Pass None where it is not known."
            )
        return pa.array(np.ma.getdata(codes), pa.uint16(), mask=np.ma.getmaskarray(codes))

    def _vector_columns(self, forward: ForwardRows, table: str) -> list[Any]:
        """Return the columns of ``score`` or ``hidden``, or [] without any vector."""
        empty = (np.empty(0, np.int64), np.empty((0, 0), np.float32))
        vectors: list[Vector] = []
        for site in forward.sites:
            given = site.scores if table == "score" else site.hidden
            self._check_vectors(given, self._sites[site.site_index], table, forward)
            vectors.append(empty if given is None else given)
        if not any(len(rows) for rows, _ in vectors):
            return []
        lengths = np.concatenate([np.full(len(rows), v.shape[1], np.int32) for rows, v in vectors])
        flat = np.concatenate([v.astype(np.float32).ravel() for _, v in vectors])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        # the score of an expert that was ruled out is -inf, which is no number: NULL
        ruled_out = np.isneginf(flat)
        values = pa.array(flat, pa.float32(), mask=ruled_out if ruled_out.any() else None)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), values)
        return [*self._places(forward, [rows for rows, _ in vectors]), lists]

    def _check_vectors(
        self, given: Vector | None, info: SiteInfo, table: str, forward: ForwardRows
    ) -> None:
        if given is None:
            return
        rows, values = given
        n_tokens = len(forward.tokens.token_id)
        name, width = ("scores", info.n_experts) if table == "score" else ("hidden", None)
        if values.ndim != 2 or len(rows) != len(values) or width not in (None, values.shape[1]):
            raise StoreError(
                f"{name} of {_describe(info)} must have shape [{len(rows)}, {width or 'D'}], got "
                f"{list(values.shape)}. Pass one row per row number."
            )
        if name == "scores" and self._depth >= LEVELS.index("scores") and len(rows) != n_tokens:
            raise StoreError(
                f"At level {self._level} every token has scores, but {_describe(info)} has "
                f"{len(rows)} of {n_tokens}. Pass the scores of every row."
            )
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= n_tokens):
            raise StoreError(
                f"Row numbers of {name} of {_describe(info)} must lie from 0 to {n_tokens - 1}, "
                f"got {rows.min()}..{rows.max()}. Count rows within the forward pass."
            )
        bad = ~np.isfinite(values)
        if name == "scores":
            bad &= ~np.isneginf(values)
        if bad.any():
            raise StoreError(
                f"{name} of {_describe(info)} must be finite, got {values[bad][0]}. Check the "
                "model's precision (dtype)."
            )

    def _sampled(self, forward: ForwardRows) -> npt.NDArray[np.int32]:
        """Return the token ids of the forward pass that belong to the sample."""
        everywhere = self._depth >= LEVELS.index("scores")
        rows = [site.hidden[0] for site in forward.sites if site.hidden is not None]
        if not everywhere:
            rows += [site.scores[0] for site in forward.sites if site.scores is not None]
        if not rows:
            return np.empty(0, np.int32)
        chosen = np.unique(np.concatenate(rows)).astype(np.int64)
        return forward.tokens.token_id[chosen].astype(np.int32)
