"""Two recordings of one text, such as a rollout engine's and a trainer's: where they part."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.metrics.parting import Parting, parting
from explorer.pages.compare_runs.data import MAX_TOKENS, common_prompts, experts_of_both
from explorer.run import Run

# (token, router) rows of whole sequences from the first on, to name a pattern
MAX_ROWS = 200_000


class TwoSides(NamedTuple):
    """Where two runs of the same text part.

    Attributes
    ----------
    found : Parting
    matched_by : str
        What says which sequence is which: texts, token ids, or their order.
    sequences, tokens, common : int
        Compared, and tokens that could have been.
    one_sided : int
        (token, layer) with experts in one run only.
    prompt_a, position : int or None
        Of the first token that parts.
    layers : list of (layer, site)
        What the layers of ``found`` are.
    """

    found: Parting
    matched_by: str
    sequences: int
    tokens: int
    common: int
    one_sided: int
    prompt_a: int | None
    position: int | None
    layers: list[tuple[int, int]]


_TOKEN_IDS = """
    SELECT prompt_id, md5(string_agg(token, ' ' ORDER BY position)) AS text, domain
    FROM tokens JOIN prompts USING (prompt_id) GROUP BY prompt_id, domain
    HAVING count(token) = count(*)
"""


def same_sequences(first: Run, second: Run) -> tuple[pd.DataFrame, str]:
    """Return ``prompt_a, prompt_b`` of the sequences that both runs hold, and what says so.

    Their texts; else the ids of all their tokens; else, where neither run knows any of them, their
    order.
    """
    found = common_prompts(first, second)
    if len(found):
        return found, "texts"
    sides = [run.query(_TOKEN_IDS).drop_duplicates("text") for run in (first, second)]
    found = sides[0].merge(sides[1], on="text", suffixes=("_a", "_b"))
    found = found.rename(columns={"prompt_id_a": "prompt_a", "prompt_id_b": "prompt_b"})
    if len(found):
        return found.sort_values("prompt_a"), "token ids"
    known = "SELECT count(text) + (SELECT count(token) FROM tokens) AS n FROM prompts"
    unknown = not any(int(run.query(known)["n"].iloc[0]) for run in (first, second))
    if unknown and first.info["n_prompts"] == second.info["n_prompts"]:
        numbers = np.arange(int(first.info["n_prompts"]))
        found = pd.DataFrame({"prompt_a": numbers, "prompt_b": numbers})
    return found, "their order"


def two_sides(first: Run, second: Run) -> TwoSides | None:
    """Compare the experts of all tokens of the same sequences in two runs of one model.

    What was generated counts, too, where both runs hold the same tokens. Returns None where they
    have no sequence in common.
    """
    prompts, matched_by = same_sequences(first, second)
    sides = []
    for run, name in ((first, "a"), (second, "b")):
        rows = run.query(
            "SELECT prompt_id, position, token, token_id FROM tokens"
            " WHERE list_contains($prompts::INTEGER[], prompt_id)",
            {"prompts": prompts[f"prompt_{name}"].tolist()},
        )
        renamed = {old: f"{old.removesuffix('_id')}_{name}" for old in ("prompt_id", "token_id")}
        sides.append(rows.rename(columns={"token": f"id_{name}", **renamed}))
    both = sides[0].merge(prompts[["prompt_a", "prompt_b"]], on="prompt_a")
    both = both.merge(sides[1], on=["prompt_b", "position"])
    both = both[both["id_a"].isna() | both["id_b"].isna() | (both["id_a"] == both["id_b"])]
    both = both.sort_values(["prompt_a", "position"]).reset_index(drop=True)
    # shifts and padding show in tokens that follow each other
    kept = both.iloc[: max(1, min(MAX_TOKENS, MAX_ROWS // len(first.sites)))]
    if kept.empty:
        return None
    width = max(site.top_k for site in (*first.sites, *second.sites))
    ids = [
        np.stack(
            [
                np.pad(
                    at.expert_ids, ((0, 0), (0, width - at.expert_ids.shape[1])), constant_values=-1
                )
                for at in side
            ],
            axis=1,
        )
        for side in experts_of_both(first, second, kept, weights=False)
    ]
    found = parting(
        ids[0],
        ids[1],
        kept["prompt_a"].to_numpy(),
        n_experts=max(site.n_experts for site in first.sites),
        margins=_margins(first, kept["token_a"].to_numpy()),
    )
    at = None if found.first is None else kept.iloc[found.first[0]]
    recorded = [(side >= 0).any(-1) for side in ids]
    return TwoSides(
        found,
        matched_by,
        int(kept["prompt_a"].nunique()),
        len(kept),
        len(both),
        int((recorded[0] != recorded[1]).sum()),
        None if at is None else int(at["prompt_a"]),
        None if at is None else int(at["position"]),
        [(site.layer, site.site) for site in first.sites],
    )


def _margins(run: Run, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64] | None:
    """Return the margins of tokens at every site, [T, L]; None where none was recorded."""
    rows = run.table(
        "SELECT token_id, place, margin FROM gates JOIN ("
        "SELECT layer, site, row_number() OVER (ORDER BY layer, site) - 1 AS place FROM sites"
        ") USING (layer, site) WHERE margin IS NOT NULL AND token_id BETWEEN $low AND $high",
        {"low": int(token_ids.min()), "high": int(token_ids.max())},
    )
    if not rows.num_rows:
        return None
    row_of = np.full(int(token_ids.max()) + 1, -1)
    row_of[token_ids] = np.arange(len(token_ids))
    margins = np.full((len(token_ids), len(run.sites)), np.nan)
    row = row_of[rows["token_id"].to_numpy()]
    wanted = row >= 0
    margins[row[wanted], rows["place"].to_numpy()[wanted]] = rows["margin"].to_numpy()[wanted]
    return margins
