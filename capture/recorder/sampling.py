"""Which tokens are sampled: equal shares for every domain, chosen by a seed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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


def plan_attention(
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
