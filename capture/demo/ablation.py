"""Take one expert away from its router and measure what each domain loses."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from capture.demo.routing import Array, Windows, routers, window_losses


class Harm(NamedTuple):
    """What masking one expert costs.

    Attributes
    ----------
    layer, expert : int
        Which expert.
    mean : array [D], float64, nats a token
        Loss with the expert masked minus loss without, by domain.
    error : array [D], float64, nats a token
        Standard error of ``mean`` over the windows.
    """

    layer: int
    expert: int
    mean: Array
    error: Array

    @property
    def domain(self) -> int:
        """The domain that is hurt most."""
        return int(self.mean.argmax())

    @property
    def elsewhere(self) -> float:
        """Mean over the other domains, nats a token."""
        return float(np.delete(self.mean, self.domain).mean())

    @property
    def worst_elsewhere(self) -> float:
        """Largest value among the other domains, nats a token."""
        return float(np.delete(self.mean, self.domain).max())


@contextlib.contextmanager
def masked_expert(router: torch.nn.Module, expert: int) -> Iterator[None]:
    """Keep a router from choosing one expert; its tokens go to the next best one."""

    def choose_again(module: Any, _inputs: Any, output: Any) -> tuple[torch.Tensor, ...]:
        logits = output[0].clone()
        logits[:, expert] = -torch.inf
        weights, ids = logits.softmax(-1, dtype=torch.float32).topk(module.top_k, -1)
        if module.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids

    hook = router.register_forward_hook(choose_again)
    try:
        yield
    finally:
        hook.remove()


def measure_harm(
    model: PreTrainedModel, windows: Windows, experts: list[tuple[int, int]], label: str
) -> list[Harm]:
    """Mask each expert in turn and compare each window's loss with the whole model's.

    Parameters
    ----------
    model : PreTrainedModel
        An OLMoE model.
    windows : Windows
        The same windows for every expert, so that differences are paired.
    experts : list of (layer, expert)
        Which ones.
    label : str
        Shown beside the progress bar.
    """
    whole = window_losses(model, windows.tokens)
    numbers = np.unique(windows.domains)
    harms = []
    for layer, expert in tqdm(experts, desc=label, unit="expert"):
        with masked_expert(routers(model)[layer], expert):
            change = window_losses(model, windows.tokens) - whole
        parts = [change[windows.domains == number] for number in numbers]
        mean = np.array([part.mean() for part in parts])
        error = np.array([part.std(ddof=1) / np.sqrt(len(part)) for part in parts])
        harms.append(Harm(layer, expert, mean, error))
    return harms
