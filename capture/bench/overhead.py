"""What recording costs in time and memory, against the same passes without it.

``python -m capture.bench overhead`` times one capture, ``levels`` every level, beside the model's
own way to put out its insides, and ``attention-memory`` looks at long prompts. This module run as a
program measures one cell of a table, in a process of its own, because the peak of a process's
memory belongs to all it did.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from capture.bench import say
from capture.interrupts import Interrupts
from capture.model.forward import Head, Runner, pad_batch, probe_tokens
from capture.model.hooks import Taps
from capture.model.inputs import vocabulary
from capture.model.load import DEMO, LoadedModel, load_model, transformers_library
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.model.tokens import TokenizedPrompt, tokenize
from capture.progress import Reporter
from capture.prompts import Prompt, read_prompts
from capture.recorder.config import CaptureConfig
from capture.recorder.engine import CallStep, senders_of
from capture.recorder.estimate import plan_sample
from capture.recorder.loop import CapturePlan, DecodeCall, HiddenRows, Recording
from capture.recorder.session import (
    AttentionPlan,
    Stopper,
    _Session,
    describe_run,
    max_length,
    plan_attention,
    plan_recording,
)
from capture.recorder.transfer import WriterThread
from capture.store import RECORDED_LEVELS, PromptInfo, RunWriter

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MIB = 2**20
PLAIN = "plain"  # forward and loss
OUTPUTS = "eager+outputs"  # output_attentions and output_router_logits, with eager attention
ROWS = (PLAIN, "stats", "ids", "scores", "attention", OUTPUTS)
DEMO_CONTEXT = 1024
SHORT = 128  # tokens of the prompt that warms everything up
RANDOM_VOCABULARY = 100  # token ids of random prompts, which every vocabulary has
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
OLMOE: dict[str, Any] = {  # OLMoE-1B-7B
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
QWEN3_30B: dict[str, Any] = {  # Qwen3-30B-A3B, 8 of its 48 layers
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
HEADS, LAYERS, HEAD_SIZE = 8, 2, 16
ATTENTION: dict[str, Any] = {  # of the measurement of attention's memory
    "vocab_size": 512,
    "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
RANDOM = {"tiny": TINY, "olmoe": OLMOE, "attention": ATTENTION}
SHAPES = ("demo", "tiny", "olmoe", "qwen3-30b-8layers")


class Elapsed(NamedTuple):
    """Seconds on the clock, and of all cores, which other busy processes disturb less."""

    wall: float
    cores: float

    @classmethod
    def now(cls) -> "Elapsed":
        """Return the time, when the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def since(self, before: "Elapsed") -> "Elapsed":
        """Return what passed."""
        return Elapsed(self.wall - before.wall, self.cores - before.cores)

    def over(self, other: "Elapsed") -> "Elapsed":
        """Return the ratios."""
        return Elapsed(self.wall / other.wall, self.cores / other.cores)


class Bench(NamedTuple):
    """A loaded model, its sites, and the batches that both sides run."""

    loaded: LoadedModel
    sites: list[Site]
    plan: CapturePlan
    config: CaptureConfig
    attention: AttentionPlan | None


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


def timed(run: Callable[[], None]) -> Elapsed:
    """Time one run, until the device is done."""
    started = Elapsed.now()
    run()
    return Elapsed.now().since(started)


def start_peak(device: torch.device) -> int:
    """Forget the peak so far and return what is in use now, bytes.

    On a CPU that is the process's resident memory as Linux counts it, on CUDA what PyTorch has
    allocated on the device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR.write_text("5", encoding="ascii")
    return _status("VmRSS")


def stop_peak(device: torch.device) -> int:
    """Return the most that was in use since :func:`start_peak`, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This measurement needs {name} in {STATUS}, as Linux has it.")


def overhead_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="demo")
    parser.add_argument("--copies", type=int, default=2, help="how often the prompts are repeated")
    parser.add_argument("--level", choices=RECORDED_LEVELS, default="ids")
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
    say(
        f"{options.model} on {bench.loaded.model.device}, {torch.get_num_threads()} threads of "
        f"torch; {n_tokens:,} tokens in {len(bench.plan.batches())} forward passes; level "
        f"{options.level}, {options.sample_tokens:,} sampled tokens"
    )
    say("plain: forward and loss; capture: the same, recorded, until the run file is closed")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"plain": partial(plain, bench), "capture": partial(recorded, bench, Path(folder))}
        for run in runs.values():
            timed(run)
        pairs = []
        for number in range(options.repeats):
            pairs.append((timed(runs["plain"]), timed(runs["capture"])))
            before, after = pairs[-1]
            ratio = after.over(before)
            say(
                f"pair {number + 1}: plain {before.wall:.2f} s, capture {after.wall:.2f} s, "
                f"ratio {ratio.wall:.3f} (core seconds {ratio.cores:.3f})"
            )
    report("overhead", [after.over(before) for before, after in pairs])


def report(name: str, ratios: list[Elapsed]) -> None:
    """Print the median and the range of ratios."""
    for kind in Elapsed._fields:
        values = [getattr(ratio, kind) for ratio in ratios]
        say(
            f"{name}, {kind}: median {statistics.median(values):.3f}, min {min(values):.3f}, max "
            f"{max(values):.3f} of {len(values)}"
        )


class Cell(NamedTuple):
    """One measurement: a row of the table at one prompt length; without repeats only its peak."""

    row: str
    shape: str
    device: str
    length: int
    tokens: int
    batch_tokens: int | None
    repeats: int
    decode: int
    attention_prompts: int
    threads: int | None
    every: int = 1  # as attention_every


def levels_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="demo", help="all but demo have random weights")
    add("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    add("--rows", nargs="+", choices=ROWS, default=ROWS)
    add("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a prompt")
    add("--tokens", type=int, default=16384, help="prompt tokens of one pass over all prompts")
    add("--batch-tokens", type=int, help="of a forward pass (default: as capture chooses)")
    add("--decode", type=int, default=0, metavar="N", help="decode N tokens after each prompt")
    add("--attention-prompts", type=int, default=64, help="as in a capture")
    add("--repeats", type=int, default=5, help="pairs; the median is reported")
    add("--threads", type=int, help="of torch (default: torch's own choice)")


def levels(options: argparse.Namespace) -> None:
    """Time and peak memory of every level, and of eager attention with all outputs."""
    what = f"then {options.decode} tokens decoded" if options.decode else "forward and loss"
    say(
        f"{options.shape} on {options.device}; {options.tokens:,} prompt tokens, {what}; median of "
        f"{options.repeats} pairs (plain, row) in one process; memory: peak above the loaded model"
    )
    say(
        f"{'tokens':>7}  {'row':14}{'wall':>7}  {'min-max':13}{'cores':>7}{'plain s':>9}"
        f"{'peak':>13}"
    )
    for length in options.lengths:
        if options.shape == "demo" and length > DEMO_CONTEXT:
            say(f"{length:>7}  (a random model of the demo's shape: the demo reads {DEMO_CONTEXT})")
        for row in options.rows:
            if row == OUTPUTS and options.decode:
                continue
            cell = Cell(
                row, options.shape, options.device, length, options.tokens, options.batch_tokens,
                options.repeats, options.decode, options.attention_prompts, options.threads,
            )  # fmt: skip
            _say_cell(cell, _in_own_process(cell))


def _in_own_process(cell: Cell) -> dict[str, Any]:
    command = [sys.executable, "-m", "capture.bench.overhead", json.dumps(cell._asdict())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _say_cell(cell: Cell, found: dict[str, Any]) -> None:
    wall, cores = found["wall"], found["cores"]
    spread = f"{min(wall):.2f}-{max(wall):.2f}"
    say(
        f"{cell.length:>7}  {cell.row:14}{statistics.median(wall):>7.3f}  {spread:13}"
        f"{statistics.median(cores):>7.3f}{found['plain']:>9.2f}{found['peak'] / MIB:>9.1f} MiB"
    )


def measure(cell: Cell) -> dict[str, Any]:
    """Measure one cell in this process: ratios to plain passes that alternate with it, and peak."""
    if cell.threads:
        torch.set_num_threads(cell.threads)
    bench, small = _benches(cell)
    device = bench.loaded.model.device
    with tempfile.TemporaryDirectory() as folder:
        baseline = partial(_loop if cell.decode else plain, bench)
        # libraries are loaded and kernels compiled before memory is looked at
        _row(cell.row, small, Path(folder))()
        if cell.repeats:
            baseline()
        run = _row(cell.row, bench, Path(folder))
        before = start_peak(device)
        run()
        peak = stop_peak(device) - before
        pairs = [(timed(baseline), timed(run)) for _ in range(cell.repeats)]
    return {
        "wall": [after.over(first).wall for first, after in pairs],
        "cores": [after.over(first).cores for first, after in pairs],
        "plain": statistics.median(first.wall for first, _ in pairs) if pairs else None,
        "peak": peak,
    }


def _row(row: str, bench: Bench, folder: Path) -> Callable[[], None]:
    """Return what a row of the table runs."""
    if row == OUTPUTS:
        return partial(_with_outputs, bench)
    if row == PLAIN:
        return partial(_loop if bench.config.generate else plain, bench)
    return partial(recorded, bench, folder)


def _benches(cell: Cell) -> tuple[Bench, Bench]:
    """Load or make the model, with prompts of the length wanted and with one short prompt."""
    count = max(1, cell.tokens // cell.length)
    loaded = None
    if cell.shape == "demo" and cell.length + cell.decode <= DEMO_CONTEXT:
        loaded = load_model("demo", device=cell.device)
        texts = [prompt.text or "" for prompt in read_prompts("demo")]
        assert loaded.tokenizer is not None
        ids = np.concatenate(loaded.tokenizer(texts)["input_ids"])
        ids = np.resize(ids, (count, cell.length))
    else:
        model = _random_model(cell.shape, cell.device, cell.length + cell.decode)
        loaded = LoadedModel(model, None, f"random {cell.shape}", None)
        ids = np.random.default_rng(0).integers(5, RANDOM_VOCABULARY, (count, cell.length))
    prompts = [Prompt(None, tuple(row), f"d{i % 4}", None) for i, row in enumerate(ids.tolist())]
    level: Any = cell.row if cell.row not in (PLAIN, OUTPUTS) else "ids"
    config = CaptureConfig(
        level=level,
        sample_tokens=0,
        batch_tokens=cell.batch_tokens,
        generate=cell.decode,
        attention_prompts=cell.attention_prompts,
        attention_every=cell.every,
    )
    short = prompts[0]._replace(ids=tuple(ids[0, :SHORT].tolist()))
    return prepare(loaded, prompts, config), prepare(loaded, [short], config)


def _random_model(shape: str, device: str, context: int) -> Any:
    """Make a model of a published shape with random weights."""
    library = transformers_library()
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config: Any
    if shape == "demo":
        config = library.AutoConfig.from_pretrained(DEMO)
    elif shape == "qwen3-30b-8layers":
        config = library.Qwen3MoeConfig(**QWEN3_30B, **ends)
    else:
        config = library.OlmoeConfig(**RANDOM[shape], **ends)
    config.max_position_embeddings = max(context, config.max_position_embeddings)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return library.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _with_outputs(bench: Bench) -> None:
    """Run forward and loss with eager attention, and every attention map and router score."""
    model: Any = bench.loaded.model
    ids = [prompt.ids for prompt in bench.plan.prompts]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), Head(model).open(probe_tokens(model)[:1]) as head:
            runner = Runner(model, head)
            runner.model = partial(model, output_attentions=True, output_router_logits=True)
            for prompts in bench.plan.batches():
                batch = pad_batch(prompts, ids, side="right", pad_id=bench.plan.pad_id)
                runner.prompts(batch).loss.cpu()
    finally:
        model.set_attn_implementation(before)


def _loop(bench: Bench) -> None:
    """Run the loop of a capture, decoding included, with nothing observed and nothing written."""

    def look(step: Any) -> None:
        if isinstance(step, CallStep):
            result = step.parcel.open()
            if isinstance(step.about, DecodeCall) and not np.any(result.has_loss):
                step.about.all_ended.set()

    model = bench.loaded.model
    thread: WriterThread[Any] = WriterThread(look)
    with Head(model).open(probe_tokens(model)[:1]) as head:
        Recording(
            runner=Runner(model, head),
            taps=Taps(()),
            hidden_rows=HiddenRows(),
            senders=senders_of((), bench.config.level, thread),
            plan=bench.plan,
            advance=lambda: None,
            check=lambda: None,
        ).run()
    thread.close()


def attention_memory_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="prompt lengths"
    )
    parser.add_argument("--every", type=int, default=1, help="as attention_every")


def attention_memory(options: argparse.Namespace) -> None:
    """Peak memory of recording one long prompt at level attention, against level scores."""
    say(
        f"random OLMoE, {LAYERS} layers, {HEADS} heads of {HEAD_SIZE}, sdpa, float32, one prompt; "
        "peak resident memory above that before recording"
    )
    say(
        f"{'tokens':>8}{'scores':>12}{'attention':>12}{'more':>10}{'a token':>11}"
        f"{'weights of one layer':>24}"
    )
    for tokens in options.tokens:
        scores, attention = (
            _in_own_process(
                Cell(row, "attention", "cpu", tokens, tokens, tokens, 0, 0, 64, 1, options.every)
            )["peak"]
            for row in ("scores", "attention")
        )
        more, weights = attention - scores, HEADS * tokens * tokens * 4
        say(
            f"{tokens:>8}{scores / MIB:>8.1f} MiB{attention / MIB:>8.1f} MiB"
            f"{more / MIB:>6.1f} MiB{more / tokens / 1024:>7.1f} KiB{weights / MIB:>20.0f} MiB"
        )


if __name__ == "__main__":
    say(json.dumps(measure(Cell(**json.loads(sys.argv[1])))))
