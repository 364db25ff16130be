"""Two routers of one comparison, paired text by text; needs no torch."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from capture.losses import SequenceLosses, loss_change
from explorer.comparison.file import Comparison
from explorer.errors import ComparisonError

CLEAR = 2.0  # standard errors


class Paired(NamedTuple):
    """What one router loses to another on the same texts, all layers swapped.

    Attributes
    ----------
    router, other : str
    difference : float, nats a token
        Loss of ``router`` minus loss of ``other``, means over their seeds; below 0 ``router`` is
        better.
    standard_error : float, nats a token
        Of the differences between texts, see :func:`capture.losses.loss_change`. That of chance
        between seeds is not in it: ``spread`` shows it.
    spread : float, nats a token
        Standard deviation of ``router``'s loss over its seeds; nan for fewer than two.
    seeds : int
        Of ``router``.
    """

    router: str
    other: str
    difference: float
    standard_error: float
    spread: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" beyond two standard errors, else "not told apart"."""
        if not abs(self.difference) > CLEAR * self.standard_error:
            return "not told apart"
        return "better" if self.difference < 0 else "worse"


def paired(comparison: Comparison, router: str, other: str) -> Paired:
    """Compare the losses of two routers on the comparison's texts.

    Parameters
    ----------
    comparison : Comparison
    router, other : str
        As table ``results`` writes them.

    Raises
    ------
    ComparisonError
        If one of them has no live row.
    """
    mine, his = (_losses(comparison, name) for name in (router, other))
    change = loss_change(_mean(his), _mean(mine))
    means = [losses.mean for losses in mine]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
    return Paired(router, other, change.change, change.standard_error, spread, len(means))


def against_controls(comparison: Comparison, router: str | None = None) -> pd.DataFrame:
    """Return a router, or every one, beside its random controls.

    Returns
    -------
    DataFrame
        ``control`` ("equal_compute", "matched_per_layer"), the fields of :class:`Paired` and
        ``verdict``; a row per router and control.
    """
    live = comparison.table.query("mode == 'live'")
    if router is not None:
        live = live[live["control_of"] == router]
    pairs = live[["control_of", "control", "router"]].dropna().drop_duplicates()
    rows = []
    for of, control, label in pairs.itertuples(index=False):
        found = paired(comparison, of, label)
        rows.append({"control": control, **found._asdict(), "verdict": found.verdict})
    return pd.DataFrame(rows, columns=["control", *Paired._fields, "verdict"])


def _losses(comparison: Comparison, router: str) -> list[SequenceLosses]:
    """Return a router's losses of all texts, seed by seed."""
    rows = comparison.query(
        "SELECT seed, sequence, tokens, loss FROM sequences "
        "WHERE router = ? AND mode = 'live' AND layer IS NULL ORDER BY seed, sequence",
        [router],
    )
    if rows.empty:
        names = comparison.query("SELECT DISTINCT router FROM sequences WHERE mode = 'live'")
        raise ComparisonError(
            f"Expected a router with a live row, got {router!r}. There are: "
            f"{', '.join(sorted(names['router'])) or 'none; compare with --live'}."
        )
    found = []
    for _, group in rows.groupby("seed", dropna=False):
        tokens = group["tokens"].to_numpy(dtype=np.int64)
        found.append(SequenceLosses(group["loss"].to_numpy(dtype=np.float64) * tokens, tokens))
    return found


def _mean(losses: list[SequenceLosses]) -> SequenceLosses:
    return SequenceLosses(np.mean([each.sums for each in losses], axis=0), losses[0].tokens)
