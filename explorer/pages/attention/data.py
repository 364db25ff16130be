"""Attention: which heads look where, and the keys that tokens attend to."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.errors import RunError
from explorer.queries.prompts import SHOWN
from explorer.queries.where import PLACES, Part, prompt_conditions
from explorer.run import Run

Floats = npt.NDArray[np.float64]

# what a kind of layer is called that has attention maps; others bear their mixer's name
HAS_MAP = "attention"


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


def head_stats(
    run: Run,
    *,
    domain: str | None = None,
    part: Part | None = None,
    prompt_id: int | None = None,
) -> pd.DataFrame:
    """Return the statistics of every recorded head, as means over queries.

    Parameters
    ----------
    prompt_id : int, optional
        Of this prompt alone.

    Returns
    -------
    DataFrame
        ``layer``, ``head``, ``prompts``, ``queries``, ``entropy`` (nats), ``sink_mass``,
        ``mean_distance`` (tokens), ``window_mass``; a prompt counts by its queries.
    """
    where, params = prompt_conditions(domain=domain, part=part)
    if prompt_id is not None:
        where, params = f"{where} AND prompt_id = $prompt_id", params | {"prompt_id": prompt_id}
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
