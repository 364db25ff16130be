"""Which heads look where, the keys that tokens attend to, and whether those share experts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.errors import RunError
from explorer.metrics.attention import AttendedPairs, chance_levels, pair_totals, together
from explorer.pages.tokens.data import prompt_experts, tokens
from explorer.queries.overview import SHOWN
from explorer.queries.where import PLACES, Part, prompt_conditions
from explorer.run import Run

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# what a kind of layer is called that has attention maps; others bear their mixer's name
HAS_MAP = "attention"
# bounds that keep a page from waiting: (query, key) rows read, and pairs of tokens compared
MAX_ROWS = 1_500_000
MAX_COMPARED = 60_000_000
_KEYS_GUESSED = 4


def attention_prompts(
    run: Run, *, domain: str | None = None, part: Part | None = None
) -> pd.DataFrame:
    """Return the prompts whose attention was recorded, in the order of the run.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``text`` (None without a tokenizer), ``domain`` (``""`` = none), ``tokens``
        of the prompt, ``bins`` a side of its maps, ``bin_width`` in tokens, ``every`` (every n-th
        block of queries was used). No rows below level ``attention``.
    """
    where, params = prompt_conditions(domain=domain, part=part)
    return run.query(
        f"""
        SELECT prompt_id, left(text, {SHOWN}) AS text, coalesce(domain, '') AS domain, tokens,
            bins, bin_width, every
        FROM attention_prompts JOIN prompts USING (prompt_id) WHERE {where} ORDER BY prompt_id
        """,
        params,
    )


def attention_layers(run: Run) -> pd.DataFrame:
    """Return every decoder layer and what mixes its tokens.

    Returns
    -------
    DataFrame
        ``layer``, ``module``, ``heads`` (NA without attention), ``kind`` (``HAS_MAP``, or the
        class of the mixer, which has no attention map). No rows below level ``attention``.
    """
    return run.query("SELECT layer, module, heads, kind FROM attention_layers ORDER BY layer")


def head_stats(run: Run, *, domain: str | None = None, part: Part | None = None) -> pd.DataFrame:
    """Return the statistics of every recorded head, as means over queries.

    Returns
    -------
    DataFrame
        ``layer``, ``head``, ``prompts``, ``queries``, ``entropy`` (nats), ``sink_mass``,
        ``mean_distance`` (tokens), ``window_mass``; a prompt counts by its queries.
    """
    where, params = prompt_conditions(domain=domain, part=part)
    means = ", ".join(
        f"sum({name} * queries) / nullif(sum(queries) FILTER ({name} IS NOT NULL), 0) AS {name}"
        for name in ("entropy", "sink_mass", "mean_distance", "window_mass")
    )
    return run.query(
        f"""
        SELECT layer, head, count(*) AS prompts, sum(queries)::BIGINT AS queries, {means}
        FROM attention_stats JOIN prompts USING (prompt_id) WHERE {where}
        GROUP BY layer, head ORDER BY layer, head
        """,
        params,
    )


class HeadMap(NamedTuple):
    """The pooled attention of one head on one prompt.

    Attributes
    ----------
    weights : array [n, n]
        Row = block of queries, column = block of keys. Rows sum to 1; nan where no query of the
        block was used.
    tokens : int
        Of the prompt; the last block may be shorter.
    bin_width : int, tokens
        Of a block; with 1 the map is exact.
    """

    weights: Floats
    tokens: int
    bin_width: int


def head_map(run: Run, prompt_id: int, layer: int, head: int) -> HeadMap:
    """Return the pooled map of a head on a prompt.

    Raises
    ------
    RunError
        If the run has no such map.
    """
    rows = run.table(
        "SELECT map, maps.bins, tokens, bin_width FROM attention_maps AS maps "
        "JOIN attention_prompts USING (prompt_id) "
        "WHERE prompt_id = $prompt_id AND layer = $layer AND head = $head",
        {"prompt_id": prompt_id, "layer": layer, "head": head},
    )
    if not rows.num_rows:
        raise RunError(
            f"The run has no attention map of layer {layer}, head {head} on prompt {prompt_id}. "
            "Choose a prompt and a head among those that were recorded."
        )
    row = rows.slice(0, 1)
    bins = int(row["bins"][0].as_py())
    values = row["map"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return HeadMap(
        np.asarray(values, dtype=np.float64).reshape(bins, bins),
        int(row["tokens"][0].as_py()),
        int(row["bin_width"][0].as_py()),
    )


def attended_keys(run: Run, token_id: int, layer: int, head: int) -> pd.DataFrame:
    """Return the keys that one token attends to most, heaviest first.

    Returns
    -------
    DataFrame
        ``rank``, ``key_token_id``, ``position``, ``text``, ``weight`` (of all its attention).
        No rows where the token's keys were not recorded.
    """
    return run.query(
        """
        SELECT rank, key_token_id, position, text, weight
        FROM attention_top_keys JOIN tokens ON tokens.token_id = key_token_id
        WHERE attention_top_keys.token_id = $token_id AND layer = $layer AND head = $head
        ORDER BY rank
        """,
        {"token_id": token_id, "layer": layer, "head": head},
    )


def prompt_keys(run: Run, prompt_id: int, layer: int, head: int) -> pd.DataFrame:
    """Return the heaviest keys that one head has for every token of a prompt.

    Returns
    -------
    DataFrame
        ``rank``, ``query`` and ``key`` (positions in the prompt), ``weight``; ordered by query
        and rank.
    """
    rows = layer_keys(run, [prompt_id], layer, head=head)
    return rows[["rank", "query", "key", "weight"]]


def layer_keys(
    run: Run, prompt_ids: Sequence[int], layer: int, *, head: int | None = None
) -> pd.DataFrame:
    """Return the heaviest keys of every token of some prompts, in one layer.

    Parameters
    ----------
    head : int, optional
        Of this head alone.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``head``, ``rank``, ``query`` and ``key`` (positions in the prompt),
        ``weight``; ordered by prompt, head, query and rank.
    """
    where = "" if head is None else "AND head = $head"
    params = {} if head is None else {"head": head}
    return run.query(
        f"""
        WITH places AS ({PLACES}), ends AS (
            SELECT min(token_id) AS low, max(token_id) AS high FROM places
        )
        SELECT queries.prompt_id, head, rank, queries.position AS query, keys.position AS key,
            weight
        FROM (
            SELECT * FROM attention_top_keys WHERE layer = $layer {where}
            AND token_id BETWEEN (SELECT low FROM ends) AND (SELECT high FROM ends)
        ) AS top
        JOIN places AS queries ON queries.token_id = top.token_id
        JOIN places AS keys ON keys.token_id = top.key_token_id
        ORDER BY queries.prompt_id, head, query, rank
        """,
        params | {"prompts": list(prompt_ids), "layer": layer},
    )


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
    run.refuse_without_ids("What attention has to do with routing")
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
) -> list[AttendedPairs]:
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
    run.refuse_without_ids("What attention has to do with routing")
    info = run.site_info(layer, site)
    position = tokens(run, prompt_id).set_index("token_id")["position"]
    rows = prompt_experts(run, prompt_id, layer, site=site)
    at = rows["token_id"].map(position).to_numpy(dtype=np.int64)
    ids = np.full((n_tokens, info.top_k), -1, dtype=np.int64)
    inside = at < n_tokens
    ids[at[inside], rows["slot"].to_numpy()[inside]] = rows["expert_id"].to_numpy()[inside]
    return PromptRouting(ids, chance_levels(ids)[0])


def prompts_experts(
    run: Run, prompt_ids: Sequence[int], layer: int, *, site: int = 0
) -> pd.DataFrame:
    """Return which experts the prompt tokens of several prompts used at one site.

    Returns
    -------
    DataFrame
        ``prompt_id``, ``position``, ``slot``, ``expert_id``; ordered by the first three. What
        was generated after the prompts is left out. No rows at level ``stats``.
    """
    run.site_info(layer, site)
    return run.query(
        f"""
        WITH places AS ({PLACES}), ends AS (
            SELECT min(token_id) AS low, max(token_id) AS high FROM places
        )
        SELECT prompt_id, position, slot, expert_id
        FROM assignments JOIN places USING (token_id)
        WHERE layer = $layer AND site = $site
            AND token_id BETWEEN (SELECT low FROM ends) AND (SELECT high FROM ends)
        ORDER BY prompt_id, position, slot
        """,
        {"prompts": list(prompt_ids), "layer": layer, "site": site},
    )
