"""Whether models come in the order that was published, told from the spread of the seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from explorer.survey.from_scratch.arms import ARMS, Claim

MET, NOT_MET, UNCLEAR = "met", "not met", "not told apart"
CERTAIN = 0.95  # of Student's t, two-sided: three seeds are few, and need 4.3 standard errors


def judge(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float, str]:
    """Judge a claim that one model has less of something than another.

    Parameters
    ----------
    better, worse : sequence of float
        Of the same seeds in the same order: a seed stands for the same windows and trunk.

    Returns
    -------
    difference : float
        Mean of better minus worse, below 0 as published.
    standard_error : float
        Of that mean, from the spread of the seeds; nan for a single one.
    verdict : str
        "met" or "not met" if the 95 % interval of the difference leaves out 0, else "not told
        apart".
    """
    paired = np.asarray(better, np.float64) - np.asarray(worse, np.float64)
    mean = float(paired.mean())
    if len(paired) < 2:
        return mean, float("nan"), UNCLEAR
    error = float(paired.std(ddof=1) / np.sqrt(len(paired)))
    sure = abs(mean) > error * float(student_t.ppf((1 + CERTAIN) / 2, len(paired) - 1))
    return mean, error, UNCLEAR if not sure else MET if mean < 0 else NOT_MET


def arms_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a model: means over seeds, the spread of the loss, and whether it is causal.

    Parameters
    ----------
    results : iterable of dict
        Of :func:`explorer.survey.from_scratch.train.trained`.
    """
    by_arm = pd.DataFrame(list(results)).groupby("arm")
    table = by_arm[["loss", "max_violation", "experts_per_token", "seconds"]].mean()
    table.insert(1, "loss_spread", by_arm["loss"].std())
    table["seeds"] = by_arm.size()
    table["causal"] = [ARMS[name].causal for name in table.index]
    return table.sort_values("loss").reset_index()


def claims_table(results: Iterable[Mapping[str, Any]], claims: Iterable[Claim]) -> pd.DataFrame:
    """Return one row a claim whose two models are both there."""
    table = pd.DataFrame(list(results))
    rows = []
    for claim in claims:
        found = table.pivot_table(index="seed", columns="arm", values=claim.quantity)
        if not {claim.better, claim.worse} <= set(found.columns):
            continue
        both = found[[claim.better, claim.worse]].dropna()
        if both.empty:
            continue
        difference, error, verdict = judge(both[claim.better].tolist(), both[claim.worse].tolist())
        rows.append(
            {
                "published": claim.source,
                "better": claim.better,
                "worse": claim.worse,
                "their numbers": claim.published,
                "in": claim.quantity,
                "difference": difference,
                "standard_error": error,
                "seeds": len(both),
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows)
