"""What two runs, or several, have in common: prompts, tokens, and their experts."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.run import Run


class Chosen(NamedTuple):
    """Experts of ``T`` tokens at one site.

    Attributes
    ----------
    expert_ids : array [T, K], int64
        Heaviest first, -1 in empty slots.
    weights : array [T, K], float64
    """

    expert_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


def prompt_texts(run: Run) -> pd.DataFrame:
    """Return ``prompt_id, text, domain`` of the prompts whose text was recorded."""
    return run.query(
        "SELECT prompt_id, text, domain FROM prompts WHERE text IS NOT NULL ORDER BY prompt_id"
    )


def common_prompts(first: Run, second: Run) -> pd.DataFrame:
    """Return prompts of the same text in both runs.

    Returns
    -------
    DataFrame
        ``text, domain, prompt_a, prompt_b``, in the order of the first run; a text that a run
        holds twice counts once.
    """
    a = prompt_texts(first).drop_duplicates("text").rename(columns={"prompt_id": "prompt_a"})
    b = prompt_texts(second).drop_duplicates("text").rename(columns={"prompt_id": "prompt_b"})
    return a.merge(b[["text", "prompt_b"]], on="text")[["text", "domain", "prompt_a", "prompt_b"]]


def common_tokens(
    first: Run, second: Run, prompts: pd.DataFrame, *, max_tokens: int
) -> pd.DataFrame:
    """Return the prompt tokens that both runs hold at the same place of the same prompt.

    Parameters
    ----------
    prompts : DataFrame
        From :func:`common_prompts`.
    max_tokens : int
        The first ones, up to so many.

    Returns
    -------
    DataFrame
        ``prompt_a, prompt_b, position, token, token_a, token_b`` (ids in each run), ``loss_a,
        loss_b``.
    """
    sides = []
    for run, name in ((first, "a"), (second, "b")):
        rows = run.query(
            "SELECT prompt_id, position, token, token_id, loss FROM tokens "
            "WHERE phase = 'prompt' AND list_contains($prompts, prompt_id) ORDER BY token_id",
            {"prompts": prompts[f"prompt_{name}"].tolist()},
        )
        names = {"prompt_id": f"prompt_{name}", "token_id": f"token_{name}", "loss": f"loss_{name}"}
        sides.append(rows.rename(columns=names))
    a = sides[0].merge(prompts[["prompt_a", "prompt_b"]], on="prompt_a")
    both = a.merge(sides[1], on=["prompt_b", "position", "token"])
    return both.sort_values("token_a").head(max_tokens).reset_index(drop=True)


def chosen(run: Run, token_ids: npt.ArrayLike, layer: int, *, site: int = 0) -> Chosen:
    """Return the experts of tokens at one site, in the order of ``token_ids``."""
    wanted = np.asarray(token_ids, dtype=np.int64)
    top_k = run.site_info(layer, site).top_k
    ids = np.full((len(wanted), top_k), -1, dtype=np.int64)
    weights = np.zeros((len(wanted), top_k))
    if not len(wanted):
        return Chosen(ids, weights)
    rows = run.table(
        "SELECT token_id, slot, expert_id, weight FROM assignments WHERE layer = $layer "
        "AND site = $site AND token_id BETWEEN $low AND $high",
        {"layer": layer, "site": site, "low": int(wanted.min()), "high": int(wanted.max())},
    )
    place = np.full(int(wanted.max()) + 1, -1, dtype=np.int64)
    place[wanted] = np.arange(len(wanted))
    row = place[rows["token_id"].to_numpy().astype(np.int64)]
    known = row >= 0
    slot = rows["slot"].to_numpy()[known].astype(np.int64)
    ids[row[known], slot] = rows["expert_id"].to_numpy()[known]
    weights[row[known], slot] = rows["weight"].to_numpy()[known]
    return Chosen(ids, weights)


def prompt_gates(run: Run, prompt_id: int) -> pd.DataFrame:
    """Return what is known of each prompt token, as means over layers.

    Returns
    -------
    DataFrame
        ``token_id, position, text, loss, normalized_entropy`` (gate entropy / ln E),
        ``margin``; ordered by position.
    """
    return run.query(
        """
        WITH places AS (
            SELECT token_id, position, text, loss FROM tokens
            WHERE prompt_id = $prompt_id AND phase = 'prompt'
        ), ends AS (SELECT min(token_id) AS low, max(token_id) AS high FROM places)
        SELECT token_id, position, text, any_value(loss) AS loss,
            avg(entropy / nullif(ln(n_experts), 0)) AS normalized_entropy, avg(margin) AS margin
        FROM places LEFT JOIN (
            SELECT * FROM gates JOIN sites USING (layer, site)
            WHERE token_id BETWEEN (SELECT low FROM ends) AND (SELECT high FROM ends)
        ) USING (token_id)
        GROUP BY token_id, position, text ORDER BY position
        """,
        {"prompt_id": int(prompt_id)},
    )
