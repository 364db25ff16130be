"""Is one model's routing like another's? Compared by what tokens share, never by expert number."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from capture.model.forward import pad_batch, plan_batches
from capture.swap.losses import SequenceLosses
from capture.swap.measure import BATCH_TOKENS, Kept, sequence_losses
from capture.swap.routers import site_key
from explorer.comparison.conditions.base import Subject
from explorer.comparison.conditions.trace import Floats, Ids, Key, Trace, traced

PAIRS = 200_000
COLUMNS = (
    *("layer", "site", "teacher_layer", "co_routing", "co_routing_shuffled", "best_layer"),
    *("best_co_routing", "entropy", "teacher_entropy", "information", "teacher_information"),
    *("information_shuffled", "tokens", "pairs"),
)


class Routed(NamedTuple):
    """What one model did with texts.

    Attributes
    ----------
    losses : SequenceLosses
    trace : Trace
        Rows are tokens in the order of :func:`text_of_tokens`.
    """

    losses: SequenceLosses
    trace: Trace


def routed(subject: Subject, texts: Sequence[npt.ArrayLike]) -> Routed:
    """Run texts and record the routing."""
    kept = Kept(lambda: traced(subject))
    losses = sequence_losses(subject.model, texts, swapped=kept)
    return Routed(losses, kept.values[-1])


def text_of_tokens(texts: Sequence[npt.ArrayLike]) -> Ids:
    """Return which text each token of a trace belongs to, [T]."""
    ids = [np.asarray(one, dtype=np.int32) for one in texts]
    batches = plan_batches([len(one) for one in ids], BATCH_TOKENS)
    rows = [pad_batch(b, ids, side="right", pad_id=0).row_prompt for b in batches]
    return np.concatenate(rows)


def compare_routing(
    teacher: Subject,
    student: Subject,
    texts: Sequence[npt.ArrayLike],
    domains: Sequence[str],
    origins: Sequence[int],
    *,
    pairs: int = PAIRS,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the routing of two models on the same texts.

    Parameters
    ----------
    teacher, student : Subject
    texts : sequence of array [S]
    domains : sequence of str
        Of each text.
    origins : sequence of int
        The teacher's layer from which each of the student's started.
    pairs : int
        Pairs of tokens that are drawn.
    seed : int

    Returns
    -------
    DataFrame
        One row for each of the student's routers: ``co_routing``, the correlation over pairs of
        tokens between the share of experts that a pair has in common in the student and in the
        teacher's ``teacher_layer``; ``co_routing_shuffled``, the same with the teacher's tokens
        shuffled (what chance gives); ``best_layer`` and ``best_co_routing`` over all of the
        teacher's layers; gate ``entropy`` of both as a share of ``ln E``; ``information`` of both
        between domain and expert, nats, and with the domains shuffled.
    """
    random = np.random.default_rng(seed)
    labels = np.unique(np.asarray(domains), return_inverse=True)[1][text_of_tokens(texts)]
    # whole texts change places: tokens of a text stay together, as they would by chance
    mixed = np.unique(np.asarray(domains), return_inverse=True)[1]
    shuffled = random.permutation(mixed)[text_of_tokens(texts)]
    left, right = random.integers(len(labels), size=(2, pairs))
    order = random.permutation(len(labels))
    ours, theirs = routed(student, texts).trace, routed(teacher, texts).trace
    shared = {key: in_common(theirs.sets(key), left, right) for key in theirs.keys}
    rows: list[dict[str, Any]] = []
    for site in student.sites:
        key = site_key(site)
        own, origin = in_common(ours.sets(key), left, right), (origins[key[0]], key[1])
        likeness = {other: correlation(own, value) for other, value in shared.items()}
        best = max(likeness, key=lambda other: likeness[other])
        by_chance = in_common(theirs.sets(origin)[order], left, right)
        rows.append(
            {
                "layer": key[0],
                "site": key[1],
                "teacher_layer": origin[0],
                "co_routing": likeness[origin],
                "co_routing_shuffled": correlation(own, by_chance),
                "best_layer": best[0],
                "best_co_routing": likeness[best],
                "entropy": relative_entropy(student, ours, key),
                "teacher_entropy": relative_entropy(teacher, theirs, origin),
                "information": information(ours.sets(key), labels),
                "teacher_information": information(theirs.sets(origin), labels),
                "information_shuffled": information(ours.sets(key), shuffled),
                "tokens": len(labels),
                "pairs": pairs,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def in_common(sets: Ids, left: Ids, right: Ids) -> Floats:
    """Return the share of experts that pairs of tokens have in common, [N], 0 to 1.

    Parameters
    ----------
    sets : array [T, K]
        Chosen experts; -1 = empty slot.
    left, right : array [N]
        Tokens of each pair.
    """
    first, second = sets[left], sets[right]
    same = (first[:, :, None] == second[:, None, :]) & (first >= 0)[:, :, None]
    return np.asarray(same.any(axis=2).sum(axis=1) / sets.shape[1], dtype=np.float64)


def correlation(first: Floats, second: Floats) -> float:
    """Return Pearson's correlation, NaN where one does not vary."""
    # a standard deviation is hardly ever exactly 0: the mean of equal numbers is rounded
    if any(np.ptp(one) <= 1e-9 * np.abs(one).max() for one in (first, second)):
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def relative_entropy(subject: Subject, trace: Trace, key: Key) -> float:
    """Return the mean gate entropy of a router as a share of ``ln E``, NaN where not known."""
    entropies = trace.entropies(key)
    if entropies is None:
        return float("nan")
    n_experts = next(s.info.n_experts for s in subject.sites if site_key(s) == key)
    if n_experts == 1:
        return float("nan")
    return float(entropies.mean() / np.log(n_experts))


def information(sets: Ids, labels: Ids) -> float:
    """Return the mutual information of experts and labels over assignments, nats.

    The plain estimate, which chance alone lifts above 0: compare it with shuffled labels.
    """
    rows = np.repeat(labels, sets.shape[1])
    experts = sets.flatten()
    filled = experts >= 0
    counts = np.zeros((int(labels.max()) + 1, int(experts.max()) + 1))
    np.add.at(counts, (rows[filled], experts[filled]), 1)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def parameters(model: torch.nn.Module) -> int:
    """Return how many weights a model has; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
