"""Head pruning: which attention heads a layer can do without, by reconstruction or by chance."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from capture.model.flops import attention_modules, decoder_layers, head_count
from capture.swap.measure import sequence_losses
from capture.swap.part_gates import OUTPUT_NAMES
from explorer.comparison.conditions.condition import (
    CONDITIONS,
    Applied,
    ConditionInfo,
    PartsDrawn,
    PartsKept,
    Subject,
)
from explorer.comparison.conditions.weights import replaced
from explorer.errors import ConditionError
from explorer.routers.subsets import MOST_SUBSETS, Dropped, best_to_drop

CALIBRATION_TOKENS = 4096


class Heads(NamedTuple):
    """The attention heads of one layer.

    Attributes
    ----------
    layer : int
    mixer : Linear
        Mixes the heads' outputs, which are its input one after the other.
    n_heads : int
    """

    layer: int
    mixer: nn.Linear
    n_heads: int

    @property
    def width(self) -> int:
        """Inputs of the mixer for one head."""
        return self.mixer.in_features // self.n_heads


def find_heads(model: nn.Module) -> list[Heads]:
    """Return the layers whose attention heads can be told apart.

    Raises
    ------
    ConditionError
        If there is none.
    """
    found = []
    for number, layer in decoder_layers(model).items():
        attention = attention_modules(layer)
        n_heads = head_count(attention[0], model) if len(attention) == 1 else 0
        named = [getattr(attention[0], name, None) for name in OUTPUT_NAMES] if n_heads else []
        mixers = [m for m in named if isinstance(m, nn.Linear) and m.in_features % n_heads == 0]
        if mixers:
            found.append(Heads(number, mixers[0], n_heads))
    if not found:
        raise ConditionError(
            f"{type(model).__name__} has no layer with {' or '.join(OUTPUT_NAMES)} behind its "
            "attention heads, so heads cannot be told apart. Choose another condition."
        )
    return found


def head_products(subject: Subject, heads: list[Heads], *, tokens: int) -> list[torch.Tensor]:
    """Return the inner products of the heads' contributions, summed over tokens.

    Returns
    -------
    list of Tensor [H, H], float64
        ``sum over t of <c_th, c_tj>`` of each layer, where ``c_th`` is what head h adds to token
        t. The squared error of dropping a set of heads is the sum over that set's block.
    """
    totals = [torch.zeros(one.n_heads, one.n_heads, dtype=torch.float64) for one in heads]
    texts, kept = subject.calibration_tokens(), 0
    used = []
    for text in texts:
        if len(text) > 1 and kept < tokens:
            used.append(text)
            kept += len(text)

    @contextmanager
    def listening() -> Iterator[None]:
        with ExitStack() as stack:
            for one, total in zip(heads, totals, strict=True):

                def keep(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    one: Heads = one,
                    sum_: torch.Tensor = total,
                ) -> None:
                    split = args[0].reshape(-1, one.n_heads, one.width).float()
                    weight = one.mixer.weight.float().reshape(-1, one.n_heads, one.width)
                    added = torch.einsum("thw,dhw->htd", split, weight).flatten(1).double().cpu()
                    sum_ += added @ added.T

                stack.callback(one.mixer.register_forward_pre_hook(keep).remove)
            yield

    # one text a pass: padding would count
    sequence_losses(subject.model, used, swapped=listening, batch_tokens=1)
    return totals


@dataclass(eq=False)
class HeadPruning(PartsKept):
    """Drop the same share of heads in every layer, by zeros in the matrix that mixes them.

    Parameters
    ----------
    keep : float
        Share of each layer's heads that stays, rounded to whole heads, at least one.
    """

    def n_pruned(self, n_heads: int) -> int:
        """Return how many heads of a layer go."""
        return n_heads - max(round(self.keep * n_heads), 1)

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        heads = find_heads(subject.model)
        changes: dict[nn.Parameter, torch.Tensor] = {}
        for one, gone in zip(heads, self.choose(subject, heads, applied), strict=True):
            parameter: Any = one.mixer.weight
            weight = parameter.data.clone()
            weight.view(len(weight), one.n_heads, one.width)[:, list(gone)] = 0
            changes[parameter] = weight
            applied.chosen[f"layer {one.layer}"] = list(gone)
            share = len(gone) / one.n_heads
            applied.weight_bytes -= share * weight.numel() * weight.element_size()
        return replaced(changes)

    @abstractmethod
    def choose(
        self, subject: Subject, heads: list[Heads], applied: Applied
    ) -> list[tuple[int, ...]]:
        """Return the heads to drop in each layer."""


@CONDITIONS.add("prune_heads")
@dataclass(eq=False)
class ReconstructionHeadPruning(HeadPruning):
    """Drop the heads without which the attention's output changes least.

    Parameters
    ----------
    keep : float
    most : int
        Subsets up to which all are tried in each layer; above, the search is greedy.
    """

    info = ConditionInfo(
        name="prune_heads",
        kind="pruning",
        title="Head pruning by reconstruction",
        summary=(
            "Drops in every layer the attention heads whose joint contribution on calibration "
            "tokens is smallest. Heads are masked: they are still computed."
        ),
        formula="argmin over C of sum_t || sum_{h in C} c_th ||^2",
        paper="1905.10650",
        calibrated=True,
    )

    _: KW_ONLY
    most: int = MOST_SUBSETS
    seed: int = field(default=0, init=False)

    def choose(
        self, subject: Subject, heads: list[Heads], applied: Applied
    ) -> list[tuple[int, ...]]:
        """Search every layer on its own."""
        products = head_products(subject, heads, tokens=CALIBRATION_TOKENS)
        found = [
            best_heads(product, self.n_pruned(one.n_heads), most=self.most)
            for one, product in zip(heads, products, strict=True)
        ]
        applied.method = "; ".join(dict.fromkeys(one.method for one in found))
        return [one.members for one in found]


def best_heads(product: torch.Tensor, n: int, *, most: int = MOST_SUBSETS) -> Dropped:
    """Return the ``n`` heads whose contributions sum to the least, by their products [H, H]."""
    return best_to_drop(len(product), n, error_without(product), most=most)


def error_without(product: torch.Tensor) -> Callable[[tuple[int, ...]], float]:
    """Return a function from heads to the norm of what they add together."""

    def error(members: tuple[int, ...]) -> float:
        chosen = list(members)
        return float(product[chosen][:, chosen].sum().clamp_min(0).sqrt())

    return error


@CONDITIONS.add("prune_heads_random")
@dataclass(eq=False)
class RandomHeadPruning(PartsDrawn, HeadPruning):
    """Drop heads by chance."""

    info = ConditionInfo(
        name="prune_heads_random",
        kind="pruning",
        title="Random head pruning",
        summary="Drops attention heads by chance, the same number in every layer. Mean of five.",
        formula="C uniform over subsets",
    )

    def choose(
        self, subject: Subject, heads: list[Heads], applied: Applied
    ) -> list[tuple[int, ...]]:
        """Draw a subset for every layer."""
        random = np.random.default_rng(self.seed)
        applied.method = f"drawn with seed {self.seed}"
        return [
            tuple(sorted(random.permutation(one.n_heads)[: self.n_pruned(one.n_heads)].tolist()))
            for one in heads
        ]
