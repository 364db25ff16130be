"""Two runs against each other: the same model twice, or two models on the same text."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.paths import model_name
from explorer.metrics import agreement, alignment
from explorer.pages.compare_runs.data import (
    Chosen,
    Layers,
    chosen,
    common_prompts,
    common_tokens,
    prompt_gates,
    spread,
)
from explorer.queries.part import Part
from explorer.run import Run

# (token, router) rows of both runs that are compared one by one; tokens of one prompt
MAX_ROWS = 60_000
MAX_TOKENS = 20_000
# texts of two models whose pairs of stretches are compared
MAX_PROMPTS = 40
MAX_SEGMENTS = 120
_PSEUDO = 0.5  # assignments added to each expert, so that an idle one has a ratio
_CONFIG = (
    *("model", "revision", "architecture", "dtype", "device", "level", "n_layers", "n_prompts"),
    *("n_tokens", "complete", "started_at", "schema_version"),
)


class Relation(NamedTuple):
    """Whether expert ids of two runs mean the same experts.

    Attributes
    ----------
    same_shape : bool
        Layers, experts and top-k are equal, as in checkpoints of one model.
    same_model : bool
        And both runs name the same model.
    """

    same_shape: bool
    same_model: bool


def relation(first: Run, second: Run) -> Relation:
    """Return how two runs' models are related, as far as their files tell."""
    shapes = [
        [(s.layer, s.site, s.n_experts, s.top_k) for s in run.sites] for run in (first, second)
    ]
    same = shapes[0] == shapes[1] and first.info["architecture"] == second.info["architecture"]
    return Relation(same, same and first.info["model"] == second.info["model"])


def differences(first: Run, second: Run) -> pd.DataFrame:
    """Return ``what, A, B`` of everything about the recordings that differs."""
    rows = []
    for name in _CONFIG:
        a, b = (run.info.get(name) for run in (first, second))
        if str(a) != str(b):
            shown = [model_name(_shown(x)) if name == "model" else _shown(x) for x in (a, b)]
            rows.append((name.replace("n_", "").replace("_", " "), *shown))
    return pd.DataFrame(rows, columns=["what", "A", "B"])


def _shown(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def load_change(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return how each expert's share changed from A to B.

    Parameters
    ----------
    first, second : DataFrame
        From ``queries.load.expert_load`` of two runs of one model.

    Returns
    -------
    DataFrame
        ``layer, site, expert_id, n_experts, share_a, share_b, assignments_a, assignments_b``,
        ``change`` = log2 of share B / share A, half an assignment added to each expert so that
        idle ones have a ratio.
    """
    keys = ["layer", "site", "expert_id"]
    columns = [*keys, "n_experts", "assignments", "share"]
    both = first[columns].merge(
        second[[*keys, "assignments", "share"]], on=keys, suffixes=("_a", "_b")
    )
    smooth = []
    for side in ("a", "b"):
        counts = both[f"assignments_{side}"] + _PSEUDO
        smooth.append(counts / counts.groupby([both["layer"], both["site"]]).transform("sum"))
    return both.assign(change=np.log2(smooth[1] / smooth[0]))


def token_divergence(
    first: Run,
    second: Run,
    *,
    domain: str | None = None,
    part: Part | None = None,
    prompts: pd.DataFrame | None = None,
    weights: bool = True,
    max_rows: int = MAX_ROWS,
) -> pd.DataFrame:
    """Compare the experts of the same prompt tokens in two runs of one model.

    Parameters
    ----------
    domain, part : optional
        Of the first run's tokens.
    prompts : DataFrame, optional
        Their ``common_prompts``, where these are known already.
    weights : bool
        Whether combine weights are read too, which takes as long again.
    max_rows : int
        Tokens times routers that are compared; the tokens are spread over all that are common.

    Returns
    -------
    DataFrame
        One row per site: ``layer, site, tokens``, ``common`` (tokens that could have been
        compared), ``jaccard, exact_set, top_1``, ``chance`` (Jaccard of random sets), with
        weights ``js`` (Jensen-Shannon divergence of the combine weights, nats). Empty without
        common tokens.
    """
    if prompts is None:
        prompts = common_prompts(first, second, domain=domain, part=part)
    every = common_tokens(first, second, prompts, part=part)
    if every.empty:
        return pd.DataFrame()
    both = spread(every, max(1, max_rows // len(first.sites)))
    rows = []
    sides = _of_both(first, second, both, weights=weights)
    for site, a, b in zip(first.sites, *sides, strict=True):
        row = {
            "layer": site.layer,
            "site": site.site,
            "tokens": len(both),
            "common": len(every),
            "jaccard": agreement.jaccard(a.expert_ids, b.expert_ids).mean(),
            "exact_set": agreement.exact_set(a.expert_ids, b.expert_ids).mean(),
            "top_1": mean(agreement.top_1(a.expert_ids, b.expert_ids)),
            "chance": agreement.chance_jaccard(site.n_experts, site.top_k),
        }
        if weights:
            row["js"] = mean(
                agreement.weight_divergence(a.expert_ids, a.weights, b.expert_ids, b.weights)
            )
        rows.append(row)
    return pd.DataFrame(rows)


def mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean of what is defined; nan if that is nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _of_both(
    first: Run, second: Run, tokens: pd.DataFrame, *, weights: bool
) -> tuple[list[Chosen], list[Chosen]]:
    """Return the experts of common tokens; rows of one run are unpacked while the other is read."""
    read = functools.partial(chosen, weights=weights)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(read, (first, second), (tokens["token_a"], tokens["token_b"]))
    return a, b


def prompt_divergence(
    first: Run, second: Run, prompt_a: int, prompt_b: int, *, layers: Layers | None = None
) -> pd.DataFrame:
    """Compare the tokens of one prompt in two runs of one model, in the layers of a range.

    Returns
    -------
    DataFrame
        ``position, token_a, token_b, text, loss_a, loss_b, jaccard`` (mean over sites) and
        ``first_layer`` (the first layer with other experts; missing where there is none).
    """
    prompts = pd.DataFrame({"prompt_a": [prompt_a], "prompt_b": [prompt_b]})
    both = common_tokens(first, second, prompts, max_tokens=MAX_TOKENS)
    texts = first.query(
        "SELECT token_id AS token_a, text FROM tokens WHERE prompt_id = $prompt",
        {"prompt": int(prompt_a)},
    )
    both = both.merge(texts, on="token_a").sort_values("position").reset_index(drop=True)
    if both.empty:
        return both.assign(jaccard=[], first_layer=[])
    a, b = _of_both(first, second, both, weights=False)
    sides = _of_range(first, a, layers), _of_range(second, b, layers)
    table = np.array(
        [agreement.jaccard(a.expert_ids, b.expert_ids) for a, b in zip(*sides, strict=True)]
    )
    places = np.array([site.layer for site in first.sites if _within(layers, site.layer)])
    other = np.where(table < 1, places[:, None], np.inf).min(axis=0)
    return both.assign(
        jaccard=np.nanmean(table, axis=0),
        first_layer=np.where(np.isfinite(other), other, np.nan),
    )


def _within(layers: Layers | None, layer: int) -> bool:
    return layers is None or layers[0] <= layer <= layers[1]


def _of_range(run: Run, found: list[Chosen], layers: Layers | None) -> list[Chosen]:
    """Return what was chosen at the sites of a range of layers."""
    return [one for site, one in zip(run.sites, found, strict=True) if _within(layers, site.layer)]


class TwoModels(NamedTuple):
    """Two models on the same texts.

    Attributes
    ----------
    stretches : DataFrame
        ``prompt, text, tokens_a, tokens_b, entropy_a, entropy_b`` (normalised gate entropy),
        ``margin_a, margin_b``, ``loss_a, loss_b`` (of predicting the stretch, nats; missing where
        the loss of one of its tokens is).
    co_routing : CoRouting
    prompts, common : int
        Prompts that were compared, and all that both runs hold.
    cut : int
        Prompts that were left out, since one run has more of their text than the other.
    """

    stretches: pd.DataFrame
    co_routing: alignment.CoRouting
    prompts: int
    common: int
    cut: int


def two_models(
    first: Run,
    second: Run,
    *,
    domain: str | None = None,
    part: Part | None = None,
    layers: Sequence[Layers | None] = (None, None),
    max_prompts: int = MAX_PROMPTS,
) -> TwoModels:
    """Compare two models on the texts that both runs hold, aligned by characters.

    Expert ids of different models have nothing to do with each other, so that none are compared:
    only how sure the routers are, and whether the same stretches are routed together.

    Parameters
    ----------
    domain, part : optional
        Of the first run's prompts; they are compared as a whole.
    layers : sequence of two
        The range of layers of each run; None = all.
    max_prompts : int
        Where more are common, so many, evenly spread over all of them and so over domains.
    """
    common = common_prompts(first, second, domain=domain, part=part)
    prompts = spread(common, max_prompts)
    tables: list[pd.DataFrame] = []
    last: tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]] = ([], [])
    gates = (
        prompt_gates(first, prompts["prompt_a"], layers=layers[0]),
        prompt_gates(second, prompts["prompt_b"], layers=layers[1]),
    )
    for row, *sides in zip(prompts.itertuples(), *gates, strict=True):
        texts = [side["text"].fillna("").tolist() for side in sides]
        # a prompt may have been truncated in one of the runs
        if "".join(texts[0]) != "".join(texts[1]) or not "".join(texts[0]):
            continue
        found = alignment.align(*texts)
        tables.append(_stretches(found, sides, str(row.text), int(row.prompt_a)))
        kept = min(len(found.end), MAX_SEGMENTS)
        for side, segment, into in zip(sides, (found.first, found.second), last, strict=True):
            into.append(_last_tokens(side, segment)[:kept])
    pairs = [
        [alignment.co_routing(experts) for experts in _experts_of(run, token_ids, of_range)]
        for run, token_ids, of_range in zip((first, second), last, layers, strict=True)
    ]
    names = ("tokens", "entropy", "margin", "loss")
    empty = ["prompt", "text", *(f"{name}_{side}" for name in names for side in "ab")]
    stretches = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=empty)
    return TwoModels(
        stretches,
        alignment.co_routing_agreement(*pairs),
        prompts=len(tables),
        common=len(common),
        cut=len(prompts) - len(tables),
    )


def _stretches(
    found: alignment.Segments, sides: list[pd.DataFrame], text: str, prompt: int
) -> pd.DataFrame:
    n = len(found.end)
    columns: dict[str, Any] = {
        "prompt": prompt,
        "text": [text[a:b] for a, b in zip(found.start, found.end, strict=True)],
    }
    for name, side, segment in zip("ab", sides, (found.first, found.second), strict=True):
        for quantity, column in (("entropy", "normalized_entropy"), ("margin", "margin")):
            columns[f"{quantity}_{name}"] = alignment.segment_means(side[column], segment, n)
        columns[f"tokens_{name}"] = np.bincount(segment[segment >= 0], minlength=n)
        columns[f"loss_{name}"] = _stretch_losses(side["loss"], segment, n)
    return pd.DataFrame(columns)


def _stretch_losses(
    losses: "pd.Series[float]", segment: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.float64]:
    """Return what predicting each of ``n`` stretches cost, nats [n]; nan where it is not known.

    A token's recorded loss is that of the token after it, so that each belongs to the next one.
    """
    of_token = losses.astype(np.float64).shift(1).to_numpy(copy=True)
    place = segment.copy()
    # a character of several tokens is the text of the first; the others cost as well
    for token in range(1, len(place)):
        if place[token] < 0:
            place[token] = place[token - 1]
    if len(segment) and segment[-1] < 0:
        # these end either a character or the whole prompt, which is no text
        of_token[-1] = np.nan
    known = place >= 0
    return np.asarray(np.bincount(place[known], of_token[known], minlength=n), dtype=np.float64)


def _last_tokens(side: pd.DataFrame, segment: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the last token of each segment [S]."""
    last = pd.Series(side["token_id"].to_numpy()).groupby(segment).last()
    return np.asarray(last[last.index >= 0].to_numpy(), dtype=np.int64)


def _experts_of(
    run: Run, token_ids: Sequence[npt.NDArray[np.int64]], layers: Layers | None
) -> list[npt.NDArray[np.int64]]:
    """Return the experts [L, S, K] of several lists of tokens [S], asked for together."""
    if not token_ids:
        return []
    found = chosen(run, np.concatenate(token_ids), weights=False)
    parts = [one.expert_ids for one in _of_range(run, found, layers)]
    width = max(part.shape[1] for part in parts)
    wide = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts]
    ends = np.cumsum([len(one) for one in token_ids])
    return np.split(np.stack(wide), ends[:-1], axis=1)
