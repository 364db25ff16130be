"""What two runs, or several, have in common: prompts, tokens, and their experts."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.paths import model_name
from capture.traces.importing import NO_MODEL
from explorer.metrics import agreement, alignment
from explorer.queries.where import Part, conditions, prompt_conditions
from explorer.run import Run

Layers = tuple[int, int]  # the first and the last of a range


class ChosenExperts(NamedTuple):
    """Experts of ``T`` tokens at one site.

    Attributes
    ----------
    expert_ids : array [T, K], int64
        Heaviest first, -1 in empty slots.
    weights : array [T, K], float64
        0 in empty slots; nan if they were not asked for.
    """

    expert_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


def prompt_texts(run: Run, *, domain: str | None = None, part: Part | None = None) -> pd.DataFrame:
    """Return ``prompt_id, text, domain`` of the prompts whose text was recorded."""
    where, params = prompt_conditions(domain=domain, part=part)
    return run.query(
        "SELECT prompt_id, text, domain FROM prompts "
        f"WHERE text IS NOT NULL AND {where} ORDER BY prompt_id",
        params,
    )


def common_prompts(
    first: Run, second: Run, *, domain: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return prompts of the same text in both runs.

    Parameters
    ----------
    domain, part : optional
        Of the first run's prompts: the second one's may be named otherwise.

    Returns
    -------
    DataFrame
        ``text, domain, prompt_a, prompt_b``, in the order of the first run; a text that a run
        holds twice counts once.
    """
    a = prompt_texts(first, domain=domain, part=part)
    a = a.drop_duplicates("text").rename(columns={"prompt_id": "prompt_a"})
    b = prompt_texts(second).drop_duplicates("text").rename(columns={"prompt_id": "prompt_b"})
    return a.merge(b[["text", "prompt_b"]], on="text")[["text", "domain", "prompt_a", "prompt_b"]]


def common_tokens(
    first: Run,
    second: Run,
    prompts: pd.DataFrame,
    *,
    part: Part | None = None,
    max_tokens: int | None = None,
) -> pd.DataFrame:
    """Return the prompt tokens that both runs hold at the same place of the same prompt.

    Parameters
    ----------
    prompts : DataFrame
        From :func:`common_prompts`.
    part : Part, optional
        Of the first run's tokens.
    max_tokens : int, optional
        Where there are more, so many, evenly spread over all of them.

    Returns
    -------
    DataFrame
        ``prompt_a, prompt_b, position, token, token_a, token_b`` (ids in each run), ``loss_a,
        loss_b``.
    """
    sides = []
    for run, name, of_run in ((first, "a", part), (second, "b", None)):
        where, params = conditions(phase="prompt", part=of_run)
        rows = run.query(
            "SELECT prompt_id, position, token, token_id, loss FROM tokens "
            f"WHERE {where} AND list_contains($prompts, prompt_id)",
            params | {"prompts": prompts[f"prompt_{name}"].tolist()},
        )
        names = {"prompt_id": f"prompt_{name}", "token_id": f"token_{name}", "loss": f"loss_{name}"}
        sides.append(rows.rename(columns=names))
    a = sides[0].merge(prompts[["prompt_a", "prompt_b"]], on="prompt_a")
    both = a.merge(sides[1], on=["prompt_b", "position", "token"])
    both = both.sort_values("token_a").reset_index(drop=True)
    return both if max_tokens is None else spread(both, max_tokens)


def spread(rows: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return at most so many rows, evenly spread over all of them, numbered from 0."""
    if len(rows) <= limit:
        return rows
    places = np.linspace(0, len(rows) - 1, limit).astype(np.int64)
    return rows.iloc[places].reset_index(drop=True)


def chosen(run: Run, token_ids: npt.ArrayLike, *, weights: bool = True) -> list[ChosenExperts]:
    """Return the experts of tokens, in the order of ``token_ids``, at every site in order.

    Without ``weights``, which are half of what a run holds, it takes half as long.
    """
    wanted = np.asarray(token_ids, dtype=np.int64)
    # all sites at once: one by one would go through the rows as often as there are sites
    width = max((site.top_k for site in run.sites), default=0)
    shape = (len(run.sites), len(wanted), width)
    expert_ids = np.full(shape, -1, np.int64)
    values = np.full(shape, 0.0 if weights else np.nan)
    if len(wanted):
        rows = run.table(
            f"SELECT token_id, place, slot, expert_id{', weight' if weights else ''} "
            "FROM assignments JOIN ("
            "SELECT layer, site, row_number() OVER (ORDER BY layer, site) - 1 AS place FROM sites"
            ") USING (layer, site) "
            "WHERE token_id BETWEEN $low AND $high AND list_contains($tokens, token_id)",
            {"tokens": wanted.tolist(), "low": int(wanted.min()), "high": int(wanted.max())},
        )
        columns = {name: rows[name].to_numpy() for name in rows.column_names}
        place = np.empty(int(wanted.max()) + 1, dtype=np.int64)
        place[wanted] = np.arange(len(wanted))
        cells = columns["place"], place[columns["token_id"]], columns["slot"]
        expert_ids[cells] = columns["expert_id"]
        if weights:
            values[cells] = columns["weight"]
    return [
        ChosenExperts(expert_ids[at, :, : site.top_k], values[at, :, : site.top_k])
        for at, site in enumerate(run.sites)
    ]


def prompt_gates(
    run: Run, prompt_ids: Sequence[int], *, layers: Layers | None = None
) -> list[pd.DataFrame]:
    """Return what is known of each prompt token, as means over the layers (of a range).

    Returns
    -------
    list of DataFrame
        For each prompt ``token_id, position, text, loss, normalized_entropy`` (gate entropy /
        ln E), ``margin``; ordered by position.
    """
    of_range = "" if layers is None else "AND layer BETWEEN $first AND $last"
    params = {} if layers is None else {"first": layers[0], "last": layers[1]}
    rows = run.query(
        f"""
        WITH places AS (
            SELECT prompt_id, token_id, position, text, loss FROM tokens
            WHERE list_contains($prompts::INTEGER[], prompt_id) AND phase = 'prompt'
        ), ends AS (SELECT min(token_id) AS low, max(token_id) AS high FROM places)
        SELECT prompt_id, token_id, position, text, any_value(loss) AS loss,
            avg(entropy / nullif(ln(n_experts), 0)) AS normalized_entropy, avg(margin) AS margin
        FROM places LEFT JOIN (
            SELECT * FROM gates JOIN sites USING (layer, site)
            WHERE token_id BETWEEN (SELECT low FROM ends) AND (SELECT high FROM ends) {of_range}
        ) USING (token_id)
        GROUP BY prompt_id, token_id, position, text ORDER BY prompt_id, position
        """,
        params | {"prompts": [int(prompt_id) for prompt_id in prompt_ids]},
    )
    of_prompt = dict(iter(rows.groupby("prompt_id")))
    none = rows.iloc[:0]
    return [of_prompt.get(n, none).reset_index(drop=True) for n in prompt_ids]


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
    # a trace of another program says neither, or one of them
    traced = any(isinstance(run.notes.get("import"), dict) for run in (first, second))
    same = shapes[0] == shapes[1]
    same &= traced or first.info["architecture"] == second.info["architecture"]
    models = {str(run.info["model"]) for run in (first, second)} - ({NO_MODEL} if traced else set())
    return Relation(same, same and len(models) < 2)


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
    sides = experts_of_both(first, second, both, weights=weights)
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


def experts_of_both(
    first: Run, second: Run, tokens: pd.DataFrame, *, weights: bool
) -> tuple[list[ChosenExperts], list[ChosenExperts]]:
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
    a, b = experts_of_both(first, second, both, weights=False)
    sides = _of_range(first, a, layers), _of_range(second, b, layers)
    table = np.array(
        [agreement.jaccard(a.expert_ids, b.expert_ids) for a, b in zip(*sides, strict=True)]
    )
    places = np.array([site.layer for site in first.sites if _within(layers, site.layer)])
    other = np.where(table < 1, places[:, None], np.inf).min(axis=0)
    return both.assign(
        jaccard=np.nanmean(table, axis=0), first_layer=np.where(np.isfinite(other), other, np.nan)
    )


def _within(layers: Layers | None, layer: int) -> bool:
    return layers is None or layers[0] <= layer <= layers[1]


def _of_range(run: Run, found: list[ChosenExperts], layers: Layers | None) -> list[ChosenExperts]:
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
        Prompts that were compared, and all prompts that both runs hold.
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
    found: alignment.AlignedSegments, sides: list[pd.DataFrame], text: str, prompt: int
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
