"""Read what routers need from a run file: router inputs, scores and choices of sampled tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from capture.swap.rules import RouterInputs, Routing
from explorer.errors import RouterError
from explorer.routers.live_rule import Convention, convention_of, with_groups_as_counted
from explorer.routers.scores import host_scores
from explorer.run import UNLABELLED, Run

# tokens of one table, whichever of the tables a run has for the layer, most telling first
_SOURCES = ("hidden", "scores", "assignments")
_LARGEST_BIAS = 1e30  # whose sums float32 holds


class Recorded(NamedTuple):
    """What a run knows of one router.

    Attributes
    ----------
    inputs : RouterInputs
    tokens : DataFrame
        One row per token in the order of the inputs: ``token_id``, ``prompt_id``, ``position``,
        ``domain`` (``""`` where there is none).
    """

    inputs: RouterInputs
    tokens: pd.DataFrame


def recorded_inputs(run: Run, layer: int, site: int = 0) -> Recorded:
    """Return the inputs of one router for the prompt tokens of which most is known.

    Those are the sampled tokens, whose router inputs and scores are stored; in a run without
    them, the tokens with scores, or else all with a recorded choice.

    Parameters
    ----------
    run : Run
    layer, site : int

    Returns
    -------
    Recorded
        With the model's selection bias and groups, which ``run.notes`` tells. Runs that were
        recovered after a crash, or recorded before there was such a note, lack them: of a model
        that has them, only the native router then repeats its choice.

    Raises
    ------
    RouterError
        If the run recorded no token of this router.
    """
    info = run.site_info(layer, site)
    where = f"layer = {int(layer)} AND site = {int(site)}"
    for source in _SOURCES:
        wanted = f"SELECT token_id FROM {source} WHERE {where}"
        if run.query(f"SELECT count(*) AS n FROM ({wanted})")["n"].iloc[0]:
            break
    else:
        raise RouterError(
            f"{run.path.name} holds no token of layer {layer}. Record again with: "
            "python -m capture MODEL --level scores --sample-tokens N"
        )
    tokens = run.query(
        "SELECT token_id, prompt_id, position, token, coalesce(domain, $none) AS domain "
        f"FROM tokens JOIN prompts USING (prompt_id) WHERE phase = 'prompt' AND token_id IN "
        f"({wanted}) ORDER BY token_id",
        {"none": UNLABELLED},
    )
    ids = tokens["token_id"].to_numpy(np.int64)
    hidden = _vectors(run, "hidden", where, ids)
    logits = _vectors(run, "scores", where, ids)
    position = torch.from_numpy(np.array(tokens["position"], np.int64))
    inputs = RouterInputs(
        layer=layer,
        site=site,
        n_experts=info.n_experts,
        top_k=info.top_k,
        score_function=info.score_function,
        **choice_told(run.notes, layer, site, info.n_experts),
        hidden=hidden,
        logits=logits,
        token_ids=torch.from_numpy(np.array(tokens["token"], np.int64)),
        positions=position,
        starts=position == 0,
    )
    inputs = with_groups_as_counted(_with_choice(run, inputs, where, ids))
    return Recorded(inputs, tokens.drop(columns="token"))


def choice_told(notes: Mapping[str, Any], layer: int, site: int, n_experts: int) -> dict[str, Any]:
    """Return the selection bias and the groups of a router, as far as a run's notes tell them.

    What does not fit the router, as a stranger's file may hold, is left out.
    """
    told = notes.get("choice")
    for one in told if isinstance(told, list) else ():
        if isinstance(one, dict) and (one.get("layer"), one.get("site")) == (layer, site):
            break
    else:
        return {}
    found: dict[str, Any] = {}
    bias, groups, kept = (one.get(name) for name in ("selection_bias", "n_groups", "top_groups"))
    if isinstance(bias, list) and len(bias) == n_experts and all(map(_is_number, bias)):
        found["selection_bias"] = torch.tensor(bias, dtype=torch.float32)
    if not isinstance(groups, int) or not isinstance(kept, int):
        return found
    if 1 <= kept <= groups <= n_experts and n_experts % groups == 0:
        found |= {"n_groups": groups, "top_groups": kept}
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST_BIAS


def _with_choice(
    run: Run, inputs: RouterInputs, where: str, ids: npt.NDArray[np.int64]
) -> RouterInputs:
    """Return the inputs with the recorded choice, and the convention of its weights."""
    if not run.records_ids:
        return inputs
    rows = run.table(
        f"SELECT token_id, slot, expert_id, weight FROM assignments WHERE {where} ORDER BY token_id"
    )
    token, slot, expert, weight = (rows[name].to_numpy() for name in rows.column_names)
    at = np.searchsorted(ids, token)
    known = (at < len(ids)) & (ids[np.minimum(at, len(ids) - 1)] == token)
    width = int(slot[known].max()) + 1 if known.any() else 1
    chosen = np.full((len(ids), width), -1, np.int64)
    weights = np.zeros((len(ids), width), np.float32)
    chosen[at[known], slot[known]] = expert[known]
    weights[at[known], slot[known]] = weight[known]
    expert_ids, combine = torch.from_numpy(chosen), torch.from_numpy(weights)
    convention = Convention(True, 1.0)
    if inputs.logits is not None and inputs.score_function != "other":
        scores = host_scores(inputs.logits, inputs)
        convention = convention_of(scores, expert_ids, combine)
    else:
        # without scores, what is known of an expert is the weight that it got
        dense = torch.zeros(len(ids), inputs.n_experts)
        scores = dense.scatter_add(-1, expert_ids.clamp_min(0), combine)
    native = Routing(scores, expert_ids, combine)
    return replace(inputs, native=native, **convention._asdict())


def _vectors(run: Run, view: str, where: str, ids: npt.NDArray[np.int64]) -> torch.Tensor | None:
    """Return the vectors of these tokens [T, N] float32, None unless all are recorded."""
    rows = run.table(f"SELECT token_id, {view} FROM {view} WHERE {where} ORDER BY token_id")
    token = rows["token_id"].to_numpy().astype(np.int64)
    at = np.searchsorted(token, ids)
    if not len(ids) or not len(token) or (at >= len(token)).any() or (token[at] != ids).any():
        return None
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in rows[view].chunks])
    values = flat.reshape(len(token), -1)
    return torch.from_numpy(np.ascontiguousarray(values[at], dtype=np.float32))


def fit_split(tokens: pd.DataFrame, *, share: float = 0.5, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Choose which tokens routers are fitted on; the rest is held out for reporting.

    Whole prompts go to one side, so that no held-out token was seen in fitting, and each domain
    is divided by itself.

    Parameters
    ----------
    tokens : DataFrame
        ``Recorded.tokens``.
    share : float, 0..1
        Of each domain's prompts, rounded.
    seed : int

    Returns
    -------
    array [T], bool
        True = fit split.

    Raises
    ------
    RouterError
        If the share is none, or one side is left without a token.
    """
    if not 0 < share < 1:
        raise RouterError(f"Expected 0 < share < 1 for the fit split, got {share}.")
    random = np.random.default_rng(seed)
    fit: set[int] = set()
    for _, prompts in tokens.groupby("domain", sort=True)["prompt_id"]:
        names = np.sort(prompts.unique())
        fit.update(random.permutation(names)[: round(share * len(names))].tolist())
    chosen = tokens["prompt_id"].isin(fit).to_numpy()
    if chosen.all() or not chosen.any():
        raise RouterError(
            f"The {tokens['prompt_id'].nunique()} recorded prompts cannot be divided into a fit "
            "split and a held-out split. Record more prompts."
        )
    return np.array(chosen, dtype=np.bool_)
