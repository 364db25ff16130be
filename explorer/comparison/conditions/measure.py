"""What a condition does to loss and routing: own and forced routing, flips, first divergence."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import Kept, sequence_losses
from capture.swap.routers import swap
from explorer.comparison.conditions.base import Applied, Condition, Subject, model_bytes
from explorer.comparison.conditions.flips import flip_rows, margin_rows
from explorer.comparison.conditions.trace import Trace, traced
from explorer.errors import ConditionError

# columns of each table, as they are documented in ConditionTables
CONDITION_COLUMNS = (
    *("condition", "name", "kind", "weights", "routing", "loss", "loss_change", "loss_se"),
    *("perplexity_ratio", "tokens", "sequences", "draws", "draw_spread", "weight_bytes_ratio"),
    *("method", "calibrated", "simulated"),
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
        ``method`` (how a choice was made, what is tested), ``calibrated``, ``simulated``. A
        condition that takes experts away has no row with weights ``"condition"`` and routing
        ``"base"``.
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


class Cell(NamedTuple):
    """One run over the texts.

    Attributes
    ----------
    losses : SequenceLosses
    trace : Trace
    """

    losses: SequenceLosses
    trace: Trace


def run_texts(
    subject: Subject, texts: Sequence[npt.ArrayLike], forced: Trace | None = None
) -> Cell:
    """Run texts through the model as it is now, by its own routing or by that of a trace."""

    @contextmanager
    def around() -> Iterator[Trace]:
        swapped: AbstractContextManager[Any] = nullcontext()
        if forced is not None:
            swapped = swap(subject.model, subject.sites, forced.tape, checked=False)
        # the trace within the swap sees what is forced
        with swapped, traced(subject) as trace:
            yield trace

    kept = Kept(around)
    losses = sequence_losses(subject.model, texts, swapped=kept)
    return Cell(losses, kept.values[-1])


def measure(
    subject: Subject,
    texts: Sequence[npt.ArrayLike],
    conditions: Iterable[Condition],
    *,
    base: Cell | None = None,
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
    base : Cell, optional
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
    rows = [_row("base", None, base.losses, base.losses, ("base", "base"), {})]
    flips: list[dict[str, Any]] = []
    margins: list[dict[str, Any]] = []
    for condition in conditions:
        progress(condition.label)
        each = [_measured(subject, texts, base, one) for one in condition.members()]
        details = _details(condition, [applied for applied, _ in each], bytes_)
        for place in each[0][1]:
            losses = [cells[place].losses for _, cells in each]
            facts = {**details, "draws": len(each), "draw_spread": _spread(losses)}
            rows.append(_row(condition.label, condition, _mean(losses), base.losses, place, facts))
        traces = [cells["condition", "condition"].trace for _, cells in each]
        flips += flip_rows(condition.label, base.trace, traces)
        margins += margin_rows(condition.label, base.trace, traces)
    return ConditionTables(
        pd.DataFrame(rows, columns=list(CONDITION_COLUMNS)),
        pd.DataFrame(flips, columns=list(FLIP_COLUMNS)),
        pd.DataFrame(margins, columns=list(MARGIN_COLUMNS)),
    )


def _check_apart(subject: Subject, texts: Sequence[npt.ArrayLike]) -> None:
    fitted = {one.tobytes() for one in subject.calibration}
    shared = sum(np.asarray(one, dtype=np.int32).tobytes() in fitted for one in texts)
    if shared:
        raise ConditionError(
            f"Texts apart from the calibration's were expected, but {shared} are in both. Report "
            "on a held-out split."
        )


def _measured(
    subject: Subject, texts: Sequence[npt.ArrayLike], base: Cell, condition: Condition
) -> tuple[Applied, dict[tuple[str, str], Cell]]:
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


def decomposition(tables: ConditionTables) -> pd.DataFrame:
    """Split each condition's cost into what its weights and what its routing do.

    Returns
    -------
    DataFrame
        ``condition``; ``total``, ``weights`` (its weights with the base's routing) and
        ``routing`` (its routing on the base's weights), changes of loss in nats a token;
        ``interaction``, what is left of the total; ``recovered``, the share of the total that
        forcing the base's routing takes back.
    """
    rows = []
    for label, cells in tables.conditions.groupby("condition", sort=False):
        change = cells.set_index(["weights", "routing"])["loss_change"]
        if ("condition", "base") not in change.index:
            continue
        total = float(change["condition", "condition"])
        weights = float(change["condition", "base"])
        routing = float(change["base", "condition"])
        rows.append(
            {
                "condition": label,
                "total": total,
                "weights": weights,
                "routing": routing,
                "interaction": total - weights - routing,
                "recovered": (total - weights) / total if total else float("nan"),
            }
        )
    columns = ["condition", "total", "weights", "routing", "interaction", "recovered"]
    return pd.DataFrame(rows, columns=columns)
