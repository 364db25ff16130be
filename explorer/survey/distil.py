"""Distil a smaller model from a run's model and compare its routing with its teacher's.

python -m explorer.survey.distil demo --shrink layers --steps 300
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.metrics import mutual_info_score
from torch.nn import functional

from capture.errors import CaptureError, quoted
from capture.model.attributes import EXPERT_COUNTS
from capture.model.forward import pad_batch, plan_batches
from capture.model.inputs import input_device, plain_forward
from capture.model.load import load_model, loading_bars
from capture.model.sites import layer_of, text_config
from capture.store.records import Place
from capture.swap.losses import SequenceLosses, loss_change
from capture.swap.measure import BATCH_TOKENS, Kept, sequence_losses
from capture.swap.routers import site_key
from explorer.comparison.compare import demo_run
from explorer.comparison.conditions.calibration import collect
from explorer.comparison.conditions.condition import Sequence_, Subject
from explorer.comparison.conditions.expert_pruning import CALIBRATION_TOKENS, load_of
from explorer.comparison.conditions.routing_changes import Floats, Ids, RoutingTrace, traced
from explorer.comparison.text_split import split_texts
from explorer.errors import ConditionError, ExplorerError
from explorer.run import open_run

Shrink = Literal["experts", "layers"]
WARM_UP = 20  # steps
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class DistilSettings:
    """How a smaller model is made and taught.

    Attributes
    ----------
    shrink : {"experts", "layers"}
        What it has half as many of.
    steps : int
    batch, length : int
        Windows a step, and tokens of a window.
    learning_rate : float
        At its peak, after a short warm-up; it falls to 0 along a half cosine.
    balance : float
        Weight of the model's own balance loss, where it has one.
    seed : int
    """

    shrink: Shrink = "experts"
    steps: int = 300
    batch: int = 8
    length: int = 192
    learning_rate: float = 1e-3
    balance: float = 0.01
    seed: int = 0


@dataclass
class Smaller:
    """A smaller model.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode.
    origins : tuple of int
        The teacher's layer from which each of its layers started.
    losses : list of float
        KL from the teacher at each step, nats a token.
    """

    model: Any
    origins: tuple[int, ...]
    losses: list[float]


def start_smaller(subject: Subject, settings: DistilSettings) -> Smaller:
    """Cut a smaller model out of a larger one: every other layer, or the most used experts.

    Raises
    ------
    ConditionError
        If the model cannot be cut that way.
    """
    if settings.shrink not in get_args(Shrink):
        raise ConditionError(
            f"shrink among {', '.join(get_args(Shrink))} was expected, got "
            f"{quoted(settings.shrink)}."
        )
    teacher: Any = subject.model
    config = copy.deepcopy(teacher.config)
    inner = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers = int(inner.num_hidden_layers)
    kept: dict[int, torch.Tensor] = {}
    if settings.shrink == "layers":
        # first and last included: what they do differs most from the rest
        origins = tuple(int(i) for i in np.linspace(0, layers - 1, max(layers // 2, 1)).round())
        _cut_lists(inner, layers, origins)
        inner.num_hidden_layers = len(origins)
    else:
        origins = tuple(range(layers))
        kept = _most_used(subject, settings.seed)
        n_experts = subject.sites[0].info.n_experts
        for name in EXPERT_COUNTS:
            if getattr(inner, name, None) == n_experts:
                setattr(inner, name, n_experts // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = type(teacher)(config)
    model.load_state_dict(_cut_weights(teacher, model, origins, kept), strict=True)
    return Smaller(model.to(input_device(teacher), teacher.dtype).eval(), origins, [])


def _cut_lists(config: Any, layers: int, origins: Sequence[int]) -> None:
    """Cut what a configuration says of each layer down to the layers that stay."""
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[i] for i in origins])


def _most_used(subject: Subject, seed: int) -> dict[int, torch.Tensor]:
    """Return the more used half of each layer's experts, ascending."""
    texts = subject.calibration_tokens()
    kept = {}
    for (layer, _), seen in collect(subject, texts, tokens=CALIBRATION_TOKENS, seed=seed).items():
        half = seen.inputs.n_experts // 2
        if half < seen.inputs.top_k:
            raise ConditionError(
                f"Layer {layer} has {seen.inputs.n_experts} experts and takes {seen.inputs.top_k}"
                " a token, so half of them are too few. Use shrink='layers'."
            )
        load = load_of(seen.inputs.decision(), seen.inputs.n_experts)
        kept[layer] = load.argsort(descending=True, stable=True)[:half].sort().values
    return kept


def _cut_weights(
    teacher: Any, model: Any, origins: Sequence[int], kept: dict[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the smaller model's weights, taken from the larger one."""
    own = teacher.state_dict()
    cut = {}
    for name, value in model.state_dict().items():
        words = name.split(".")
        layer = next((i for i, word in enumerate(words) if word.isdigit()), None)
        if layer is not None:
            words[layer] = str(origins[int(words[layer])])
        source = own[".".join(words)]
        if source.shape != value.shape:
            rows = kept.get(layer_of(".".join(words)))
            if rows is None or source.shape[1:] != value.shape[1:] or len(rows) != len(value):
                raise ConditionError(
                    f"{name} is {list(value.shape)} in the smaller model and "
                    f"{list(source.shape)} in the larger, which no choice of experts explains. "
                    "Use shrink='layers'."
                )
            source = source[rows]
        cut[name] = source.detach().clone()
    return cut


def windows(texts: Sequence[Sequence_], length: int, seed: int) -> torch.Tensor:
    """Return texts in random order, one after the other, in windows [W, S] int64.

    Raises
    ------
    ConditionError
        If there are too few tokens for one window.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    stream = np.concatenate([texts[i] for i in order] or [np.zeros(0, dtype=np.int32)])
    count = len(stream) // length
    if not count:
        raise ConditionError(
            f"At least {length} tokens were expected in the fit split, got {len(stream)}."
        )
    return torch.from_numpy(stream[: count * length].astype(np.int64)).view(count, length)


def distil(
    subject: Subject,
    settings: DistilSettings,
    *,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Smaller:
    """Cut a smaller model out of the subject's and teach it the subject's predictions.

    Parameters
    ----------
    subject : Subject
        The teacher; its calibration texts are what is taught on.
    settings : DistilSettings
    progress : callable, optional
        Told step and KL, in nats a token.
    """
    smaller = start_smaller(subject, settings)
    rows = windows(subject.calibration_tokens(), settings.length, settings.seed)
    model, teacher = smaller.model, subject.model
    rows = rows.to(input_device(teacher))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, settings.steps))
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        ids = rows[torch.randint(len(rows), (settings.batch,), generator=generator)]
        with torch.inference_mode(), plain_forward(teacher):
            wanted = teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        with plain_forward(model):
            found = model(input_ids=ids, use_cache=False, output_router_logits=True)
        logs = found.logits.float().log_softmax(-1)
        kl = functional.kl_div(
            logs.flatten(0, 1), wanted.clone().flatten(0, 1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        aux = getattr(found, "aux_loss", None)
        loss = kl if aux is None else kl + settings.balance * aux
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smaller.losses.append(float(kl.detach()))
        progress(step, smaller.losses[-1])
    model.eval().requires_grad_(False)
    return smaller


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate at a step."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + float(np.cos(np.pi * (step - WARM_UP) / max(steps - WARM_UP, 1))))


def cached(
    subject: Subject,
    settings: DistilSettings,
    *,
    folder: Path | None = None,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> Smaller:
    """Return the smaller model from the user's cache, or distil it and keep it there.

    Parameters
    ----------
    subject, settings, progress
        As in :func:`distil`.
    folder : Path, optional
        Default: ``routescope/distilled`` in the user's cache.

    Notes
    -----
    The name in the cache is made from the teacher's weights, the texts and the settings, so that
    another teacher never meets an old student.
    """
    place = (folder or cache_folder()) / fingerprint(subject, settings)
    if (place / "distilled.json").is_file():
        known = json.loads((place / "distilled.json").read_text("utf-8"))
        model = type(subject.model).from_pretrained(place, dtype=torch.float32)  # type: ignore[attr-defined]
        return Smaller(
            model.to(input_device(subject.model)).eval(), tuple(known["origins"]), known["losses"]
        )
    smaller = distil(subject, settings, progress=progress)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        partial = Path(temporary) / "model"
        smaller.model.save_pretrained(partial)
        facts = {"origins": smaller.origins, "losses": smaller.losses, **asdict(settings)}
        (partial / "distilled.json").write_text(json.dumps(facts), "utf-8")
        if not place.exists():
            os.replace(partial, place)
    return smaller


def cache_folder() -> Path:
    """Return where distilled models are kept for this user."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "routescope" / "distilled"


def fingerprint(subject: Subject, settings: DistilSettings) -> str:
    """Return a name made from the teacher's weights, the texts and the settings."""
    made = hashlib.blake2b(repr(asdict(settings)).encode(), digest_size=12)
    for text in subject.calibration_tokens():
        made.update(text.tobytes())
    for name, parameter in subject.model.named_parameters():
        made.update(name.encode())
        made.update(parameter.detach().float().cpu().numpy().tobytes())
    made.update(str(text_config(subject.model)).encode())
    return made.hexdigest()


PAIRS = 200_000
COLUMNS = (
    *("layer", "site", "teacher_layer", "co_routing", "co_routing_shuffled", "best_layer"),
    *("best_co_routing", "entropy", "teacher_entropy", "information", "teacher_information"),
    *("information_shuffled", "tokens", "pairs"),
)


class RoutedTexts(NamedTuple):
    """What one model did with texts.

    Attributes
    ----------
    losses : SequenceLosses
    trace : RoutingTrace
        Rows are tokens in the order of :func:`text_of_tokens`.
    """

    losses: SequenceLosses
    trace: RoutingTrace


def routed(subject: Subject, texts: Sequence[npt.ArrayLike]) -> RoutedTexts:
    """Run texts and record the routing."""
    kept = Kept(lambda: traced(subject))
    losses = sequence_losses(subject.model, texts, swapped=kept)
    return RoutedTexts(losses, kept.values[-1])


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


def relative_entropy(subject: Subject, trace: RoutingTrace, key: Place) -> float:
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
    return float(mutual_info_score(rows[filled], experts[filled]))


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
        See :func:`explorer.survey.distil.compare_routing`.
    """

    losses: pd.DataFrame
    routing: pd.DataFrame


def distilled(
    run: str | Path = "demo",
    settings: DistilSettings = DistilSettings(),
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
        facts = (name, model.num_parameters(), losses.mean, change.change, change.standard_error)
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
