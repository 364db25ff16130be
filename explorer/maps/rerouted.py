"""Where another router would send the tokens of a map; unlike the rest of a map, it needs torch."""

import numpy as np
import numpy.typing as npt
import torch

from capture.errors import quoted
from explorer.comparison.router_names import make_router, parse_router
from explorer.errors import RouterError
from explorer.maps.pca import Ids
from explorer.routers import PartRouter, Routing, fit_layers, route_layers
from explorer.routers.recorded import fit_split, recorded_inputs
from explorer.run import Run

UNKNOWN = -1


def rerouted(
    run: Run, layer: int, token_ids: Ids, router: str, *, site: int = 0, seed: int = 0
) -> npt.NDArray[np.int32]:
    """Return the heaviest expert that a router chooses for each token.

    It is fitted, where it has to be, on half of the prompts, and then routes the recorded inputs
    of all of them.

    Parameters
    ----------
    token_ids : array [N]
    router : str
        A name with arguments, such as ``top_k(k=1)``.
    seed : int
        Of the split, and of a stochastic router.

    Returns
    -------
    array [N], int32
        -1 where the router's input was not recorded, or it chose no expert.

    Raises
    ------
    RouterError
        If there is no such router, it decides about parts, or needs what the run does not hold.
    """
    made = make_router(parse_router(router), seed=seed)
    if isinstance(made, PartRouter):
        raise RouterError(
            f"{quoted(router)} decides about {made.part}s. Choose a router that chooses experts."
        )
    place = (layer, site)
    recorded, tokens = recorded_inputs(run, *place)
    half = torch.from_numpy(fit_split(tokens, seed=seed))
    fitted = fit_layers(made, {place: recorded.take(half)})
    decision = route_layers(fitted, {place: recorded})[place]
    if not isinstance(decision, Routing):
        raise RouterError(f"{quoted(router)} should choose experts, it returned a mask of parts.")
    weights = decision.weights.masked_fill(decision.expert_ids < 0, -torch.inf)
    heaviest = weights.argmax(dim=-1, keepdim=True)
    expert = decision.expert_ids.gather(-1, heaviest)[:, 0].numpy()
    known = tokens["token_id"].to_numpy(dtype=np.int64)
    at = np.minimum(np.searchsorted(known, token_ids), len(known) - 1)
    return np.where(known[at] == token_ids, expert[at], UNKNOWN).astype(np.int32)
