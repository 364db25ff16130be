"""What routers chose, token after token, as a cache of experts would see it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.errors import RunError
from explorer.metrics.cache import LayerLookups
from explorer.queries.where import conditions
from explorer.run import Run


class Lookups(NamedTuple):
    """What one site chose, token after token.

    Attributes
    ----------
    expert_ids : array [T, K], int64
        Numbers among the routed experts; -1 = empty slot, or an expert that computes nothing.
    prompt_id : array [T]
    """

    expert_ids: npt.NDArray[np.int64]
    prompt_id: npt.NDArray[np.int64]


def trace(
    run: Run,
    layer: int,
    *,
    site: int = 0,
    phase: str | None = None,
    domain: str | None = None,
    interleaved: bool = False,
    together: int = 1,
) -> Lookups:
    """Return a site's choices in the order in which a cache of experts would see them.

    Parameters
    ----------
    interleaved : bool
        In the order of the forward passes, where requests are decoded together as it was recorded;
        otherwise request after request, each from its first token.
    together : int
        So many requests at a time take turns, token by token, as a server would decode them.

    Raises
    ------
    RunError
        If the run does not hold expert ids.
    """
    info = run.site_info(layer, site)
    run.refuse_without_ids("Reading choices in order")
    where, params = conditions(phase=phase, domain=domain)
    order = "batch_id, row_in_batch" if interleaved else "turn, position, prompt_id"
    rows = run.table(
        f"""
        WITH known AS (
            SELECT *, (dense_rank() OVER (ORDER BY prompt_id) - 1) // $together AS turn
            FROM tokens JOIN prompts USING (prompt_id) JOIN token_batches USING (token_id)
            WHERE {where}
        ), ordered AS (
            SELECT token_id, prompt_id, row_number() OVER (ORDER BY {order}) - 1 AS place FROM known
        )
        SELECT place, prompt_id, slot, expert_id FROM ordered LEFT JOIN (
            SELECT token_id, slot, expert_id FROM assignments
            WHERE layer = $layer AND site = $site
        ) USING (token_id) ORDER BY place
        """,
        params | {"layer": layer, "site": site, "together": together},
    )
    at = rows["place"].to_numpy()
    n_tokens = int(at[-1]) + 1 if len(at) else 0
    ids = np.full((n_tokens, info.top_k), -1, dtype=np.int64)
    prompt_id = np.zeros(n_tokens, dtype=np.int64)
    prompt_id[at] = rows["prompt_id"].to_numpy()
    chosen = rows["slot"].is_valid().to_numpy()
    slot = rows["slot"].fill_null(0).to_numpy()
    ids[at[chosen], slot[chosen]] = rows["expert_id"].fill_null(-1).to_numpy()[chosen]
    return Lookups(info.routed_numbers()[ids], prompt_id)


def cache_lookups(
    run: Run,
    *,
    phase: str | None = None,
    domain: str | None = None,
    interleaved: bool = False,
    together: int = 1,
) -> list[LayerLookups]:
    """Return what all layers chose, of every other prompt to fit on and of the rest to judge on.

    Parameters are as for :func:`trace`.

    Raises
    ------
    RunError
        If layers differ in size, or there are not two prompts with such tokens.
    """
    if len({(one.n_routed, one.site) for one in run.sites}) > 1:
        raise RunError(
            "The layers of this run have different numbers of experts, or several routers. A "
            "budget that they share counts experts of one size."
        )
    layers = []
    for info in run.sites:
        found = trace(
            run,
            info.layer,
            phase=phase,
            domain=domain,
            interleaved=interleaved,
            together=together,
        )
        even = np.unique(found.prompt_id, return_inverse=True)[1] % 2 == 0
        if even.all():
            raise RunError(
                "Pins are judged on prompts that they were not made from, and there are not two "
                "prompts with such tokens. Take other filters, or record more prompts."
            )
        ids, of = found.expert_ids, found.prompt_id
        layers.append(LayerLookups(info.layer, info.n_routed, ids[even], ids[~even], of[~even]))
    return layers
