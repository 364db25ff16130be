"""The prompts of a run in two halves: those that suggest a finding and those that test it.

Of a run that is too large to be read whole, the beginnings of many prompts are read rather than a
few prompts: the prompt is the unit of every test, and the beginning of a prompt is a prompt. Which
ones and how far depends on their number, lengths and domains alone.
"""

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
from explorer.queries.load import expert_load
from explorer.run import Run, open_run
from explorer.text import visible

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

MIN_PROMPTS = 8  # in each half; of fewer, a spread over prompts cannot be told
MAX_ASSIGNMENTS = 2_000_000  # that are read
# prompts of which they are to be, each at least so far
WANTED_PROMPTS, LEAST_TOKENS = 256, 16
MAX_KEYS = 1_000_000  # attended tokens that are read
KEY_RANKS = 2  # of each token and head, the heaviest ones
MAX_CHECKPOINTS, LEAST_CHECKPOINTS = 24, 4
_ANY = 2**31 - 1  # position that no token has
_STEP = re.compile(r"step[-_]?(\d+)")


class RouterChoices(NamedTuple):
    """What one router chose for T tokens of P prompts."""

    name: str
    n_experts: int
    top_k: int
    ids: Ids  # [T, K], -1 = empty slot
    load: Floats  # [P, E], assignments of each prompt
    routed: Ids  # those that compute: the others are never dead and have no fair share
    used: Ids = np.array([], dtype=np.int64)  # by any token of the run: not all may be read


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
    first: int | None = None  # tokens of each prompt that were read; None = all


class _Part(NamedTuple):
    """Which tokens are read: all, or the first ones of some prompts.

    ``prompts`` are numbers and domains, domain after domain; ``is_odd`` whether they test.
    """

    prompts: pd.DataFrame
    is_odd: npt.NDArray[np.bool_]
    first: int | None = None

    @property
    def where(self) -> str:
        """Condition on the rows of ``tokens``, of ``params``."""
        some = "prompt_id IN (SELECT unnest($prompts::UINTEGER[])) AND position < $first"
        return some if self.first else "true"

    @property
    def params(self) -> dict[str, object]:
        """What the conditions are about."""
        some = {"prompts": self.prompts["prompt_id"].tolist(), "first": self.first}
        return some if self.first else {}

    @property
    def of_tokens(self) -> str:
        """What follows a table with a column ``token_id``, so that only their rows are left."""
        some = f" SEMI JOIN (SELECT token_id FROM tokens WHERE {self.where}) USING (token_id)"
        return some if self.first else ""

    def every(self, step: int, among: pd.Series) -> list[int]:
        """Return every so many-th prompt of those that are among others, of both halves."""
        ids, known = self.prompts["prompt_id"], self.prompts["prompt_id"].isin(among)
        halves = [ids[known & (self.is_odd == odd)].iloc[::step] for odd in (False, True)]
        return [int(prompt) for half in halves for prompt in half]


def _part(run: Run, most_tokens: int) -> _Part:
    """Choose prompts evenly within each domain, and deal them out in turn."""
    prompts = run.query(
        "SELECT prompt_id, any_value(coalesce(domain, '')) AS domain, count(*) AS tokens"
        " FROM tokens JOIN prompts USING (prompt_id) GROUP BY prompt_id ORDER BY domain, prompt_id"
    )
    first = None
    if prompts["tokens"].sum() > most_tokens:
        first = max(LEAST_TOKENS, most_tokens // min(WANTED_PROMPTS, len(prompts)))
        step = -(-int(prompts["tokens"].clip(upper=first).sum()) // most_tokens)
        prompts = prompts.iloc[::step]
        first = max(first, most_tokens // len(prompts))
    return _Part(prompts, np.arange(len(prompts)) % 2 == 1, first)


def read_halves(run: Run) -> tuple[Half, Half]:
    """Read prompts, or the beginnings of many, and deal them out in turn within each domain.

    Raises
    ------
    RunError
        If the run does not hold expert ids.
    """
    run.refuse_without_ids("Testing findings")
    part = _part(run, MAX_ASSIGNMENTS // sum(site.top_k for site in run.sites))
    tokens = run.query(
        "SELECT token_id, prompt_id, position, phase, coalesce(token, -1) AS token,"
        " tokens.text AS text, coalesce(domain, '') AS domain"
        " FROM tokens JOIN prompts USING (prompt_id)"
        f" WHERE {part.where} ORDER BY prompt_id, position",
        part.params,
    )
    odd = pd.Series(part.is_odd, index=part.prompts["prompt_id"])
    is_odd = tokens["prompt_id"].map(odd).to_numpy(dtype=bool)
    row_of = np.full(int(tokens["token_id"].max()) + 1 if len(tokens) else 0, -1, dtype=np.int64)
    row_of[tokens["token_id"].to_numpy()] = np.arange(len(tokens))
    sites = _sites(run, part, row_of, len(tokens))
    entropy = _entropy(run, part, row_of, len(tokens))
    attended = _attended(run, part, tokens, sites)
    series, saturation = _checkpoints(run, part, tokens, sites)
    named = tokens.drop_duplicates("token")
    words = {
        int(token): visible(str(text), spaces=True) if isinstance(text, str) else f"id {token}"
        for token, text in zip(named["token"], named["text"], strict=True)
    }
    found = []
    for kept in (~is_odd, is_odd):
        prompts_of = tokens["prompt_id"][kept].drop_duplicates().to_numpy()
        half = _half(tokens, kept, words, sites, entropy)._replace(
            first=part.first,
            attended={
                name: np.stack([sums[prompt] for prompt in prompts_of if prompt in sums])
                for name, sums in attended.items()
                if any(prompt in sums for prompt in prompts_of)
            },
        )
        if series:
            rows = saturation.reindex(prompts_of).to_numpy(dtype=np.float64)
            half = half._replace(checkpoints=series, saturation=rows)
        found.append(half)
    return found[0], found[1]


def _sites(run: Run, part: _Part, row_of: Ids, n_tokens: int) -> list[RouterChoices]:
    """Return what every router chose for the tokens that are read, without loads."""
    several = any(site.site for site in run.sites)
    load = expert_load(run, weights=False)
    load = load[load["assignments"] > 0]
    return [
        RouterChoices(
            name=f"{site.layer}.{site.site}" if several else str(site.layer),
            n_experts=site.n_experts,
            top_k=site.top_k,
            ids=ids,
            load=np.zeros((0, site.n_experts)),
            routed=site.routed_ids(),
            used=load[(load["layer"] == site.layer) & (load["site"] == site.site)][
                "expert_id"
            ].to_numpy(dtype=np.int64),
        )
        for site, ids in zip(run.sites, _chosen(run, part, row_of, n_tokens), strict=True)
    ]


def _chosen(run: Run, part: _Part, row_of: Ids, n_tokens: int) -> list[Ids]:
    """Return the experts of every site in the rows that tokens have, [T, K] each."""
    rows = run.table(
        f"SELECT layer, site, token_id, slot, expert_id FROM assignments{part.of_tokens}",
        part.params,
    )
    layer, site, token, slot, expert = (column.to_numpy() for column in rows.columns)
    known = token < len(row_of)
    at = np.where(known, row_of[np.where(known, token, 0)], -1)
    known = at >= 0
    width = max(site.top_k for site in run.sites)
    table = np.full((len(run.sites), n_tokens, width), -1, dtype=np.int64)
    table[_column(run, layer, site)[known], at[known], slot[known]] = expert[known]
    return [ids[:, : site.top_k] for site, ids in zip(run.sites, table, strict=True)]


def _column(run: Run, layer: Ids, site: Ids) -> Ids:
    """Return the place of (layer, site) among the run's sites."""
    layers, sites = ([getattr(one, name) for one in run.sites] for name in ("layer", "site"))
    places = np.full((max(layers) + 1, max(sites) + 1), -1, dtype=np.int64)
    places[layers, sites] = np.arange(len(run.sites))
    return np.asarray(places[layer, site])


def _entropy(run: Run, part: _Part, row_of: Ids, n_tokens: int) -> Floats:
    """Return each token's gate entropy over its largest value at each site, [T, L]."""
    rows = run.query(
        "SELECT token_id, layer, site, entropy / ln(n_experts) AS entropy FROM gates JOIN sites"
        f" USING (layer, site){part.of_tokens} WHERE n_experts > 1 AND entropy IS NOT NULL",
        part.params,
    )
    found = np.full((n_tokens, len(run.sites)), np.nan)
    at = _column(run, rows["layer"].to_numpy(), rows["site"].to_numpy())
    found[row_of[rows["token_id"].to_numpy()], at] = rows["entropy"].to_numpy(dtype=np.float64)
    return found


def _attended(
    run: Run, part: _Part, tokens: pd.DataFrame, sites: list[RouterChoices]
) -> dict[str, dict[int, Floats]]:
    """Return what heads have to do with the choices of their own layer, by site and prompt."""
    recorded = run.query("SELECT prompt_id FROM attention_prompts ORDER BY prompt_id")["prompt_id"]
    mine = tokens[(tokens["phase"] == "prompt") & tokens["prompt_id"].isin(recorded)]
    if mine.empty:
        return {}
    heads = run.query("SELECT layer, coalesce(heads, 0) AS heads FROM attention_layers")
    heads = heads.set_index("layer")["heads"]
    rows = len(mine) * KEY_RANKS * int(heads.sum())
    chosen = part.every(-(-rows // MAX_KEYS), recorded)
    mine = mine[mine["prompt_id"].isin(chosen)].assign(row=lambda t: t.index)
    found: dict[str, dict[int, Floats]] = {}
    for site, choices in zip(run.sites, sites, strict=True):
        if site.layer not in heads.index or not heads[site.layer]:
            continue
        keys = run.query(
            "SELECT q.prompt_id, head, q.position AS query, k.position AS key, weight"
            " FROM attention_top_keys AS top JOIN tokens AS q ON q.token_id = top.token_id"
            " JOIN tokens AS k ON k.token_id = key_token_id WHERE layer = $layer"
            " AND rank < $ranks AND q.phase = 'prompt' AND k.phase = 'prompt'"
            " AND q.prompt_id IN (SELECT unnest($chosen::UINTEGER[]))"
            " AND q.position < $first",
            {
                "layer": site.layer,
                "ranks": KEY_RANKS,
                "chosen": chosen,
                "first": part.first or _ANY,
            },
        )
        by_prompt = dict(iter(keys.groupby("prompt_id")))
        for prompt, of in mine.groupby("prompt_id"):
            if prompt in by_prompt:
                pairs = by_prompt[prompt]
                columns = [
                    pairs[column].to_numpy() for column in ("query", "key", "weight", "head")
                ]
                n_heads = int(heads[site.layer])
                sums = pair_totals(choices.ids[of["row"].to_numpy()], *columns, n_heads=n_heads)
                found.setdefault(choices.name, {})[int(prompt)] = np.stack(
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


def _checkpoints(
    run: Run, part: _Part, tokens: pd.DataFrame, sites: list[RouterChoices]
) -> tuple[list[str], "pd.DataFrame"]:
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
                chosen[path.stem] = [site.ids for site in sites]
                continue
            try:
                other = stack.enter_context(open_run(path))
                chosen[path.stem] = _same_tokens(run, other, part, mine, len(tokens))
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


def _same_tokens(run: Run, other: Run, part: _Part, mine: pd.DataFrame, n_tokens: int) -> list[Ids]:
    """Return what another run's sites chose for the tokens of this one, [T, K] each."""
    shape = [(s.layer, s.site, s.n_experts, s.top_k) for s in run.sites]
    if [(s.layer, s.site, s.n_experts, s.top_k) for s in other.sites] != shape:
        raise RunError("Expected a run of the same layers and experts.")
    other.refuse_without_ids("Following a training")
    theirs = other.query(
        "SELECT token_id, prompt_id, position, phase, coalesce(token, -1) AS token FROM tokens"
        f" WHERE phase = 'prompt' AND {part.where}",
        part.params,
    )
    both = mine.merge(theirs, on=["prompt_id", "position", "token"])
    if len(both) < len(mine):
        raise RunError("Expected a run of the same prompts.")
    row_of = np.full(int(theirs["token_id"].max()) + 1, -1, dtype=np.int64)
    row_of[both["token_id"].to_numpy()] = both["row"].to_numpy()
    return _chosen(other, part, row_of, n_tokens)


def _half(
    tokens: pd.DataFrame,
    kept: npt.NDArray[np.bool_],
    words: dict[int, str],
    sites: list[RouterChoices],
    entropy: Floats,
) -> Half:
    rows = tokens[kept]
    prompt, names = pd.factorize(rows["prompt_id"])
    domain = rows.drop_duplicates("prompt_id")["domain"].to_numpy(dtype=object)
    found = []
    for site in sites:
        ids = site.ids[kept]
        at, slot = np.nonzero(ids >= 0)
        cells = prompt[at] * site.n_experts + ids[at, slot]
        load = np.bincount(cells, minlength=len(names) * site.n_experts).astype(np.float64)
        found.append(site._replace(ids=ids, load=load.reshape(len(names), site.n_experts)))
    sizes = np.bincount(prompt, minlength=len(names)).astype(np.float64)
    token = rows["token"].to_numpy(dtype=np.int64)
    return Half(token, words, prompt.astype(np.int64), sizes, domain, entropy[kept], found)
