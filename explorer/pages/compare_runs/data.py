"""What two runs, or several, have in common: prompts, tokens, and their experts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.queries.where import Part, conditions, prompt_conditions
from explorer.run import Run

Layers = tuple[int, int]  # the first and the last of a range


class Chosen(NamedTuple):
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
    """Return at most so many rows, evenly spread over all of them, numbered anew."""
    if len(rows) <= limit:
        return rows
    places = np.linspace(0, len(rows) - 1, limit).astype(np.int64)
    return rows.iloc[places].reset_index(drop=True)


def chosen(run: Run, token_ids: npt.ArrayLike, *, weights: bool = True) -> list[Chosen]:
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
        Chosen(expert_ids[at, :, : site.top_k], values[at, :, : site.top_k])
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
