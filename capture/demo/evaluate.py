"""Measure the demo model on its held-out text and write the figures behind its card.

One of them: what each domain loses when one expert is taken away from its router.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from capture.demo import FIGURES, WEIGHTS, work_folder
from capture.demo.card import write_card
from capture.demo.corpus import read_lines
from capture.demo.model import load_model, random_model, read_stages, stock_model, use_experts
from capture.demo.routing import (
    Array,
    WindowRouting,
    Windows,
    balance,
    domain_counts,
    histograms,
    information,
    observe,
    routers,
    shuffled_information,
    window_accuracy,
    window_losses,
)
from capture.demo.sources import DOMAIN_NAMES
from capture.demo.streams import BOS, cut_windows, load_streams
from capture.errors import CaptureError

ROUTING_WINDOWS = 48  # windows a domain, the same number for each
SCAN_WINDOWS = 4  # windows a domain while every expert is masked once
HARM_WINDOWS = 32  # windows a domain for the experts that the scan found
HARM_CANDIDATES = 18
HARM_OWN = 0.1  # nats a token that an expert's own domain has to lose
HARM_OTHERS = 0.01  # nats a token that the other domains may lose, on average
RANDOM_SEED = 1
POSITION_TOKENS = 1000
POSITION_CONTEXTS = 10  # a domain
POSITION_BOUNDS = (0, 16, 64, 128, 256, 320, 400, 600, 1000)
SAMPLE_TOKENS = 48
SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_K = 40
SAMPLE_STARTS = {
    "en_prose": "The Congress of the United States",
    "bible_kjv": "And the LORD said unto",
    "en_geography": "Geography - note: ",
    "en_legal": "Permission is hereby",
    "de_help": "Klicken Sie",
    "fr_help": "Cliquez sur",
    "ru_help": "Выберите",
    "ja_help": "このコマンド",
    "zh_classical": "春風",
    "python": "def __init__(self, ",
    "c": "static int sqlite3",
    "sql": "SELECT * FROM",
    "math_formal": "$( The ",
}


class Harm(NamedTuple):
    """What masking one expert costs each of D domains, nats a token."""

    layer: int
    expert: int
    mean: Array  # [D], loss with the expert masked minus loss without
    error: Array  # [D], standard error of the mean over the windows

    @property
    def domain(self) -> int:
        """The domain that is hurt most."""
        return int(self.mean.argmax())

    @property
    def elsewhere(self) -> float:
        """Mean over the other domains, nats a token."""
        return float(np.delete(self.mean, self.domain).mean())

    @property
    def worst_elsewhere(self) -> float:
        """Largest value among the other domains, nats a token."""
        return float(np.delete(self.mean, self.domain).max())


@contextlib.contextmanager
def masked_expert(router: torch.nn.Module, expert: int) -> Iterator[None]:
    """Keep a router from choosing one expert; its tokens go to the next best one."""

    def choose_again(module: Any, _inputs: Any, output: Any) -> tuple[torch.Tensor, ...]:
        logits = output[0].clone()
        logits[:, expert] = -torch.inf
        weights, ids = logits.softmax(-1, dtype=torch.float32).topk(module.top_k, -1)
        if module.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids

    hook = router.register_forward_hook(choose_again)
    try:
        yield
    finally:
        hook.remove()


def measure_harm(
    model: PreTrainedModel, windows: Windows, experts: list[tuple[int, int]], label: str
) -> list[Harm]:
    """Mask each (layer, expert) in turn and compare each window's loss with the whole model's.

    The windows are the same for every expert, so that differences are paired.
    """
    whole = window_losses(model, windows.tokens)
    numbers = np.unique(windows.domains)
    harms = []
    for layer, expert in tqdm(experts, desc=label, unit="expert"):
        with masked_expert(routers(model)[layer], expert):
            change = window_losses(model, windows.tokens) - whole
        parts = [change[windows.domains == number] for number in numbers]
        mean = np.array([part.mean() for part in parts])
        error = np.array([part.std(ddof=1) / np.sqrt(len(part)) for part in parts])
        harms.append(Harm(layer, expert, mean, error))
    return harms


@dataclass(frozen=True)
class HeldOutText:
    """The prototype's held-out split, encoded: by domain."""

    streams: list[np.ndarray]
    bytes_per_token: list[float]  # of UTF-8, document marks included

    def windows(self, limit: int | None = None) -> Windows:
        """Cut neighbouring windows, at most ``limit`` a domain, spread over its text."""
        parts = [cut_windows(stream, limit) for stream in self.streams]
        labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return Windows(torch.cat(parts), labels)


def load_held_out(work: Path) -> HeldOutText:
    """Load the held-out split from the work folder."""
    streams = load_streams(work / "encoded", "validation")
    sizes = []
    for name, stream in zip(DOMAIN_NAMES, streams, strict=True):
        lines = read_lines(work / "corpus" / "validation" / f"{name}.jsonl")
        sizes.append(sum(len(line["text"].encode()) for line in lines) / len(stream))
    return HeldOutText(streams, sizes)


def prepare_model(folder: Path) -> PreTrainedModel:
    """Load a model for evaluation on the CPU."""
    model: PreTrainedModel = load_model(folder)
    model.train(False)
    use_experts(model, torch.device("cpu"))
    return model


def language_figures(
    sample: WindowRouting, windows: Windows, held_out: HeldOutText
) -> dict[str, Any]:
    """Summarise loss and bits per byte by domain."""
    domains = {}
    for number, name in enumerate(DOMAIN_NAMES):
        losses = sample.losses[windows.domains == number]
        per_byte = losses / np.log(2) / held_out.bytes_per_token[number]
        domains[name] = {
            "loss_nats": float(losses.mean()),
            "bits_per_byte": float(per_byte.mean()),
            "error": float(per_byte.std(ddof=1) / np.sqrt(len(losses))),
            "tokens": int(len(losses) * (windows.tokens.shape[1] - 1)),
        }
    return {
        "mean_loss_nats": float(np.mean([row["loss_nats"] for row in domains.values()])),
        "mean_bits_per_byte": float(np.mean([row["bits_per_byte"] for row in domains.values()])),
        "domains": domains,
    }


def _layer_figures(
    ids: npt.NDArray[np.uint8], windows: Windows, experts: int, generator: np.random.Generator
) -> dict[str, float]:
    counts = domain_counts(ids, windows.domains, experts)
    shuffled = shuffled_information(ids, windows.domains, experts, generator)
    return {
        "information_bits": information(counts),
        "information_shuffled_bits": shuffled,
        **balance(counts),
    }


def routing_figures(
    trained: WindowRouting, untrained: dict[str, WindowRouting], windows: Windows, experts: int
) -> dict[str, Any]:
    """Summarise balance and expert-domain information of every layer.

    The same windows, equally many of every domain, went through the trained model and through those
    with random weights.
    """
    generator = np.random.default_rng(0)
    layers = [_layer_figures(ids, windows, experts, generator) for ids in trained.expert_ids]
    accuracy, by_domain = window_accuracy(histograms(trained.expert_ids, experts), windows.domains)
    figures: dict[str, Any] = {
        "windows_per_domain": int(np.bincount(windows.domains).min()),
        "tokens": int(trained.expert_ids[0, ..., 0].size),
        "layers": layers,
        "window_accuracy": accuracy,
        "window_accuracy_by_domain": {DOMAIN_NAMES[d]: share for d, share in by_domain.items()},
    }
    for name, sample in untrained.items():
        for row, ids in zip(layers, sample.expert_ids, strict=True):
            counts = domain_counts(ids, windows.domains, experts)
            row[f"information_{name}_bits"] = information(counts)
        shares = histograms(sample.expert_ids, experts)
        figures[f"window_accuracy_{name}"] = window_accuracy(shares, windows.domains)[0]
    return figures


def _describe(harm: Harm) -> dict[str, Any]:
    worst = int(np.argsort(harm.mean)[-2])
    return {
        "layer": harm.layer,
        "expert": harm.expert,
        "domain": DOMAIN_NAMES[harm.domain],
        "own": float(harm.mean[harm.domain]),
        "own_error": float(harm.error[harm.domain]),
        "others_mean": harm.elsewhere,
        "next_domain": DOMAIN_NAMES[worst],
        "next": float(harm.mean[worst]),
    }


def harm_figures(model: PreTrainedModel, held_out: HeldOutText) -> dict[str, Any]:
    """Mask every expert on a few windows, and the most specific ones on many."""
    every = [
        (layer, expert)
        for layer in range(model.config.num_hidden_layers)
        for expert in range(model.config.num_experts)
    ]
    scan = measure_harm(model, held_out.windows(SCAN_WINDOWS), every, "mask every expert")
    # those that cost their domain enough first, by how little the domain hurt next loses
    scan.sort(key=lambda harm: harm.worst_elsewhere - min(harm.mean[harm.domain], HARM_OWN))
    chosen = [(harm.layer, harm.expert) for harm in scan[:HARM_CANDIDATES]]
    windows = held_out.windows(HARM_WINDOWS)
    harms = [
        _describe(harm) for harm in measure_harm(model, windows, chosen, "mask specific experts")
    ]
    harms.sort(key=lambda row: row["own"], reverse=True)
    specific = [r for r in harms if r["own"] >= HARM_OWN and r["others_mean"] <= HARM_OTHERS]
    return {
        "windows_per_domain": HARM_WINDOWS,
        "threshold_own": HARM_OWN,
        "threshold_others": HARM_OTHERS,
        "experts_scanned": len(every),
        "specific": specific,
        "measured": harms,
    }


@torch.inference_mode()
def position_figures(model: Any, held_out: HeldOutText) -> list[dict[str, Any]]:
    """Average the loss by position in contexts longer than the training windows."""
    contexts = []
    for stream in held_out.streams:
        last = len(stream) - POSITION_TOKENS - 1
        for start in np.linspace(0, last, POSITION_CONTEXTS).astype(int):
            contexts.append(stream[start : start + POSITION_TOKENS + 1].astype(np.int64))
    losses = []
    for context in contexts:
        ids = torch.from_numpy(context)
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        losses.append(functional.cross_entropy(logits, ids[1:], reduction="none").numpy())
    means = np.mean(losses, 0)
    return [
        {
            "first": first,
            "last": last - 1,
            "contexts": len(contexts),
            "loss_nats": float(means[first:last].mean()),
        }
        for first, last in itertools.pairwise(POSITION_BOUNDS)
    ]


def continue_texts(model: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """WindowRouting a continuation of one opening a domain."""
    torch.manual_seed(0)
    texts = {}
    for domain, start in SAMPLE_STARTS.items():
        ids = torch.tensor([[BOS, *tokenizer.encode(start).ids]])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=SAMPLE_TEMPERATURE,
            top_k=SAMPLE_TOP_K,
        )
        texts[domain] = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
    return texts


def compare(ours: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Set bits per byte beside an earlier model's on the same windows."""
    ratios = {
        name: row["bits_per_byte"] / earlier["domains"][name]["bits_per_byte"]
        for name, row in ours["domains"].items()
    }
    return {
        "mean_bits_per_byte": earlier["mean_bits_per_byte"],
        "domains": {n: row["bits_per_byte"] for n, row in earlier["domains"].items()},
        "worst_ratio": max(ratios.values()),
        "worst_domain": max(ratios, key=lambda name: ratios[name]),
    }


def _routing(model: PreTrainedModel, windows: Windows) -> dict[str, Any]:
    untrained = {}
    for name, make in {"random_init": random_model, "stock_init": stock_model}.items():
        start = make(RANDOM_SEED)
        start.train(False)
        untrained[name] = observe(start, windows, name)
    trained = observe(model, windows, "routing")
    return routing_figures(trained, untrained, windows, model.config.num_experts)


def evaluate(model_folder: Path, work: Path, earlier: Path | None) -> dict[str, Any]:
    """Measure everything the card reports: the content of ``figures.json``.

    Parameters
    ----------
    model_folder : Path
        Weights and tokenizer.
    work : Path
        Work folder with the corpus.
    earlier : Path or None
        Weights to compare bits per byte with; they must share the tokenizer.
    """
    held_out = load_held_out(work)
    model = prepare_model(model_folder)
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    windows = held_out.windows()
    language = language_figures(observe(model, windows, "held-out loss"), windows, held_out)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "experts": model.config.num_experts,
        "top_k": model.config.num_experts_per_tok,
        "held_out": language,
    }
    if earlier is not None:
        sample = observe(prepare_model(earlier), windows, "earlier model")
        figures["earlier"] = compare(language, language_figures(sample, windows, held_out))
    figures["routing"] = _routing(model, held_out.windows(ROUTING_WINDOWS))
    figures["harm"] = harm_figures(model, held_out)
    figures["positions"] = position_figures(model, held_out)
    figures["samples"] = continue_texts(model, tokenizer)
    figures["training"] = read_stages(model_folder)
    return figures


def write_figures(figures: dict[str, Any], folder: Path) -> None:
    """Write ``figures.json`` and the card into a folder."""
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    (folder / FIGURES.name).write_text(text, encoding="utf-8")
    write_card(figures, folder / "MODEL_CARD.md")


def main(arguments: list[str]) -> None:
    """Measure a model and write its figures and its card."""
    parser = argparse.ArgumentParser(prog="python -m capture.demo.evaluate", description=__doc__)
    parser.add_argument("--work", type=Path, default=work_folder())
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--earlier", type=Path, help="weights to compare with")
    parser.add_argument("--out", type=Path, default=FIGURES.parent)
    parser.add_argument("--threads", type=int, default=1, help="more than one needs idle cores")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        figures = evaluate(options.model, options.work, options.earlier)
    except CaptureError as error:
        sys.exit(f"error: {error}")
    write_figures(figures, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
