"""One forward pass of the model over a padded batch, with the loss of every token."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from capture.model.batching import PaddedBatch
from capture.model.inputs import input_device
from capture.model.token_losses import Head


class PromptPass(NamedTuple):
    """What a forward pass over prompts gives besides its routing.

    Attributes
    ----------
    loss : Tensor [M], float32, nats
        Of the real tokens that have a next token, in the order of the batch's rows.
    taken : Tensor [R, ...]
        What ``Head.logits`` takes, one row per place of the batch.
    cache : object or None
        Keys and values, when they were asked for.
    """

    loss: torch.Tensor
    taken: torch.Tensor
    cache: Any


def keeps(cache: Any) -> bool:
    """Whether a model really kept what it has read: some hand back nothing, or an empty cache."""
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and not (callable(length) and int(length()) == 0)


class Runner:
    """Calls a causal language model as capture needs it.

    Parameters
    ----------
    model : PreTrainedModel
    head : Head
        Open, so that logits of all positions are never computed at once.
    """

    def __init__(self, model: Any, head: Head) -> None:
        self.model = model
        self.head = head
        self.device = input_device(model)
        self.is_compiled = any(m._compiled_call_impl is not None for m in model.modules())
        self._takes_positions = takes_positions(model)

    def prompts(self, batch: PaddedBatch, *, keep_cache: bool = False) -> PromptPass:
        """Run the prompts of a batch; padding is masked and gets no loss."""
        ids = to_device(batch.input_ids, self.device)
        # without padding the mask says nothing, and models are faster without it
        mask = to_device(batch.mask, self.device) if batch.is_padded or keep_cache else None
        arguments: dict[str, Any] = {"use_cache": keep_cache}
        if keep_cache and mask is not None:
            arguments |= self.positions((mask.cumsum(-1) - 1).clamp_min(0))
        output = self.model(input_ids=ids, attention_mask=mask, **arguments)
        taken = self.head.take(output)
        has_next = next_in_prompt(batch)
        rows = to_device(batch.rows[has_next], self.device)
        targets = ids.flatten()[rows + 1]
        if taken.device != self.device:  # a model spread over several devices
            rows, targets = rows.to(taken.device), targets.to(taken.device)
        loss = self.head.losses(taken, rows, targets)
        return PromptPass(loss, taken, getattr(output, "past_key_values", None))

    def again(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] after texts [B, S] that are read from their start.

        For decoding with a model that keeps no cache; texts end at the right edge.
        """
        positions = self.positions((mask.cumsum(-1) - 1).clamp_min(0))
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        taken = self.head.take(output)
        return self.head.logits(taken.reshape(*ids.shape, -1)[:, -1])

    def positions(self, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the argument for positions, where the model takes one."""
        return {"position_ids": position_ids} if self._takes_positions else {}


def takes_positions(model: Any) -> bool:
    """Whether a model takes positions; an adapter's wrapper takes anything and hands it on."""
    base = getattr(model, "get_base_model", None)
    called = base() if callable(base) else model
    return "position_ids" in inspect.signature(called.forward).parameters


def next_in_prompt(batch: PaddedBatch) -> npt.NDArray[np.bool_]:
    """Return which of the real tokens [N] are not the last of their prompt."""
    last = np.cumsum(batch.lengths) - 1
    has_next = np.ones(len(batch.rows), dtype=np.bool_)
    has_next[last] = False
    return has_next


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; from page-locked memory, so that nothing waits."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
