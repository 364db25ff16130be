"""Where another router would send the tokens of a map; unlike the rest of a map, it needs torch."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from capture.errors import quoted
from explorer.errors import RouterError
from explorer.maps import map_cache
from explorer.maps.data import Source, read_points
from explorer.maps.make import Report, check_content
from explorer.maps.pca import Ids
from explorer.router_cards import parse_router
from explorer.routers import PartRouter, Routing, fit_layers, route_layers
from explorer.routers.by_name import make_router
from explorer.routers.recorded import fit_split, recorded_inputs
from explorer.run import Run, open_run

UNKNOWN = -1


def make_rerouted(
    run_path: str, source: Source, out: Path, router: str, seed: int, report: Report
) -> Path:
    """Route the tokens of a map by another router and keep its choices at ``out``.

    Raises
    ------
    RouterError
        If the router cannot route what the run holds.
    RunError
        If the run does not hold the vectors that ``out`` is named after.
    """
    with open_run(run_path) as run:
        report("Reading the vectors", 0.0)
        points = read_points(run, source)
        check_content(out, map_cache.router_path(points.digest, run.fingerprint, router, seed))
        report("Fitting and routing", 0.4)
        ids = points.ids[:, 0]
        found = rerouted(run, source.layer, ids, router, site=source.site, seed=seed)
    return map_cache.write(out, {"router": found}, {"known": float((found >= 0).mean())})


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
