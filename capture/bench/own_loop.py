"""How much longer somebody's own loop takes while it is recorded or its training is watched."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from capture.bench import say
from capture.bench.overhead import Elapsed, report
from capture.model.inputs import vocabulary
from capture.model.load import load_model
from capture.model.tokens import tokenize
from capture.prompts import read_prompts
from capture.recorder.own_loop.callback import TrainerCallback
from capture.recorder.own_loop.recording import recording
from capture.store import RECORDED_LEVELS

Step = Callable[[], None]


def own_loop_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=8, help="texts of a batch")
    parser.add_argument("--width", type=int, default=256, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=4, help="steps of one side of a pair")
    parser.add_argument("--repeats", type=int, default=7, help="pairs; the median is reported")
    parser.add_argument("--level", choices=RECORDED_LEVELS, default="ids")
    parser.add_argument("--device")


def own_loop(options: argparse.Namespace) -> None:
    """Time steps of one's own loop, recorded and watched, over plain ones; prints the ratios."""
    loaded = load_model(options.model, device=options.device)
    model: Any = loaded.model
    ids = np.concatenate(
        [
            prompt.ids
            for prompt in tokenize(
                read_prompts("demo"),
                loaded.tokenizer,
                vocab_size=vocabulary(model),
                max_length=None,
            )
        ]
    )
    size = options.rows * options.width
    batch = torch.from_numpy(np.resize(ids, size).astype(np.int64))
    batch = batch.reshape(options.rows, options.width).to(model.device)
    say(
        f"{options.model} on {model.device}, {torch.get_num_threads()} threads of torch; batches "
        f"of {options.rows} x {options.width} tokens, {options.steps} steps a side"
    )

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=batch, use_cache=False)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def train() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ratios: list[Elapsed] = []
        # the first one imports what writing needs
        _recorded(model, out / "first.duckdb", forward, options)
        for number in range(options.repeats):
            plain = _timed(forward, options.steps)
            run = out / f"{number}.duckdb"
            ratios.append(_recorded(model, run, forward, options).over(plain))
        report(f"recording, level {options.level}, over forward passes", ratios)
        model.train()
        _timed(train, 1)
        ratios = [_watched(model, out / f"{n}", train, options) for n in range(options.repeats)]
        report("statistics of every step over training steps", ratios)


def _recorded(model: Any, out: Path, step: Step, options: argparse.Namespace) -> Elapsed:
    """Time recorded steps until the file is closed; its creation and the test come before."""
    with recording(model, out, level=options.level) as run:
        # before the first call numba loads what it compiled
        step()
        started = Elapsed.now()
        for _ in range(options.steps):
            step()
    seconds = Elapsed.now().since(started)
    if run.error is not None:
        raise run.error
    return seconds


def _watched(model: Any, out: Path, step: Step, options: argparse.Namespace) -> Elapsed:
    """Return the time of watched steps over that of plain ones, which follow."""
    callback = TrainerCallback(out, strict=True)
    about: Any = SimpleNamespace(n_gpu=1)
    state: Any = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    callback.on_train_begin(about, state, None, model=model)

    def watched() -> None:
        step()
        state.global_step += 1
        callback.on_step_end(about, state, None, model=model)

    watched()
    seconds = _timed(watched, options.steps)
    callback.on_train_end(about, state, None, model=model)
    return seconds.over(_timed(step, options.steps))


def _timed(step: Step, count: int) -> Elapsed:
    started = Elapsed.now()
    for _ in range(count):
        step()
    return Elapsed.now().since(started)
