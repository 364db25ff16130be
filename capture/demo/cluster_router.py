"""Start a layer's router from clusters of the text instead of from what it learned before."""

import numpy as np
import torch
from sklearn.cluster import KMeans
from transformers import OlmoeForCausalLM

from capture.demo.batches import cut_windows
from capture.demo.routing import BATCH, routers

WINDOWS = 60  # a domain
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


def cluster_router(
    model: OlmoeForCausalLM, layer: int, streams: list[np.ndarray], seed: int
) -> None:
    """Point each expert of a layer at one cluster of windows; the model is changed in place.

    An early router that was trained on little text sorts tokens by form alone. K-Means over the
    windows' mean router inputs, without any domain label, gives as many clusters as there are
    experts; the router's rows become linear discriminants of these clusters (within-window
    covariance inverted), orthogonal to the mean input, so that no expert is ahead of the others,
    and as large as the old rows made the logits.

    Parameters
    ----------
    model : OlmoeForCausalLM
    layer : int
    streams : list of array
        Token streams of the training split, one a domain.
    seed : int
        Seeds K-Means.
    """
    tokens = torch.cat([cut_windows(stream, WINDOWS)[:, :-1] for stream in streams])
    hidden = router_inputs(model, layer, tokens).double()
    weight = routers(model)[layer].get_parameter("weight")
    means = hidden.mean(1)
    clusters = KMeans(weight.shape[0], n_init=10, random_state=seed).fit(means.numpy())
    centers = torch.from_numpy(clusters.cluster_centers_)
    centered = (hidden - means[:, None]).flatten(0, 1)
    covariance = centered.T @ centered / len(centered)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    rows = torch.linalg.solve(covariance + ridge, (centers - means.mean(0)).T).T
    direction = torch.nn.functional.normalize(means.mean(0), dim=0)
    rows = rows - (rows @ direction)[:, None] * direction
    flat = hidden.flatten(0, 1)
    # every expert's logits vary equally: rare and large clusters start with equal chances
    rows = rows / (flat @ rows.T).std(0)[:, None]
    spread = (flat @ weight.double().T).std()
    with torch.no_grad():
        weight.copy_(rows * spread)
