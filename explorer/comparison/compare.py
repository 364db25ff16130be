"""Put other routers in a model's place and see what they cost; choose their settings before."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd

from capture import record
from capture.progress import Progress, Reporter
from explorer.comparison.results_file import Comparison, open_comparison
from explorer.comparison.session import (
    Mode,
    Session,
    Settings,
    Unit,
    can_replay,
    read_specs,
    units_of,
)
from explorer.comparison.text_split import check_text
from explorer.errors import ComparisonError
from explorer.router_cards import RouterSpec
from explorer.run import Run, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEMO_RUN = Path("runs") / "demo.duckdb"


def compare(
    run: str | Path | Run,
    routers: Sequence[str] | None = None,
    *,
    live: bool | None = None,
    layers: bool = False,
    replay: bool = True,
    seeds: Sequence[int] = (0,),
    tokens: int = 10_000,
    fit_tokens: int = 20_000,
    seed: int = 0,
    skip: Literal["block", "layer"] = "block",
    controls: bool = True,
    latency: bool = True,
    oracle: bool = False,
    validation: bool = False,
    model: "str | Path | PreTrainedModel | None" = None,
    folder: str | Path | None = None,
    progress: bool | Callable[[Progress], None] = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Compare routers on a run: by replay of what was recorded, and live in the model.

    Parameters
    ----------
    run : str, Path or Run
        A run file, or ``"demo"``, which is ``runs/demo.duckdb``, recorded first if there is none.
    routers : sequence of str, optional
        Names of ``explorer.ROUTERS``, with arguments where they differ: ``"top_k(k=1)"``.
        Default: some of every family, compared live.
    live : bool, optional
        Run the model with each router in all its layers. Default: only without ``routers``.
    layers : bool
        Also run it with each router in one layer at a time; implies ``live``.
    replay : bool
        Route the recorded inputs again; for routers that choose experts.
    seeds : sequence of int
        Of routers that are stochastic; each gets its own rows.
    tokens, fit_tokens : int
        At most so many held-out tokens to report on, and tokens to fit on, in equal shares per
        domain. The demo model is fitted on ``demo-fit`` and reported on ``demo-heldout`` (or on
        the run's own prompts, if those are not the demo's); other runs are divided by prompts.
    seed : int
        Chooses texts.
    skip : {"block", "layer"}
        What rules about layers skip: the MoE block, or the whole layer.
    controls : bool
        Put two random controls beside every router that changes how much is computed: as much on
        average, and as much layer by layer.
    latency : bool
        Measure forward passes with and without each router, 20 times in turns.
    oracle : bool
        Also try every set of experts in the last layer and let the loss choose, see
        :mod:`explorer.comparison.oracle`: a bound, in table ``oracle``. One forward pass a set.
    validation : bool
        Fit on three quarters of the fit split and report on the rest of it, to choose prices and
        other settings before the held-out texts are seen; see :mod:`explorer.comparison.compare`.
    model : str, Path or PreTrainedModel, optional
        Default: the model that the run was recorded from.
    folder : str or Path, optional
        Where the comparison file goes. Default: beside the run.
    progress : bool or callable
        A bar, nothing, or a function that gets :class:`capture.progress.Progress`.
    cancelled : callable
        Asked between forward passes; True ends the comparison.

    Returns
    -------
    Comparison
        Rows that the file had already, for the same run, model, settings and
        :data:`explorer.comparison.session.RESULTS_VERSION`, are not
        computed again. A router that could not be compared is in table ``units`` with the reason.

    Raises
    ------
    ComparisonError, RouterError, UnknownNameError
        If there is nothing that could be compared.
    ComparisonCancelled
        What was finished is in the file.
    """
    settings = Settings(
        tokens=tokens, fit_tokens=fit_tokens, seed=seed, skip=skip, validation=validation
    )
    with ExitStack() as stack:
        if not isinstance(run, Run):
            run = stack.enter_context(open_run(demo_run() if str(run) == "demo" else run))
        check_text(run)
        modes: list[Mode] = ["replay"] if replay else []
        modes += ["live"] if live or layers or (live is None and routers is None) else []
        modes += ["live-layer"] if layers else []
        units = _units(routers, modes, seeds, controls=controls and "live" in modes)
        reporter = Reporter(progress, unit="run")
        session = Session(
            run,
            settings,
            run.info["model"] if model is None else model,
            controls=controls,
            timed=latency,
            folder=run.path.parent if folder is None else Path(folder),
            reporter=reporter,
            cancelled=cancelled,
        )
        stack.callback(lambda: reporter.enter("done", str(session.path), written=False))
        missing = session.missing(units)
        if missing:
            session.compute(missing)
        if oracle:
            session.oracle()
    return open_comparison(session.path)


def _units(
    routers: Sequence[str] | None, modes: Sequence[Mode], seeds: Sequence[int], *, controls: bool
) -> list[Unit]:
    """Return what there is to compute; replay leaves out what shows in a live run only."""
    if not modes:
        raise ComparisonError("Nothing to do: ask for replay, live or layers.")
    specs = read_specs(routers)
    chance = RouterSpec("random", {})
    if controls and chance not in specs:
        # what rules that compute as much as the model itself stand beside
        specs.append(chance)
    units = [
        unit
        for unit in units_of(specs, modes=modes, seeds=seeds)
        if unit.mode != "replay" or can_replay(unit.spec)
    ]
    if not units:
        names = ", ".join(spec.label for spec in specs)
        raise ComparisonError(f"{names} can only be compared live. Add --live (live=True).")
    return units


def demo_run(path: Path = DEMO_RUN) -> Path:
    """Return the run of the demo model, recorded first where there is none."""
    if not path.is_file():
        record("demo", "demo", path)
    return path


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
        As in :func:`explorer.comparison.compare.compare`, which gets ``options`` too (``seeds``,
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
