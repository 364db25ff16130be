"""Find out, on the model itself, whether a rule's choices depend on what they must not know."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from capture.model.forward import probe_tokens
from capture.model.inputs import plain_forward
from capture.model.sites import Site
from capture.swap.routers import site_key, swap
from capture.swap.rules import Choice, RouterInputs, Rule, choice_of

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
        Other tokens later in the sequence, or none where it ends early, changed the choice for an
        earlier one: not causal.
    other_sequences : bool
        Another sequence in the batch, or the lack of it, changed a choice.
    repeatable : bool
        The same tokens gave the same choices twice.
    """

    later_tokens: bool
    other_sequences: bool
    repeatable: bool


def dependence(model: nn.Module, sites: Sequence[Site], rule: Rule) -> Dependence:
    """Change later tokens and other sequences, or leave them out, and see whether choices change.

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
        first, again = (_choices(model, sites, site, rule, ids)[0] for _ in range(2))
        unsteady |= _differ(first, again)
        early, _ = _choices(model, sites, site, rule, other_end)
        later |= _differ(first[MIDDLE, :half], early[MIDDLE, :half])
        alone, known = _choices(model, sites, site, rule, one)
        mixed, _ = _choices(model, sites, site, rule, changed)
        other |= _differ(first[MIDDLE], alone[0]) or _differ(first[MIDDLE], mixed[MIDDLE])
        later |= any(
            _differ(alone[0, :n], _dense(_answer(rule, known, site, n), known.n_experts))
            for n in range(1, ids.shape[1])
        )
    return Dependence(later, other, not unsteady)


def _choices(
    model: nn.Module, sites: Sequence[Site], site: Site, rule: Rule, ids: torch.Tensor
) -> tuple[torch.Tensor, RouterInputs]:
    """Return the weight [B, S, E] of every expert for every token at one site, and its inputs."""
    seen: list[tuple[torch.Tensor, RouterInputs]] = []

    def keep(inputs: RouterInputs, choice: Choice) -> None:
        seen.append((_dense(choice, inputs.n_experts), inputs))

    watch = {site_key(s): rule for s in sites if site_key(s) < site_key(site)}
    with (
        torch.inference_mode(),
        plain_forward(model),
        swap(model, sites, rule, only=[site_key(site)], watch=watch, on_choice=keep),
    ):
        model(input_ids=ids, use_cache=False)
    dense, inputs = seen[0]
    return dense.reshape(*ids.shape, -1), inputs


def _answer(rule: Rule, inputs: RouterInputs, site: Site, n: int) -> Choice:
    """Ask a rule about a text that ended after ``n`` tokens; what came before is the same."""
    inputs = inputs.take(slice(n))
    with torch.inference_mode():
        return choice_of(site, rule.route(inputs), inputs, checked=True)


def _dense(choice: Choice, n_experts: int) -> torch.Tensor:
    """Return the weight [T, E] of every expert, float32."""
    dense = choice.weights.new_zeros(len(choice.weights), n_experts + 1)
    # the column before the first expert takes the empty slots
    return dense.scatter(1, choice.expert_ids + 1, choice.weights)[:, 1:].float()


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(((first - second).abs() > ROUNDING).any())
