"""How much longer a model takes while it is recorded, against the same passes without capture."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from capture.interrupts import Interrupts
from capture.model.forward import Head, Runner, pad_batch
from capture.model.inputs import vocabulary
from capture.model.load import LoadedModel, load_model
from capture.model.selftest import attach, probe_tokens
from capture.model.sites import Site
from capture.model.tokens import TokenizedPrompt, tokenize
from capture.progress import Reporter
from capture.prompts import Prompt, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.loop import Plan
from capture.recorder.preparation import (
    AttentionPlan,
    describe_run,
    max_length,
    plan_attention,
    plan_recording,
)
from capture.recorder.sampling import plan_sample
from capture.recorder.session import Stopper, _Session
from capture.store import LEVELS, PromptInfo, RunWriter


class Timing(NamedTuple):
    """One timed pass over all prompts: seconds on the clock and seconds of all cores."""

    wall: float
    cores: float


class Bench(NamedTuple):
    """A loaded model, its sites, and the batches that both sides run."""

    loaded: LoadedModel
    sites: list[Site]
    plan: Plan
    config: CaptureConfig
    attention: AttentionPlan | None


def overhead_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="demo")
    parser.add_argument("--copies", type=int, default=2, help="how often the prompts are repeated")
    parser.add_argument("--level", choices=LEVELS, default="ids")
    parser.add_argument("--sample-tokens", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=7, help="pairs; the median is reported")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")


def overhead(options: argparse.Namespace) -> None:
    """Time capture over plain forward and loss, alternating; prints the ratio."""
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = prepare(
        load_model(options.model, device=options.device),
        read_prompts(options.prompts) * options.copies,
        CaptureConfig(
            level=options.level,
            sample_tokens=options.sample_tokens,
            batch_tokens=options.batch_tokens,
        ),
    )
    n_tokens = sum(len(prompt.ids) for prompt in bench.plan.prompts)
    _say(
        f"{options.model} on {bench.loaded.model.device}, {torch.get_num_threads()} threads of "
        f"torch; {n_tokens:,} tokens in {len(bench.plan.batches())} forward passes; level "
        f"{options.level}, {options.sample_tokens:,} sampled tokens"
    )
    _say("plain: forward and loss; capture: the same, recorded, until the run file is closed")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"plain": partial(plain, bench), "capture": partial(recorded, bench, Path(folder))}
        for run in runs.values():
            timed(bench, run)
        pairs = []
        for number in range(options.repeats):
            pairs.append((timed(bench, runs["plain"]), timed(bench, runs["capture"])))
            before, after = pairs[-1]
            _say(
                f"pair {number + 1}: plain {before.wall:.2f} s, capture {after.wall:.2f} s, "
                f"ratio {after.wall / before.wall:.3f} "
                f"(core seconds {after.cores / before.cores:.3f})"
            )
    _report("wall", [after.wall / before.wall for before, after in pairs])
    _report("core seconds", [after.cores / before.cores for before, after in pairs])


def prepare(loaded: LoadedModel, prompts: list[Prompt], config: CaptureConfig) -> Bench:
    """Settle what a capture settles between loading the model and its first forward pass."""
    tokenized: list[TokenizedPrompt] = tokenize(
        prompts,
        loaded.tokenizer,
        vocab_size=vocabulary(loaded.model),
        max_length=max_length(loaded, config),
    )
    domains, lengths = [p.domain for p in tokenized], [len(p.ids) for p in tokenized]
    sample = plan_sample(domains, lengths, config.sample_tokens, config.seed)
    sites = attach(loaded.model)
    attention = plan_attention(tokenized, sites, loaded, config)
    plan = plan_recording(tokenized, sample, loaded, config, attention)
    return Bench(loaded, sites, plan, config, attention)


def plain(bench: Bench) -> None:
    """Run the same batches and losses, without anything of capture but the loop."""
    model, plan = bench.loaded.model, bench.plan
    ids = [prompt.ids for prompt in plan.prompts]
    with torch.inference_mode(), Head(model).open(probe_tokens(model)[:1]) as head:
        runner = Runner(model, head)
        for prompts in plan.batches(head.limit(vocabulary(bench.loaded.model))):
            batch = pad_batch(prompts, ids, side="right", pad_id=plan.pad_id)
            runner.prompts(batch).loss.cpu()


def recorded(bench: Bench, folder: Path) -> None:
    """Record the batches into a run file, until it is closed, and remove it."""
    out, attention = folder / "run.duckdb", bench.attention
    rows = [PromptInfo(p.text, p.domain, p.source, len(p.ids), 0) for p in bench.plan.prompts]
    info = describe_run(bench.loaded, bench.config, bench.plan.sample, attention)
    layers = attention.found.layers if attention is not None else ()
    writer = RunWriter.create(out, info, [site.info for site in bench.sites], rows, layers)
    reporter = Reporter(False)
    _Session(bench.loaded, bench.sites, bench.plan, writer, reporter, attention).run(
        Stopper(Interrupts())
    )
    out.unlink()


def timed(bench: Bench, run: Callable[[], None]) -> Timing:
    """Time one run, until the device is done."""
    wall, cores = time.perf_counter(), time.process_time()
    run()
    if bench.loaded.model.device.type == "cuda":
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - wall, time.process_time() - cores)


def _report(name: str, ratios: list[float]) -> None:
    _say(
        f"overhead, {name}: median {statistics.median(ratios):.3f}, min {min(ratios):.3f}, "
        f"max {max(ratios):.3f} of {len(ratios)}"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
