"""Time replay: many linear routers on a million recorded rows, on synthetic router inputs.

python -m explorer.comparison.bench --threads 2
"""

import argparse
import os
import sys
import time

import pandas as pd
import torch

from explorer.comparison.replay import RecordedSplit, replay_router
from explorer.routers import ROUTERS, Router, RouterInputs
from explorer.routers.native import TopKRouter

# gates that are one matrix: learned by imitation, random, the model's own with other k
LINEAR = (
    *[("distilled_linear", {"seed": seed, "steps": 50}) for seed in range(6)],
    *[("frozen_random", {"seed": seed}) for seed in range(4)],
    *[("top_k", {"k": k}) for k in (1, 2, 4, 6, 8, 12)],
)


def synthetic(rows: int, layers: int, width: int, n_experts: int, top_k: int) -> RecordedSplit:
    """Make router inputs of ``layers`` layers, ``rows`` of them together, and a small fit split."""
    split = RecordedSplit({}, {}, {})
    for layer in range(layers):
        generator = torch.Generator().manual_seed(10_000 + layer)
        gate = torch.randn(n_experts, width, generator=generator) / width**0.5
        for part, n in ((split.fit, 2048), (split.held_out, rows // layers)):
            part[layer, 0] = _inputs(layer, gate, n, top_k, generator)
        names = pd.Categorical([f"domain {n % 8}" for n in range(rows // layers)])
        split.tokens[layer, 0] = pd.DataFrame({"domain": names})
    return split


def _inputs(
    layer: int, gate: torch.Tensor, n: int, top_k: int, generator: torch.Generator
) -> RouterInputs:
    hidden = torch.randn(n, gate.shape[1], generator=generator)
    position = torch.arange(n) % 256
    known = {
        "layer": layer,
        "n_experts": gate.shape[0],
        "top_k": top_k,
        "score_function": "softmax",
        "hidden": hidden,
        "logits": hidden @ gate.T * 2,
        "token_ids": torch.randint(0, 1000, (n,), generator=generator),
        "positions": position,
        "starts": position == 0,
    }
    inputs = RouterInputs(**known)  # type: ignore[arg-type]
    return RouterInputs(**known, native=TopKRouter().route(inputs))  # type: ignore[arg-type]


def main() -> None:
    """Print seconds for each router and for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="(token, layer) rows")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    split = synthetic(options.rows, options.layers, options.width, options.experts, options.top_k)
    routers: dict[str, Router] = {
        f"{name} {next(iter(given.values()))}": ROUTERS[name](**given) for name, given in LINEAR
    }
    begun, used = time.perf_counter(), time.process_time()
    for label, router in routers.items():
        start = time.perf_counter()
        rows = replay_router(label, router, split).rows
        took = time.perf_counter() - start
        _say(f"{label}: {took:.2f} s, agreement {rows[-1]['agreement']:.3f}")
    wall, cpu = time.perf_counter() - begun, time.process_time() - used
    _say(
        f"{len(routers)} routers on {options.rows:,} rows: {wall:.1f} s, {cpu:.1f} s of CPU "
        f"(fits included), load average {os.getloadavg()[0]:.1f}"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
