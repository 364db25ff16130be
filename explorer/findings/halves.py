"""The prompts of a run in two halves: those that suggest a finding and those that test it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from explorer.queries.where import conditions
from explorer.run import Run
from explorer.text import visible

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

MIN_PROMPTS = 8  # in each half; of fewer, a spread over prompts cannot be told
MAX_ASSIGNMENTS = 2_000_000  # that are read; whole prompts, evenly over the run


class RouterChoices(NamedTuple):
    """What one router chose for T tokens of P prompts."""

    name: str
    n_experts: int
    top_k: int
    ids: Ids  # [T, K], -1 = empty slot
    load: Floats  # [P, E], assignments of each prompt


class Half(NamedTuple):
    """P prompts of T tokens in the order of the prompts: those that suggest, or those that test."""

    token: Ids  # [T], vocabulary entry; -1 = left out
    words: dict[int, str]  # what entries look like
    prompt: Ids  # [T], from 0
    tokens: Floats  # [P]
    domain: npt.NDArray[np.object_]  # [P]
    entropy: Floats  # [T], share of the largest, mean over sites; nan = not recorded
    sites: list[RouterChoices]


def read_halves(run: Run) -> tuple[Half, Half]:
    """Read whole prompts, evenly over the run, and deal them out in turn within each domain.

    Raises
    ------
    RunError
        If the run does not hold expert ids.
    """
    run.refuse_without_ids("Testing findings")
    width = sum(site.top_k for site in run.sites)
    step = max(1, -(-int(run.info["n_tokens"]) * width // MAX_ASSIGNMENTS))
    chosen = "prompt_id % $step = 0"
    tokens = run.query(
        "SELECT token_id, prompt_id, position, coalesce(token, -1) AS token, tokens.text AS text,"
        " coalesce(domain, '') AS domain FROM tokens JOIN prompts USING (prompt_id)"
        f" WHERE {chosen} ORDER BY prompt_id, position",
        {"step": step},
    )
    prompts = tokens.drop_duplicates("prompt_id")[["prompt_id", "domain"]]
    turn = prompts.sort_values("domain", kind="stable")
    odd = pd.Series(np.arange(len(turn)) % 2 == 1, index=turn["prompt_id"])
    is_odd = tokens["prompt_id"].map(odd).to_numpy(dtype=bool)
    row_of = np.full(int(tokens["token_id"].max()) + 1 if len(tokens) else 0, -1, dtype=np.int64)
    row_of[tokens["token_id"].to_numpy()] = np.arange(len(tokens))
    several = any(site.site for site in run.sites)
    ids = []
    for site in run.sites:
        where, params = conditions(layer=site.layer, site=site.site)
        rows = run.table(
            "SELECT token_id, slot, expert_id FROM assignments SEMI JOIN (SELECT token_id FROM"
            f" tokens WHERE {chosen}) USING (token_id) WHERE {where}",
            params | {"step": step},
        )
        table = np.full((len(tokens), site.top_k), -1, dtype=np.int64)
        at = row_of[rows["token_id"].to_numpy()]
        table[at, rows["slot"].to_numpy()] = rows["expert_id"].to_numpy()
        name = f"{site.layer}.{site.site}" if several else str(site.layer)
        ids.append((name, site.n_experts, site.top_k, table))
    entropy = _entropy(run, step, row_of, len(tokens))
    named = tokens.drop_duplicates("token")
    words = {
        int(token): visible(str(text), spaces=True) if isinstance(text, str) else f"id {token}"
        for token, text in zip(named["token"], named["text"], strict=True)
    }
    first, second = (_half(tokens, kept, words, ids, entropy) for kept in (~is_odd, is_odd))
    return first, second


def _entropy(run: Run, step: int, row_of: Ids, n_tokens: int) -> Floats:
    """Return each token's gate entropy over its largest value, mean over sites."""
    rows = run.query(
        "SELECT token_id, avg(entropy / ln(n_experts)) AS entropy FROM gates JOIN sites"
        " USING (layer, site) SEMI JOIN (SELECT token_id FROM tokens WHERE prompt_id % $step = 0)"
        " USING (token_id) WHERE n_experts > 1 GROUP BY token_id",
        {"step": step},
    )
    found = np.full(n_tokens, np.nan)
    found[row_of[rows["token_id"].to_numpy()]] = rows["entropy"].to_numpy(dtype=np.float64)
    return found


def _half(
    tokens: pd.DataFrame,
    kept: npt.NDArray[np.bool_],
    words: dict[int, str],
    sites: list[tuple[str, int, int, Ids]],
    entropy: Floats,
) -> Half:
    rows = tokens[kept]
    prompt, names = pd.factorize(rows["prompt_id"])
    domain = rows.drop_duplicates("prompt_id")["domain"].to_numpy(dtype=object)
    found = []
    for name, n_experts, top_k, table in sites:
        ids = table[kept]
        load = np.zeros((len(names), n_experts))
        at, slot = np.nonzero(ids >= 0)
        np.add.at(load, (prompt[at], ids[at, slot]), 1)
        found.append(RouterChoices(name, n_experts, top_k, ids, load))
    sizes = np.bincount(prompt, minlength=len(names)).astype(np.float64)
    token = rows["token"].to_numpy(dtype=np.int64)
    return Half(token, words, prompt.astype(np.int64), sizes, domain, entropy[kept], found)
