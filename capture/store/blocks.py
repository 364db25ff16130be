"""Blocks of sites: packing plain rows into one, and refusing what must not be stored."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from capture.errors import StoreError
from capture.store.codec import NO_WEIGHT, encode_half, encode_weights, id_dtype
from capture.store.records import LEVELS, Level, SiteBlock, SiteInfo, SiteRows, Vectors
from capture.store.schema import STATISTICS


def as_block(rows: SiteBlock | SiteRows, site: SiteInfo) -> SiteBlock:
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
        weights=None if weights is None else encode_weights(weights)[None],
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


def _half(name: str, values: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float16] | None:
    if values is None:
        return None
    return encode_half(name, np.ma.filled(values, np.inf))[None]


def _copied(
    given: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None,
) -> Vectors | None:
    if given is None:
        return None
    return np.array(given[0], np.int64), [np.array(given[1], np.float32)]


def check_block(
    block: SiteBlock, sites: Sequence[SiteInfo], level: Level, n_tokens: int, n_domains: int
) -> None:
    """Refuse arrays that do not fit together or hold what a run file must not.

    Parameters
    ----------
    block : SiteBlock
    sites : sequence of SiteInfo
        Those of the block, in its order.
    level : Level
        What the run records.
    n_tokens, n_domains : int
        Of the forward pass.

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


def _check_rollups(block: SiteBlock, sites: Sequence[SiteInfo], n_domains: int) -> None:
    shape = (n_domains, sites[0].n_experts)
    sums: dict[str, npt.NDArray[Any]] = {
        "assignments": block.assignments, "weight_sum": block.weight_sum
    }  # fmt: skip
    if block.prob_sum is not None:
        sums["prob_sum"] = block.prob_sum
    for name, values in sums.items():
        if values.shape != (len(sites), *shape):
            raise StoreError(
                f"{name} of {describe(sites[0])} must have shape {list(shape)} (domains, "
                f"experts), got {list(values.shape[1:])}. Pass one row per domain."
            )
        # nan is neither; an infinite sum is as large as none other
        bad = ~((values >= 0) & (values < np.inf))
        if bad.any():
            index = int(np.argwhere(bad)[0][0])
            raise StoreError(
                f"{name} of {describe(sites[index])} must be finite and not negative, got "
                f"{values[index].min()}..{values[index].max()}. Check the model's precision "
                "(dtype)."
            )


def _check_routes(block: SiteBlock, sites: Sequence[SiteInfo], level: Level, n_tokens: int) -> None:
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
        _check_weights(weights, sites)


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
    name: str, given: Vectors, sites: Sequence[SiteInfo], level: Level, n_tokens: int
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
