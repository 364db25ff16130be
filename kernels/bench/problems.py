"""What is timed: an op on one input, the backends that run it, and what it is compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch


class BenchError(RuntimeError):
    """A backend disagrees with the reference, or a benchmark cannot run."""


class Tolerance(NamedTuple):
    """How far one field of an output may be from the reference.

    Attributes
    ----------
    error : float
        Largest difference; for large values, this share of the reference.
    share : float
        Share of the elements that may be further away.
    """

    error: float
    share: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One op on one input.

    Attributes
    ----------
    op, shape : str
        How the results name it.
    run : callable
        From the name of a backend to the op's output.
    backends : tuple of str
        Backends to time, all but the reference, best first.
    inputs : tuple of Tensor
        What the op reads.
    baselines : mapping
        Other functions to time in the same run, by name.
    tolerances : mapping
        By field of the output; integers are equal and floats within 1e-4 where it says nothing.
    check : callable, optional
        Like ``run`` on a smaller input, for references that cannot hold the timed one. The
        reference is timed only where there is none.
    """

    op: str
    shape: str
    run: Callable[[str], Any]
    backends: tuple[str, ...]
    inputs: tuple[torch.Tensor, ...]
    baselines: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    check: Callable[[str], Any] | None = None

    def timed(self) -> dict[str, Callable[[], object]]:
        """Return what is timed by name: backends, the reference where it fits, baselines."""
        names = self.backends if self.check else (*self.backends, "torch")
        return {**{name: partial(self.run, name) for name in names}, **self.baselines}

    def n_bytes(self) -> int:
        """Return the bytes that the op must move: its inputs once and its outputs once."""
        outputs = self.run(self.backends[0])
        tensors = [*self.inputs, *(x for x in outputs if x is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def refuse_what_disagrees(self) -> None:
        """Compare every backend with the reference.

        Raises
        ------
        BenchError
            If one is too far from it.
        """
        run = self.check or self.run
        expected = run("torch")
        for name in self.backends:
            actual = run(name)
            for part in expected._fields:
                reason = disagreement(
                    getattr(actual, part), getattr(expected, part), self.tolerances.get(part)
                )
                if reason:
                    raise BenchError(
                        f"{self.op} ({self.shape}) with backend {name!r} disagrees with the "
                        f"reference in {part}: {reason}. It is not timed."
                    )


def disagreement(
    actual: torch.Tensor | None, expected: torch.Tensor | None, tolerance: Tolerance | None = None
) -> str | None:
    """Return how two outputs differ, or None where they agree; nan agrees with nan only."""
    if actual is None or expected is None:
        return None if actual is expected else "only one of them has it"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return (
            f"{actual.dtype} of shape {list(actual.shape)} instead of "
            f"{expected.dtype} of shape {list(expected.shape)}"
        )
    allowed = tolerance or Tolerance(1e-4 if expected.is_floating_point() else 0.0)
    left, right = actual.double(), expected.double()
    limit = allowed.error * right.abs().nan_to_num(posinf=0.0).clamp_min(1.0)
    far = ~(((left - right).abs() <= limit) | (left == right) | (left.isnan() & right.isnan()))
    n_far = int(far.sum())
    if n_far <= allowed.share * far.numel():
        return None
    first = tuple(far.nonzero()[0].tolist())
    return (
        f"{n_far} of {far.numel()} elements, the first at {list(first)}: "
        f"{left[first].item():.7g} instead of {right[first].item():.7g}"
    )
