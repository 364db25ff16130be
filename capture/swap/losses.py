"""Losses of sequences, and how they differ between two ways to run a model; needs no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from capture.errors import SwapError

CERTAIN = 0.95  # of intervals, two-sided


def critical(degrees: float) -> float:
    """Return how many standard errors the 95% interval of Student's t reaches to each side.

    Parameters
    ----------
    degrees : float
        Of freedom. 1.96 for infinitely many, 12.7 for one, nan for none.
    """
    return float(stdtrit(degrees, (1 + CERTAIN) / 2)) if degrees > 0 else math.nan


class SequenceLosses(NamedTuple):
    """Next-token losses of ``N`` sequences.

    Attributes
    ----------
    sums : array [N], float64, nats
        Of each sequence's tokens.
    tokens : array [N], int64
        Tokens that have a next one: length - 1.
    """

    sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Loss a token, nats."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def per_token(self) -> npt.NDArray[np.float64]:
        """Loss a token of each sequence [N], nats."""
        return self.sums / self.tokens

    def by(self, groups: Sequence[object]) -> "SequenceLosses":
        """Add up the sequences of each group, such as a domain, as if they were one."""
        _, numbers = np.unique(np.array([str(one) for one in groups]), return_inverse=True)
        tokens = np.bincount(numbers, self.tokens).astype(np.int64)
        return SequenceLosses(np.bincount(numbers, self.sums).astype(np.float64), tokens)


class LossChange(NamedTuple):
    """What a rule costs, on the same sequences as the model it is compared with.

    Attributes
    ----------
    change : float, nats a token
        Above 0: the rule is worse.
    standard_error : float, nats a token
        Of the paired differences between sequences; nan for a single sequence.
    perplexity_ratio : float
        ``exp(change)``.
    differences : array [N], nats a token
        Of each sequence.
    tokens : array [N], int64
    degrees : float
        Of freedom of ``standard_error``, see :func:`ratio_degrees`.
    """

    change: float
    standard_error: float
    perplexity_ratio: float
    differences: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    degrees: float

    @property
    def margin(self) -> float:
        """Half of the 95% interval of the change, nats a token; nan for a single sequence."""
        return critical(self.degrees) * self.standard_error


def loss_change(native: SequenceLosses, swapped: SequenceLosses) -> LossChange:
    """Compare two losses of the same sequences.

    Notes
    -----
    The change is a ratio of two sums over sequences (nats, tokens), so its standard error is that
    of a ratio estimator, see :func:`ratio_variance`. Sequences of one length give the standard
    deviation of the differences over the root of their number.
    """
    if not np.array_equal(native.tokens, swapped.tokens):
        raise SwapError(
            "Losses of the same sequences were expected, got "
            f"{len(native.tokens)} and {len(swapped.tokens)} sequences of other lengths."
        )
    tokens = native.tokens
    differences = swapped.per_token - native.per_token
    change = swapped.mean - native.mean
    error = math.sqrt(ratio_variance(differences - change, tokens))
    degrees = ratio_degrees(tokens)
    return LossChange(change, error, math.exp(change), differences, tokens, degrees)


def ratio_variance(residuals: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> float:
    """Return the variance of a mean over tokens whose sequences differ, nan for one sequence.

    Parameters
    ----------
    residuals : array [..., N]
        What each sequence is above the mean a token; of several rows the variances are added up.
    tokens : array [N]

    Notes
    -----
    A long sequence draws the mean to itself, so that its residual is too small: its square is
    divided by the share ``1 - 2 p + sum(p^2)`` that is left of it, where ``p`` is the sequence's
    share of the tokens. Without this correction two to twelve texts of uneven lengths look surer
    than they are.

    References
    ----------
    Bell & McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage
    samples", Survey Methodology 28, 2002 (CR2), for a mean and equal variances.
    """
    if len(tokens) < 2:
        return math.nan
    shares = tokens / tokens.sum()
    left = 1 - 2 * shares + (shares**2).sum()
    return float((residuals**2 * shares**2 / left).sum())


def ratio_degrees(tokens: npt.NDArray[np.int64]) -> float:
    """Return the degrees of freedom of :func:`ratio_variance`, 0 for one sequence.

    ``N - 1`` for sequences of one length; of uneven ones only as many count as even ones would
    that know as much (``sum(n)^2 / sum(n^2)``, Kish), one at least.
    """
    n = len(tokens)
    even = float(tokens.sum()) ** 2 / float((tokens.astype(np.float64) ** 2).sum())
    return max(1.0, (n - 1) * even / n) if n > 1 else 0.0
