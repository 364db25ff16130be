"""Rebuild the demo model from the package registries: ``python -m capture.demo.train``.

It trains in several single-thread processes that share gradients.
"""

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from tqdm import tqdm
from transformers import OlmoeForCausalLM

from capture.demo import FIGURES, TRENDS, WEIGHTS, work_folder
from capture.demo.corpus import prepare, ship
from capture.demo.evaluate import evaluate, write_figures
from capture.demo.model import (
    STAGES,
    WARM_UP_STEPS,
    install,
    list_snapshots,
    load_model,
    random_model,
    read_stages,
    record_snapshots,
    save_snapshot,
    snapshot_folder,
    use_experts,
)
from capture.demo.routing import SHARE, cluster_router
from capture.demo.sources import fetch
from capture.demo.streams import (
    LONG_EVERY,
    LONG_WINDOW,
    WINDOW,
    WindowSampler,
    cut_windows,
    encode_corpus,
    load_streams,
    train_tokenizer,
)

# big buffers stay with the process for a while, which saves page faults; without an end to
# that, memory grows until the machine swaps
_JEMALLOC = "dirty_decay_ms:10000,muzzy_decay_ms:10000,oversize_threshold:0,thp:always"
BALANCE_WEIGHT = 0.01
Z_WEIGHT = 1e-3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP = 1.0
SNAPSHOT_PERCENTS = (1, 5, 20, 60, 100)
CHECKPOINT_SECONDS = 300.0
CHECK_WINDOWS = 8  # windows a domain in the quick check beside a checkpoint
LOG_STEPS = 50
logger = logging.getLogger(__name__)


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_number(value: float) -> float:
    """Return the first process's value in every process."""
    if not dist.is_initialized():
        return value
    cell = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(cell, 0)
    return float(cell)


@contextlib.contextmanager
def join_workers(folder: Path, *, single_thread: bool) -> Iterator[None]:
    """Join the group of processes that `launch` started, if there is one.

    A busy machine needs ``single_thread``: one thread of torch a process.
    """
    rank, world = rank_and_world()
    folder.mkdir(parents=True, exist_ok=True)
    if single_thread:
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if world > 1:
        address = f"file://{(folder / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        yield
        if world > 1:
            dist.barrier()
    finally:
        if world > 1:
            dist.destroy_process_group()


def _environment(rank: int, world: int) -> dict[str, str]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    for path in Path("/usr/lib").glob("*/libjemalloc.so.2"):
        environment |= {"LD_PRELOAD": str(path), "MALLOC_CONF": _JEMALLOC}
    return environment


def launch(arguments: list[str], *, folder: Path, processes: int) -> None:
    """Start workers that find each other in ``folder``; if one fails, the others end too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    command = [sys.executable, "-m", "capture.demo.train", *arguments, "--worker"]
    workers = [
        subprocess.Popen(command, env=_environment(rank, processes)) for rank in range(processes)
    ]
    try:
        for worker in workers:
            if worker.wait():
                raise RuntimeError(
                    f"Expected every training process to end well, one ended with"
                    f" {worker.returncode}. Its message is above; go on with --resume."
                )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()


@dataclass
class Recipe:
    """What one training run does."""

    work: Path  # has ``encoded``; checkpoints and snapshots go below it
    tokenizer: Path  # its folder, copied beside the weights
    init: Path | None  # weights to start from; None starts from random ones
    minutes: float  # length of the schedule; the rate reaches zero at its end
    steps: int  # length in steps instead; 0 goes by the clock
    rate: float  # at its peak
    batch: int  # windows a step and process
    seed: int  # decides the start and the windows
    cluster_router: int | None  # layer whose router starts turned towards clusters of the text
    device: str  # "cpu" or "cuda"


@dataclass
class TrainingState:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    snapshots: list[int] = field(default_factory=list)


def balance_loss(
    router_logits: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the two losses of the routers from logits [L, T, E] of every layer and token.

    Returns
    -------
    balance : Tensor []
        Mean over the layers of ``E * sum_e f_e P_e``; 1 is balanced. The share of
        assignments ``f`` is taken over all processes, so that one batch may be one-sided.
    z : Tensor []
        Mean of the squared logsumexp, nats^2.
    share : Tensor [L, E]
        The share ``f``.

    References
    ----------
    arXiv 2501.11873 (global-batch balance), arXiv 2202.08906 equation 5 (z-loss).
    """
    experts = router_logits.size(-1)
    probabilities = router_logits.softmax(-1)
    chosen = probabilities.topk(top_k, -1).indices
    counts = [torch.bincount(layer.reshape(-1), minlength=experts) for layer in chosen]
    share = all_reduce(torch.stack(counts).float())
    share = share / share.sum(-1, keepdim=True)
    balance = experts * (share * probabilities.mean(1)).sum(-1)
    z = torch.logsumexp(router_logits, -1).pow(2).mean()
    return balance.mean(), z, share


class Trainer:
    """One process of a training run, on from the last checkpoint if ``resume``."""

    def __init__(self, recipe: Recipe, *, resume: bool) -> None:
        self.recipe = recipe
        self.rank, self.world = rank_and_world()
        self.device = torch.device(recipe.device)
        self.progress = TrainingState()
        model = load_model(recipe.init) if recipe.init else random_model(recipe.seed)
        streams = load_streams(recipe.work / "encoded", "train")
        if recipe.cluster_router is not None:
            cluster_router(model, recipe.cluster_router, streams, recipe.seed)
        self.model: OlmoeForCausalLM = torch.nn.Module.to(model, self.device)
        use_experts(self.model, self.device)
        self._flatten_gradients()
        self.optimizer = self._make_optimizer()
        self.checkpoint = recipe.work / "training" / "checkpoint.pt"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            self._load_checkpoint()
        self.sampler = WindowSampler(
            streams,
            batch=recipe.batch,
            rank=self.rank,
            world=self.world,
            seed=recipe.seed,
            first_step=self.progress.step,
        )

    def _flatten_gradients(self) -> None:
        # one buffer for all gradients: one all-reduce, one norm, no copies
        parameters = list(self.model.parameters())
        size = sum(parameter.numel() for parameter in parameters)
        self.gradient = torch.zeros(size, device=self.device)
        offset = 0
        for parameter in parameters:
            part = self.gradient[offset : offset + parameter.numel()]
            parameter.grad = part.view_as(parameter)
            offset += parameter.numel()

    def _make_optimizer(self) -> torch.optim.AdamW:
        decayed: list[torch.nn.Parameter] = []
        plain: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            small = parameter.dim() < 2 or "embed" in name
            (plain if small else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.rate, betas=BETAS, fused=True)

    def _load_checkpoint(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        with torch.no_grad():
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = TrainingState(**state["progress"])

    def _save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _save_stages(self) -> None:
        # beside the last weights: how they were trained, the stages of a warm start first
        recipe = self.recipe
        stage = {
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "minutes": self.progress.seconds / 60,
            "processes": self.world,
            "device": recipe.device,
            "peak_rate": recipe.rate,
            "windows_per_step": recipe.batch * self.world,
            "window": WINDOW,
            "long_window": LONG_WINDOW,
            "long_every": LONG_EVERY,
            "warm_start": recipe.init is not None,
            "cluster_router": recipe.cluster_router,
            "cluster_share": None if recipe.cluster_router is None else SHARE,
            "seed": recipe.seed,
        }
        earlier = read_stages(recipe.init) if recipe.init else []
        folder = snapshot_folder(recipe.work, self.progress.step, 100)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STAGES).write_text(json.dumps([*earlier, stage], indent=1) + "\n")

    def _save_snapshot(self, percent: int) -> None:
        self.progress.snapshots.append(percent)
        if self.rank == 0:
            recipe = self.recipe
            folder = snapshot_folder(recipe.work, self.progress.step, percent)
            save_snapshot(self.model, recipe.tokenizer, folder)

    def _fraction(self, seconds: float) -> float:
        if self.recipe.steps:
            return self.progress.step / self.recipe.steps
        return broadcast_number(seconds / (60 * self.recipe.minutes))

    def _step(self, rate: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.sampler.draw().to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model.model(
                input_ids=batch[:, :-1], output_router_logits=True, use_cache=False
            )
            logits = self.model.lm_head(output.last_hidden_state)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        router_logits = torch.stack([layer.float() for layer in output.router_logits])
        top_k = self.model.config.num_experts_per_tok
        balance, z, share = balance_loss(router_logits, top_k)
        self.gradient.zero_()
        torch.autograd.backward(loss + BALANCE_WEIGHT * balance + Z_WEIGHT * z)
        all_reduce(self.gradient).div_(self.world)
        norm = self.gradient.norm()
        self.gradient.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.progress.step += 1
        self.progress.tokens += batch[:, 1:].numel() * self.world
        return {
            "loss": loss.item(),
            "balance": balance.item(),
            "z": z.item(),
            "max_share": share.max().item(),
            "min_share": share.min().item(),
            "norm": norm.item(),
        }

    @torch.no_grad()
    def check(self) -> float:
        """Return the mean over domains of the loss on a few held-out windows, in nats."""
        self.model.train(False)
        losses = []
        for stream in load_streams(self.recipe.work / "encoded", "validation"):
            windows = cut_windows(stream, CHECK_WINDOWS).to(self.device)
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits.float()
            targets = windows[:, 1:].flatten()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), targets).item())
        self.model.train()
        return sum(losses) / len(losses)

    def _checkpoint_and_check(self) -> None:
        if self.rank == 0:
            self._save_checkpoint()
            minutes = self.progress.seconds / 60
            logger.info("check %.1f min, held-out loss %.4f nats", minutes, self.check())

    def _moments(self) -> Iterator[float]:
        # fractions of the schedule until it ends; keeps the clock across restarts
        started = time.monotonic() - self.progress.seconds
        while True:
            self.progress.seconds = time.monotonic() - started
            fraction = self._fraction(self.progress.seconds)
            if fraction >= 1:
                return
            yield fraction

    def _report(self, figures: dict[str, float], mean_loss: float, rate: float) -> None:
        progress = self.progress
        logger.info(
            "step %d, %.1f min, %.2f M tokens, loss %.3f, balance %.3f, z %.2f, rate %.2e,"
            " shares %.3f to %.3f, gradient %.2f",
            progress.step,
            progress.seconds / 60,
            progress.tokens / 1e6,
            mean_loss,
            figures["balance"],
            figures["z"],
            rate,
            figures["min_share"],
            figures["max_share"],
            figures["norm"],
        )

    def run(self) -> None:
        """Train to the end of the schedule."""
        self.model.train()
        mean_loss = 0.0
        next_checkpoint = self.progress.seconds + CHECKPOINT_SECONDS
        bar = tqdm(total=100, unit="%", disable=self.rank > 0, bar_format="{l_bar}{bar}|{postfix}")
        for fraction in self._moments():
            due = [p for p in SNAPSHOT_PERCENTS if p <= 100 * fraction]
            for percent in set(due) - set(self.progress.snapshots):
                self._save_snapshot(percent)
            warm_up = min(1.0, (self.progress.step + 1) / WARM_UP_STEPS)
            rate = self.recipe.rate * warm_up * (1 - fraction)
            figures = self._step(rate)
            mean_loss += (figures["loss"] - mean_loss) * (0.03 if mean_loss else 1.0)
            if self.progress.step % LOG_STEPS == 0:
                self._report(figures, mean_loss, rate)
                speed = self.progress.tokens / max(self.progress.seconds, 1e-9)
                bar.n = round(100 * fraction, 1)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {speed:.0f} tokens/s")
            if broadcast_number(self.progress.seconds) > next_checkpoint:
                next_checkpoint += CHECKPOINT_SECONDS
                self._checkpoint_and_check()
        bar.close()
        self._save_snapshot(100)
        self._checkpoint_and_check()
        if self.rank == 0:
            self._save_stages()


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run this process's part of the training, on from the last checkpoint if ``resume``."""
    folder = recipe.work / "training"
    with join_workers(folder, single_thread=recipe.device == "cpu"):
        if rank_and_world()[0] == 0:
            log = folder / "train.log"
            logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(message)s")
            logger.info("%s", json.dumps(vars(recipe), default=str))
        Trainer(recipe, resume=resume).run()


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
    known = {each.name for each in fields(Recipe)}
    given = {name: value for name, value in vars(options).items() if name in known}
    return Recipe(tokenizer=options.init or options.work / "tokenizer", **given)


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
    write_figures(evaluate(last, work, options.earlier), result)
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
