"""Choose settings of rules, such as prices, on a part of the fit split, never on reported texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from explorer.comparison.api import compare
from explorer.comparison.plan import read_specs
from explorer.errors import ComparisonError


class Picked(NamedTuple):
    """What was chosen for one rule.

    Attributes
    ----------
    name : str
        In ``ROUTERS``.
    chosen : str
        The setting that is to be reported, as tables write it.
    among : tuple of str
    budget : float
        Most expert operations, a share of the model's own.
    """

    name: str
    chosen: str
    among: tuple[str, ...]
    budget: float

    def __str__(self) -> str:
        others = ", ".join(self.among)
        return (
            f"{self.chosen} was chosen among {others}: on a part of the fit split that nothing was "
            f"fitted on it loses least at {self.budget:.0%} of the experts' operations or less"
        )


def pick(
    run: Any, routers: Sequence[str], *, budget: float, **options: Any
) -> tuple[list[str], list[Picked]]:
    """Choose one setting of each rule that is named with several.

    Parameters
    ----------
    run : str, Path or Run
        As in :func:`explorer.comparison.api.compare`, which gets ``options`` too (``seeds``,
        ``tokens``, ``fit_tokens``, ``seed``, ``skip``, ``model``, ``folder``, ``progress``).
    routers : sequence of str
        Such as ``policy_gradient(price=0.02)`` and ``policy_gradient(price=0.025)``; rules with
        one setting stay.
    budget : float
        Most expert operations, a share of the model's own.

    Returns
    -------
    routers : list of str
        One a rule, in their order: to be compared on held-out texts.
    picked : list of Picked

    Raises
    ------
    ComparisonError
        If no rule has several settings, or none of a rule's keeps to the budget.
    """
    groups: dict[str, list[str]] = {}
    for spec in read_specs(routers):
        groups.setdefault(spec.name, []).append(spec.label)
    several = [label for labels in groups.values() if len(labels) > 1 for label in labels]
    if not several:
        raise ComparisonError(
            "Expected several settings of one rule to choose among, such as "
            "policy_gradient(price=0.02), policy_gradient(price=0.025)."
        )
    quick: dict[str, Any] = {"controls": False, "latency": False, "replay": False}
    with compare(run, several, live=True, validation=True, **quick, **options) as comparison:
        table = comparison.table
        errors = comparison.rows("units")["error"].dropna().tolist()
    live = table[(table["mode"] == "live") & table["layer"].isna()]
    if errors:
        raise ComparisonError(f"No setting was chosen: {errors[0]}")
    picked = [
        Picked(name, least_loss(live[live["router"].isin(labels)], budget), tuple(labels), budget)
        for name, labels in groups.items()
        if len(labels) > 1
    ]
    chosen = {one.name: one.chosen for one in picked}
    return [chosen.get(name, labels[0]) for name, labels in groups.items()], picked


def least_loss(rows: pd.DataFrame, budget: float) -> str:
    """Return the router with the least loss within a budget, means over seeds.

    Parameters
    ----------
    rows : DataFrame
        ``router``, ``loss_change``, ``expert_flops_ratio``.
    budget : float
    """
    means = rows.groupby("router", sort=False)[["loss_change", "expert_flops_ratio"]].mean()
    within = means[means["expert_flops_ratio"] <= budget]
    if within.empty:
        cost = ", ".join(f"{name} {share:.1%}" for name, share in means.iloc[:, 1].items())
        raise ComparisonError(
            f"Expected a setting with at most {budget:.0%} of the experts' operations, got {cost}."
        )
    return str(within["loss_change"].idxmin())
