"""Losses of a model with and without another rule, sequence by sequence, and its latency."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.errors import SwapError
from capture.model.forward import (
    Head,
    Runner,
    next_in_prompt,
    pad_batch,
    plan_batches,
    probe_tokens,
)
from capture.model.inputs import plain_forward
from capture.model.sites import text_config
from capture.swap.losses import SequenceLosses

BATCH_TOKENS = 4096
# medians of fewer runs move too much to be reported
MIN_REPEATS = 20
WARM_UP = 3

Swap = Callable[[], AbstractContextManager[Any]]
Opened = TypeVar("Opened")


class Kept(Generic[Opened]):
    """Opens contexts and keeps what they gave: the counts of a swap, or a recorded tape.

    Parameters
    ----------
    make : callable
        Returns a new context, such as ``lambda: swap(model, sites, rule)``.

    Attributes
    ----------
    values : list
        One for each time it was opened.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Opened]]) -> None:
        self._make = make
        self.values: list[Opened] = []

    @contextmanager
    def __call__(self) -> Iterator[Opened]:
        """Open the context."""
        with self._make() as value:
            self.values.append(value)
            yield value


class Latency(NamedTuple):
    """Times of one forward pass with and without a rule, taken in turns.

    Attributes
    ----------
    native_ms, swapped_ms : float
        Medians.
    ratio : float
        Median of the ratios of neighbouring runs: other load on the machine meets both.
    low, high : float
        Quartiles of these ratios.
    repeats : int
    """

    native_ms: float
    swapped_ms: float
    ratio: float
    low: float
    high: float
    repeats: int


def sequence_losses(
    model: nn.Module,
    sequences: Sequence[npt.ArrayLike],
    *,
    swapped: Swap = nullcontext,
    pad_id: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> SequenceLosses:
    """Return the loss of every sequence; takes and refuses what :func:`token_losses` does."""
    losses = token_losses(
        model, sequences, swapped=swapped, pad_id=pad_id, batch_tokens=batch_tokens
    )
    return summed(losses)


def summed(losses: Sequence[npt.NDArray[np.float32]]) -> SequenceLosses:
    """Return the sums of losses that :func:`token_losses` gave."""
    sums = np.array([one.sum(dtype=np.float64) for one in losses])
    return SequenceLosses(sums, np.array([len(one) for one in losses], dtype=np.int64))


def token_losses(
    model: nn.Module,
    sequences: Sequence[npt.ArrayLike],
    *,
    swapped: Swap = nullcontext,
    pad_id: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    before_batch: Callable[[npt.NDArray[np.int64]], None] | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Return the loss of every token that follows another, sequence by sequence.

    Batches depend on the lengths only, so that two calls with the same sequences pair exactly.

    Parameters
    ----------
    model : PreTrainedModel
    sequences : sequence of array [S]
        Token ids; at least two each.
    swapped : callable, optional
        Returns the context to run in, such as ``lambda: swap(model, sites, rule)``; inside a
        :class:`Kept`, what the context gave can be read afterwards.
    pad_id : int, optional
        What padding holds, hidden by the mask. Default: the configuration's, else 0.
    batch_tokens : int
        Upper bound of a forward pass, padding included.
    before_batch : callable, optional
        Told which sequences the next forward pass holds, one a row of the batch.

    Returns
    -------
    list of array [S - 1], float32, nats
        Of the second token on.

    Raises
    ------
    SwapError
        If a sequence has no next token to predict.
    """
    ids = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    lengths = [len(one) for one in ids]
    if not lengths or min(lengths) < 2:
        raise SwapError(
            "Sequences of at least two tokens were expected, so that there is one to predict, got "
            f"{min(lengths, default=0)}. Leave shorter ones out."
        )
    pad = pad_id if pad_id is not None else getattr(text_config(model), "pad_token_id", None) or 0
    losses = [np.zeros(length - 1, dtype=np.float32) for length in lengths]
    with torch.inference_mode(), Head(model).open(probe_tokens(model)[:1]) as head:
        runner = Runner(model, head)
        # opened late: what the head tries out is no part of what a swap counts
        with swapped():
            for numbers in plan_batches(lengths, batch_tokens):
                if before_batch is not None:
                    before_batch(numbers)
                batch = pad_batch(numbers, ids, side="right", pad_id=int(pad))
                loss = runner.prompts(batch).loss.float().cpu().numpy()
                has_next = next_in_prompt(batch)
                of = batch.row_prompt[has_next]
                for number in numbers:
                    losses[number] = loss[of == number]
    return losses


def latency(
    model: nn.Module,
    input_ids: torch.Tensor,
    swapped: Swap,
    *,
    repeats: int = MIN_REPEATS,
    warm_up: int = WARM_UP,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time a forward pass with and without a rule, in turns.

    Give ``swapped`` a swap with ``checked=False``, which does not look at the rule's values.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : Tensor [B, S]
        Without padding.
    swapped : callable
        Returns the context of the swapped pass; opening it is not timed.
    repeats : int
        Pairs of runs, at least 20.
    warm_up : int
        Pairs that do not count.
    clock : callable
        Seconds.
    """
    if repeats < MIN_REPEATS:
        raise SwapError(f"At least {MIN_REPEATS} repeats give a median, got {repeats}.")
    native, changed = [], []
    with torch.inference_mode(), plain_forward(model):
        for number in range(warm_up + repeats):
            pair = _timed(model, input_ids, clock)
            with swapped():
                other = _timed(model, input_ids, clock)
            if number >= warm_up:
                native.append(pair)
                changed.append(other)
    ratios = [b / a for a, b in zip(native, changed, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Latency(
        1e3 * statistics.median(native),
        1e3 * statistics.median(changed),
        middle,
        low,
        high,
        repeats,
    )


def _timed(model: nn.Module, input_ids: torch.Tensor, clock: Callable[[], float]) -> float:
    """Return the seconds of one forward pass, once the device is done with it."""
    _wait(input_ids.device)
    start = clock()
    model(input_ids=input_ids, use_cache=False)
    _wait(input_ids.device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
