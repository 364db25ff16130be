"""Times of functions measured in turns, so that their ratios are of one run."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

FLUSH_BYTES = 2**28  # more than the second-level cache of any GPU we know
SLEEP_CYCLES = 10**6  # about half a millisecond: the host queues the call while the GPU sleeps


class Times(NamedTuple):
    """Quantiles of a function's times, in seconds."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Times:
    """Return the 20th, 50th and 80th percentile, between neighbours by their distance."""
    values = torch.tensor(sorted(samples), dtype=torch.float64)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*values.quantile(points).tolist())


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Times]:
    """Time each function ``repeats`` times, one after the other, after two calls unmeasured.

    On CUDA a time is what the device needs, from event to event, with a second-level cache that
    holds nothing of the inputs; the host's part is hidden behind a device that sleeps first. On a
    CPU it is the processor time of all threads together, which other work on the machine changes
    little; caches hold what they hold.
    """
    measure = _cuda_timer() if device.type == "cuda" else _processor_time
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(2):
        for function in functions.values():
            function()
    for _ in range(repeats):
        for name, function in functions.items():
            samples[name].append(measure(function))
    return {name: quantiles(values) for name, values in samples.items()}


def _processor_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _cuda_timer() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(function: Callable[[], object]) -> float:
        before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        flush.zero_()
        before.record()
        function()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    return measure
