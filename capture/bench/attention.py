"""How much memory recorded attention takes, by length of the prompt, each in a process of its own.

``python -m capture.bench attention-memory`` prints the table; this module run as a program
measures one cell of it.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capture.bench.levels import start_peak, stop_peak
from capture.model.load import transformers_library
from capture.recorder.record import record

HEADS, LAYERS, HEAD_SIZE = 8, 2, 16
WARM_TOKENS = 128
MIB = 2**20
CPU = torch.device("cpu")
MODES = ("scores", "attention")


def attention_memory_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the measurement."""
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="prompt lengths"
    )
    parser.add_argument("--every", type=int, default=1, help="as attention_every")


def attention_memory(options: argparse.Namespace) -> None:
    """Peak memory of recording one long prompt at level attention, against level scores."""
    lines = [
        f"random OLMoE, {LAYERS} layers, {HEADS} heads of {HEAD_SIZE}, sdpa, float32, one prompt; "
        "peak resident memory above that before recording",
        f"{'tokens':>8}{'scores':>12}{'attention':>12}{'more':>10}{'a token':>11}"
        f"{'weights of one layer':>24}",
    ]
    _say(*lines)
    for tokens in options.tokens:
        peak = {mode: _measured(tokens, mode, options.every) for mode in MODES}
        more = peak["attention"] - peak["scores"]
        weights = HEADS * tokens * tokens * 4
        _say(
            f"{tokens:>8}{peak['scores'] / MIB:>8.1f} MiB{peak['attention'] / MIB:>8.1f} MiB"
            f"{more / MIB:>6.1f} MiB{more / tokens / 1024:>7.1f} KiB{weights / MIB:>20.0f} MiB"
        )


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _measured(tokens: int, mode: str, every: int) -> int:
    """Run one cell in a process of its own; returns bytes."""
    command = [sys.executable, "-m", "capture.bench.attention", str(tokens), mode, str(every)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["peak"])


def _model(tokens: int) -> Any:
    """Return a random model with room for the prompt."""
    library = transformers_library()
    torch.manual_seed(0)
    config = library.OlmoeConfig(
        vocab_size=512,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=tokens,
        pad_token_id=0,
        eos_token_id=1,
    )
    return library.OlmoeForCausalLM(config).eval()


def _cell(tokens: int, mode: str, every: int) -> None:
    """Record one prompt and print how far memory rose."""
    torch.set_num_threads(1)
    model = _model(max(tokens, WARM_TOKENS))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, length in (("warm", WARM_TOKENS), ("long", tokens)):
            prompt = random.integers(3, 500, length).tolist()
            gc.collect()
            before = start_peak(CPU)
            out = Path(folder) / f"{name}.duckdb"
            options: dict[str, Any] = {"level": mode, "sample_tokens": 0, "attention_every": every}
            record(model, [prompt], out, batch_tokens=tokens, progress=False, **options)
            peak = stop_peak(CPU) - before
    _say(json.dumps({"peak": peak}))


if __name__ == "__main__":
    _cell(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
