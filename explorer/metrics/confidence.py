"""How sure a router is of one token."""

from typing import Any

import numpy as np
import numpy.typing as npt

from capture.errors import quoted
from explorer.errors import MetricError

Floats = npt.NDArray[np.float64]


def probabilities(scores: npt.ArrayLike, score_function: str) -> Floats:
    """Return the routing probabilities behind recorded scores.

    Parameters
    ----------
    scores : array [..., E]
        As the router put them out; see the view ``scores``. nan = ruled out by the router.
    score_function : str
        The site's; ``other`` gives nan, since then the scores have no known meaning.

    Returns
    -------
    array [..., E]
        Sums to 1 over the experts, 0 for those ruled out; nan where every score is nan. Sigmoid
        scores are divided by their sum.

    Notes
    -----
    Selection may have used more than this: a bias added for balance, or a limit on groups.
    """
    values = np.asarray(scores, dtype=np.float64)
    ruled_out = np.isnan(values)
    known = np.asarray(~ruled_out.all(axis=-1, keepdims=True))
    if score_function in ("softmax", "softmax_topk"):
        logits = np.where(ruled_out, -np.inf, values)
        largest = np.where(known, logits.max(axis=-1, keepdims=True), 0.0)
        parts = np.exp(logits - largest)
        return _normalized(parts, known)
    if score_function in ("sigmoid", "sigmoid_topk"):
        parts = np.exp(-np.logaddexp(0.0, -np.where(ruled_out, -np.inf, values)))
        return _normalized(parts, known)
    if score_function == "probabilities":
        return np.where(ruled_out & known, 0.0, values)
    if score_function == "other":
        return np.full_like(values, np.nan)
    raise MetricError(
        f"Expected a score function that the view `sites` names, got {quoted(score_function)}. "
        "Take it from the site's row: softmax, sigmoid, softmax_topk, sigmoid_topk, "
        "probabilities or other."
    )


def _normalized(parts: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    total = parts.sum(axis=-1, keepdims=True)
    whole = np.where(known & (total > 0), total, np.nan)
    return np.asarray(parts / whole)


def entropy(probs: npt.ArrayLike) -> Floats:
    """Return the entropy of each distribution.

    Parameters
    ----------
    probs : array [..., E]

    Returns
    -------
    array [...], nats
        0 .. ln E; nan where a probability is nan.
    """
    values = np.asarray(probs, dtype=np.float64)
    logs = np.log(values, out=np.zeros_like(values), where=values != 0)
    return np.asarray(-(values * logs).sum(axis=-1))


def normalized_entropy(gate_entropy: npt.ArrayLike, n_experts: int) -> Floats:
    """Return gate entropies over ``ln E``, so that layers of different width compare.

    Parameters
    ----------
    gate_entropy : array [...], nats
        Missing values may be nan or None.
    n_experts : int

    Returns
    -------
    array [...], 0..1
        0: one expert has all the probability; 1: all experts are equally likely. nan where the
        entropy is missing, and everywhere for a single expert, whose choice is no choice.
    """
    values = _numbers(gate_entropy)
    if n_experts < 2:
        return np.full_like(values, np.nan)
    return np.asarray(values / np.log(n_experts))


def effective_experts(gate_entropy: npt.ArrayLike) -> Floats:
    """Return ``exp(H)``: the number of equally likely experts with the same entropy.

    Parameters
    ----------
    gate_entropy : array [...], nats

    Returns
    -------
    array [...], experts
        1 .. E; nan where the entropy is missing.
    """
    return np.asarray(np.exp(_numbers(gate_entropy)))


def _numbers(values: Any) -> Floats:
    """Return floats with nan for missing; takes pandas' nullable columns too."""
    if hasattr(values, "to_numpy"):
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
    return np.array(values, dtype=np.float64)
