"""What a capture will keep and cost on disk, before it starts; needs no model in memory.

Which tokens are sampled: equal shares for every domain, chosen by a seed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from capture.errors import ConfigError
from capture.store.records import Level, SiteInfo
from capture.store.sums import MAX_CELLS
from capture.store.writer import CHECKPOINT_MB

# measured on finished runs of the demo model, with the database's own compression
FILE_BYTES = 350_000  # an empty run file: tables, views, free blocks
TOKEN_BYTES = 15  # ids, position, loss and text of one token
ROW_BYTES = 2  # token_id, layer and site of one routing row, compressed
STATISTICS_BYTES = 8  # four half-precision statistics
ROLLUP_BYTES = 24  # three sums an expert, for every site, domain and phase
FLOAT_BYTES = 4
# one head of one layer and prompt: its row and four statistics
HEAD_BYTES = 30
MAP_CELL_BYTES = 2.4  # 19 bits, of the lower triangle
KEY_BYTES = 3.3  # a distance and a weight
KEY_ROW_BYTES = 5  # token_id and layer of one row of keys
QUERY_BLOCK, TOP_QUERIES = (
    64,
    512,
)  # as kernels.ops.attention and capture.recorder.attention.summary have them
HEADROOM = 1.3  # a database file grows in blocks
# up to here what is written stands in the log as well, uncompressed and so about twice as large,
# until it is moved into the file
LOG_BYTES = CHECKPOINT_MB * 1e6


class AttentionSize(NamedTuple):
    """What the size of recorded attention depends on.

    Attributes
    ----------
    lengths : sequence of int, tokens
        One for every prompt whose attention is kept.
    layers : int
    heads : int
        Of all these layers together.
    bins, every, top_keys : int
        As in :class:`capture.CaptureConfig`.
    """

    lengths: Sequence[int]
    layers: int
    heads: int
    bins: int
    every: int
    top_keys: int

    @property
    def total_bytes(self) -> float:
        """Bytes of all prompts."""
        return sum(map(self.prompt_bytes, self.lengths))

    def prompt_bytes(self, length: int) -> float:
        """Return the bytes of one prompt."""
        width = 1
        while -(-length // width) > self.bins:
            width *= 2
        bins = -(-length // width)
        cells = bins * (bins + 1) // 2
        blocks, rest = divmod(length, QUERY_BLOCK * self.every)
        queries = min(TOP_QUERIES, blocks * QUERY_BLOCK + min(rest, QUERY_BLOCK))
        keys = queries * self.top_keys * KEY_BYTES
        head = HEAD_BYTES + cells * MAP_CELL_BYTES + bins * FLOAT_BYTES + keys
        rows = KEY_ROW_BYTES * queries if self.top_keys else 0
        return self.heads * head + self.layers * rows


class Estimate(NamedTuple):
    """The expected size of a run.

    Attributes
    ----------
    tokens : int
        Prompt tokens and, as an upper bound, generated tokens.
    bytes_per_token : dict of str to float, bytes
        For every level, without the sample; for level attention without its attention.
    level : str
    sample_tokens : int
        Tokens that will be sampled.
    sample_bytes : int, bytes
    total_bytes : int, bytes
    attended_prompts : int
        Prompts whose attention is kept.
    attention_bytes : int, bytes
        Of all of them.
    """

    tokens: int
    bytes_per_token: dict[str, float]
    level: Level
    sample_tokens: int
    sample_bytes: int
    total_bytes: int
    attended_prompts: int = 0
    attention_bytes: int = 0

    def lines(self) -> list[str]:
        """Return the estimate as sentences for people."""
        per_token = ", ".join(
            f"{level} {value:,.0f} B" for level, value in self.bytes_per_token.items()
        )
        here = self.bytes_per_token[self.level]
        attention = ""
        if self.attended_prompts:
            each = human_bytes(self.attention_bytes / self.attended_prompts)
            attention = (
                f", plus the attention of {self.attended_prompts:,} prompts at {each} "
                f"({human_bytes(self.attention_bytes)})"
            )
        return [
            f"Bytes per token by level: {per_token}.",
            f"Level {self.level}: {self.tokens:,} tokens x {here:,.0f} B, plus a sample of "
            f"{self.sample_tokens:,} tokens ({human_bytes(self.sample_bytes)}){attention}: "
            f"about {human_bytes(self.total_bytes)}.",
        ]


def estimate(
    *,
    n_tokens: int,
    sites: Sequence[SiteInfo],
    hidden_size: int,
    level: Level = "ids",
    sample_tokens: int = 0,
    n_domains: int = 1,
    attention: AttentionSize | None = None,
) -> Estimate:
    """Estimate the size of a run.

    Parameters
    ----------
    n_tokens : int
        Prompt tokens and tokens to generate.
    sites : sequence of SiteInfo
    hidden_size : int
        Width of the router inputs.
    level : {"stats", "ids", "scores", "attention"}
    sample_tokens : int
        Tokens asked for; no more than there are get sampled.
    n_domains : int
    attention : AttentionSize, optional
        What is kept at level attention.

    Raises
    ------
    ConfigError
        If there are more pairs of experts than are counted.
    """
    cells, most = sum(s.n_experts**2 for s in sites), max((s.n_experts for s in sites), default=0)
    if cells > MAX_CELLS:
        raise ConfigError(
            f"Pairs of experts are counted for up to {MAX_CELLS:,} pairs, but {len(sites)} routers "
            f"of up to {most:,} experts have {cells:,}. Such a model cannot be recorded."
        )
    slots = max((site.top_k for site in sites), default=0)
    wide = most > 255
    packed = 8 * -(-slots * (2 if wide else 1) // 8) + 8 * -(-slots * 2 // 8)
    ids = TOKEN_BYTES + len(sites) * (ROW_BYTES + STATISTICS_BYTES + packed)
    scores = sum(ROW_BYTES + FLOAT_BYTES * site.n_experts for site in sites)
    per_token = {"stats": float(TOKEN_BYTES), "ids": float(ids), "scores": float(ids + scores)}
    per_token["attention"] = per_token["scores"]
    sampled = min(sample_tokens, n_tokens)
    sample = len(sites) * (ROW_BYTES + FLOAT_BYTES * hidden_size)
    if level in ("stats", "ids"):
        sample += scores
    rollup = ROLLUP_BYTES * n_domains * sum(site.n_experts for site in sites)
    maps = attention.total_bytes if attention is not None and level == "attention" else 0.0
    prompts = len(attention.lengths) if attention is not None and maps else 0
    total = FILE_BYTES + rollup + n_tokens * per_token[level] + sampled * sample + maps
    return Estimate(
        n_tokens, per_token, level, sampled, sampled * sample, int(total), prompts, int(maps)
    )


def check_space(cost: Estimate, out: Path) -> None:
    """Refuse a capture that does not fit on the disk of ``out``.

    Raises
    ------
    ConfigError
        With the space needed and the space there is.
    """
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = int(cost.total_bytes * HEADROOM + min(2 * cost.total_bytes, LOG_BYTES))
    if needed > free:
        raise ConfigError(
            f"The capture needs about {human_bytes(needed)}, but {folder} has "
            f"{human_bytes(free)} free. Choose another place, fewer prompts, a smaller "
            "sample_tokens, attention_prompts or a lower level ('stats' < 'ids' < 'scores')."
        )


def human_bytes(count: float) -> str:
    """Write a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


WHY = (
    "Scores and router inputs of every token would outgrow the rest of the run, so they are kept "
    "for a sample of the prompt tokens only: every domain gets the same number, a domain with "
    "fewer tokens gives all of them and leaves its share to the others, and within a domain "
    "tokens are drawn uniformly without replacement. Generated tokens are never sampled."
)

WHY_PROMPTS = (
    "Attention grows with prompts, layers and heads, so it is kept for some prompts: every domain "
    "gets the same number, a domain with fewer prompts gives all of them and leaves its share to "
    "the others, and every domain gets one at least. Generated tokens have none."
)


class Sample(NamedTuple):
    """The sampled tokens of a run.

    Attributes
    ----------
    is_sampled : array [T], bool
        Indexed by token_id, over all prompt tokens.
    record : dict
        What the run file says about it: requested, planned, seed, strata, why.
    """

    is_sampled: npt.NDArray[np.bool_]
    record: dict[str, Any]


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """Share ``total`` equally among strata of the given sizes, none above its size.

    What a small stratum cannot use goes to the others; a remainder goes to the largest strata.
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for rank, stratum in enumerate(by_size):
        # what a small stratum leaves makes the equal part of those still to come larger
        shares[stratum] = min(sizes[stratum], left // (len(sizes) - rank))
        left -= shares[stratum]
    return shares


def plan_sample(
    domains: Sequence[str | None], lengths: Sequence[int], requested: int, seed: int
) -> Sample:
    """Choose the sampled tokens of a run before it starts.

    Parameters
    ----------
    domains : sequence of str or None, one a prompt
        Prompts without a domain form one stratum together.
    lengths : sequence of int, one a prompt, tokens
    requested : int, tokens
    seed : int
    """
    token_domains = np.repeat(np.arange(len(domains)), lengths)  # prompt of each token
    names = list(dict.fromkeys(domains))
    stratum_of_prompt = np.array([names.index(d) for d in domains], dtype=np.int64)
    stratum_of_token = stratum_of_prompt[token_domains]
    is_sampled = np.zeros(len(token_domains), dtype=np.bool_)
    sizes = np.bincount(stratum_of_token, minlength=len(names)).tolist()
    shares = quotas(sizes, requested)
    rng = np.random.default_rng(seed)
    for stratum, share in enumerate(shares):
        members = np.flatnonzero(stratum_of_token == stratum)
        is_sampled[rng.choice(members, size=share, replace=False)] = True
    record = {
        "requested": requested,
        "planned": int(is_sampled.sum()),
        "seed": seed,
        "strata": [
            {"domain": name, "tokens": size, "sampled": share}
            for name, size, share in zip(names, sizes, shares, strict=True)
        ],
        "why": WHY if requested else "No sample was asked for (sample_tokens=0).",
    }
    return Sample(is_sampled, record)


class Attended(NamedTuple):
    """The prompts whose attention is recorded.

    Attributes
    ----------
    is_attended : array [P], bool
    record : dict
        What the run file says about it: requested, planned, seed, strata, why.
    """

    is_attended: npt.NDArray[np.bool_]
    record: dict[str, Any]


def choose_attended(
    domains: Sequence[str | None], lengths: Sequence[int], requested: int, seed: int
) -> Attended:
    """Choose the prompts whose attention is recorded: equal shares, but one of every domain.

    Parameters
    ----------
    domains : sequence of str or None, one a prompt
        Prompts without a domain form one stratum together.
    lengths : sequence of int, one a prompt, tokens
        A prompt of one token, whose attention says nothing, is taken only where a domain has no
        other.
    requested : int, prompts
        Raised to the number of domains where it is smaller.
    seed : int
    """
    names = list(dict.fromkeys(domains))
    stratum = np.array([names.index(domain) for domain in domains], dtype=np.int64)
    usable = []
    for number in range(len(names)):
        members = np.flatnonzero(stratum == number)
        longer = members[np.asarray(lengths)[members] > 1]
        usable.append(longer if len(longer) else members[:1])
    shares = quotas([len(members) for members in usable], max(requested, len(names)))
    rng = np.random.default_rng(seed)
    is_attended = np.zeros(len(domains), dtype=np.bool_)
    for members, share in zip(usable, shares, strict=True):
        is_attended[rng.choice(members, size=share, replace=False)] = True
    record = {
        "requested": requested,
        "planned": int(is_attended.sum()),
        "seed": seed,
        "strata": [
            {"domain": name, "prompts": size, "attended": share}
            for name, size, share in zip(names, np.bincount(stratum).tolist(), shares, strict=True)
        ],
        "why": WHY_PROMPTS,
    }
    return Attended(is_attended, record)
