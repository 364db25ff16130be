"""Find out, on the model itself, whether a rule's choices depend on what they must not know."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from capture.rules import Choice, RouteInputs, Rule
from capture.selftest import probe_tokens
from capture.sites import Site
from capture.swap import site_key, swap
from capture.switches import plain_forward

# products over another number of rows round differently; a combine weight moves by less
ROUNDING = 1e-3
# every site costs four forward passes over short text
MAX_SITES = 4
MIDDLE = 1  # a sequence that has others before and after it


class Dependence(NamedTuple):
    """What a rule's choices were seen to depend on.

    Attributes
    ----------
    later_tokens : bool
        Other tokens later in the sequence changed the choice for an earlier one: not causal.
    other_sequences : bool
        Another sequence in the batch, or the lack of it, changed a choice.
    repeatable : bool
        The same tokens gave the same choices twice.
    """

    later_tokens: bool
    other_sequences: bool
    repeatable: bool


def dependence(model: nn.Module, sites: Sequence[Site], rule: Rule) -> Dependence:
    """Change later tokens and other sequences, and see whether choices change.

    One site is swapped at a time, so that its input differs by rounding only. A rule that gives
    the same answer by chance on these tokens passes: what is found is certain, what is not found
    is only likely.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    sites : sequence of Site
        All sites of the model; at most four, spread over depth, are tried.
    rule : Rule
    """
    ids = probe_tokens(model)
    half = ids.shape[1] // 2
    # one sequence between others is looked at; what these do to it is the second question
    one, others = ids[MIDDLE : MIDDLE + 1], torch.arange(len(ids)) != MIDDLE
    other_end = ids.clone()
    other_end[MIDDLE, half:] = ids[-1, half:].flip(-1)
    changed = ids.clone()
    changed[others] = ids[others].flip(-1)
    step = max(1, -(-len(sites) // MAX_SITES))
    later = other = unsteady = False
    for site in sites[::step]:
        first, again = (_choices(model, sites, site, rule, ids) for _ in range(2))
        unsteady |= _differ(first, again)
        early = _choices(model, sites, site, rule, other_end)
        later |= _differ(first[MIDDLE, :half], early[MIDDLE, :half])
        alone = _choices(model, sites, site, rule, one)
        mixed = _choices(model, sites, site, rule, changed)
        other |= _differ(first[MIDDLE], alone[0]) or _differ(first[MIDDLE], mixed[MIDDLE])
    return Dependence(later, other, not unsteady)


def _choices(
    model: nn.Module, sites: Sequence[Site], site: Site, rule: Rule, ids: torch.Tensor
) -> torch.Tensor:
    """Return the weight [B, S, E] of every expert for every token at one site."""
    seen: list[torch.Tensor] = []

    def keep(inputs: RouteInputs, choice: Choice) -> None:
        dense = choice.weights.new_zeros(len(choice.weights), inputs.n_experts + 1)
        # the column before the first expert takes the empty slots
        seen.append(dense.scatter(1, choice.expert_ids + 1, choice.weights)[:, 1:])

    watch = {site_key(s): rule for s in sites if site_key(s) < site_key(site)}
    with (
        torch.inference_mode(),
        plain_forward(model),
        swap(model, sites, rule, only=[site_key(site)], watch=watch, on_choice=keep),
    ):
        model(input_ids=ids, use_cache=False)
    return seen[0].float().reshape(*ids.shape, -1)


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(((first - second).abs() > ROUNDING).any())
