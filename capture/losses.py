"""Losses of sequences, and how they differ between two ways to run a model; needs no torch."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import SwapError


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
    """

    change: float
    standard_error: float
    perplexity_ratio: float
    differences: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]


def loss_change(native: SequenceLosses, swapped: SequenceLosses) -> LossChange:
    """Compare two losses of the same sequences.

    Notes
    -----
    The change is a ratio of two sums over sequences (nats, tokens), so its standard error is that
    of a ratio estimator: the spread of ``n (d - change)`` over sequences. Sequences of one length
    give the standard deviation of the differences over the root of their number.
    """
    if not np.array_equal(native.tokens, swapped.tokens):
        raise SwapError(
            "Losses of the same sequences were expected, got "
            f"{len(native.tokens)} and {len(swapped.tokens)} sequences of other lengths."
        )
    tokens, n = native.tokens, len(native.tokens)
    differences = swapped.per_token - native.per_token
    change = swapped.mean - native.mean
    residuals = tokens * (differences - change)
    spread = math.sqrt(float((residuals**2).sum()) * n / (n - 1)) if n > 1 else math.nan
    return LossChange(change, spread / float(tokens.sum()), math.exp(change), differences, tokens)
