"""What a condition is: a change to a loaded model that is undone exactly when its block ends."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from capture.model.selftest import attach
from capture.model.sites import Site
from explorer.errors import ConditionError
from explorer.registry import Registry

Kind = Literal["precision", "quantisation", "pruning", "factorisation", "merging"]
Sequence_ = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Subject:
    """The model that conditions are put on.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, not compiled.
    sites : tuple of Site
        All its routers.
    calibration : tuple of array [S], int32
        Token ids of the fit split, from which a condition may learn what to keep. Never the texts
        that losses are reported on.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    calibration: tuple[Sequence_, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, calibration: Sequence[npt.ArrayLike] = ()) -> "Subject":
        """Find and test the routers of a model."""
        ids = tuple(np.asarray(one, dtype=np.int32) for one in calibration)
        return cls(model, tuple(attach(model)), ids)

    def calibration_tokens(self) -> tuple[Sequence_, ...]:
        """Return the fit split, which must be there."""
        if not self.calibration:
            raise ConditionError(
                "This condition learns what to keep from texts of a fit split, but the subject "
                "has none. Pass calibration=[token ids, ...]."
            )
        return self.calibration


@dataclass
class Applied:
    """What an open condition did to the model.

    Attributes
    ----------
    method : str
        How a choice was made, such as ``"enumeration of 1820 subsets"`` or ``"greedy"``, or what
        is tested, such as the arithmetic alone where weights are exact in a dtype; ``""`` where
        there is nothing to say.
    weight_bytes : float
        Bytes of the weights as the condition would store them.
    chosen : dict
        What was chosen in each layer, such as the pruned experts; for reports.
    """

    method: str = ""
    weight_bytes: float = float("nan")
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConditionInfo:
    """What a condition's card says.

    Attributes
    ----------
    name : str
        Name in ``CONDITIONS``.
    kind : {"precision", "quantisation", "pruning", "factorisation", "merging"}
    title, summary, formula : str
        The summary has at most two sentences; the formula is in plain characters.
    paper : str
        arXiv id, or ``""``.
    calibrated : bool
        Whether it learns from texts of the fit split.
    simulated : bool
        Whether what it saves is only reckoned, as the work is still done in full.
    keeps_experts : bool
        Whether all experts stay, so that the routing of the whole model can be forced on it.
    """

    name: str
    kind: Kind
    title: str
    summary: str
    formula: str
    paper: str = ""
    calibrated: bool = False
    simulated: bool = True
    keeps_experts: bool = True


class Condition(ABC):
    """A change to a model; the constructor keeps its options and does no work."""

    info: ConditionInfo

    @property
    def label(self) -> str:
        """A name that tells it from the same condition with other options."""
        return self.info.name

    def members(self) -> "tuple[Condition, ...]":
        """Return the conditions to average over: itself, or one for each seed of a random one."""
        return (self,)

    @contextmanager
    def open(self, subject: Subject) -> Iterator[Applied]:
        """Change the model until the block is left, then put back every tensor it had.

        Raises
        ------
        ConditionError
            If the model has not what the condition changes.
        """
        if subject.model.training:
            raise ConditionError(
                "A model in evaluation mode was expected. Call model.eval() first."
            )
        applied = Applied(weight_bytes=float(model_bytes(subject.model)))
        with torch.no_grad():
            context = self._open(subject, applied)
        with context:
            yield applied

    @abstractmethod
    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        """Work out the change, describe it in ``applied``, and return the context that makes it."""


@dataclass(eq=False)
class PartsKept(Condition):
    """A condition that keeps a share of the experts, or heads, of the layers.

    Parameters
    ----------
    keep : float
        Above 0, at most 1.
    seed : int
        Draws what is drawn, such as the calibration texts.
    """

    keep: float = 0.75
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        if not 0 < self.keep <= 1:
            raise ConditionError(
                f"0 < keep <= 1 was expected for {self.info.name}, got {self.keep}."
            )

    @property
    def label(self) -> str:
        """Name and share, such as ``prune_reap 75%``."""
        return f"{self.info.name} {self.keep:.0%}"


@dataclass(eq=False)
class PartsDrawn(PartsKept):
    """A condition that draws what it keeps; reported as the mean over several seeds.

    Parameters
    ----------
    keep : float
    seed : int
        The first one.
    seeds : int
        How many draws are averaged.
    """

    _: KW_ONLY
    seeds: int = 5

    def __post_init__(self) -> None:
        """Check what was given."""
        super().__post_init__()
        if self.seeds < 1:
            raise ConditionError(f"At least one seed was expected, got {self.seeds}.")

    def members(self) -> tuple[Condition, ...]:
        """Return one condition for each seed."""
        return tuple(replace(self, seed=self.seed + i, seeds=1) for i in range(self.seeds))


CONDITIONS: Registry[Callable[..., Condition]] = Registry("condition")


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
