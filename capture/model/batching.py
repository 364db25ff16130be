"""Prompts of unequal length into padded batches, and which of their rows are real tokens."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class PaddedBatch(NamedTuple):
    """Prompts of one forward pass: B rows, S columns, N real tokens.

    Attributes
    ----------
    prompts : array [B]
        Numbers of the prompts, ascending.
    lengths : array [B], tokens
    input_ids : array [B, S], int64
    mask : array [B, S], int64
        1 at real tokens.
    rows : array [N]
        Place of each real token in the flattened batch, prompt after prompt.
    row_prompt : array [N]
        Prompt of each real token.
    position : array [N]
        Place of each real token in its prompt.
    """

    prompts: Ints
    lengths: Ints
    input_ids: Ints
    mask: Ints
    rows: Ints
    row_prompt: Ints
    position: Ints

    @property
    def is_padded(self) -> bool:
        """Whether any prompt is shorter than the batch is wide."""
        return len(self.rows) < self.input_ids.size


def plan_batches(
    lengths: Sequence[int], budget: int, extra: int = 0, *, same_length: bool = False
) -> list[Ints]:
    """Group prompts of similar length, longest first, within a budget of padded tokens.

    Longest first, so that a model that does not fit into memory fails at once. A prompt longer
    than the budget gets a forward pass of its own.

    Parameters
    ----------
    lengths : sequence of int, tokens
    budget : int, tokens
        Rows times width of a batch stay below it.
    extra : int, tokens
        Tokens that will be generated after each prompt.
    same_length : bool
        Put only prompts of one length together, so that nothing is padded.

    Returns
    -------
    list of arrays
        Numbers of the prompts of each batch, ascending.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[Ints] = []
    start = 0
    while start < len(order):
        width = lengths[order[start]] + extra
        stop = start + max(1, budget // width)
        if same_length:
            alike = [lengths[n] == lengths[order[start]] for n in order[start:stop]]
            stop = start + (alike.index(False) if False in alike else len(alike))
        batches.append(np.sort(order[start:stop]))
        start = stop
    return batches


def pad_batch(
    prompts: Ints,
    ids: Sequence[npt.NDArray[np.int32]],
    *,
    side: Literal["left", "right"],
    pad_id: int,
) -> PaddedBatch:
    """Lay prompts out as one rectangle.

    Parameters
    ----------
    prompts : array [B]
        Numbers of the prompts, ascending.
    ids : sequence of array, one a prompt of the whole run
    side : {"left", "right"}
        Where the padding goes: left where decoding follows.
    pad_id : int
        What padding holds; the attention mask hides it.
    """
    lengths = np.array([len(ids[p]) for p in prompts], dtype=np.int64)
    width = int(lengths.max())
    column = np.arange(width)
    start = width - lengths if side == "left" else np.zeros_like(lengths)
    real = (column >= start[:, None]) & (column < (start + lengths)[:, None])  # [B, S]
    input_ids = np.full(real.shape, pad_id, dtype=np.int64)
    input_ids[real] = np.concatenate([ids[p] for p in prompts])
    position = (column - start[:, None])[real]
    return PaddedBatch(
        prompts=prompts,
        lengths=lengths,
        input_ids=input_ids,
        mask=real.astype(np.int64),
        rows=np.flatnonzero(real),
        row_prompt=np.repeat(prompts, lengths),
        position=position,
    )
