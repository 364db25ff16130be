"""The oracle of the last layer: each token's experts chosen by the loss itself, a bound.

After the last layer nothing attends any more, so a token's experts there change its own prediction
only, and every set of experts can be tried on all tokens at once, one set a pass. The best of them
is chosen by the token that follows: it bounds what a router of that layer could reach, and no
router can know it. Even the better one of two random sets may beat a router, which shows how little
such a bound says about headroom.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capture.model.sites import text_config
from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import summed
from explorer.comparison.live import LiveModel
from explorer.errors import ComparisonError
from explorer.routers import RouterInfo, RouterInputs, Routing, RoutingRouter
from explorer.routers.live_rule import LiveRule
from explorer.routers.scores import host_scores, slots, weigh

MOST_SETS = 500  # of experts that are tried; beyond, so many random ones
DRAWS = (1, 2, 4, 8, 16)  # of "best of n"
SAME = 1e-5  # nats; the model's own set and the same set by our rule differ by rounding
_TOKENS_AT_ONCE = 1 << 14

Told = Callable[[int, int], None]  # sets done, sets in all


class OneSet(RoutingRouter):
    """Send every token to the same experts, weighed as the model would.

    Parameters
    ----------
    experts : sequence of int
    """

    info = RouterInfo(
        name="one_set",
        family="control",
        title="One set of experts for all tokens",
        summary="Every token gets the same experts.",
        formula="S = const",
        paper="",
        needs=frozenset({"logits"}),
    )

    def __init__(self, experts: tuple[int, ...]) -> None:
        self.experts = experts

    def _route(self, inputs: RouterInputs) -> Routing:
        scores = host_scores(inputs.tensor("logits"), inputs)
        ids = torch.tensor(self.experts, device=scores.device).expand(len(scores), -1)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the model's gate, whose scores are the weights."""
        return 2.0 * d * n_experts


def last_layer_oracle(
    live: LiveModel, *, seed: int = 0, told: Told = lambda done, total: None
) -> list[dict[str, Any]]:
    """Try sets of experts in the last layer, all other layers as they are.

    Parameters
    ----------
    live : LiveModel
    seed : int
        Draws sets where there are more than ``MOST_SETS``.
    told : callable
        Told after every pass how many sets were tried, and of how many.

    Returns
    -------
    list of dict
        Rows of table ``oracle``: the model itself, the best set of each token, a random one, the
        best of ``n`` random ones (the exact expectation over the sets tried), the worst.

    Raises
    ------
    ComparisonError
        If the last decoder layer has no router: what comes after would mix tokens.
    """
    place, n_experts, top_k = _last(live)
    sets, whole = _sets(n_experts, top_k, seed)
    native = np.concatenate(live.native.losses)
    losses = np.empty((len(sets), len(native)), np.float32)
    for number, experts in enumerate(sets):
        rule = LiveRule(OneSet(experts), live.conventions[place])
        losses[number] = np.concatenate(live.losses({place: rule}, only=[place]))
        told(number + 1, len(sets))
    found = dict(_statistics(losses))
    better = (losses < native - SAME).sum(axis=0)
    about = {
        "layer": place[0],
        "site": place[1],
        "sets": len(sets),
        "enumerated": whole,
        "tokens": live.report.n_tokens,
        "sequences": len(live.report.sequences),
        "native_best": float((better == 0).mean()),
        "native_rank": float(better.mean()) + 1,
    }
    rows: dict[tuple[str, int | None], npt.NDArray[Any]] = {("model", None): native, **found}
    own = _by_sequence(live, native)
    return [
        {"kind": kind, "n": n, **about, **_change(own, _by_sequence(live, values))}
        for (kind, n), values in rows.items()
    ]


def _last(live: LiveModel) -> tuple[tuple[int, int], int, int]:
    """Return the last router's place, experts and top k."""
    info = max((site.info for site in live.sites), key=lambda each: (each.layer, each.site))
    config: Any = text_config(live.model)
    last = int(config.num_hidden_layers) - 1
    if info.layer != last:
        raise ComparisonError(
            f"The oracle needs a router in the last decoder layer, {last}; the last router is in "
            f"layer {info.layer}, and what comes after it mixes tokens."
        )
    return (info.layer, info.site), info.n_experts, info.top_k


def _sets(n_experts: int, top_k: int, seed: int) -> tuple[list[tuple[int, ...]], bool]:
    """Return sets of experts, and whether they are all there are."""
    if comb(n_experts, top_k) <= MOST_SETS:
        return list(combinations(range(n_experts), top_k)), True
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < MOST_SETS:
        chosen = generator.choice(n_experts, top_k, replace=False)
        drawn[tuple(sorted(chosen.tolist()))] = None
    return list(drawn), False


def _statistics(
    losses: npt.NDArray[np.float32],
) -> Iterator[tuple[tuple[str, int | None], npt.NDArray[np.float64]]]:
    """Yield what choosing in some way gives each token, [T] each, from losses [sets, T]."""
    yield ("best", None), losses.min(axis=0).astype(np.float64)
    draws = [n for n in DRAWS if n <= len(losses)]
    weights = np.array([least_of(n, len(losses)) for n in draws])  # [draws, sets]
    expected = np.empty((len(draws), losses.shape[1]))
    for start in range(0, losses.shape[1], _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        expected[:, part] = weights @ np.sort(losses[:, part], axis=0)
    for n, values in zip(draws, expected, strict=True):
        yield ("random", None) if n == 1 else ("best of n", n), values
    yield ("worst", None), losses.max(axis=0).astype(np.float64)


def least_of(n: int, total: int) -> npt.NDArray[np.float64]:
    """Return how likely the i-th least of ``total`` is the least of ``n`` drawn without repeat."""
    return np.array([comb(total - 1 - i, n - 1) / comb(total, n) for i in range(total)])


def _by_sequence(live: LiveModel, losses: npt.NDArray[Any]) -> SequenceLosses:
    ends = np.cumsum([len(each) for each in live.native.losses])[:-1]
    return summed(np.split(losses, ends))


def _change(native: SequenceLosses, losses: SequenceLosses) -> dict[str, Any]:
    change = loss_change(native, losses)
    error = None if np.isnan(change.standard_error) else change.standard_error
    return {"loss": losses.mean, "loss_change": change.change, "loss_se": error}
