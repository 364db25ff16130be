"""A smaller mixture-of-experts model, started from a larger one and taught by its predictions."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from capture.errors import quoted
from capture.model.attributes import EXPERT_COUNTS
from capture.model.inputs import input_device, plain_forward
from capture.model.sites import layer_of, text_config
from explorer.comparison.conditions.base import Sequence_, Subject
from explorer.comparison.conditions.calibration import collect
from explorer.comparison.conditions.pruning import CALIBRATION_TOKENS, load_of
from explorer.errors import ConditionError

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
