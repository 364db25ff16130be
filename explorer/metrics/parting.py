"""Where two recordings of one text part, and what the pattern of their differences looks like.

A rollout engine and a trainer, two engines or two precisions route the same tokens. Shapes: T
tokens in the order of their sequences, L layers, K slots, E experts. numpy only.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

VERDICTS = {
    "same": "the same experts everywhere",
    "near-ties": "a few choices between experts that were nearly equal, all over the layers, as "
    "another precision or another order of sums makes",
    "one layer": "one layer chooses otherwise, and what comes before it does not: its weights, or "
    "the kernel that runs it",
    "shifted rows": "rows of one side stand at other tokens of the same text",
    "padding": "rows of one side are padding and no choices",
    "no pattern": "none of the known patterns: perhaps other weights, or another text",
}
MAX_SHIFT = 16  # tokens
# a token is astray where this share of its layers differs
_ASTRAY = 0.5
# of the tokens astray, for a verdict on all of them
_MOST = 0.75
# rates of differing choices: a layer of its own, and how many times those before it
_LAYER_RATE, _JUMP = 0.1, 3.0
# a rate that near-ties may have in the first layer of all
_USUAL_RATE = 0.04
# how far from chance (0) to all (1) experts of related routers are shared
_RELATED = 0.1
# near-ties swap one expert, and few of the choices are near
_ONE_SWAP, _TIE_RATE = 0.75, 0.35


class Parting(NamedTuple):
    """How two sides differ.

    Attributes
    ----------
    verdict : str
        A name in ``VERDICTS``.
    compared : int
        (token, layer) with a choice on both sides.
    mismatched : float
        Share of these where the sets of experts differ.
    by_layer : array [L]
        The same of each layer; nan where nothing was compared.
    first : (int, int) or None
        Token and layer of the first difference, token by token.
    margin : float
        There, of the first side; nan where it is not known.
    margin_rank : float
        Mean quantile of the margins where tokens first part, among all margins of their layers:
        0.5 = any, near 0 = near-ties; nan where margins are not known.
    one_swapped : float
        Share of the tokens that part whose sets first differ by one expert only.
    layer : int or None
        Of the verdict "one layer", counted from 0.
    shift : int or None
        Of the verdict "shifted rows": the second side's row of token t is the first side's row of
        token t + shift.
    """

    verdict: str
    compared: int
    mismatched: float
    by_layer: npt.NDArray[np.float64]
    first: tuple[int, int] | None = None
    margin: float = float("nan")
    margin_rank: float = float("nan")
    one_swapped: float = float("nan")
    layer: int | None = None
    shift: int | None = None


def parting(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    sequence: npt.ArrayLike,
    *,
    n_experts: int,
    margins: npt.NDArray[np.floating] | None = None,
) -> Parting:
    """Find where two sides of the same tokens part, and name the pattern.

    Parameters
    ----------
    first, second : array [T, L, K], int
        Experts; -1 = empty slot, a row of them = no record.
    sequence : array [T]
        Which text a token is of; tokens of one text follow each other.
    n_experts : int
    margins : array [T, L], optional
        Of the first side: the last chosen expert's score over that of the first not chosen; nan
        where it is not known.

    Notes
    -----
    The verdicts are tried in the order shifted rows, padding, one layer, near-ties. Tested on
    seeded faults in a small stack of routers whose experts change what later layers see:
    ``tests/explorer/test_explorer_parting.py``.
    """
    a, b = (np.sort(np.asarray(side, np.int64), axis=-1) for side in (first, second))
    texts = np.asarray(sequence)
    known = np.asarray((a >= 0).any(-1)) & np.asarray((b >= 0).any(-1))  # [T, L]
    differs = known & np.asarray((a != b).any(-1))
    compared = int(known.sum())
    seen = known.sum(0)
    by_layer = np.divide(differs.sum(0), seen, out=np.full(len(seen), np.nan), where=seen > 0)
    found = Parting(
        "same", compared, float(differs.sum() / compared) if compared else float("nan"), by_layer
    )
    padded = _fills(a, n_experts) != _fills(b, n_experts)
    if not differs.any():
        return found
    parted = np.asarray(differs.any(1))
    token = int(parted.argmax())
    start = differs.argmax(1)  # the layer where each token first parts
    rows = np.flatnonzero(parted)
    swapped = np.array([len(np.setdiff1d(a[t, start[t]], b[t, start[t]])) for t in rows])
    found = found._replace(first=(token, int(start[token])), one_swapped=(swapped == 1).mean())
    if margins is not None:
        found = found._replace(
            margin=float(margins[found.first]), margin_rank=_rank(margins, rows, start[rows])
        )
    astray = differs.sum(1) >= _ASTRAY * np.maximum(known.sum(1), 1)
    astray &= known.any(1)
    if (shift := _shift(a, b, texts, astray)) is not None:
        return found._replace(verdict="shifted rows", shift=shift)
    if astray.any() and (padded & astray).sum() >= _MOST * astray.sum():
        return found._replace(verdict="padding")
    layer = _own_layer(differs[~padded], known[~padded])
    later = slice(None) if layer is None else slice(layer + 1, None)
    # where all layers differ as strangers do, the first one is not alone
    if layer is not None and (layer or _beyond_chance(a[:, later], b[:, later], n_experts)):
        return found._replace(verdict="one layer", layer=layer)
    # what differs later differs because of what differed before
    at_risk = known & (np.cumsum(differs, 1) - differs == 0)
    rate = parted.sum() / max(int(at_risk.sum()), 1)
    few = found.one_swapped >= _ONE_SWAP and rate <= _TIE_RATE
    # without margins, sets of one expert cannot tell a near-tie from a guess
    near = not found.margin_rank > 0.4
    return found._replace(verdict="near-ties" if few and near else "no pattern")


def _rank(
    margins: npt.NDArray[np.floating], tokens: npt.NDArray[np.intp], layers: npt.NDArray[np.intp]
) -> float:
    """Return the mean quantile of some margins within their layers."""
    ranks = []
    for token, layer in zip(tokens, layers, strict=True):
        column = margins[:, layer]
        column, here = column[~np.isnan(column)], margins[token, layer]
        if not np.isnan(here):
            ranks.append(float((column < here).mean()))
    return float(np.mean(ranks)) if ranks else float("nan")


def _shift(a: Ids, b: Ids, texts: npt.NDArray[Any], astray: npt.NDArray[np.bool_]) -> int | None:
    """Return by how many tokens the rows that are astray are shifted."""
    best, best_share = None, 0.0
    for size in range(1, MAX_SHIFT + 1):
        for shift in (size, -size):
            here = np.flatnonzero(astray)
            there = here + shift
            inside = (there >= 0) & (there < len(a))
            here, there = here[inside], there[inside]
            same_text = texts[here] == texts[there]
            here, there = here[same_text], there[same_text]
            if len(here) < max(4, 0.2 * astray.sum()):
                continue
            alike = (a[there] == b[here]).all(-1).mean(-1)
            share = float((alike > _ASTRAY).mean())
            if share > best_share:
                best, best_share = shift, share
    return best if best_share >= _MOST else None


def _fills(ids: Ids, n_experts: int) -> npt.NDArray[np.bool_]:
    """Return which tokens' rows [T, L, K], sorted, are fillers: none, counted up, or all alike.

    Padding is zeros, which read as no record, experts counted up (``arange % E``), or one row again
    and again.
    """
    n_layers, top_k = ids.shape[1:]
    none = (ids < 0).all((1, 2))
    steps = np.diff(ids, axis=-1, append=ids[..., :1] + n_experts)
    run_of = (steps == 1).sum(-1) >= top_k - 1
    if top_k == 1:
        run_of = np.diff(ids[..., 0], axis=1, append=ids[:, :1, 0] + n_layers) % n_experts == 1
    counted_up = run_of.all(1) & (n_layers * (top_k - 1) >= 4 if top_k > 1 else n_layers >= 4)
    alike = (ids == ids[:, :1]).all((1, 2)) & (n_layers > 2)
    before = np.concatenate([[False], (ids[1:] == ids[:-1]).all((1, 2))])
    again = before | np.concatenate([before[1:], [False]])
    return np.asarray(none | counted_up | alike | again)


def _beyond_chance(a: Ids, b: Ids, n_experts: int) -> bool:
    """Return whether sets [T, L, K] share more than those of routers that know nothing of another.

    Without a layer they do.
    """
    if not a.shape[1]:
        return True
    shared = (a[..., :, None] == b[..., None, :]) & (a >= 0)[..., :, None]
    chance = a.shape[2] / n_experts
    return bool(shared.any(-1).mean() - chance > _RELATED * (1 - chance))


def _own_layer(differs: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]) -> int | None:
    """Return the layer that begins to differ by itself, if there is one."""
    seen = known.sum(0)
    rate = np.divide(differs.sum(0), seen, out=np.zeros(len(seen)), where=seen > 0)
    # what a rate may be by the chance of few tokens
    floor = _USUAL_RATE + 2 / np.maximum(seen, 1)
    best, best_jump = None, _JUMP
    for layer in range(len(rate)):
        before = max(rate[:layer].max(initial=0.0), floor[layer])
        if rate[layer] >= _LAYER_RATE and rate[layer] / before >= best_jump:
            best, best_jump = layer, rate[layer] / before
    return best
