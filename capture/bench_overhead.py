"""How much longer a model takes while it is recorded, against the same passes without capture."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capture.config import CaptureConfig
from capture.progress import Reporter
from capture.prompts import read_prompts
from capture.sampling import plan_sample
from capture.store import LEVELS, PromptInfo, RunWriter
from capture.tokens import TokenizedPrompt, tokenize

if TYPE_CHECKING:
    from capture.models import LoadedModel
    from capture.recording import Plan
    from capture.sites import Site


class Timing(NamedTuple):
    """One timed pass over all prompts: seconds on the clock and seconds of all cores."""

    wall: float
    cores: float


class Bench(NamedTuple):
    """A loaded model, its sites, and the batches that both sides run."""

    loaded: "LoadedModel"
    sites: "list[Site]"
    plan: "Plan"
    config: CaptureConfig


def overhead_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="demo")
    parser.add_argument("--copies", type=int, default=2, help="how often the prompts are repeated")
    parser.add_argument("--level", choices=LEVELS[:3], default="ids")
    parser.add_argument("--sample-tokens", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=7, help="pairs; the median is reported")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")


def overhead(options: argparse.Namespace) -> None:
    """Time capture over plain forward and loss, alternating; prints the ratio."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    bench = _prepare(options)
    n_tokens = sum(len(prompt.ids) for prompt in bench.plan.prompts)
    _say(
        f"{options.model} on {bench.loaded.model.device}, {torch.get_num_threads()} threads of "
        f"torch; {n_tokens:,} tokens in {len(bench.plan.batches())} forward passes; level "
        f"{options.level}, {options.sample_tokens:,} sampled tokens"
    )
    _say("plain: forward and loss; capture: the same, recorded, until the run file is closed")
    with tempfile.TemporaryDirectory() as folder:

        def plain() -> None:
            _plain(bench)

        def recorded() -> None:
            _recorded(bench, Path(folder))

        _timed(bench, plain)
        _timed(bench, recorded)
        pairs = []
        for number in range(options.repeats):
            pairs.append((_timed(bench, plain), _timed(bench, recorded)))
            before, after = pairs[-1]
            _say(
                f"pair {number + 1}: plain {before.wall:.2f} s, capture {after.wall:.2f} s, "
                f"ratio {after.wall / before.wall:.3f} "
                f"(core seconds {after.cores / before.cores:.3f})"
            )
    _report("wall", [after.wall / before.wall for before, after in pairs])
    _report("core seconds", [after.cores / before.cores for before, after in pairs])


def _prepare(options: argparse.Namespace) -> Bench:
    from capture.models import load_model
    from capture.preparation import max_length, plan_recording, vocab_size
    from capture.selftest import attach

    config = CaptureConfig(
        level=options.level,
        sample_tokens=options.sample_tokens,
        batch_tokens=options.batch_tokens,
        device=options.device,
    )
    loaded = load_model(options.model, device=options.device)
    prompts: list[TokenizedPrompt] = tokenize(
        read_prompts(options.prompts) * options.copies,
        loaded.tokenizer,
        vocab_size=vocab_size(loaded),
        max_length=max_length(loaded, config),
    )
    sample = plan_sample(
        [p.domain for p in prompts], [len(p.ids) for p in prompts], options.sample_tokens, 0
    )
    plan = plan_recording(prompts, sample, loaded, config)
    return Bench(loaded, attach(loaded.model), plan, config)


def _plain(bench: Bench) -> None:
    import torch

    from capture.batching import pad_batch
    from capture.forward import Runner
    from capture.head import Head
    from capture.preparation import vocab_size
    from capture.selftest import probe_tokens

    model, plan = bench.loaded.model, bench.plan
    ids = [prompt.ids for prompt in plan.prompts]
    with torch.inference_mode(), Head(model).open(probe_tokens(model)[:1]) as head:
        runner = Runner(model, head)
        for prompts in plan.batches(head.limit(vocab_size(bench.loaded))):
            batch = pad_batch(prompts, ids, side="right", pad_id=plan.pad_id)
            runner.prompts(batch).loss.cpu()


def _recorded(bench: Bench, folder: Path) -> None:
    from capture.preparation import describe_run
    from capture.session import _Session

    out = folder / "run.duckdb"
    rows = [PromptInfo(p.text, p.domain, p.source, len(p.ids), 0) for p in bench.plan.prompts]
    info = describe_run(bench.loaded, bench.config, bench.plan.sample)
    writer = RunWriter.create(out, info, [site.info for site in bench.sites], rows)
    _Session(bench.loaded, bench.sites, bench.plan, writer, Reporter(False)).run(None)
    out.unlink()


def _timed(bench: Bench, run: Callable[[], None]) -> Timing:
    import torch

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
