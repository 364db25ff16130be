"""Replay: route the recorded inputs of a run again, by other rules, without the model.

The inputs of a layer are those that the model's own routing led to, so replay hides how errors
add up from layer to layer, and agreement is a poor predictor of loss. It is quick and exact about
balance and compute on these inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from capture.errors import quoted
from capture.store.records import Place
from explorer.comparison.causality import recorded_badges
from explorer.comparison.live import entropy_of_shares, mean_of_known, shares_of
from explorer.comparison.text_split import SHARED_TOKENS
from explorer.errors import RouterError
from explorer.metrics.agreement import agreement, mean_known
from explorer.metrics.load import balance
from explorer.routers import (
    ROUTERS,
    Decision,
    PartRouter,
    Router,
    RouterInputs,
    Routing,
    fit_layers,
    route_layers,
)
from explorer.routers.clustering import ClusterTableRouter
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
        layers. By token: see :func:`explorer.comparison.replay.token_rows`.

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

    fit: dict[Place, RouterInputs]
    held_out: dict[Place, RouterInputs]
    tokens: dict[Place, pd.DataFrame]


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
    decisions: dict[Place, Decision]


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
    fitted: Mapping[Place, Router] = dict.fromkeys(split.held_out, router)
    if router.info.fits is not None:
        if split.fit.keys() != split.held_out.keys():
            raise RouterError(
                f"{label} has to be fitted on prompts that it is not reported on, and the recorded "
                "ones cannot be divided. Record more prompts."
            )
        fitted = fit_layers(router, split.fit)
    decisions = route_layers(fitted, split.held_out)
    found_badges = recorded_badges(fitted, split.held_out)
    own = []
    for at, inputs in split.held_out.items():
        row = site_row(label, router, inputs, decisions[at]) | found_badges._asdict()
        found = fitted[at]
        if isinstance(found, ClusterTableRouter):
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


CHUNK = 8192  # tokens at a time, so that their scores stay in the caches

# means over layers where the row is of all layers
_MEANS = (
    *("experts_per_token", "agreement", "jaccard", "exact_set", "top_1", "weighted_overlap"),
    *("js", "entropy", "max_violation", "max_violation_floor", "cv", "gini", "dead_experts"),
    "load_entropy",
)


def site_row(
    label: str, router: Router, inputs: RouterInputs, decision: Decision
) -> dict[str, Any]:
    """Measure one router in one layer."""
    native = inputs.decision()
    if not isinstance(decision, Routing):
        raise RouterError(f"{quoted(label)} should choose experts, it returned a mask of parts.")
    info = router.info
    found = decision.expert_ids.numpy()
    means = {name: mean_known(values) for name, values in _agreed(inputs, decision).items()}
    load = np.bincount(found[found >= 0], minlength=inputs.n_experts)
    js, entropy = divergence(native.scores, decision.scores)
    return {
        "router": label,
        "family": info.family,
        "mode": "replay",
        "layer": inputs.layer,
        "site": inputs.site,
        "tokens": len(found),
        **means,
        "js": js,
        "entropy": entropy,
        **balance(load, len(found)),
        "simulated": False,
    }


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return scores' mean Jensen-Shannon divergence and the found ones' mean entropy, nats.

    In one pass over the scores: the divergence is the entropy of the mean less the mean of the
    entropies. Scores are shares of their sum, since sigmoids are no distribution by themselves.
    Means are of the tokens that have scores; nan where none has.
    """
    total, tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(found), CHUNK):
        rows = slice(start, start + CHUNK)
        p, q = shares_of(expected[rows]), shares_of(found[rows])
        own = entropy_of_shares(q)
        js = entropy_of_shares((p + q) / 2) - (entropy_of_shares(p) + own) / 2
        values = torch.stack([js.clamp_min(0), own]).double()
        total += values.nansum(-1)
        tokens += (~values.isnan()).sum(-1)
    js_mean, entropy = (total / tokens).tolist()
    return js_mean, entropy


def over_layers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of all layers: means of the layers' numbers."""
    names = (*_MEANS, "spanning_rate") if "spanning_rate" in rows[0] else _MEANS
    means = {name: mean_of_known([row[name] for row in rows]) for name in names}
    return {**rows[0], **means, "layer": None, "site": None}


def token_rows(
    label: str, split: "RecordedSplit", decisions: Mapping[Place, Decision]
) -> pd.DataFrame:
    """Return how a router's choice of every held-out token agrees with the model's own.

    Returns
    -------
    DataFrame
        One row per (layer, site) and token: ``router, mode, layer, site, token_id, prompt_id,
        position, domain`` and what :func:`explorer.metrics.agreement.agreement` gives.
    """
    return pd.concat(
        [
            split.tokens[at].assign(
                **{"router": label, "mode": "replay", "layer": at[0], "site": at[1]},
                **_agreed(inputs, decisions[at]),
            )
            for at, inputs in split.held_out.items()
        ],
        ignore_index=True,
    )


def _agreed(inputs: RouterInputs, decision: Decision) -> dict[str, npt.NDArray[np.float64]]:
    assert isinstance(decision, Routing)  # checked when the rows were made
    own, found = ((one.expert_ids.numpy(), one.weights.numpy())
                  for one in (inputs.decision(), decision))  # fmt: skip
    return agreement(*own, *found)


def domain_rows(
    label: str, split: "RecordedSplit", decisions: Mapping[Place, Decision]
) -> list[dict[str, Any]]:
    """Return agreement and experts a token in each domain, means over sites."""
    parts = []
    for at, inputs in split.held_out.items():
        found = _agreed(inputs, decisions[at])
        columns = {name: found[name] for name in ("agreement", "experts_per_token")}
        frame = pd.DataFrame({"domain": split.tokens[at]["domain"], **columns})
        of_domain = frame.groupby("domain", observed=True)
        parts.append(of_domain.mean().assign(tokens=of_domain.size()))
    means = pd.concat(parts).groupby(level="domain").mean().reset_index()
    means["tokens"] = means["tokens"].astype(int)
    own = {"router": label, "mode": "replay"}
    return [{**own, **{str(k): v for k, v in row.items()}} for row in means.to_dict("records")]


def choice_rows(
    unit: Mapping[str, Any],
    split: "RecordedSplit",
    decisions: Mapping[Place, Decision],
    text_ids: Mapping[int, int],
) -> list[dict[str, Any]]:
    """Return what a router chose for the recorded tokens of some texts.

    Parameters
    ----------
    unit : mapping
        ``router`` and ``seed``.
    text_ids : dict of prompt_id to text_id
        As :func:`explorer.comparison.text_split.recorded_texts` gave them.
    """
    rows = []
    for (layer, site), decision in decisions.items():
        assert isinstance(decision, Routing)
        tokens = split.tokens[layer, site]
        wanted = tokens["prompt_id"].isin(text_ids) & (tokens["position"] < SHARED_TOKENS)
        for at in np.flatnonzero(wanted.to_numpy()).tolist():
            ids = decision.expert_ids[at].numpy()
            rows.append(
                {
                    **unit,
                    "mode": "replay",
                    "text_id": text_ids[int(tokens["prompt_id"].iat[at])],
                    "position": int(tokens["position"].iat[at]),
                    "layer": layer,
                    "site": site,
                    "expert_ids": ids[ids >= 0].tolist(),
                    "weights": decision.weights[at].numpy()[ids >= 0].tolist(),
                }
            )
    return rows
