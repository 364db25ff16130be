"""Quantised weights: rounded to few bits with a scale per group, stacks of experts included."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from explorer.comparison.conditions.base import (
    CONDITIONS,
    Applied,
    Condition,
    ConditionInfo,
    Subject,
)
from explorer.comparison.conditions.weights import (
    check_parts,
    input_axis,
    matrices,
    part_parameters,
    replaced,
)
from explorer.errors import ConditionError

FEWEST_BITS, MOST_BITS = 2, 8
SCALE_BITS = 16  # a scale is stored as a half float
GROUP = 32


def fake_quantise(
    weight: torch.Tensor, bits: int, *, group: int = 0, axis: int = -1
) -> torch.Tensor:
    """Return a weight rounded to ``2^bits - 1`` evenly spaced values, symmetric around 0.

    Parameters
    ----------
    weight : Tensor [..., out, in]
        Any number of matrices.
    bits : int
    group : int
        Weights along ``axis`` that share a scale; 0 = all of them, a scale for each output.
    axis : int
        The one that products sum over.

    Returns
    -------
    Tensor
        Of the weight's shape and dtype; no value is off by more than half its group's scale.

    Notes
    -----
    ``w = s round(w / s)`` with ``s = max |w| / (2^(bits - 1) - 1)``: nothing is clipped. Rounding
    is torch's own; what is missing there, and in libraries that quantise the matrices of
    ``nn.Linear`` only, is a group of a stack of experts. torchao stores such stacks, but a model
    of transformers cannot run on what it stores.
    """
    moved = weight.movedim(axis, -1)
    size = group or moved.shape[-1]
    if moved.shape[-1] % size:
        raise ConditionError(
            f"A group that divides the {moved.shape[-1]} inputs of a weight was expected, got "
            f"{group}. Give a divisor, or 0 for one scale for each output."
        )
    grouped = moved.reshape(-1, size).float()
    top = 2 ** (bits - 1) - 1
    # a group of zeros stays zeros with any scale
    scale = grouped.abs().amax(dim=-1).div(top).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(grouped, scale, zero, 0, -top, top)
    return rounded.reshape(moved.shape).movedim(-1, axis).to(weight.dtype).contiguous()


def usual_group(inputs: int) -> int:
    """Return 32, or the largest number below that divides the inputs of a weight."""
    return next(size for size in range(min(GROUP, inputs), 0, -1) if inputs % size == 0)


@CONDITIONS.add("quantised")
class Quantised(Condition):
    """Round weights to few bits; products are still computed in the model's own dtype.

    Parameters
    ----------
    bits : int, 2 to 8
    group : int or None
        Weights that share a scale; 0 = one scale for each output. None = one scale for each output
        at 8 bits, else 32, or the largest number below that divides the inputs.
    parts : sequence of {"attention", "router", "experts", "rest"}
        Whose matrices are rounded. The router is left out by default, as is usual.
    """

    info = ConditionInfo(
        name="quantised",
        kind="quantisation",
        title="Quantised weights",
        summary=(
            "Weights are rounded to 8, 4 or 3 bits with a scale per group, experts' stacks "
            "included. Fake quantisation: the rounding is real, the smaller memory is reckoned."
        ),
        formula="w = s round(w / s),  s = max |w_group| / (2^(bits-1) - 1)",
        paper="2508.01625",
    )

    def __init__(
        self,
        bits: int = 8,
        *,
        group: int | None = None,
        parts: Sequence[str] = ("attention", "experts"),
    ) -> None:
        if not FEWEST_BITS <= bits <= MOST_BITS:
            raise ConditionError(f"{FEWEST_BITS} to {MOST_BITS} bits were expected, got {bits}.")
        if group is not None and group < 0:
            raise ConditionError(f"A group of 0 or more weights was expected, got {group}.")
        self.bits = bits
        self.group = 0 if group is None and bits == MOST_BITS else group
        self.parts = check_parts(parts)

    @property
    def label(self) -> str:
        """Bits, and group and parts where they are not the usual ones."""
        usual = self.parts == ("attention", "experts")
        parts = "" if usual else " " + "+".join(self.parts)
        plain = self.group is None or (self.group == 0 and self.bits == MOST_BITS)
        return f"int{self.bits}{parts}" + ("" if plain else f" group {self.group}")

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        named = part_parameters(subject)
        changes = {}
        for part in self.parts:
            for parameter in matrices(named[part]).values():
                axis = input_axis(subject, parameter)
                inputs = parameter.shape[axis]
                size = usual_group(inputs) if self.group is None else self.group or inputs
                changes[parameter] = fake_quantise(parameter.data, self.bits, group=size, axis=axis)
                stored = parameter.numel() * (self.bits + SCALE_BITS / size) / 8
                applied.weight_bytes += stored - parameter.numel() * parameter.element_size()
        applied.chosen["bits"] = self.bits
        return replaced(changes)
