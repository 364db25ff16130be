"""Routing that changed: which tokens, how it follows from small margins, and where it began."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from explorer.comparison.conditions.trace import Floats, Key, Trace

BINS = 10

Bools = npt.NDArray[np.bool_]


def set_changed(base: npt.NDArray[Any], other: npt.NDArray[Any]) -> Bools:
    """Return which tokens have another set of experts, [T], from sorted ids [T, K]."""
    if base.shape[1] != other.shape[1]:
        wide = max(base.shape[1], other.shape[1])
        base, other = (
            np.sort(np.pad(ids, ((0, 0), (0, wide - ids.shape[1])), constant_values=-1), axis=1)
            for ids in (base, other)
        )
    return np.asarray((base != other).any(axis=1))


def slots_changed(base: npt.NDArray[Any], other: npt.NDArray[Any]) -> Floats:
    """Return each token's share of filled slots whose expert is not in the base's set, [T]."""
    found = (other[:, :, None] == base[:, None, :]).any(axis=2)
    filled = other >= 0
    lost = (filled & ~found).sum(axis=1)
    return np.asarray(lost / np.maximum(filled.sum(axis=1), 1), dtype=np.float64)


def margin_auc(margins: Floats, changed: Bools) -> float:
    """Return the chance that a token that changed had a smaller margin than one that did not.

    Ties count half; NaN without tokens of both kinds.
    """
    n, m = int(changed.sum()), int((~changed).sum())
    if not n or not m:
        return float("nan")
    ranks = rankdata(-margins)
    return float((ranks[changed].sum() - n * (n + 1) / 2) / (n * m))


def first_divergence(changed: Sequence[Bools]) -> npt.NDArray[np.int64]:
    """Return the first router of each token [T] that changed, as its place in order; -1 = none."""
    stacked = np.stack(changed)
    return np.where(stacked.any(axis=0), stacked.argmax(axis=0), -1)


def flip_rows(label: str, base: Trace, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Return the flips of each router, and of all, averaged over draws."""
    draws = [_flips(base, trace) for trace in traces]
    rows = []
    for at, (layer, site) in enumerate([*base.keys, (-1, -1)]):
        values = {name: float(np.mean([draw[at][name] for draw in draws])) for name in draws[0][at]}
        tokens = len(base.heaviest(base.keys[0]))
        rows.append({"condition": label, "layer": layer, "site": site, "tokens": tokens, **values})
    return rows


def _flips(base: Trace, trace: Trace) -> list[dict[str, float]]:
    changed = [set_changed(base.sets(key), trace.sets(key)) for key in base.keys]
    first = first_divergence(changed)
    rows = []
    for at, key in enumerate(base.keys):
        margins = base.margins(key)
        auc = float("nan") if margins is None else margin_auc(margins, changed[at])
        rows.append(
            {
                "set_flips": float(changed[at].mean()),
                "top1_flips": float((base.heaviest(key) != trace.heaviest(key)).mean()),
                "slot_flips": float(slots_changed(base.sets(key), trace.sets(key)).mean()),
                "margin_auc": auc,
                "first_divergence": float((first == at).mean()),
            }
        )
    any_top1 = np.stack([base.heaviest(k) != trace.heaviest(k) for k in base.keys]).any(axis=0)
    aucs = [row["margin_auc"] for row in rows if not np.isnan(row["margin_auc"])]
    rows.append(
        {
            "set_flips": float((first >= 0).mean()),
            "top1_flips": float(any_top1.mean()),
            "slot_flips": float(np.mean([row["slot_flips"] for row in rows])),
            "margin_auc": float(np.mean(aucs)) if aucs else float("nan"),
            "first_divergence": float((first >= 0).mean()),
        }
    )
    return rows


def margin_rows(label: str, base: Trace, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Return flips by margin for each router whose margins are known, averaged over draws."""
    rows = []
    for key in base.keys:
        margins = base.margins(key)
        if margins is None:
            continue
        flips = np.mean([set_changed(base.sets(key), t.sets(key)) for t in traces], axis=0)
        for number, members in enumerate(margin_bins(margins)):
            rows.append(_bin_row(label, key, number, margins[members], flips[members]))
    return rows


def margin_bins(margins: Floats, bins: int = BINS) -> list[npt.NDArray[np.int64]]:
    """Return the tokens of equal bins by margin, smallest first; empty bins are left out."""
    order = np.argsort(margins, kind="stable")
    return [part for part in np.array_split(order, bins) if len(part)]


def _bin_row(label: str, key: Key, number: int, margins: Floats, flips: Floats) -> dict[str, Any]:
    return {
        "condition": label,
        "layer": key[0],
        "site": key[1],
        "bin": number,
        "margin_low": float(margins.min()),
        "margin_high": float(margins.max()),
        "tokens": len(margins),
        "set_flips": float(flips.mean()),
    }
