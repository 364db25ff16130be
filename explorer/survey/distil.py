"""Distil a smaller model from a run's model and compare its routing with its teacher's.

python -m explorer.survey.distil demo --shrink layers --steps 300
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from capture.errors import CaptureError
from capture.model.load import load_model, loading_bars
from capture.swap.losses import loss_change
from capture.swap.measure import sequence_losses
from explorer.comparison.api import demo_run
from explorer.comparison.conditions.base import Subject
from explorer.comparison.texts import split_texts
from explorer.errors import ExplorerError
from explorer.run import open_run
from explorer.survey.likeness import compare_routing, parameters
from explorer.survey.smaller import DistilSettings, cached, start_smaller

LOSS_COLUMNS = ("model", "parameters", "loss", "loss_change", "loss_se", "perplexity", "tokens")
ERROR = 2


class Distilled(NamedTuple):
    """A smaller model beside its teacher.

    Attributes
    ----------
    losses : DataFrame
        ``teacher``, ``start`` (cut out, not taught) and ``distilled``: ``parameters``, ``loss``
        (nats a token, held-out texts), ``loss_change`` and ``loss_se`` (paired with the teacher),
        ``perplexity``, ``tokens``.
    routing : DataFrame
        See :func:`explorer.survey.likeness.compare_routing`.
    """

    losses: pd.DataFrame
    routing: pd.DataFrame


def distilled(
    run: str | Path = "demo",
    settings: DistilSettings = DistilSettings(),  # noqa: B008  it is frozen
    *,
    tokens: int = 50_000,
    fit_tokens: int = 200_000,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Distilled:
    """Distil a smaller model on the fit split, or take it from the cache, and judge it.

    Parameters
    ----------
    run : str or Path
        A run file, whose model is the teacher, or ``"demo"``.
    settings : DistilSettings
    tokens, fit_tokens : int
        Of the held-out and of the fit split.
    progress : callable, optional
        Told step and KL, in nats a token.
    """
    with open_run(demo_run() if str(run) == "demo" else run) as opened:
        with loading_bars(shown=False):
            loaded = load_model(opened.info["model"])
        split = split_texts(opened, loaded, fit_tokens=fit_tokens, tokens=tokens)
    teacher = Subject.of(loaded.model, split.fit.sequences)
    report = split.report
    smaller = cached(teacher, settings, progress=progress)
    student = Subject.of(smaller.model)
    native = sequence_losses(teacher.model, report.sequences)
    models = {
        "teacher": teacher.model,
        "start": start_smaller(teacher, settings).model,
        "distilled": student.model,
    }
    rows = []
    for name, model in models.items():
        losses = native if name == "teacher" else sequence_losses(model, report.sequences)
        change = loss_change(native, losses)
        facts = (name, parameters(model), losses.mean, change.change, change.standard_error)
        rows.append((*facts, math.exp(losses.mean), int(losses.tokens.sum())))
    routing = compare_routing(teacher, student, report.sequences, report.domains, smaller.origins)
    return Distilled(pd.DataFrame(rows, columns=list(LOSS_COLUMNS)), routing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.survey.distil",
        description="Distil a smaller model and compare its routing with its teacher's.",
    )
    usual = DistilSettings()
    parser.add_argument("run", nargs="?", default="demo", metavar="RUN", help="default: demo")
    parser.add_argument("--shrink", choices=("experts", "layers"), default=usual.shrink)
    parser.add_argument("--steps", type=int, default=usual.steps, metavar="N")
    parser.add_argument("--tokens", type=int, default=50_000, metavar="N", help="to report on")
    parser.add_argument("--fit-tokens", type=int, default=200_000, metavar="N", help="to learn on")
    parser.add_argument("--seed", type=int, default=usual.seed, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args(arguments)
    settings = DistilSettings(shrink=options.shrink, steps=options.steps, seed=options.seed)

    def say(step: int, kl: float) -> None:
        if step % 10 == 0:
            sys.stderr.write(f"step {step}: KL {kl:.3f} nats a token\n")

    try:
        found = distilled(
            options.run,
            settings,
            tokens=options.tokens,
            fit_tokens=options.fit_tokens,
            progress=say,
        )
    except (ExplorerError, CaptureError) as error:
        sys.stderr.write(f"error: {error}\n")
        return ERROR
    if options.json:
        tables = {n: json.loads(getattr(found, n).to_json(orient="records")) for n in found._fields}
        sys.stdout.write(json.dumps(tables, indent=1) + "\n")
    else:
        for table in found:
            text = table.to_string(
                index=False, na_rep="–", float_format=lambda value: f"{value:.4f}"
            )
            sys.stdout.write(text + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
