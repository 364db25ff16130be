"""``explorer.compare``: put other routers in a model's place and see what they cost."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from explorer.comparison.file import Comparison, open_comparison
from explorer.comparison.names import RouterSpec
from explorer.comparison.plan import Mode, Settings, Unit, read_specs, units_of
from explorer.comparison.progress import Progress, Reporter
from explorer.comparison.session import Session, can_replay
from explorer.comparison.texts import check_text
from explorer.errors import ComparisonError
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
        other settings before the held-out texts are seen; see :mod:`explorer.comparison.pick`.
    model : str, Path or PreTrainedModel, optional
        Default: the model that the run was recorded from.
    folder : str or Path, optional
        Where the comparison file goes. Default: beside the run.
    progress : bool or callable
        A bar, nothing, or a function that gets :class:`explorer.comparison.progress.Progress`.
    cancelled : callable
        Asked between forward passes; True ends the comparison.

    Returns
    -------
    Comparison
        Rows that the file had already, for the same run, model, code and settings, are not
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
        reporter = Reporter(progress)
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
        stack.callback(lambda: reporter.close(str(session.path)))
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
        from capture import record

        record("demo", "demo", path)
    return path
