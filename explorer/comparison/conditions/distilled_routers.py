"""Distilled routers: students of the model's gate, by likeness on held-out text and live loss."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from capture.store.records import Place
from capture.swap.losses import loss_change
from capture.swap.measure import sequence_losses
from capture.swap.routers import swap
from capture.swap.rules import RouterInputs, Routing
from explorer.comparison.conditions.calibration import SeenSite, collect
from explorer.comparison.conditions.condition import Sequence_, Subject
from explorer.routers.contract import ROUTERS, Router, fit_layers, route_layers
from explorer.routers.learning.imitation import imitation_loss
from explorer.routers.live_rule import LiveRule

STUDENTS = (
    *("distilled_linear", "cosine", "expert_key_attention", "yuan_attention", "gru_recurrent"),
    "look_ahead",
)
FIT_TOKENS = 16_384
REPLAY_TOKENS = 8_192
LIKENESS = ("kl", "agreement", "exact_set")
STUDENT_COLUMNS = (
    *("student", "title", *LIKENESS, "chance", "loss_change", "loss_se", "perplexity_ratio"),
    *("fit_tokens", "tokens"),
)
LAYER_COLUMNS = ("student", "layer", "site", *LIKENESS)


class StudentTables(NamedTuple):
    """What students of the model's gate have learned.

    Attributes
    ----------
    students : DataFrame
        One row for each student: ``student`` (name in ``ROUTERS``), ``title``; ``kl`` (nats a
        token, from the model's gate to the student), ``agreement`` (share of the model's experts
        that the student chooses too) and ``exact_set``, means over routers on held-out tokens
        with the model's own inputs; ``chance``, the agreement of random sets; ``loss_change``,
        ``loss_se`` (nats a token, paired by sequence) and ``perplexity_ratio`` with the student
        in every layer of the running model; ``fit_tokens``, ``tokens`` (of the loss).
    layers : DataFrame
        ``kl``, ``agreement`` and ``exact_set`` of each router.
    """

    students: pd.DataFrame
    layers: pd.DataFrame


def measure_students(
    subject: Subject,
    texts: Sequence[npt.ArrayLike],
    names: Sequence[str] = STUDENTS,
    *,
    seed: int = 0,
    fit_tokens: int = FIT_TOKENS,
    progress: Callable[[str], None] = lambda _: None,
) -> StudentTables:
    """Distil students on the fit split and judge them on held-out texts.

    Parameters
    ----------
    subject : Subject
        With the fit split as its calibration.
    texts : sequence of array [S]
        The held-out split.
    names : sequence of str
        Students, names in ``ROUTERS``.
    seed : int
        Draws the fit tokens.
    fit_tokens : int
        At most, of the fit split.
    progress : callable, optional
        Told each name before it is fitted.
    """
    held_out: list[Sequence_] = [np.asarray(one, dtype=np.int32) for one in texts]
    fit = collect(subject, subject.calibration_tokens(), tokens=fit_tokens, seed=seed)
    replayed = collect(subject, held_out, tokens=REPLAY_TOKENS, seed=seed)
    native = sequence_losses(subject.model, held_out)
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for name in names:
        progress(name)
        fitted = fit_layers(ROUTERS[name](), {key: seen.inputs for key, seen in fit.items()})
        likenesses = _likeness(fitted, replayed)
        rules = {key: LiveRule(one) for key, one in fitted.items()}

        def live(rules: Mapping[Place, LiveRule] = rules) -> AbstractContextManager[Any]:
            return swap(subject.model, subject.sites, rules)

        change = loss_change(native, sequence_losses(subject.model, held_out, swapped=live))
        rows.append(
            {
                "student": name,
                "title": ROUTERS[name]().info.title,
                **{m: float(np.mean([one[m] for one in likenesses.values()])) for m in LIKENESS},
                "chance": float(np.mean([s.info.top_k / s.info.n_experts for s in subject.sites])),
                "loss_change": change.change,
                "loss_se": change.standard_error,
                "perplexity_ratio": change.perplexity_ratio,
                "fit_tokens": next(iter(fit.values())).inputs.n_tokens,
                "tokens": int(native.tokens.sum()),
            }
        )
        layers += [
            {"student": name, "layer": key[0], "site": key[1], **one}
            for key, one in likenesses.items()
        ]
    return StudentTables(
        pd.DataFrame(rows, columns=list(STUDENT_COLUMNS)),
        pd.DataFrame(layers, columns=list(LAYER_COLUMNS)),
    )


def _likeness(
    fitted: Mapping[Place, Router], replayed: Mapping[Place, SeenSite]
) -> dict[Place, dict[str, float]]:
    """Return how like the model's gate students are on the model's own inputs, by router."""
    inputs = {key: seen.inputs for key, seen in replayed.items()}
    found = {}
    for key, decision in route_layers(fitted, inputs).items():
        if isinstance(decision, Routing):
            found[key] = likeness(decision, inputs[key].decision(), inputs[key])
    return found


def likeness(student: Routing, native: Routing, inputs: RouterInputs) -> dict[str, float]:
    """Return KL (nats a token), agreement and share of equal sets of one router's decisions.

    Parameters
    ----------
    student, native : Routing
        Of the same tokens.
    inputs : RouterInputs
        Says what the scores are.
    """
    sigmoid = inputs.score_function.startswith("sigmoid")
    scores = student.scores
    logits = scores.logit(eps=1e-6) if sigmoid else scores.clamp_min(1e-20).log()
    own = native.expert_ids
    same = (own[:, :, None] == student.expert_ids[:, None, :]) & (own >= 0)[:, :, None]
    share = same.any(dim=-1).sum(dim=-1) / (own >= 0).sum(dim=-1).clamp_min(1)
    sizes = (student.expert_ids >= 0).sum(dim=-1) == (own >= 0).sum(dim=-1)
    with torch.no_grad():
        kl = float(imitation_loss(logits, native.scores, inputs))
    return {
        "kl": kl,
        "agreement": float(share.double().mean()),
        "exact_set": float(((share == 1) & sizes).double().mean()),
    }
