"""Train one model on the shipped texts and measure it on held-out ones."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from capture.demo.streams import PATTERN, SPECIAL_TOKENS, encode_texts
from capture.prompts import read_prompts
from explorer.errors import RouterError
from explorer.metrics.load import max_violation
from explorer.routers.contract import RoutingRouter
from explorer.survey.from_scratch.arms import ARMS, Arm, FixedTableRouter, Ints, Key, make_table
from explorer.survey.from_scratch.model import Facts, ModelShape, ScratchModel

# Raise it when the same setting would train another model: kept figures are then made anew.
TRAINING_VERSION = 1
PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY, CLIP = 6e-3, 30, 0.1, 1.0
SHAPE = ModelShape()
L1_START, L1_FACTOR = 1e-8, 1.2  # ReMoE's


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison share.

    Attributes
    ----------
    steps, windows : int
        Training steps, and windows of ``shape.context`` tokens in each.
    held_out : int
        Windows that are scored, evenly spread over the held-out text.
    shape : ModelShape
    """

    steps: int = 450
    windows: int = 16
    held_out: int = 1024
    shape: ModelShape = SHAPE

    @property
    def key(self) -> str:
        """A short name that changes with any of it, and with ``TRAINING_VERSION``."""
        facts = json.dumps([asdict(self), TRAINING_VERSION])
        return hashlib.sha256(facts.encode()).hexdigest()[:8]


class Corpus(NamedTuple):
    """Token ids of the fit and the held-out texts.

    Attributes
    ----------
    train, held_out : array [N], int64
    """

    train: Ints
    held_out: Ints


def load_corpus(vocabulary: int) -> Corpus:
    """Read the shipped texts, with a small tokenizer learned on those that models train on."""
    fit, held_out = (
        [str(prompt.text) for prompt in read_prompts(name)] for name in ("demo-fit", "demo-heldout")
    )
    tokenizer = learn_tokenizer(fit, vocabulary)
    return Corpus(*(encode_texts(tokenizer, each).astype(np.int64) for each in (fit, held_out)))


def learn_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE tokenizer of ``vocabulary`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def facts_of(windows: torch.Tensor, key: Key, vocabulary: int) -> Facts:
    """Return what rules are told of windows [B, S + 1], whose last token is only a target."""
    ids = windows[:, :-1]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    previous = functional.pad(ids[:, :-1], (1, 0))
    keys = {
        "token": ids,
        "previous": previous,
        "next": windows[:, 1:],
        "bigram": previous * vocabulary + ids,
        "position": positions,
    }[key]
    flat = positions.flatten()
    return Facts(keys.flatten(), flat, flat == 0)


def make_rules(arm: Arm, setting: Setting, corpus: Corpus, seed: int) -> list[RoutingRouter]:
    """Make the rule of every layer."""
    layers, vocabulary = range(setting.shape.layers), setting.shape.vocabulary
    if arm.table is None:
        return [arm.rule() for _ in layers]
    tables = [make_table(arm.table, corpus.train, vocabulary, seed * 101 + n) for n in layers]
    return [FixedTableRouter(table) for table in tables]


def train(
    arm: Arm, setting: Setting, corpus: Corpus, seed: int, *, start: ScratchModel | None = None
) -> ScratchModel:
    """Train a model, or a copy of ``start`` further.

    All arms of a seed see the same windows in the same order.
    """
    rules = make_rules(arm, setting, corpus, seed)
    model = ScratchModel(arm, rules, setting.shape, seed=seed)
    if start is not None:
        model.load_state_dict(start.state_dict())
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "emb" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim > 1 and "emb" not in name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = np.random.default_rng(seed)
    length, l1 = setting.shape.context + 1, L1_START
    for step in range(setting.steps):
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / setting.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = generator.integers(0, len(corpus.train) - length, setting.windows)
        rows = np.stack([corpus.train[start : start + length] for start in starts])
        windows = torch.from_numpy(rows)
        loss = _losses(model, windows, arm, setting).mean()
        moes = model.moes
        if arm.aux:
            loss = loss + arm.aux * sum(moe.balance for moe in moes) / len(moes)
        if arm.sparsity:
            loss = loss + l1 * sum(moe.density for moe in moes) / len(moes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        for moe in moes:
            moe.even_out()
        experts = float(sum(moe.load().sum() for moe in moes)) / len(moes) / rows[:, 1:].size
        l1 *= L1_FACTOR ** float(np.sign(experts - arm.top_k))
    return model


def _losses(model: ScratchModel, windows: torch.Tensor, arm: Arm, setting: Setting) -> torch.Tensor:
    """Return the loss of each token, [B, S], nats."""
    facts = facts_of(windows, arm.key, setting.shape.vocabulary)
    logits, targets = model(windows[:, :-1], facts), windows[:, 1:]
    flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


@torch.no_grad()
def score(model: ScratchModel, arm: Arm, setting: Setting, corpus: Corpus) -> dict[str, Any]:
    """Return what a model does on held-out windows, in batches as large as in training.

    Returns
    -------
    dict
        ``loss`` (nats a token), ``max_violation`` (mean over layers, of the load over all windows)
        and ``experts_per_token``.
    """
    length = setting.shape.context + 1
    starts = np.linspace(0, len(corpus.held_out) - length, setting.held_out).astype(int)
    rows = np.stack([corpus.held_out[start : start + length] for start in starts])
    losses: list[torch.Tensor] = []
    load: npt.NDArray[np.float64] = np.zeros((len(model.moes), arm.n_experts))
    for windows in torch.split(torch.from_numpy(rows), setting.windows):
        losses.append(_losses(model, windows, arm, setting).mean(dim=1))
        load += torch.stack([moe.load() for moe in model.moes]).numpy()
    tokens = rows[:, 1:].size
    return {
        "loss": float(torch.cat(losses).double().mean()),
        "max_violation": float(np.mean([max_violation(layer) for layer in load])),
        "experts_per_token": float(load.sum() / len(load) / tokens),
    }


def trained(name: str, setting: Setting, corpus: Corpus, seed: int, folder: Path) -> dict[str, Any]:
    """Train and score a model, or read what was found before; results are files in a folder."""

    def made() -> dict[str, Any]:
        before = time.perf_counter()
        model = train(ARMS[name], setting, corpus, seed)
        result = {"arm": name, "seed": seed, **score(model, ARMS[name], setting, corpus)}
        return {**result, "seconds": time.perf_counter() - before}

    found: dict[str, Any] = kept(folder / f"{name}-{seed}-{setting.key}.json", made)
    return found


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds, or make it and write the file in one step."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(make()) + "\n")
        partial.replace(file)
    return json.loads(file.read_text())


def seeds_of(text: str) -> list[int]:
    """Read seeds such as ``0,1,2``.

    Raises
    ------
    RouterError
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise RouterError(f"Expected --seeds such as 0,1,2, got {text}.")
    return [int(part) for part in parts]
