"""Whether a fitted router looks ahead or at other sequences, found on the model itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from capture.model.forward import probe_tokens
from capture.model.inputs import plain_forward
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.dependence import MIDDLE, ROUNDING, dependence
from capture.swap.part_gates import gate_parts
from capture.swap.rules import RouterInputs, Rule
from explorer.comparison.fit import Fitted
from explorer.comparison.live import Spy
from explorer.routers import Router, route_layers
from explorer.routers.contract import dense
from explorer.routers.live_rule import LiveRule

MAX_LAYERS = 4
PROBED = 512  # recorded tokens
PREFIXES = 24  # of these, each of which is tried
TIES = 2  # rows that products over another number of rows may decide otherwise


class Badges(NamedTuple):
    """What is said of a router wherever it appears.

    Attributes
    ----------
    causal : bool
        Neither declared nor found to look at later tokens, or at whether there are any.
    batch_dependent : bool
        Declared or found to look at other sequences.
    """

    causal: bool
    batch_dependent: bool


class BySite:
    """One rule that asks the rule of the site in question."""

    def __init__(self, rules: Mapping[Place, Rule]) -> None:
        self.rules = rules

    def route(self, inputs: RouterInputs, /) -> Any:
        """Answer as the site's rule does."""
        return self.rules[inputs.layer, inputs.site].route(inputs)


def badges(
    model: nn.Module, sites: Sequence[Site], fitted: Fitted, rules: Mapping[Place, Rule]
) -> Badges:
    """Change later tokens and other sequences, end texts early, and see whether decisions change.

    What is declared stays: a rule that was not caught on a few tokens may still look ahead.
    """
    info = fitted.router.info
    ahead, others = not info.causal, info.batch_dependent
    if fitted.part != "expert":
        found = _gates_depend(model, sites, fitted, fitted.part)
        ahead, others = ahead or found[0], others or found[1]
    elif not fitted.attention:  # the probe of experts runs without attention
        seen = dependence(model, sites, BySite(rules))
        ahead, others = ahead or seen.later_tokens, others or seen.other_sequences
    return Badges(not ahead, others)


def _gates_depend(
    model: nn.Module,
    sites: Sequence[Site],
    fitted: Fitted,
    part: Literal["head", "layer", "block"],
) -> tuple[bool, bool]:
    """Whether gates depend on later tokens, and on other sequences."""
    ids = probe_tokens(model)
    half = ids.shape[1] // 2
    one, others = ids[MIDDLE : MIDDLE + 1], torch.arange(len(ids)) != MIDDLE
    other_end = ids.clone()
    other_end[MIDDLE, half:] = ids[-1, half:].flip(-1)
    changed = ids.clone()
    changed[others] = ids[others].flip(-1)
    layers = sorted(layer for layer, _ in fitted.routers)
    later = other = False
    for layer in layers[:: max(1, -(-len(layers) // MAX_LAYERS))]:
        asked: list[RouterInputs] = []

        def gates(
            tokens: torch.Tensor, layer: int = layer, asked: list[RouterInputs] = asked
        ) -> torch.Tensor:
            spy = Spy(_Remembered(LiveRule(fitted.routers[layer, 0]), asked))
            rule = gate_parts(model, sites, {layer: spy}, part=part, attention=fitted.attention)
            with torch.inference_mode(), plain_forward(model), rule:
                model(input_ids=tokens, use_cache=False)
            return spy.gates[-1].reshape(*tokens.shape, -1)

        first = gates(ids)
        later |= _differ(first[MIDDLE, :half], gates(other_end)[MIDDLE, :half])
        mixed, alone = gates(changed)[MIDDLE], gates(one)[0]
        other |= _differ(first[MIDDLE], alone) or _differ(first[MIDDLE], mixed)
        rule = LiveRule(fitted.routers[layer, 0])
        for n in range(1, len(alone)):
            with torch.inference_mode():
                shorter: torch.Tensor = rule.route(asked[-1].take(slice(n))).gate  # type: ignore[union-attr]
            later |= _differ(alone[:n], shorter.float().cpu().reshape(n, -1))
    return later, other


class _Remembered:
    """A rule that keeps what it was asked."""

    def __init__(self, rule: Rule, asked: list[RouterInputs]) -> None:
        self.rule = rule
        self.asked = asked

    def route(self, inputs: RouterInputs, /) -> Any:
        """Answer as the rule does."""
        self.asked.append(inputs)
        return self.rule.route(inputs)


def recorded_badges(
    routers: Mapping[Place, Router], inputs: Mapping[Place, RouterInputs]
) -> Badges:
    """Change later tokens of recorded inputs, leave tokens out, and see whether choices change.

    Parameters
    ----------
    routers : mapping of (layer, site) to Router
        Fitted.
    inputs : mapping of (layer, site) to RouterInputs
        The first ``PROBED`` tokens are tried: a quarter, half and three quarters of each text
        against all of it, and every prefix of the first ``PREFIXES`` tokens of the longest.
    """
    info = next(iter(routers.values())).info
    ahead, others = not info.causal, info.batch_dependent
    if ahead and others:
        return Badges(not ahead, others)
    few = {at: one.take(torch.arange(min(PROBED, one.n_tokens))) for at, one in inputs.items()}
    positions = next(iter(few.values())).tensor("positions")
    # a sequence begins where positions stop rising: a sampled one may lack its first tokens
    begins = [0, *((positions.diff() <= 0).nonzero().flatten() + 1).tolist(), len(positions)]
    every = torch.arange(len(positions))
    whole = _weights(routers, few, every)
    later = other = 0
    shorter: set[int] = set()  # rows that decided otherwise where their text ended early

    def cut_short(begin: int, whole: torch.Tensor, lengths: Iterable[int]) -> None:
        for n in lengths:
            part = _weights(routers, few, every[begin : begin + n])
            shorter.update((begin + _changed_rows(whole[:n], part)).tolist())

    for begin, end in pairwise(begins):
        alone = _weights(routers, few, every[begin:end])
        other += _changed(whole[begin:end], alone)
        cuts = {begin + (end - begin) * n // 4 for n in (1, 2, 3)} - {begin}
        cut_short(begin, alone, [cut - begin for cut in cuts])
        for cut in cuts:
            # as many tokens in the same places, so that what depends on their number stays
            strange = (every[cut:end] + len(every) // 2) % len(every)
            rows = torch.cat([every[begin:cut], strange])
            changed = _weights(routers, few, rows, every[begin:end])
            later += _changed(alone[: cut - begin], changed[: cut - begin])
    begin, end = max(pairwise(begins), key=lambda ends: ends[1] - ends[0])
    end = min(end, begin + PREFIXES)
    cut_short(begin, _weights(routers, few, every[begin:end]), range(1, end - begin))
    ahead = ahead or max(later, len(shorter)) > TIES
    return Badges(not ahead, others or other > TIES)


def _weights(
    routers: Mapping[Place, Router],
    inputs: Mapping[Place, RouterInputs],
    rows: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what all layers apply to some tokens [T, L * E], put in the places of others."""
    taken = {at: one.take(rows) for at, one in inputs.items()}
    if places is not None:
        there = {at: one.take(places) for at, one in inputs.items()}
        taken = {
            at: replace(one, positions=there[at].positions, starts=there[at].starts)
            for at, one in taken.items()
        }
    return torch.cat([dense(each) for each in route_layers(routers, taken).values()], dim=-1)


def _changed(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return in how many rows two decisions differ."""
    return len(_changed_rows(first, second))


def _changed_rows(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the rows in which two decisions differ, [N] int64."""
    return ((first - second).abs() > ROUNDING).any(dim=-1).nonzero().flatten()


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(((first - second).abs() > ROUNDING).any())
