"""What a comparison proves: two routers paired text by text and seed by seed; needs no torch."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.errors import SwapError, quoted
from capture.swap.losses import LossChange, SequenceLosses, critical, loss_change, ratio_variance
from explorer.comparison.results_file import Comparison
from explorer.errors import ComparisonError

UNCLEAR = "not told apart"
NATIVE = "native"  # the model's own router, as tables write it
# the router that rules stand beside which give each token as many experts as the model
CHANCE = "random"
SAME = 1e-3  # experts a token: differences below are rounding
# kinds of controls, and what people call them
CONTROLS = {"equal_compute": "on average", "matched_per_layer": "layer by layer"}
# a verdict on a router and the harder of its controls, as the answer to "better than chance?"
ANSWERS = {"better": "yes", "worse": "worse", UNCLEAR: UNCLEAR}


class Paired(NamedTuple):
    """What one router loses to another on the same texts, all layers swapped.

    Attributes
    ----------
    router, other : str
    difference : float, nats a token
        Loss of ``router`` minus loss of ``other``, means over their seeds; below 0 ``router`` is
        better.
    standard_error : float, nats a token
        Of the differences between texts, see :func:`capture.swap.losses.loss_change`.
    spread : float, nats a token
        Standard deviation of ``router``'s loss over its seeds; nan for fewer than two.
    seeds : int
        Of ``router``.
    texts : int
        How many there are; 0 = unknown, and then nothing is told apart.
    domain_error : float, nats a token
        Standard error if texts of one domain count as one; nan for a single domain.
    seed_error : float, nats a token
        Standard error of the differences between seeds; nan where no rule was drawn twice.
    margin : float, nats a token
        Half of the 95% interval of the difference, of texts and seeds; nan = from
        ``standard_error`` and ``texts`` alone, as for texts of one length.
    steady : bool
        Whether the difference has one sign in all seeds.
    """

    router: str
    other: str
    difference: float
    standard_error: float
    spread: float
    seeds: int
    texts: int = 0
    domain_error: float = math.nan
    seed_error: float = math.nan
    margin: float = math.nan
    steady: bool = True

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" where the 95% interval leaves out 0, else "not told apart".

        The interval is Student's t over texts, and over seeds where rules were drawn with several;
        a difference that changes its sign from seed to seed is not told apart.
        """
        margin = self.margin
        if math.isnan(margin):
            margin = critical(self.texts - 1) * self.standard_error
        if not (self.steady and abs(self.difference) > margin):
            return UNCLEAR
        return "better" if self.difference < 0 else "worse"


class _Losses(NamedTuple):
    """A router's losses of all texts.

    Attributes
    ----------
    by_seed : dict of seed to SequenceLosses
    domains : list of str
    """

    by_seed: dict[int | None, SequenceLosses]
    domains: list[str]

    @property
    def mean(self) -> SequenceLosses:
        losses = list(self.by_seed.values())
        return SequenceLosses(np.mean([each.sums for each in losses], axis=0), losses[0].tokens)


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

    Notes
    -----
    The variance of the difference has a part of texts and a part of seeds; what both count, the
    chance of one text with one seed, is taken off once, and the whole is at least the larger of
    the two (two-way clustering: Cameron, Gelbach & Miller 2011). Its degrees of freedom are
    Welch's, and its interval is at least that of the seeds and that of the texts: two seeds that
    agree by chance prove little. With one seed only the variance of the texts is known, and the
    verdict is about that draw.
    """
    mine, his = (_losses(comparison, name) for name in (router, other))
    change = loss_change(his.mean, mine.mean)
    by_domain = loss_change(his.mean.by(his.domains), mine.mean.by(mine.domains))
    means = [losses.mean for losses in mine.by_seed.values()]
    drawn = _drawn(mine, his)
    seed_error, margin = _with_seeds(change, drawn)
    signs = {np.sign(row @ change.tokens) for matrix in drawn for row in matrix} - {0.0}
    return Paired(
        router,
        other,
        change.change,
        change.standard_error,
        float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        len(means),
        len(change.tokens),
        by_domain.standard_error,
        seed_error,
        margin,
        len(signs) < 2,
    )


def _drawn(mine: _Losses, his: _Losses) -> list[npt.NDArray[np.float64]]:
    """Return differences [seeds, texts] for each source of chance; none with one draw of each."""
    a, b = mine.by_seed, his.by_seed
    if len(a) > 1 and a.keys() == b.keys():
        # a control is drawn with the seed of the router that it stands beside
        return [np.array([a[seed].per_token - b[seed].per_token for seed in a])]
    found = []
    if len(a) > 1:
        found.append(np.array([one.per_token - his.mean.per_token for one in a.values()]))
    if len(b) > 1:
        found.append(np.array([mine.mean.per_token - one.per_token for one in b.values()]))
    return found


def _with_seeds(change: LossChange, drawn: list[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Return the standard error between seeds, and half of the interval of texts and seeds."""
    if not drawn:
        return math.nan, change.margin
    shares = change.tokens / change.tokens.sum()
    of_texts = change.standard_error**2
    of_seeds, both = [], 0.0
    for matrix in drawn:  # [S, N]
        n = len(matrix)
        means = matrix @ shares
        of_seeds.append((float(means.var(ddof=1)) / n, n - 1))
        rest = matrix - means[:, None] - matrix.mean(axis=0) + means.mean()
        both += ratio_variance(rest, change.tokens) / (n * (n - 1))
    seeds = sum(variance for variance, _ in of_seeds)
    parts = [*of_seeds, (of_texts, change.degrees)]
    spread = sum(variance**2 / degrees for variance, degrees in parts if degrees)
    degrees = (of_texts + seeds) ** 2 / spread if spread else math.inf
    whole = max(of_texts, seeds, of_texts + seeds - both)
    alone = [critical(n) * math.sqrt(variance) for variance, n in parts]
    return math.sqrt(seeds), max(critical(degrees) * math.sqrt(whole), *alone)


def against_controls(comparison: Comparison, router: str | None = None) -> pd.DataFrame:
    """Return a router, or every one, beside its random controls.

    Returns
    -------
    DataFrame
        ``control`` ("equal_compute", "matched_per_layer"), the fields of :class:`Paired`,
        ``verdict``, and ``harder``: whether this control loses least, so that it is the one to
        beat; a row per router and control.
    """
    live = with_controls(comparison.table.query("mode == 'live' and layer.isna()"))
    of_its_own = live[["control_of", "control", "router"]].dropna().drop_duplicates()
    known = list(of_its_own.itertuples(index=False, name=None))
    shared = live[live["equal_compute"].notna() & ~live["router"].isin(of_its_own["control_of"])]
    known += [(name, "equal_compute", CHANCE) for name in shared["router"].unique()]
    rows = []
    for of, control, label in known:
        if router in (None, of):
            found = paired(comparison, of, label)
            rows.append({"control": control, **found._asdict(), "verdict": found.verdict})
    table = pd.DataFrame(rows, columns=["control", *Paired._fields, "verdict"])
    # the larger difference is that to the control with the smaller loss
    hardest = table.groupby("router")["difference"].transform("max")
    return table.assign(harder=table["difference"] == hardest)


def better_than_chance(comparison: Comparison) -> pd.DataFrame:
    """Return whether each router that ran live loses less than the harder of its random controls.

    Returns
    -------
    DataFrame
        A row per router: ``router``; ``better_than_chance``, "yes", "not told apart" or "worse",
        missing without an answer; ``chance_difference``, its loss minus that control's, nats a
        token, means over seeds, with its 95% interval from ``chance_low`` to ``chance_high``, see
        :func:`paired`; ``no_answer``, the reason where there is none, else "".
    """
    live = comparison.table.query("mode == 'live' and layer.isna()").drop_duplicates("router")
    missing = "no control in this file"
    try:
        pairs = against_controls(comparison)
    except (ComparisonError, SwapError):  # a file of somebody else's may lack texts
        pairs = against_controls(comparison, "")
        missing = "losses of texts are missing"
    pairs = pairs[pairs["harder"].eq(True)].drop_duplicates("router")
    table = live[["router", "family", "causal"]].merge(pairs, on="router", how="left")
    reasons = [
        (table["router"] == NATIVE, "the model's own"),
        (table["family"] == "control", "a control"),
        (table["causal"].eq(False), "not causal"),
        (table["verdict"].isna(), missing),
    ]
    reason = pd.Series("", table.index)
    for wrong, said in reversed(reasons):
        reason = reason.mask(wrong, said)
    difference, margin = table["difference"].astype(float), table["margin"].astype(float)
    return pd.DataFrame(
        {
            "router": table["router"],
            "better_than_chance": table["verdict"].map(ANSWERS).where(reason == "", None),
            "chance_difference": difference,
            "chance_low": difference - margin,
            "chance_high": difference + margin,
            "no_answer": reason,
        }
    )


def with_answers(table: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of :func:`better_than_chance` to the rows of all layers swapped live."""
    found = table[["router"]].merge(answers, on="router", how="left").drop(columns="router")
    found = found.set_axis(table.index)
    return table.join(found.where((table["mode"] == "live") & table["layer"].isna()))


def with_controls(table: pd.DataFrame) -> pd.DataFrame:
    """Add to rows of table ``results`` what chance loses in the same place at the same compute.

    Returns
    -------
    DataFrame
        The rows in their order, with ``equal_compute`` and ``matched_per_layer``, the change in
        loss of these controls, nats a token, nan where there is none, and ``harder``, the one of
        them that loses less, ``""`` without any. A rule that gives every token as many experts as
        the model has no control of its own: router ``random`` is its ``equal_compute``.
    """
    place = ["mode", "layer", "site"]
    chance = table[table["router"] == CHANCE].groupby(place, dropna=False, as_index=False)
    of_chance = chance[["loss_change", "experts_per_token"]].mean()
    for kind in CONTROLS:
        own = table[table["control"] == kind]
        own = own.assign(router=own["control_of"], **{kind: own["loss_change"]})
        where = [*place, "router", "seed"]
        table = table.merge(own[[*where, kind]].drop_duplicates(where), on=where, how="left")
        # a router that draws nothing may stand beside a control that was drawn with some seed
        means = own.groupby(where[:-1], dropna=False, as_index=False)[[kind]].mean()
        drawn = table[where[:-1]].merge(means, on=where[:-1], how="left")[kind]
        table[kind] = table[kind].fillna(drawn)
    table = table.merge(of_chance, on=place, how="left", suffixes=("", "_by_chance"))
    alone = table[list(CONTROLS)].isna().all(axis=1) & (table["part"].fillna("expert") == "expert")
    alone &= (table["family"] != "control") & (table["router"] != NATIVE)
    alone &= (table["experts_per_token"] - table["experts_per_token_by_chance"]).abs() < SAME
    equal = table["equal_compute"].where(~alone, table["loss_change_by_chance"])
    table = table.drop(columns=["loss_change_by_chance", "experts_per_token_by_chance"])
    table["equal_compute"] = equal
    found = table[list(CONTROLS)].astype(float)
    return table.assign(
        harder=found.fillna(np.inf).idxmin(axis=1).where(found.notna().any(axis=1), "")
    )


def _seed(value: object) -> int | None:
    return None if pd.isna(value) else int(str(value))


def _losses(comparison: Comparison, router: str) -> _Losses:
    """Return a router's losses of all texts, seed by seed."""
    rows = comparison.query(
        "SELECT seed, sequence, tokens, loss, domain FROM sequences "
        "WHERE router = ? AND mode = 'live' AND layer IS NULL ORDER BY seed, sequence",
        [router],
    )
    if rows.empty:
        names = comparison.query("SELECT DISTINCT router FROM sequences WHERE mode = 'live'")
        raise ComparisonError(
            f"Expected a router with a live row, got {quoted(router)}. There are: "
            f"{', '.join(sorted(names['router'])) or 'none; compare with --live'}."
        )
    found: dict[int | None, SequenceLosses] = {}
    for seed, group in rows.groupby("seed", dropna=False):
        tokens = group["tokens"].to_numpy(dtype=np.int64)
        sums = group["loss"].to_numpy(dtype=np.float64) * tokens
        found[_seed(seed)] = SequenceLosses(sums, tokens)
        domains = group["domain"].astype(str).tolist()
    return _Losses(found, domains)


def reach(info: Mapping[str, Any]) -> str:
    """Say how much of a model its experts are, and what one checkpoint shows of rules.

    Parameters
    ----------
    info : mapping
        ``Comparison.info``; of files of older formats, and of replay alone, less is known.
    """
    parts = []
    head, experts = info["head_flops_share"], info["expert_flops_share"]
    if head is not None and experts is not None:
        parts.append(
            f"Of all operations of the unchanged model {head:.0%} are its output layer's and "
            f"{experts:.0%} its experts', so that FLOPs × cannot fall below {1 - experts:.2f} "
            "by leaving experts out."
        )
    if info["n_experts"]:
        parts.append(
            f"One checkpoint with {info['n_experts']} experts in a layer can show how a rule "
            "works and whether it beats chance here; it cannot show which rule is best in models "
            "with more experts, of other sizes, or trained with the rule."
        )
    return " ".join(parts)
