"""What the routers of a model do on windows of every domain, and turning one towards clusters."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch.nn import functional
from tqdm import tqdm
from transformers import OlmoeForCausalLM, PreTrainedModel

from capture.demo.streams import cut_windows

Array = npt.NDArray[np.float64]

BATCH = 8  # windows a forward pass
CLUSTER_WINDOWS = 60  # a domain
SHARE = 0.4  # of the clusters in the new rows: enough to tell domains, and nearly no loss
RIDGE = 0.1  # of the mean variance; keeps the inverse of the covariance tame


class Windows(NamedTuple):
    """Held-out windows of several domains."""

    tokens: torch.Tensor  # [W, S + 1], int64; the last of each row is only a target
    domains: npt.NDArray[np.int64]  # [W], the number of each window's domain


class WindowRouting(NamedTuple):
    """What one model did on the windows."""

    losses: Array  # [W], nats a token
    expert_ids: npt.NDArray[np.uint8]  # [L, W, S, K]


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """List the routers, one a layer."""
    return [layer.mlp.gate for layer in model.model.layers]


@torch.inference_mode()
def window_losses(model: PreTrainedModel, tokens: torch.Tensor) -> Array:
    """Return the mean loss of each window, [W] in nats a token.

    Every token but the first of a window is predicted from the window's earlier ones.
    """
    losses = []
    for rows in torch.split(tokens, BATCH):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        targets = rows[:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape).double().mean(1).numpy())
    return np.concatenate(losses)


def observe(model: PreTrainedModel, windows: Windows, label: str) -> WindowRouting:
    """Run windows through an OLMoE model and note every router's choice."""
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
    return WindowRouting(np.concatenate(losses), ids.view(len(chosen), count, length, -1).numpy())


def domain_counts(
    expert_ids: npt.NDArray[np.uint8], domains: npt.NDArray[np.int64], experts: int
) -> Array:
    """Count a layer's assignments by domain and expert, [D, E].

    Ids [N, ...] and domains [N] have one row a window or token.
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
    """Describe one layer's load from counts [D, E], all domains with equal weight."""
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
    """Return how often each window chose each expert, [W, L * E]; a layer's shares sum to 1."""
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

    Centroids come from the first half of each domain's windows, the second half is judged. Returns
    the share of windows told right, over all and by domain number.

    Parameters
    ----------
    shares : array [W, F]
        One row a window, each domain's windows in the order of its text.
    domains : array [W]
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


@torch.inference_mode()
def router_inputs(model: OlmoeForCausalLM, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the layer's router reads of tokens [W, S], [W, S, D] float32."""
    seen: list[torch.Tensor] = []
    router = routers(model)[layer]
    hook = router.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    try:
        for rows in torch.split(tokens, BATCH):
            model.model(input_ids=rows, use_cache=False)
    finally:
        hook.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).view(*tokens.shape, -1)


def _cluster_rows(hidden: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    # linear discriminants of K-Means clusters of the windows' means
    means = hidden.mean(1)
    clusters = KMeans(experts, n_init=10, random_state=seed).fit(means.numpy())
    centers = torch.from_numpy(clusters.cluster_centers_)
    centered = (hidden - means[:, None]).flatten(0, 1)
    covariance = centered.T @ centered / len(centered)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    rows = torch.linalg.solve(covariance + ridge, (centers - means.mean(0)).T).T
    direction = torch.nn.functional.normalize(means.mean(0), dim=0)
    rows = rows - (rows @ direction)[:, None] * direction
    # every expert's logits vary equally: rare and large clusters start with equal chances
    scaled: torch.Tensor = rows / (hidden.flatten(0, 1) @ rows.T).std(0)[:, None]
    return scaled


def _chosen(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return torch.zeros_like(logits).scatter_(1, logits.topk(top_k, -1).indices, 1.0)


def cluster_router(
    model: OlmoeForCausalLM,
    layer: int,
    streams: list[np.ndarray],
    seed: int,
    share: float = SHARE,
) -> None:
    """Turn each expert of a layer towards one cluster of windows; the model is changed in place.

    An early router that was trained on little text sorts tokens by form alone. K-Means over the
    windows' mean router inputs, without any domain label, gives as many clusters as there are
    experts. Linear discriminants of these clusters (within-window covariance inverted) are made
    orthogonal to the mean input, so that no expert is ahead of the others. Each goes to the
    expert that reads most of the same tokens already, and is blended with that expert's old row;
    the logits stay as large as they were. A ``share`` of 1 leaves nothing of the old rows.
    """
    tokens = torch.cat([cut_windows(stream, CLUSTER_WINDOWS)[:, :-1] for stream in streams])
    hidden = router_inputs(model, layer, tokens).double()
    router = routers(model)[layer]
    weight = router.get_parameter("weight")
    old = weight.detach().double()
    flat = hidden.flatten(0, 1)
    before = flat @ old.T
    spread = before.std()
    new = _cluster_rows(hidden, len(old), seed) * spread
    top_k = model.config.num_experts_per_tok
    common = _chosen(before, top_k).T @ _chosen(flat @ new.T, top_k)
    _, order = linear_sum_assignment(common.numpy(), maximize=True)
    rows = (1 - share) * old + share * new[order]
    with torch.no_grad():
        weight.copy_(rows * (spread / (flat @ rows.T).std()))
