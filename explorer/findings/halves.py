"""The prompts of a run in two halves: those that suggest a finding and those that test it."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from capture.errors import CaptureError
from capture.paths import RUN_SUFFIX
from explorer.errors import ExplorerError, RunError
from explorer.metrics.agreement import overlap_at_k
from explorer.metrics.attention import pair_totals
from explorer.queries.where import conditions
from explorer.run import Run, open_run
from explorer.text import visible

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

MIN_PROMPTS = 8  # in each half; of fewer, a spread over prompts cannot be told
MAX_ASSIGNMENTS = 2_000_000  # that are read; whole prompts, evenly over the run
MAX_KEYS = 1_000_000  # attended tokens that are read; whole prompts, evenly over the run
KEY_RANKS = 2  # of each token and head, the heaviest ones
MAX_CHECKPOINTS, LEAST_CHECKPOINTS = 24, 4
_STEP = re.compile(r"step[-_]?(\d+)")


class RouterChoices(NamedTuple):
    """What one router chose for T tokens of P prompts."""

    name: str
    n_experts: int
    top_k: int
    ids: Ids  # [T, K], -1 = empty slot
    load: Floats  # [P, E], assignments of each prompt
    routed: Ids  # those that compute: the others are never dead and have no fair share


class Half(NamedTuple):
    """P prompts of T tokens in the order of the prompts: those that suggest, or those that test."""

    token: Ids  # [T], vocabulary entry; -1 = left out
    words: dict[int, str]  # what entries look like
    prompt: Ids  # [T], from 0
    tokens: Floats  # [P]
    domain: npt.NDArray[np.object_]  # [P]
    entropy: Floats  # [T, L], share of the largest at each site; nan = not recorded
    sites: list[RouterChoices]
    # name of a site -> [P, G, 2]: pairs of a token and one that head g attends to in its layer
    # with an expert in common, and as many as other pairs at the same distance have
    attended: Mapping[str, Floats] = MappingProxyType({})
    checkpoints: Sequence[str] = ()  # runs of a training, in its order; the last one is last
    saturation: Floats | None = None  # [P, C], share of the last one's experts; nan = other prompt


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
        "SELECT token_id, prompt_id, position, phase, coalesce(token, -1) AS token,"
        " tokens.text AS text, coalesce(domain, '') AS domain"
        " FROM tokens JOIN prompts USING (prompt_id)"
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
    ids, routed = [], []
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
        routed.append(site.routed_ids())
    entropy = _entropy(run, step, row_of, len(tokens))
    attended = _attended(run, tokens, ids)
    series, saturation = _checkpoints(run, tokens, ids)
    named = tokens.drop_duplicates("token")
    words = {
        int(token): visible(str(text), spaces=True) if isinstance(text, str) else f"id {token}"
        for token, text in zip(named["token"], named["text"], strict=True)
    }
    found = []
    for kept in (~is_odd, is_odd):
        prompts_of = tokens["prompt_id"][kept].drop_duplicates().to_numpy()
        half = _half(tokens, kept, words, ids, routed, entropy)._replace(
            attended={
                name: np.stack([sums[prompt] for prompt in prompts_of if prompt in sums])
                for name, sums in attended.items()
                if any(prompt in sums for prompt in prompts_of)
            }
        )
        if series:
            rows = saturation.reindex(prompts_of).to_numpy(dtype=np.float64)
            half = half._replace(checkpoints=series, saturation=rows)
        found.append(half)
    return found[0], found[1]


def _entropy(run: Run, step: int, row_of: Ids, n_tokens: int) -> Floats:
    """Return each token's gate entropy over its largest value at each site, [T, L]."""
    rows = run.query(
        "SELECT token_id, layer, site, entropy / ln(n_experts) AS entropy FROM gates JOIN sites"
        " USING (layer, site) SEMI JOIN (SELECT token_id FROM tokens WHERE prompt_id % $step = 0)"
        " USING (token_id) WHERE n_experts > 1 AND entropy IS NOT NULL",
        {"step": step},
    )
    column = {(site.layer, site.site): at for at, site in enumerate(run.sites)}
    found = np.full((n_tokens, len(run.sites)), np.nan)
    at = [column[place] for place in zip(rows["layer"], rows["site"], strict=True)]
    found[row_of[rows["token_id"].to_numpy()], at] = rows["entropy"].to_numpy(dtype=np.float64)
    return found


Choices = list[tuple[str, int, int, Ids]]


def _attended(run: Run, tokens: pd.DataFrame, ids: Choices) -> dict[str, dict[int, Floats]]:
    """Return what heads have to do with the choices of their own layer, by site and prompt."""
    recorded = run.query("SELECT prompt_id FROM attention_prompts ORDER BY prompt_id")["prompt_id"]
    mine = tokens[(tokens["phase"] == "prompt") & tokens["prompt_id"].isin(recorded)]
    if mine.empty:
        return {}
    heads = run.query("SELECT layer, coalesce(heads, 0) AS heads FROM attention_layers")
    heads = heads.set_index("layer")["heads"]
    rows = len(mine) * KEY_RANKS * int(heads.sum())
    every = -(-rows // MAX_KEYS)
    chosen = mine["prompt_id"].drop_duplicates().iloc[::every]
    mine = mine[mine["prompt_id"].isin(chosen)].assign(row=lambda t: t.index)
    found: dict[str, dict[int, Floats]] = {}
    for site, (name, _, _, table) in zip(run.sites, ids, strict=True):
        if site.layer not in heads.index or not heads[site.layer]:
            continue
        keys = run.query(
            "SELECT q.prompt_id, head, q.position AS query, k.position AS key, weight"
            " FROM attention_top_keys AS top JOIN tokens AS q ON q.token_id = top.token_id"
            " JOIN tokens AS k ON k.token_id = key_token_id WHERE layer = $layer"
            " AND rank < $ranks AND q.phase = 'prompt' AND k.phase = 'prompt'"
            " AND list_contains($prompts::INTEGER[], q.prompt_id)",
            {"layer": site.layer, "ranks": KEY_RANKS, "prompts": chosen.tolist()},
        )
        by_prompt = dict(iter(keys.groupby("prompt_id")))
        for prompt, of in mine.groupby("prompt_id"):
            if prompt in by_prompt:
                pairs = by_prompt[prompt]
                columns = [
                    pairs[column].to_numpy() for column in ("query", "key", "weight", "head")
                ]
                n_heads = int(heads[site.layer])
                sums = pair_totals(table[of["row"].to_numpy()], *columns, n_heads=n_heads)
                found.setdefault(name, {})[int(prompt)] = np.stack(
                    [sums.shared, sums.at_distance], axis=-1
                )
    return found


def series_of(path: Path) -> list[Path]:
    """Return the runs of a folder that are named as one is, but for the step of a training.

    In the order of the steps; none where the name has no step.
    """
    mine = _STEP.search(path.stem)
    if not mine:
        return []
    found = []
    for one in path.parent.glob(f"*{RUN_SUFFIX}"):
        step = _STEP.search(one.stem)
        # a step may be followed by how far the training was
        if step and one.stem[: step.start()] == mine.string[: mine.start()]:
            found.append((int(step[1]), one.name, one))
    return [one for *_, one in sorted(found)]


def _checkpoints(run: Run, tokens: pd.DataFrame, ids: Choices) -> tuple[list[str], "pd.DataFrame"]:
    """Return runs of a training, and each prompt's saturation at them.

    The share of the last one's experts that a checkpoint chose for the same tokens, mean over
    tokens and sites; prompts that a checkpoint does not have, token by token, are left out.
    """
    nothing = pd.DataFrame(index=tokens["prompt_id"].drop_duplicates())
    paths = series_of(run.path)[:MAX_CHECKPOINTS]
    if len(paths) < LEAST_CHECKPOINTS:
        return [], nothing
    key = ["prompt_id", "position", "token"]
    mine = tokens[tokens["phase"] == "prompt"][key].assign(row=lambda t: t.index)
    chosen: dict[str, list[Ids]] = {}
    with ExitStack() as stack:
        for path in paths:
            if path == run.path:
                chosen[path.stem] = [table for *_, table in ids]
                continue
            try:
                other = stack.enter_context(open_run(path))
                chosen[path.stem] = _same_tokens(run, other, mine, ids)
            except (CaptureError, ExplorerError):
                continue  # another model, other prompts, or no run: not of this training
    names = list(chosen)
    if len(names) < LEAST_CHECKPOINTS:
        return [], nothing
    last = chosen[names[-1]]
    rows = mine["row"].to_numpy()
    table = mine[["prompt_id"]].copy()
    for name in names:
        each = [
            overlap_at_k(end[rows], now[rows]) for end, now in zip(last, chosen[name], strict=True)
        ]
        table[name] = np.mean(each, axis=0)
    return names, table.groupby("prompt_id").mean()


def _same_tokens(run: Run, other: Run, mine: pd.DataFrame, ids: Choices) -> list[Ids]:
    """Return what another run's sites chose for the tokens of this one, [T, K] each."""
    shape = [(s.layer, s.site, s.n_experts, s.top_k) for s in run.sites]
    if [(s.layer, s.site, s.n_experts, s.top_k) for s in other.sites] != shape:
        raise RunError("Expected a run of the same layers and experts.")
    other.refuse_without_ids("Following a training")
    theirs = other.query(
        "SELECT token_id, prompt_id, position, phase, coalesce(token, -1) AS token FROM tokens"
        " WHERE phase = 'prompt'"
    )
    both = mine.merge(theirs, on=["prompt_id", "position", "token"])
    if len(both) < len(mine):
        raise RunError("Expected a run of the same prompts.")
    row_of = np.full(int(theirs["token_id"].max()) + 1, -1, dtype=np.int64)
    row_of[both["token_id"].to_numpy()] = both["row"].to_numpy()
    found = []
    for site, (*_, table) in zip(other.sites, ids, strict=True):
        where, params = conditions(layer=site.layer, site=site.site)
        rows = other.table(
            f"SELECT token_id, slot, expert_id FROM assignments WHERE {where}", params
        )
        token = rows["token_id"].to_numpy()
        known = token < len(row_of)
        at = np.where(known, row_of[np.where(known, token, 0)], -1)
        chosen = np.full_like(table, -1)
        kept = at >= 0
        chosen[at[kept], rows["slot"].to_numpy()[kept]] = rows["expert_id"].to_numpy()[kept]
        found.append(chosen)
    return found


def _half(
    tokens: pd.DataFrame,
    kept: npt.NDArray[np.bool_],
    words: dict[int, str],
    sites: Choices,
    routed: list[Ids],
    entropy: Floats,
) -> Half:
    rows = tokens[kept]
    prompt, names = pd.factorize(rows["prompt_id"])
    domain = rows.drop_duplicates("prompt_id")["domain"].to_numpy(dtype=object)
    found = []
    for (name, n_experts, top_k, table), computing in zip(sites, routed, strict=True):
        ids = table[kept]
        load = np.zeros((len(names), n_experts))
        at, slot = np.nonzero(ids >= 0)
        np.add.at(load, (prompt[at], ids[at, slot]), 1)
        found.append(RouterChoices(name, n_experts, top_k, ids, load, computing))
    sizes = np.bincount(prompt, minlength=len(names)).astype(np.float64)
    token = rows["token"].to_numpy(dtype=np.int64)
    return Half(token, words, prompt.astype(np.int64), sizes, domain, entropy[kept], found)
