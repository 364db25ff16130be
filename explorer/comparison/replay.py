"""Replay: route the recorded inputs of a run again, by other rules, without the model.

The inputs of a layer are those that the model's own routing led to, so replay hides how errors
add up from layer to layer, and agreement is a poor predictor of loss. It is quick and exact about
balance and compute on these inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch

from capture.errors import quoted
from explorer.comparison.badges import recorded_badges
from explorer.comparison.replay_rows import domain_rows, over_layers, site_row, token_rows
from explorer.errors import RouterError
from explorer.routers import (
    ROUTERS,
    Decision,
    PartRouter,
    Router,
    RouterInputs,
    Site,
    fit_layers,
    route_layers,
)
from explorer.routers.clustering import TableRouter
from explorer.routers.recorded import fit_split, recorded_inputs
from explorer.run import Run

By = Literal["layer", "domain", "token"]


def replay(
    run: Run,
    routers: Iterable[str] | Mapping[str, Router],
    *,
    layers: Sequence[int] | None = None,
    by: By = "layer",
    fit_share: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """Route a run's recorded inputs again by each router and compare with the model's own choice.

    Parameters
    ----------
    run : Run
        With sampled tokens; at least two prompts.
    routers : names of ROUTERS, or mapping of labels to routers
        Fitted here where they need it, a copy for each layer.
    layers : sequence of int, optional
        Default: all of the run.
    by : {"layer", "domain", "token"}
        What a row is.
    fit_share : float, 0..1
        Of each domain's prompts; routers are fitted on these and reported on the others.
    seed : int
        Seeds the split.

    Returns
    -------
    DataFrame
        One row per router and (layer, site), and one per router with ``layer`` NULL, the mean of
        those. ``router``, ``family``, ``mode`` (``"replay"``), ``layer``, ``site``, ``tokens``,
        ``experts_per_token``, ``agreement`` (share of the model's experts that were chosen),
        ``jaccard``, ``exact_set``, ``top_1``, ``weighted_overlap``, ``js`` (nats), ``entropy`` (of
        a token's scores, nats), ``max_violation`` with what uniform routing of as many tokens
        would have (``max_violation_floor``), ``cv``, ``gini``, ``dead_experts``,
        ``load_entropy`` (0..1), ``spanning_rate`` (share of tokens between clusters, of rules with
        clusters only), ``causal``, ``batch_dependent`` (declared, or found on these inputs),
        ``simulated`` (False: nothing was masked that would have run).

        By domain: ``router, mode, domain, agreement, experts_per_token, tokens``, means over
        layers. By token: see :func:`explorer.comparison.replay_rows.token_rows`.

    Raises
    ------
    RouterError
        If a router needs what the run does not hold, or gates parts, which only a live run shows.
    """
    named = _named(routers)
    split = recorded_split(run, layers=layers, fit_share=fit_share, seed=seed)
    replayed = {label: replay_router(label, router, split) for label, router in named.items()}
    if by == "token":
        frames = [token_rows(label, split, one.decisions) for label, one in replayed.items()]
        return pd.concat(frames, ignore_index=True)
    if by == "domain":
        return pd.DataFrame([row for one in replayed.values() for row in one.domains])
    table = pd.DataFrame([row for one in replayed.values() for row in one.rows])
    return table.astype({"layer": "Int64", "site": "Int64"})


class RecordedSplit(NamedTuple):
    """What a run recorded of its routers' inputs, for fitting and for reporting.

    Attributes
    ----------
    fit : dict of (layer, site) to RouterInputs
        Empty where there are too few prompts to divide; then all are reported on.
    held_out : dict of (layer, site) to RouterInputs
    tokens : dict of (layer, site) to DataFrame
        ``token_id, prompt_id, position, domain`` of the held-out tokens; domain ``""`` = none.
    """

    fit: dict[Site, RouterInputs]
    held_out: dict[Site, RouterInputs]
    tokens: dict[Site, pd.DataFrame]


class Replayed(NamedTuple):
    """What one router chose for the held-out inputs.

    Attributes
    ----------
    rows : list of dict
        One per site, then one of all sites.
    domains : list of dict
        ``router, mode, domain, agreement, experts_per_token, tokens``, means over sites.
    decisions : dict of (layer, site) to Decision
    """

    rows: list[dict[str, Any]]
    domains: list[dict[str, Any]]
    decisions: dict[Site, Decision]


def recorded_split(
    run: Run, *, layers: Sequence[int] | None = None, fit_share: float = 0.5, seed: int = 0
) -> RecordedSplit:
    """Read a run's router inputs, divided by prompts.

    Raises
    ------
    RouterError
        If the run has none of the layers.
    """
    places = [(s.layer, s.site) for s in run.sites if layers is None or s.layer in set(layers)]
    if not places:
        raise RouterError(
            f"The run has no layer among {layers}. Choose from {', '.join(map(str, run.layers))}."
        )
    split = RecordedSplit({}, {}, {})
    for place in places:
        inputs, tokens = recorded_inputs(run, *place)
        tokens["domain"] = pd.Categorical(tokens["domain"])
        try:
            chosen = torch.from_numpy(fit_split(tokens, share=fit_share, seed=seed))
        except RouterError:
            split.held_out[place], split.tokens[place] = inputs, tokens
            continue
        split.fit[place], split.held_out[place] = inputs.take(chosen), inputs.take(~chosen)
        split.tokens[place] = tokens[~chosen.numpy()].reset_index(drop=True)
    return split


def replay_router(label: str, router: Router, split: RecordedSplit) -> Replayed:
    """Fit one router and route the held-out inputs by it."""
    _check_experts(label, router)
    fitted: Mapping[Site, Router] = dict.fromkeys(split.held_out, router)
    if router.info.fits is not None:
        if split.fit.keys() != split.held_out.keys():
            raise RouterError(
                f"{label} has to be fitted on prompts that it is not reported on, and the recorded "
                "ones cannot be divided. Record more prompts."
            )
        fitted = fit_layers(router, split.fit)
    decisions = route_layers(fitted, split.held_out)
    worn = recorded_badges(fitted, split.held_out)
    own = []
    for at, inputs in split.held_out.items():
        row = site_row(label, router, inputs, decisions[at]) | worn._asdict()
        found = fitted[at]
        if isinstance(found, TableRouter):
            row["spanning_rate"] = found.spanning_rate(inputs)
        own.append(row)
    return Replayed([*own, over_layers(own)], domain_rows(label, split, decisions), decisions)


def _named(routers: Iterable[str] | Mapping[str, Router]) -> dict[str, Router]:
    named = (
        dict(routers)
        if isinstance(routers, Mapping)
        else {name: ROUTERS[name]() for name in routers}
    )
    if not named:
        raise RouterError(f"Expected at least one router. There are: {', '.join(ROUTERS)}.")
    for label, router in named.items():
        _check_experts(label, router)
    return named


def _check_experts(label: str, router: Router) -> None:
    if isinstance(router, PartRouter):
        raise RouterError(
            f"{quoted(label)} decides about {router.part}s. What that changes shows in a live "
            "comparison only; replay takes routers that choose experts."
        )
