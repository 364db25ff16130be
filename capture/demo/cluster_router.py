"""Turn a layer's router towards clusters of the text, so that it says more about the domain."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from transformers import OlmoeForCausalLM

from capture.demo.batches import cut_windows
from capture.demo.routing import BATCH, routers

WINDOWS = 60  # a domain
SHARE = 0.4  # of the clusters in the new rows: enough to tell domains, and nearly no loss
RIDGE = 0.1  # of the mean variance; keeps the inverse of the covariance tame


@torch.inference_mode()
def router_inputs(model: OlmoeForCausalLM, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the layer's router reads.

    Parameters
    ----------
    model : OlmoeForCausalLM
    layer : int
    tokens : Tensor [W, S], int64

    Returns
    -------
    Tensor [W, S, D], float32
    """
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
    the logits stay as large as they were.

    Parameters
    ----------
    model : OlmoeForCausalLM
    layer : int
    streams : list of array
        Token streams of the training split, one a domain.
    seed : int
        Seeds K-Means.
    share : float
        Share of the clusters in the new rows; 1 leaves nothing of the old ones.
    """
    tokens = torch.cat([cut_windows(stream, WINDOWS)[:, :-1] for stream in streams])
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
