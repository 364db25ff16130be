"""What a token may know of its sequence: running sums, random numbers, the best tokens of it."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from capture.swap.rules import RouterInputs
from explorer.router_cards import RouterInfo
from explorer.routers.selectors import SELECTOR_DECIDES, Selector

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # SplitMix64's multipliers


def row_starts(inputs: RouterInputs) -> torch.Tensor:
    """Return for each token the row of its sequence's first token, [T] int64.

    A row also starts a sequence where its position does not follow the one above: decoding puts
    one token of each sequence into a batch, and a sample of a run may have gaps.
    """
    begins = inputs.tensor("starts").bool().clone()
    if inputs.positions is not None and len(begins) > 1:
        begins[1:] |= inputs.positions[1:] != inputs.positions[:-1] + 1
    begins[:1] = True
    rows = torch.arange(len(begins), device=begins.device)
    return torch.where(begins, rows, 0).cummax(dim=0).values if len(begins) else rows


def prefix_sum(values: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the sum of each token's values and those before it in its sequence, as [T, ...]."""
    if not len(values):
        return values.clone()
    total = values.cumsum(dim=0)
    starts = row_starts(inputs)
    return total - total[starts] + values[starts]


def prefix_mean(values: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Return the mean of each token's values and those before it in its sequence, [T, D]."""
    rows = torch.arange(len(values), device=values.device)
    count = (rows - row_starts(inputs) + 1).unsqueeze(-1)
    return (prefix_sum(values.double(), inputs) / count).float()


def token_keys(inputs: RouterInputs, seed: int, stream: int = 0) -> torch.Tensor:
    """Return a number for each token that its sequence so far determines, [T] int64.

    The same text gives the same number in any batch, on any machine; no later token and no other
    sequence has a part in it. Layers and streams are independent.

    Parameters
    ----------
    inputs : RouterInputs
        With ``token_ids`` and ``starts``.
    seed, stream : int
        Which of many independent numbers.
    """
    starts = row_starts(inputs)
    index = torch.arange(len(starts), device=starts.device) - starts
    salt = ((seed * 1009 + inputs.layer) * 101 + inputs.site) * 11 + stream
    offset = mix(torch.tensor(salt, device=starts.device) * _GOLDEN)
    own = mix(inputs.tensor("token_ids").long() * _GOLDEN + mix(index + offset))
    return mix(prefix_sum(own, inputs))


def uniform(keys: torch.Tensor, n: int) -> torch.Tensor:
    """Return ``n`` random numbers of each key, [T, n] float64 in [0, 1)."""
    columns = torch.arange(1, n + 1, device=keys.device) * _GOLDEN
    bits = mix(keys.unsqueeze(-1) + columns)
    return _shift(bits, 11).double() * 2.0**-53


def normal(keys: torch.Tensor, n: int) -> torch.Tensor:
    """Return ``n`` standard normal numbers of each key, [T, n] float32."""
    numbers: torch.Tensor = torch.special.ndtri(uniform(keys, n).clamp_min(2.0**-54))
    return numbers.float()


def mix(bits: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's scramble of 64-bit numbers.

    References
    ----------
    Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA.
    """
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right with zeros: torch's own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def with_selector(info: RouterInfo, selector: Selector | None) -> RouterInfo:
    """Return the card of a rule about layers that chooses its tokens by a selector.

    A selector that compares the tokens of a sequence looks at later ones and has to know where
    sequences start; one that looks at each token's own score leaves the rule as causal as it was.
    """
    if selector is None:
        return info
    scores = info.formula.split(";  ")[0]
    if selector.alone:
        return replace(
            info,
            formula=f"{scores};  {selector}, each token by itself",
            identity=SELECTOR_DECIDES,
        )
    return replace(
        info,
        formula=f"{scores};  {selector} among the tokens of a sequence",
        needs=info.needs | {"starts"},
        causal=False,
        identity=SELECTOR_DECIDES,
    )


def sequence_rows(inputs: RouterInputs) -> Iterator[torch.Tensor]:
    """Yield the rows of each sequence's tokens, [S] int64."""
    starts = row_starts(inputs)
    lengths = torch.unique_consecutive(starts, return_counts=True)[1].tolist()
    yield from torch.split(torch.arange(len(starts), device=starts.device), lengths)


def choose_tokens(scores: torch.Tensor, selector: Selector, inputs: RouterInputs) -> torch.Tensor:
    """Return which tokens a selector keeps, [T, 1] float32, 1 or 0.

    Parameters
    ----------
    scores : Tensor [T], not negative
    selector : Selector
        A threshold is held against each token's score. Top-k keeps the ``k`` best tokens of each
        sequence, or all of a shorter one; top-p the fewest that hold the share ``p`` of the
        sequence's total score.
    inputs : RouterInputs
        With ``starts``, unless the selector looks at each score by itself.
    """
    if selector.alone:
        return selector.mask(scores.unsqueeze(-1)).float()
    gate = torch.zeros(len(scores), 1, device=scores.device)
    for rows in sequence_rows(inputs):
        kept = selector.within(len(rows)).mask(scores[rows].unsqueeze(0))
        gate[rows, 0] = kept[0].float()
    return gate
