"""What conditions do to loss and routing, on the texts of a run, kept in its comparison file.

Own and forced routing, routing that flips, and where it first diverged.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.model.forward import plan_batches
from capture.model.load import load_model, loading_bars
from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import BATCH_TOKENS, Kept, sequence_losses
from capture.swap.routers import site_key, swap
from explorer.comparison.compare import compare, demo_run
from explorer.comparison.conditions import USUAL
from explorer.comparison.conditions.catalogue import make_conditions
from explorer.comparison.conditions.condition import (
    Applied,
    Condition,
    Subject,
    model_bytes,
)
from explorer.comparison.conditions.distilled_routers import STUDENTS, measure_students
from explorer.comparison.conditions.routing_changes import (
    RoutingTrace,
    flip_rows,
    margin_rows,
    traced,
)
from explorer.comparison.cost import memory_reads
from explorer.comparison.results_file import CONDITION_TABLES, open_comparison, write_comparison
from explorer.comparison.session import fingerprint
from explorer.comparison.text_split import split_texts
from explorer.errors import ConditionError
from explorer.run import open_run

# columns of each table, as they are documented in ConditionTables
CONDITION_COLUMNS = (
    *("condition", "name", "kind", "weights", "routing", "loss", "loss_change", "loss_se"),
    *("perplexity_ratio", "tokens", "sequences", "draws", "draw_spread", "weight_bytes_ratio"),
    *("method", "calibrated", "simulated", "hit_rate", "draft_experts", "max_violation"),
)
FLIP_COLUMNS = (
    *("condition", "layer", "site", "tokens", "set_flips", "top1_flips", "slot_flips"),
    *("margin_auc", "first_divergence"),
)
MARGIN_COLUMNS = (
    *("condition", "layer", "site", "bin", "margin_low", "margin_high", "tokens", "set_flips"),
)

Progress = Callable[[str], None]


class ConditionTables(NamedTuple):
    """What conditions were measured to do.

    Attributes
    ----------
    conditions : DataFrame
        One row for each cell of a condition's 2x2: ``condition`` (label; ``"base"`` is the model
        as it was loaded), ``name`` in ``CONDITIONS``, ``kind``, ``weights`` and ``routing``
        (whose: ``"base"`` or ``"condition"``), ``loss`` (nats a token), ``loss_change`` against
        the base, ``loss_se`` (paired, by sequence), ``perplexity_ratio``, ``tokens``,
        ``sequences``, ``draws`` (averaged over), ``draw_spread`` (standard deviation of the loss
        between them, nats; NaN for one), ``weight_bytes_ratio`` (as stored, 1 = the base's),
        ``method`` (how a choice was made, what is tested), ``calibrated``, ``simulated``; of own
        weights and own routing ``hit_rate``, ``draft_experts`` and ``max_violation``, see
        ``cost.memory_reads``, mean of routers. A condition that takes experts away has no row
        with weights ``"condition"`` and routing ``"base"``.
    flips : DataFrame
        One row for each router: ``condition``, ``layer``, ``site``, ``tokens``; shares of tokens
        whose set of experts (``set_flips``) or heaviest expert (``top1_flips``) changed, of
        slots whose expert is not in the base's set (``slot_flips``); ``margin_auc``: how well a
        small margin in the base foretells a changed set (1 = perfectly, 0.5 = not at all, NaN
        without flips); ``first_divergence``: share of tokens whose set changed here first. Rows
        with ``layer`` -1 hold any-layer shares: tokens with a change anywhere, and the mean over
        routers of the rest.
    flip_margins : DataFrame
        Flips by margin: tokens of each router in ten equal bins of the base's margin, ``bin``
        0 the smallest, from ``margin_low`` to ``margin_high``.
    """

    conditions: pd.DataFrame
    flips: pd.DataFrame
    flip_margins: pd.DataFrame


class ConditionCell(NamedTuple):
    """One run over the texts.

    Attributes
    ----------
    losses : SequenceLosses
    trace : RoutingTrace
    """

    losses: SequenceLosses
    trace: RoutingTrace


def run_texts(
    subject: Subject, texts: Sequence[npt.ArrayLike], forced: RoutingTrace | None = None
) -> ConditionCell:
    """Run texts through the model as it is now, by its own routing or by that of a trace."""

    @contextmanager
    def around() -> Iterator[RoutingTrace]:
        swapped: AbstractContextManager[Any] = nullcontext()
        if forced is not None:
            swapped = swap(subject.model, subject.sites, forced.tape, checked=False)
        # the trace within the swap sees what is forced
        with swapped, traced(subject) as trace:
            yield trace

    kept = Kept(around)
    losses = sequence_losses(subject.model, texts, swapped=kept)
    return ConditionCell(losses, kept.values[-1])


def measure(
    subject: Subject,
    texts: Sequence[npt.ArrayLike],
    conditions: Iterable[Condition],
    *,
    base: ConditionCell | None = None,
    progress: Progress = lambda _: None,
) -> ConditionTables:
    """Measure conditions on texts of the held-out split.

    Parameters
    ----------
    subject : Subject
        Its calibration texts must not be among ``texts``.
    texts : sequence of array [S]
        Token ids; at least two each.
    conditions : iterable of Condition
    base : ConditionCell, optional
        What :func:`run_texts` gave for the unchanged model on the same texts, to save that run.
    progress : callable, optional
        Told each condition's label before it is measured.

    Returns
    -------
    ConditionTables
    """
    _check_apart(subject, texts)
    if base is None:
        progress("base")
        base = run_texts(subject, texts)
    bytes_ = float(model_bytes(subject.model))
    rows = [
        _row(
            "base", None, base.losses, base.losses, ("base", "base"), _reads(subject, [base], texts)
        )
    ]
    flips: list[dict[str, Any]] = []
    margins: list[dict[str, Any]] = []
    for condition in conditions:
        progress(condition.label)
        each = [_measured(subject, texts, base, one) for one in condition.members()]
        details = _details(condition, [applied for applied, _ in each], bytes_)
        for place in each[0][1]:
            losses = [cells[place].losses for _, cells in each]
            facts = {**details, "draws": len(each), "draw_spread": _spread(losses)}
            if place == ("condition", "condition"):
                facts |= _reads(subject, [cells[place] for _, cells in each], texts)
            rows.append(_row(condition.label, condition, _mean(losses), base.losses, place, facts))
        traces = [cells["condition", "condition"].trace for _, cells in each]
        flips += flip_rows(condition.label, base.trace, traces)
        margins += margin_rows(condition.label, base.trace, traces)
    return ConditionTables(
        pd.DataFrame(rows, columns=list(CONDITION_COLUMNS)),
        pd.DataFrame(flips, columns=list(FLIP_COLUMNS)),
        pd.DataFrame(margins, columns=list(MARGIN_COLUMNS)),
    )


def _reads(
    subject: Subject, cells: Sequence[ConditionCell], texts: Sequence[npt.ArrayLike]
) -> dict[str, float]:
    """Return what choices ask of memory, mean of routers and draws."""
    lengths = [len(np.asarray(text)) for text in texts]
    # rows of a trace are those of the passes, whose batches depend on the lengths only
    order = np.concatenate(list(plan_batches(lengths, BATCH_TOKENS)))
    of = np.repeat(order, np.array(lengths)[order])
    found = [
        memory_reads(cell.trace.sets(site_key(site)), of, site.info.n_experts)
        for cell in cells
        for site in subject.sites
    ]
    return {name: float(np.nanmean([one[name] for one in found])) for name in found[0]}


def _check_apart(subject: Subject, texts: Sequence[npt.ArrayLike]) -> None:
    fitted = {one.tobytes() for one in subject.calibration}
    shared = sum(np.asarray(one, dtype=np.int32).tobytes() in fitted for one in texts)
    if shared:
        raise ConditionError(
            f"Texts apart from the calibration's were expected, but {shared} are in both. Report "
            "on a held-out split."
        )


def _measured(
    subject: Subject,
    texts: Sequence[npt.ArrayLike],
    base: ConditionCell,
    condition: Condition,
) -> tuple[Applied, dict[tuple[str, str], ConditionCell]]:
    """Run the cells of one condition's 2x2 other than the base's own."""
    cells = {}
    with condition.open(subject) as applied:
        cells["condition", "condition"] = own = run_texts(subject, texts)
        if condition.info.keeps_experts:
            cells["condition", "base"] = run_texts(subject, texts, base.trace)
    cells["base", "condition"] = run_texts(subject, texts, own.trace)
    return applied, cells


def _details(condition: Condition, applied: Sequence[Applied], base: float) -> dict[str, Any]:
    stored = float(np.mean([one.weight_bytes for one in applied])) / base
    method = applied[0].method if len(applied) == 1 else f"mean of {len(applied)} draws"
    return {"weight_bytes_ratio": stored, "method": method}


def _row(
    label: str,
    condition: Condition | None,
    losses: SequenceLosses,
    base: SequenceLosses,
    place: tuple[str, str],
    facts: dict[str, Any],
) -> dict[str, Any]:
    change, info = loss_change(base, losses), condition.info if condition else None
    return {
        "condition": label,
        "name": info.name if info else "base",
        "kind": info.kind if info else "base",
        "weights": place[0],
        "routing": place[1],
        "loss": losses.mean,
        "loss_change": change.change,
        "loss_se": change.standard_error,
        "perplexity_ratio": change.perplexity_ratio,
        "tokens": int(losses.tokens.sum()),
        "sequences": len(losses.tokens),
        "draws": 1,
        "draw_spread": float("nan"),
        "weight_bytes_ratio": 1.0,
        "method": "",
        "calibrated": info.calibrated if info else False,
        "simulated": info.simulated if info else False,
        **facts,
    }


def _mean(losses: Sequence[SequenceLosses]) -> SequenceLosses:
    """Average draws sequence by sequence, so that the mean still pairs with the base."""
    sums = np.mean([one.sums for one in losses], axis=0)
    return SequenceLosses(sums, losses[0].tokens)


def _spread(losses: Sequence[SequenceLosses]) -> float:
    means = [one.mean for one in losses]
    return float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")


# As ``RESULTS_VERSION`` of explorer.comparison.session, for rows about conditions and students.
CONDITIONS_VERSION = 2

Records = dict[str, list[dict[str, Any]]]


def measure_conditions(
    run: str | Path = "demo",
    conditions: Sequence[str] = USUAL,
    *,
    students: Sequence[str] = STUDENTS,
    tokens: int = 50_000,
    fit_tokens: int = 20_000,
    seed: int = 0,
    model: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Measure conditions and distilled routers, and keep them in the run's comparison file.

    Parameters
    ----------
    run : str or Path
        A run file, or ``"demo"``.
    conditions : sequence of str
        Such as ``quantised(bits=4)``.
    students : sequence of str
        Routers that are distilled from the model's gate.
    tokens, fit_tokens : int
        Of the held-out split, on which losses are reported, and of the fit split.
    seed : int
        Draws the texts.
    model : str, optional
        Default: the model that the run was recorded from.
    progress : callable, optional
        Told what is measured next.

    Returns
    -------
    Path
        Of the comparison file; tables ``conditions``, ``flips``, ``flip_margins`` and
        ``students``. What it holds already, of the same version and options, is not measured again.
    """
    made = make_conditions(conditions)
    path = demo_run() if str(run) == "demo" else Path(run)
    settings: dict[str, Any] = {"tokens": tokens, "fit_tokens": fit_tokens, "seed": seed}
    progress("the model's own router")
    # one file with the routers that were compared on the same texts
    with compare(
        path, ["native"], live=True, replay=False, controls=False, latency=False, model=model,
        progress=False, **settings,
    ) as comparison:  # fmt: skip
        file, rows = comparison.path, comparison.records()
    wanted = {one.label: condition_fingerprint(one) for one in made}
    known = {row["condition"]: row["fingerprint"] for row in rows["conditions"]}
    missing = [one for one in made if known.get(one.label) != wanted[one.label]]
    taught = {name: fingerprint((name, CONDITIONS_VERSION)) for name in students}
    learned = {row["student"]: row["fingerprint"] for row in rows["students"]}
    untaught = [name for name in students if learned.get(name) != taught[name]]
    if not missing and not untaught:
        return file
    with open_run(path) as opened:
        name = opened.info["model"] if model is None else model
        with loading_bars(shown=False):
            loaded = load_model(name)
        split = split_texts(opened, loaded, **settings)
    subject = Subject.of(loaded.model, split.fit.sequences)
    base = run_texts(subject, split.report.sequences) if missing else None
    for condition in missing:
        tables = measure(subject, split.report.sequences, [condition], base=base, progress=progress)
        found = {name: records(getattr(tables, name)) for name in tables._fields}
        for row in found["conditions"]:
            row["fingerprint"] = wanted.get(row["condition"], "")
        keep(file, found)
    if untaught:
        learners = measure_students(
            subject, split.report.sequences, untaught, seed=seed, fit_tokens=fit_tokens,
            progress=progress,
        )  # fmt: skip
        taught_rows = [
            {**row, "fingerprint": taught[row["student"]]} for row in records(learners.students)
        ]
        keep(file, {"students": taught_rows, "student_layers": records(learners.layers)})
    return file


def keep(file: Path, found: Records) -> None:
    """Put rows into a comparison file, in the place of the same conditions' or students' rows."""
    with open_comparison(file) as comparison:
        rows = comparison.records()
    for table, fresh in found.items():
        name = "student" if table.startswith("student") else "condition"
        labels = {row[name] for row in fresh}
        rows[table] = [row for row in rows[table] if row[name] not in labels] + fresh
    write_comparison(file, rows)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows, missing values as None: a file holds no NaN."""
    return [
        {str(k): None if isinstance(v, float) and v != v else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]


def read(file: Path) -> dict[str, pd.DataFrame]:
    """Return the tables about conditions of a comparison file."""
    with open_comparison(file) as comparison:
        return {name: comparison.rows(name) for name in CONDITION_TABLES}


def condition_fingerprint(condition: Condition) -> str:
    """Return a short name for what a condition's rows depend on besides the file's own key."""
    options = json.dumps(vars(condition), sort_keys=True, default=str)
    return fingerprint((condition.info.name, options, CONDITIONS_VERSION))
