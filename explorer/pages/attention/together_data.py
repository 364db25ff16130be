"""Attention beside routing: the tokens that a head joins, and whether they share experts."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.errors import RunError
from explorer.metrics.attention import PairTotals, chance_levels, pair_totals, together
from explorer.pages.attention.data import attention_prompts, layer_keys
from explorer.pages.tokens.data import tokens
from explorer.queries.part import Part
from explorer.queries.routes import prompt_experts, prompts_experts
from explorer.run import Run

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# bounds that keep a page from waiting: (query, key) rows read, and pairs of tokens compared
MAX_ROWS = 1_500_000
MAX_COMPARED = 60_000_000
_KEYS_GUESSED = 4


class HeadsTogether(NamedTuple):
    """Whether attended tokens route together, for the heads of one layer.

    Attributes
    ----------
    heads : DataFrame
        ``head``, the fields of ``metrics.together.Together``, and ``covered``: the share of the
        attention that lies on recorded keys.
    n_prompts, n_all : int
        Prompts used, and prompts that have attention.
    n_tokens : int
        Of the prompts used.
    """

    heads: pd.DataFrame
    n_prompts: int
    n_all: int
    n_tokens: int


def routing_together(
    run: Run,
    *,
    attention_layer: int,
    layer: int,
    site: int,
    domain: str | None = None,
    part: Part | None = None,
) -> HeadsTogether:
    """Say for every head of a layer whether tokens that attend to each other route together.

    Parameters
    ----------
    attention_layer : int
        Whose heads.
    layer, site : int
        Whose experts.

    Raises
    ------
    RunError
        If the run has no attention, or no expert ids.
    """
    _needs_ids(run)
    prompts = attention_prompts(run, domain=domain, part=part)
    if prompts.empty:
        raise RunError(
            "The run has no attention of these prompts. Choose another domain, or record with "
            "--level attention."
        )
    n_heads = _n_heads(run, attention_layer)
    lengths = prompts["tokens"].to_numpy(dtype=np.int64)
    rows = np.cumsum(lengths * n_heads * _KEYS_GUESSED)
    within = (rows <= MAX_ROWS) & (np.cumsum(lengths**2) <= MAX_COMPARED)
    within[0] = True
    used = prompts["prompt_id"].to_numpy()[within]
    keys = layer_keys(run, used.tolist(), attention_layer)
    experts = prompts_experts(run, used.tolist(), layer, site=site)
    parts = _totals(run, layer, site, lengths[within], used, keys, experts)
    found = pd.DataFrame(together(parts))
    first = keys[keys["rank"] == 0].groupby("head").size()
    covered = keys.groupby("head")["weight"].sum() / first
    heads = pd.DataFrame({"head": range(len(found))}).assign(**found)
    heads["covered"] = heads["head"].map(covered).astype("float64")
    heads = heads[heads["head"].isin(first.index)].reset_index(drop=True)
    return HeadsTogether(heads, len(used), len(prompts), int(lengths[within].sum()))


def _totals(
    run: Run,
    layer: int,
    site: int,
    lengths: Ids,
    prompt_ids: Ids,
    keys: pd.DataFrame,
    experts: pd.DataFrame,
) -> list[PairTotals]:
    top_k = run.site_info(layer, site).top_k
    n_heads = int(keys["head"].max()) + 1 if len(keys) else 0
    by_prompt = dict(iter(keys.groupby("prompt_id")))
    routes = dict(iter(experts.groupby("prompt_id")))
    parts = []
    for prompt_id, length in zip(prompt_ids.tolist(), lengths.tolist(), strict=True):
        if prompt_id not in by_prompt:
            continue
        mine = by_prompt[prompt_id]
        ids = np.full((length, top_k), -1, dtype=np.int64)
        if prompt_id in routes:
            route = routes[prompt_id]
            route = route[route["position"] < length]
            ids[route["position"], route["slot"]] = route["expert_id"]
        parts.append(
            pair_totals(
                ids,
                mine["query"].to_numpy(),
                mine["key"].to_numpy(),
                mine["weight"].to_numpy(),
                mine["head"].to_numpy(),
                n_heads=n_heads,
            )
        )
    return parts


def _n_heads(run: Run, layer: int) -> int:
    rows = run.query(
        "SELECT count(DISTINCT head) AS n FROM attention_stats WHERE layer = $layer",
        {"layer": layer},
    )
    return max(1, int(rows["n"].iloc[0]))


class PromptRouting(NamedTuple):
    """What a layer's router did with the tokens of one prompt.

    Attributes
    ----------
    expert_ids : array [T, K]
        By position; -1 = empty slot.
    by_distance : array [T]
        Chance that two tokens of the prompt share an expert, by their distance.
    """

    expert_ids: Ids
    by_distance: Floats


def prompt_routing(
    run: Run, *, prompt_id: int, n_tokens: int, layer: int, site: int
) -> PromptRouting:
    """Return the experts of a prompt's first tokens, and how often they share one by chance.

    Parameters
    ----------
    n_tokens : int
        Length of the prompt, without what was generated after it.

    Raises
    ------
    RunError
        If the run has no expert ids.
    """
    _needs_ids(run)
    info = run.site_info(layer, site)
    position = tokens(run, prompt_id).set_index("token_id")["position"]
    rows = prompt_experts(run, prompt_id, layer, site=site)
    at = rows["token_id"].map(position).to_numpy(dtype=np.int64)
    ids = np.full((n_tokens, info.top_k), -1, dtype=np.int64)
    inside = at < n_tokens
    ids[at[inside], rows["slot"].to_numpy()[inside]] = rows["expert_id"].to_numpy()[inside]
    return PromptRouting(ids, chance_levels(ids)[0])


def _needs_ids(run: Run) -> None:
    if not run.records_ids:
        raise RunError(
            "This run was recorded at level stats, which keeps no expert ids per token. "
            "Record it again with --level attention."
        )
