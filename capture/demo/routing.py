"""Measure what a model's routers do on held-out windows of every domain."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

Array = npt.NDArray[np.float64]

BATCH = 8  # windows a forward pass


class Windows(NamedTuple):
    """Held-out windows of several domains.

    Attributes
    ----------
    tokens : Tensor [W, S + 1], int64
        Token ids; the last of each row is only a target.
    domains : array [W], int64
        Domain number of each window.
    """

    tokens: torch.Tensor
    domains: npt.NDArray[np.int64]


class Sample(NamedTuple):
    """What one model did on the windows.

    Attributes
    ----------
    losses : array [W], float64, nats a token
        Mean loss of each window.
    expert_ids : array [L, W, S, K], uint8
        Chosen experts.
    """

    losses: Array
    expert_ids: npt.NDArray[np.uint8]


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """List the routers, one a layer."""
    return [layer.mlp.gate for layer in model.model.layers]


@torch.inference_mode()
def window_losses(model: PreTrainedModel, tokens: torch.Tensor) -> Array:
    """Compute the mean loss of each window.

    Returns
    -------
    array [W], float64, nats a token
        Every token but the first of a window is predicted from the window's earlier ones.
    """
    losses = []
    for rows in torch.split(tokens, BATCH):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        targets = rows[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape).double().mean(1).numpy())
    return np.concatenate(losses)


def observe(model: PreTrainedModel, windows: Windows, label: str) -> Sample:
    """Run the windows through a model and note every router's choice.

    Parameters
    ----------
    model : PreTrainedModel
        An OLMoE model.
    windows : Windows
        What to run.
    label : str
        Shown beside the progress bar.
    """
    chosen: list[list[torch.Tensor]] = [[] for _ in routers(model)]
    hooks = [
        router.register_forward_hook(
            # the router returns logits, weights and ids
            lambda _module, _inputs, output, store=store: store.append(output[2].to(torch.uint8))
        )
        for router, store in zip(routers(model), chosen, strict=True)
    ]
    try:
        parts = torch.split(windows.tokens, 8 * BATCH)
        losses = [window_losses(model, part) for part in tqdm(parts, desc=label)]
    finally:
        for hook in hooks:
            hook.remove()
    count, length = windows.tokens.shape[0], windows.tokens.shape[1] - 1
    ids = torch.stack([torch.cat(layer) for layer in chosen])
    return Sample(np.concatenate(losses), ids.view(len(chosen), count, length, -1).numpy())


def domain_counts(
    expert_ids: npt.NDArray[np.uint8], domains: npt.NDArray[np.int64], experts: int
) -> Array:
    """Count assignments by domain and expert.

    Parameters
    ----------
    expert_ids : array [N, ...], uint8
        One layer's choices, one row a window or token.
    domains : array [N], int64
        Domain number of each row.
    experts : int
        Number of experts.

    Returns
    -------
    array [D, E], float64, assignments
        Counts.
    """
    counts = np.zeros((int(domains.max()) + 1, experts))
    rows = expert_ids.reshape(len(domains), -1)
    for domain in np.unique(domains):
        chosen = rows[domains == domain].reshape(-1)
        counts[domain] = np.bincount(chosen, minlength=experts)
    return counts


def information(counts: Array) -> float:
    """Mutual information of the two sides of a table of counts, in bits (no bias correction)."""
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def balance(counts: Array) -> dict[str, float]:
    """Describe one layer's load, all domains with equal weight.

    Parameters
    ----------
    counts : array [D, E], assignments
        Counts by domain and expert.
    """
    load = (counts / counts.sum(1, keepdims=True)).mean(0)
    relative = load / load.mean()
    used = load[load > 0]
    entropy = -(used * np.log(used)).sum() / np.log(len(load))
    return {
        "min_load": float(relative.min()),
        "max_load": float(relative.max()),
        "max_violation": float(relative.max() - 1),
        "coefficient_of_variation": float(relative.std()),
        "normalized_entropy": float(entropy),
        "dead_experts": int((load == 0).sum()),
    }


def shuffled_information(
    expert_ids: npt.NDArray[np.uint8],
    domains: npt.NDArray[np.int64],
    experts: int,
    generator: np.random.Generator,
) -> float:
    """Information that is left when the tokens' domain labels are shuffled: the sampling bias."""
    length, top_k = expert_ids.shape[1:]
    labels = generator.permutation(np.repeat(domains, length))
    return information(domain_counts(expert_ids.reshape(-1, top_k), labels, experts))


def histograms(expert_ids: npt.NDArray[np.uint8], experts: int) -> Array:
    """Describe each window by how often each expert of each layer was chosen.

    Returns
    -------
    array [W, L * E], float64
        Shares; each layer sums to 1.
    """
    layers, windows, length, top_k = expert_ids.shape
    shares = np.zeros((windows, layers, experts))
    for expert in range(experts):
        shares[:, :, expert] = (expert_ids == expert).sum((2, 3)).T
    flat: Array = shares.reshape(windows, -1) / (length * top_k)
    return flat


def window_accuracy(
    shares: Array, domains: npt.NDArray[np.int64]
) -> tuple[float, dict[int, float]]:
    """Tell the domain of a window from its routing alone: nearest centroid.

    Centroids come from the first half of each domain's windows, the second half is judged.

    Parameters
    ----------
    shares : array [W, F]
        One row a window, each domain's windows in the order of its text.
    domains : array [W]
        Domain numbers.

    Returns
    -------
    accuracy : float
        Share of windows told right.
    by_domain : dict
        The same by domain number.
    """
    numbers = np.unique(domains)
    first = np.zeros(len(domains), dtype=bool)
    for domain in numbers:
        rows = np.flatnonzero(domains == domain)
        first[rows[: len(rows) // 2]] = True
    centroids = np.stack([shares[first & (domains == domain)].mean(0) for domain in numbers])
    distances = ((shares[~first, None] - centroids[None]) ** 2).sum(-1)
    right = numbers[distances.argmin(1)] == domains[~first]
    by_domain = {int(d): float(right[domains[~first] == d].mean()) for d in numbers}
    return float(right.mean()), by_domain
