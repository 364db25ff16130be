"""Replay: route the recorded inputs of a run again, by other rules, without the model.

The inputs of a layer are those that the model's own routing led to, so replay hides how errors
add up from layer to layer, and agreement is a poor predictor of loss. It is quick and exact about
balance and compute on these inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from explorer.errors import RouterError
from explorer.metrics import agreement as agree
from explorer.metrics.load import (
    coefficient_of_variation,
    dead_experts,
    gini,
    max_violation,
    normalized_entropy,
    sampling_floor,
)
from explorer.routers import (
    ROUTERS,
    Decision,
    PartRouter,
    Router,
    RouterInputs,
    Routing,
    Site,
    fit_layers,
    route_layers,
)
from explorer.routers.clustering import TableRouter
from explorer.routers.recorded import fit_split, recorded_inputs
from explorer.run import Run

_ROWS = 8192  # tokens at a time, so that their scores stay in the caches

# means over layers where the row is of all layers
_MEANS = (
    *("experts_per_token", "agreement", "jaccard", "exact_set", "top_1", "weighted_overlap"),
    *("js", "entropy", "max_violation", "max_violation_floor", "cv", "gini", "dead_experts"),
    "load_entropy",
)


def replay(
    run: Run,
    routers: Iterable[str] | Mapping[str, Router],
    *,
    layers: Sequence[int] | None = None,
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
        clusters only), ``causal``, ``batch_dependent``, ``simulated`` (False: nothing was
        masked that would have run).

    Raises
    ------
    RouterError
        If a router needs what the run does not hold, or gates parts, which only a live run shows.
    """
    named = _named(routers)
    split = recorded_split(run, layers=layers, fit_share=fit_share, seed=seed)
    table = pd.DataFrame(
        [row for label in named for row in replay_router(label, named[label], split).rows]
    )
    return table.astype({"layer": "Int64", "site": "Int64"})


class RecordedSplit(NamedTuple):
    """What a run recorded of its routers' inputs, for fitting and for reporting.

    Attributes
    ----------
    fit : dict of (layer, site) to RouterInputs
        Empty where there are too few prompts to divide; then all are reported on.
    held_out : dict of (layer, site) to RouterInputs
    domains : dict of (layer, site) to Categorical [T] of str
        Of the held-out tokens; ``""`` = none.
    """

    fit: dict[Site, RouterInputs]
    held_out: dict[Site, RouterInputs]
    domains: dict[Site, pd.Categorical]


class Replayed(NamedTuple):
    """What one router chose for the held-out inputs.

    Attributes
    ----------
    rows : list of dict
        One per site, then one of all sites.
    domains : list of dict
        ``router, mode, domain, agreement, experts_per_token, tokens``, means over sites.
    """

    rows: list[dict[str, Any]]
    domains: list[dict[str, Any]]


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
        domains = pd.Categorical(tokens["domain"])
        try:
            chosen = torch.from_numpy(fit_split(tokens, share=fit_share, seed=seed))
        except RouterError:
            split.held_out[place], split.domains[place] = inputs, domains
            continue
        split.fit[place], split.held_out[place] = inputs.take(chosen), inputs.take(~chosen)
        split.domains[place] = domains[~chosen.numpy()]
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
    own = []
    for at, inputs in split.held_out.items():
        row = _row(label, router, inputs, decisions[at])
        found = fitted[at]
        if isinstance(found, TableRouter):
            row["spanning_rate"] = found.spanning_rate(inputs)
        own.append(row)
    return Replayed([*own, _over_layers(own)], _by_domain(label, split, decisions))


def _by_domain(
    label: str, split: RecordedSplit, decisions: Mapping[Site, Decision]
) -> list[dict[str, Any]]:
    """Return agreement and experts a token in each domain, means over sites."""
    parts = []
    for at, inputs in split.held_out.items():
        found = decisions[at]
        assert isinstance(found, Routing)  # checked when the rows were made
        expected, ids = inputs.decision().expert_ids.numpy(), found.expert_ids.numpy()
        few = [slice(start, start + _ROWS) for start in range(0, len(ids), _ROWS)]
        columns = {
            "domain": split.domains[at],
            "agreement": np.concatenate([agree.overlap_at_k(expected[s], ids[s]) for s in few]),
            "experts_per_token": np.count_nonzero(ids >= 0, axis=1),
        }
        of_domain = pd.DataFrame(columns).groupby("domain", observed=True)
        parts.append(of_domain.mean().assign(tokens=of_domain.size()))
    means = pd.concat(parts).groupby(level="domain").mean().reset_index()
    means["tokens"] = means["tokens"].astype(int)
    own = {"router": label, "mode": "replay"}
    return [{**own, **{str(k): v for k, v in row.items()}} for row in means.to_dict("records")]


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
            f"{label!r} decides about {router.part}s. What that changes shows in a live "
            "comparison only; replay takes routers that choose experts."
        )


def _row(label: str, router: Router, inputs: RouterInputs, decision: Decision) -> dict[str, Any]:
    """Measure one router in one layer."""
    native = inputs.decision()
    if not isinstance(decision, Routing):
        raise RouterError(f"{label!r} should choose experts, it returned a mask of parts.")
    info = router.info
    expected, found = native.expert_ids.numpy(), decision.expert_ids.numpy()
    means = agree.agreement(expected, native.weights.numpy(), found, decision.weights.numpy())
    load = np.bincount(found[found >= 0], minlength=inputs.n_experts)
    floor = sampling_floor(
        "max_violation",
        n_tokens=len(found),
        n_experts=inputs.n_experts,
        top_k=means.experts_per_token,
    )
    js, entropy = divergence(native.scores, decision.scores)
    return {
        "router": label,
        "family": info.family,
        "mode": "replay",
        "layer": inputs.layer,
        "site": inputs.site,
        "tokens": len(found),
        "experts_per_token": means.experts_per_token,
        "agreement": means.overlap,
        "jaccard": means.jaccard,
        "exact_set": means.exact_set,
        "top_1": means.top_1,
        "weighted_overlap": means.weighted_overlap,
        "js": js,
        "entropy": entropy,
        "max_violation": max_violation(load),
        "max_violation_floor": floor.mean,
        "cv": coefficient_of_variation(load),
        "gini": gini(load),
        "dead_experts": dead_experts(load),
        "load_entropy": normalized_entropy(load),
        "causal": info.causal,
        "batch_dependent": info.batch_dependent,
        "simulated": False,
    }


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return scores' mean Jensen-Shannon divergence and the found ones' mean entropy, nats.

    As :func:`explorer.metrics.agreement.jensen_shannon`, in one pass over the scores: the
    divergence is the entropy of the mean less the mean of the entropies.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(found), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = _shares(expected[rows]), _shares(found[rows])
        own = _entropy(q)
        js = _entropy((p + q) / 2) - (_entropy(p) + own) / 2
        total += torch.stack([js.clamp_min(0).double().sum(), own.double().sum()])
    js_mean, entropy = (total / max(1, len(found))).tolist()
    return js_mean, entropy


def _shares(scores: torch.Tensor) -> torch.Tensor:
    positive = scores.float().clamp_min(0)
    return positive / positive.sum(-1, keepdim=True).clamp_min(1e-20)


def _entropy(shares: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def _over_layers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of all layers: means of the layers' numbers."""
    names = (*_MEANS, "spanning_rate") if "spanning_rate" in rows[0] else _MEANS
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return {**rows[0], **means, "layer": None, "site": None}
