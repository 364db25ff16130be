"""What a replayed router did: by layer, by domain, token by token, and in the shared texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from capture.errors import quoted
from explorer.comparison.measure import entropy_of_shares, mean_of_known, shares_of
from explorer.comparison.texts import SHARED_TOKENS
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
from explorer.routers import Decision, Router, RouterInputs, Routing, Site

if TYPE_CHECKING:
    from explorer.comparison.replay import RecordedSplit

CHUNK = 8192  # tokens at a time, so that their scores stay in the caches

MEASURES = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap")

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
        "simulated": False,
    }


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return scores' mean Jensen-Shannon divergence and the found ones' mean entropy, nats.

    As :func:`explorer.metrics.agreement.jensen_shannon`, in one pass over the scores: the
    divergence is the entropy of the mean less the mean of the entropies. Means are of the tokens
    that have scores; nan where none has.
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
    label: str,
    split: "RecordedSplit",
    decisions: Mapping[Site, Decision],
    measures: Sequence[str] = MEASURES,
) -> pd.DataFrame:
    """Return how a router's choice of every held-out token agrees with the model's own.

    Parameters
    ----------
    measures : sequence of {"agreement", "jaccard", "exact_set", "top_1", "weighted_overlap"}

    Returns
    -------
    DataFrame
        One row per (layer, site) and token: ``router, mode, layer, site, token_id, prompt_id,
        position, domain, experts_per_token`` and the measures.
    """
    return pd.concat(
        [
            split.tokens[at].assign(
                **{"router": label, "mode": "replay", "layer": at[0], "site": at[1]},
                **_agreed(inputs, decisions[at], measures),
            )
            for at, inputs in split.held_out.items()
        ],
        ignore_index=True,
    )


def _agreed(
    inputs: RouterInputs, decision: Decision, measures: Sequence[str]
) -> dict[str, npt.NDArray[np.generic]]:
    assert isinstance(decision, Routing)  # checked when the rows were made
    native = inputs.decision()
    expected, found = native.expert_ids.numpy(), decision.expert_ids.numpy()
    weights, own = native.weights.numpy(), decision.weights.numpy()
    of = {
        "agreement": lambda s: agree.overlap_at_k(expected[s], found[s]),
        "jaccard": lambda s: agree.jaccard(expected[s], found[s]),
        "exact_set": lambda s: agree.exact_set(expected[s], found[s]),
        "top_1": lambda s: agree.top_1(expected[s], found[s]),
        "weighted_overlap": lambda s: agree.weighted_overlap(
            expected[s], weights[s], found[s], own[s]
        ),
    }
    few = [slice(start, start + CHUNK) for start in range(0, len(found), CHUNK)]
    values = {name: np.concatenate([of[name](part) for part in few]) for name in measures}
    return {**values, "experts_per_token": np.count_nonzero(found >= 0, axis=1)}


def domain_rows(
    label: str, split: "RecordedSplit", decisions: Mapping[Site, Decision]
) -> list[dict[str, Any]]:
    """Return agreement and experts a token in each domain, means over sites."""
    parts = []
    for at, inputs in split.held_out.items():
        columns = _agreed(inputs, decisions[at], ["agreement"])
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
    decisions: Mapping[Site, Decision],
    text_ids: Mapping[int, int],
) -> list[dict[str, Any]]:
    """Return what a router chose for the recorded tokens of some texts.

    Parameters
    ----------
    unit : mapping
        ``router`` and ``seed``.
    text_ids : dict of prompt_id to text_id
        As :func:`explorer.comparison.texts.recorded_texts` gave them.
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
