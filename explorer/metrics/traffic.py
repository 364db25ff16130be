"""What a placement of experts is worth on traffic that it was not made from, and when to renew it.

Windows of traffic are held out one at a time. Which policy is best is itself learned from traffic,
so that it is chosen within the windows that are left, and judged on the one that was held out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import MetricError
from explorer.metrics.placement import (
    Floats,
    Ints,
    Placement,
    checked_windows,
    gpu_load,
    overall_balancedness,
    place,
)

_FOLDS = 4  # of the windows that are left, to choose a policy on


class HeldOut(NamedTuple):
    """How a policy balances the traffic that it was made from, and traffic that it was not.

    Attributes
    ----------
    own : array [W]
        Overall balancedness of each window under the placement of all windows.
    held_out : array [W]
        The same under the placement of all other windows.
    validation : array [W]
        Mean of the same over the *other* windows, each under a placement made from neither it nor
        the window itself: what a policy may be chosen by for that window. nan with two windows.
    stragglers : array [L]
        Largest over mean load of the GPUs in each layer, mean over held-out windows.
    """

    own: Floats
    held_out: Floats
    validation: Floats
    stragglers: Floats


def held_out(
    windows: npt.ArrayLike, policy: str, *, gpus: int, nodes: int, groups: int, replicas: int
) -> HeldOut:
    """Judge a policy on windows of traffic [W, L, E] that it was not made from, one at a time.

    Raises
    ------
    MetricError
        With fewer than two windows, or as ``placement.place`` does.
    """
    loads = checked_windows(windows)
    if len(loads) < 2:
        raise MetricError(
            f"Expected two or more windows of traffic to hold one out, got {len(loads)}."
        )
    sizes = {"gpus": gpus, "nodes": nodes, "groups": groups, "replicas": replicas}
    whole = place(loads, policy, **sizes)
    numbers = np.arange(len(loads))
    held, validation, stragglers = [], [], []
    for i, window in enumerate(loads):
        rest = np.delete(numbers, i)
        ranks = gpu_load(window, place(loads[rest], policy, **sizes), gpus)
        held.append(overall_balancedness(ranks))
        with np.errstate(invalid="ignore"):  # a layer without load has no straggler
            stragglers.append(ranks.max(-1) / ranks.mean(-1))
        inner = []
        for fold in np.array_split(rest, min(_FOLDS, len(rest))) if len(rest) > 1 else []:
            made = place(loads[np.setdiff1d(rest, fold)], policy, **sizes)
            inner += [overall_balancedness(gpu_load(loads[j], made, gpus)) for j in fold]
        validation.append(np.nanmean(inner) if inner else np.nan)
    own = [overall_balancedness(gpu_load(window, whole, gpus)) for window in loads]
    known = np.ma.masked_invalid(stragglers).mean(0).filled(np.nan)
    return HeldOut(np.array(own), np.array(held), np.array(validation), np.asarray(known))


class ChosenPolicy(NamedTuple):
    """What comes of taking the policy that is best on other windows.

    Attributes
    ----------
    policies : list of str
        Taken for each window, by ``HeldOut.validation``.
    held_out : array [W]
        Overall balancedness of each window under it.
    """

    policies: list[str]
    held_out: Floats


def choose(judged: Mapping[str, HeldOut]) -> ChosenPolicy | None:
    """Choose a policy for each window without looking at it; None with two windows."""
    names = list(judged)
    scores = np.array([judged[name].validation for name in names])
    if np.isnan(scores).all():
        return None
    best = np.where(np.isnan(scores), -np.inf, scores).argmax(0)
    held = np.array([judged[name].held_out for name in names])
    return ChosenPolicy([names[i] for i in best], held[best, np.arange(held.shape[1])])


def rebalanced_later(
    windows: npt.ArrayLike, policy: str, *, gpus: int, nodes: int, groups: int, replicas: int
) -> Floats:
    """Return what a placement made at one window does to the windows after it.

    Parameters
    ----------
    windows : array [W, L, E]
        In order of time.

    Returns
    -------
    array [W, W]
        Overall balancedness of window ``j`` under the placement made from window ``i``; nan where
        ``j < i``. The diagonal is what was predicted when it was made, the rest what came of it.
    """
    loads = checked_windows(windows)
    sizes = {"gpus": gpus, "nodes": nodes, "groups": groups, "replicas": replicas}
    found = np.full((len(loads), len(loads)), np.nan)
    for made in range(len(loads)):
        placement = place(loads[made : made + 1], policy, **sizes)
        for later in range(made, len(loads)):
            found[made, later] = overall_balancedness(gpu_load(loads[later], placement, gpus))
    return found


class Renewal(NamedTuple):
    """What comes of making the placement again after every so many windows.

    Attributes
    ----------
    every : int or None
        Windows; None = the placement of the first window stays.
    held_out : array [W - 1]
        Overall balancedness of each window after the first, under the placement in force.
    copies : float
        Experts that are loaded each time, all layers and GPUs together; 0 without a renewal.
    most : float
        Of these, those of the GPU that loads most.
    """

    every: int | None
    held_out: Floats
    copies: float
    most: float

    def pays_from(self, never: "Renewal", seconds_per_expert: float) -> float:
        """Return from how long on a renewal pays, against ``never`` making it again.

        Parameters
        ----------
        seconds_per_expert : float
            To load one expert onto a GPU; GPUs load side by side.

        Returns
        -------
        float, seconds
            The time that the experts' layers would need for one window on even GPUs: slower GPUs
            stretch it by 1 / balancedness, and what a renewal saves of that has to exceed what it
            costs. inf where it saves nothing.
        """
        if self.every is None:
            return float("nan")
        saved = float(np.nanmean(1 / never.held_out) - np.nanmean(1 / self.held_out))
        cost = self.most * seconds_per_expert / self.every
        return cost / saved if saved > 0 else float("inf")


def renewals(
    windows: npt.ArrayLike, policy: str, *, gpus: int, nodes: int, groups: int, replicas: int
) -> list[Renewal]:
    """Serve windows [W, L, E] in order, with placements that are made again now and then.

    A placement is made from the windows since the one before, and serves those that follow.

    Returns
    -------
    list of Renewal
        After every window, every second, fourth and so on, and never.
    """
    loads = checked_windows(windows)
    sizes = {"gpus": gpus, "nodes": nodes, "groups": groups, "replicas": replicas}
    found = []
    periods = [2**n for n in range(10) if 2**n < len(loads) - 1]
    for every in (*periods, None):
        made = place(loads[:1], policy, **sizes)
        held, copies = [], []
        for now in range(1, len(loads)):
            if every is not None and now > 1 and (now - 1) % every == 0:
                fresh = place(loads[now - every : now], policy, **sizes)
                copies.append(moved(made, fresh, gpus).sum(0))
                made = fresh
            held.append(overall_balancedness(gpu_load(loads[now], made, gpus)))
        each = np.array(copies) if copies else np.zeros((1, gpus))
        found.append(
            Renewal(every, np.array(held), float(each.sum(1).mean()), float(each.max(1).mean()))
        )
    return found


def moved(before: Placement, after: Placement, num_gpus: int) -> Ints:
    """Return how many copies each GPU has to load in each layer when placements change, [L, G].

    A copy that its GPU holds already, in whatever slot, is not loaded again.
    """
    old, new = (one.phy2log.reshape(len(one.phy2log), num_gpus, -1) for one in (before, after))
    if old.shape != new.shape:
        raise MetricError(
            f"Expected two placements of equal size, got {list(old.shape)} and {list(new.shape)} "
            "(layers, GPUs, slots)."
        )
    n_experts = int(max(old.max(), new.max())) + 1
    counts = [np.apply_along_axis(np.bincount, -1, one, minlength=n_experts) for one in (old, new)]
    return np.asarray(np.maximum(counts[1] - counts[0], 0).sum(2), dtype=np.int64)


def mean_interval(
    values: npt.ArrayLike, *, in_time: bool, n_draws: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of windows [W].

    Parameters
    ----------
    in_time : bool
        Windows follow each other, so that neighbours are alike: blocks of about ``W ** (1/3)``
        neighbours are drawn, the last beside the first (Politis and Romano 1992). Otherwise
        windows are drawn one by one.
    """
    given = np.asarray(values, dtype=np.float64)
    n = len(given)
    size = max(1, round(n ** (1 / 3))) if in_time else 1
    random = np.random.default_rng(seed)
    starts = random.integers(0, n, (n_draws, -(-n // size)))
    rows = ((starts[..., None] + np.arange(size)) % n).reshape(n_draws, -1)[:, :n]
    low, high = np.nanquantile(np.nanmean(given[rows], axis=1), [0.025, 0.975])
    return float(low), float(high)
