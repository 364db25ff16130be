"""Which tokens run a layer: a selector over the tokens of a sequence, or each token by itself."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from explorer.routers.base import RouterInfo, RouterInputs
from explorer.routers.selectors import SELECTOR_DECIDES, Selector
from explorer.routers.sequences import row_starts


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
