"""Run a model with another rule in a router's place, and count what really ran."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from capture.errors import SwapError
from capture.model.context import Passes, PassTokens
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.attention import LiveAttention
from capture.swap.playback import RoutingTape
from capture.swap.rules import (
    OWN_ROUTER,
    Choice,
    NativeRule,
    RouterInputs,
    Rule,
    as_rows,
    choice_of,
    reads_of,
    with_attention,
)

OnChoice = Callable[[RouterInputs, Choice], None]

# choices that wait to be counted hold their memory
WAITING_ROWS = 65_536

_swapped: WeakSet[nn.Module] = WeakSet()


@dataclass
class SiteCount:
    """What one site executed since the swap began.

    Attributes
    ----------
    computing : int
        Experts that have weights; the ones after them only pass a token on, or skip it.
    n_experts : int
    passes : int
        Forward passes.
    tokens : int
        Real tokens that came to the site; padding is not counted.
    rows : Tensor [E], int64, assignments
        Rows that each expert ran on, padding included where it ran.
    load : Tensor [E], int64, assignments
        The same for real tokens only.
    calls : Tensor [E], int64
        Passes in which the expert ran at all.
    """

    computing: int
    n_experts: int
    passes: int = 0
    tokens: int = 0
    _waiting: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _waiting_rows: int = 0
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> torch.Tensor:
        """Rows that each expert ran on, [E] int64."""
        return self._counted()["rows"]

    @property
    def load(self) -> torch.Tensor:
        """Real tokens that each expert ran on, [E] int64."""
        return self._counted()["load"]

    @property
    def calls(self) -> torch.Tensor:
        """Passes in which each expert ran, [E] int64."""
        return self._counted()["calls"]

    @property
    def experts_per_token(self) -> float:
        """Experts with weights that ran, a real token."""
        return int(self.load[: self.computing].sum()) / max(self.tokens, 1)

    @property
    def distinct_experts(self) -> float:
        """Different experts with weights that ran, a pass: what had to be read from memory."""
        return int(self.calls[: self.computing].sum()) / max(self.passes, 1)

    @classmethod
    def of(cls, site: Site) -> "SiteCount":
        """Return the count of a site that executed nothing yet."""
        zeros = torch.zeros(site.info.n_experts, dtype=torch.int64, device=_device(site))
        sums = {name: zeros.clone() for name in ("rows", "load", "calls")}
        return cls(site.n_computing, site.info.n_experts, _sums=sums)

    def add(self, choice: Choice, real: torch.Tensor | None) -> None:
        """Take the choice [R, K] of one pass; ``real`` picks the tokens among the rows.

        It is counted later, so that a pass takes the time of the rule and not of the counting.
        """
        ids = choice.expert_ids
        chosen = ids if real is None else ids[real]
        self._waiting.append((ids, chosen))
        self._waiting_rows += len(ids)
        self.passes += 1
        self.tokens += len(chosen)
        if self._waiting_rows > WAITING_ROWS:
            self._counted()

    def _counted(self) -> dict[str, torch.Tensor]:
        """Count what waits, and return all counts."""
        for ids, chosen in self._waiting:
            rows = _bincount(ids, self.n_experts)
            load = rows if chosen is ids else _bincount(chosen, self.n_experts)
            for name, found in (("rows", rows), ("load", load), ("calls", rows > 0)):
                self._sums[name] = self._sums[name] + found
        self._waiting.clear()
        self._waiting_rows = 0
        return self._sums


@dataclass
class Swapped:
    """An open swap.

    Attributes
    ----------
    sites : tuple of Site
        All MoE sites of the model.
    counts : dict
        (layer, site) -> what was executed there, swapped or not.
    """

    sites: tuple[Site, ...]
    counts: dict[Place, SiteCount] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Forward passes of the model."""
        return max((count.passes for count in self.counts.values()), default=0)

    @property
    def experts(self) -> dict[Place, float]:
        """Experts that ran, a real token, at each (layer, site)."""
        return {key: count.experts_per_token for key, count in self.counts.items()}

    @property
    def distinct_experts(self) -> dict[Place, float]:
        """Different experts that ran in a pass, at each (layer, site)."""
        return {key: count.distinct_experts for key, count in self.counts.items()}

    @property
    def experts_per_token(self) -> float:
        """Experts that ran, a real token and MoE site."""
        return sum(self.experts.values()) / max(len(self.counts), 1)


@contextmanager
def swap(
    model: nn.Module,
    sites: Sequence[Site] | None,
    rule: Rule | RoutingTape | Mapping[Any, Rule],
    *,
    only: Sequence[int | Place] | None = None,
    watch: Mapping[Any, Rule] | None = None,
    on_choice: OnChoice | None = None,
    checked: bool = True,
    attention: bool = False,
) -> Iterator[Swapped]:
    """Put ``rule`` in the place of the model's routers until the block is left.

    The model's own router runs as far as the rule reads it (``reads`` of
    :class:`capture.swap.rules.Rule`), or all of it where ``on_choice`` or somebody else listens.
    Experts run on filled slots only; a layer in which no slot is filled does not run them at all.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, not compiled.
    sites : sequence of Site or None
        All sites of the model, from :func:`capture.model.selftest.attach`; None finds them now.
    rule : Rule, mapping or RoutingTape
        One rule for every site, or one for each layer (``{layer: rule}``) or site
        (``{(layer, site): rule}``); sites without one keep their router. A tape forces the
        recorded routing, slot by slot.
    only : sequence, optional
        Layers or (layer, site) to swap; the others keep their router. Default: all.
    watch : mapping, optional
        Rules that run at sites that are not swapped, without effect, so that their ``state``
        reaches the swapped ones.
    on_choice : callable, optional
        Called with inputs and choice at every swapped site in every pass.
    checked : bool
        Look at the rule's values in every pass. Costs a little; leave it out of timings.
    attention : bool
        Give rules the attention of their layer. Costs about what the attention itself does, and
        needs whole texts: no cache.

    Yields
    ------
    Swapped
        Counts of what was executed; they stay readable after the block.

    Raises
    ------
    SwapError
        If a site cannot be swapped, or the rule's answer cannot be executed.
    """
    _check_model(model)
    sites = attach(model) if sites is None else list(sites)
    if model in _swapped:
        raise SwapError(
            f"{type(model).__name__} is swapped already; two rules in one place would overrule "
            "each other. Leave the first `with swap(...)` block, or give one rule for each site."
        )
    rules = _rules_by_site(sites, rule, only)
    watched = _rules_by_site(sites, watch, None) if watch else {}
    swapped = Swapped(tuple(sites))
    with ExitStack() as stack:
        _swapped.add(model)
        stack.callback(_swapped.discard, model)
        passes = stack.enter_context(Passes().follow(model))
        live = None
        if attention:
            layers = {layer for layer, _ in (*rules, *watched)}
            live = stack.enter_context(LiveAttention(model, sites, layers).open(passes))
        run = _SwappedPass(passes, on_choice, checked, live)
        for site in sites:
            key = site_key(site)
            place = _Place(site, run, rules.get(key), watched.get(key))
            swapped.counts[key] = place.count
            stack.enter_context(site.replaced(place))
        if isinstance(rule, RoutingTape):
            rule.rewind()
        yield swapped


def site_key(site: Site) -> Place:
    """Return (layer, site) of a site."""
    return site.info.layer, site.info.site


@dataclass
class _SwappedPass:
    """What the sites of a swap share; the previous site's part of it lasts one pass."""

    passes: Passes
    on_choice: OnChoice | None
    checked: bool
    attention: LiveAttention | None
    pass_number: int = 0
    previous: Choice | None = None
    state: torch.Tensor | None = None

    def begin(self) -> PassTokens:
        """Return the tokens of the pass that runs; forget what an earlier pass handed on."""
        if self.pass_number != self.passes.count:
            self.pass_number = self.passes.count
            self.previous = self.state = None
        return self.passes.tokens


class _Place:
    """One site of a swap: asks the rule, counts, and hands on to the next site."""

    def __init__(
        self, site: Site, run: _SwappedPass, rule: Rule | RoutingTape | None, watched: Rule | None
    ) -> None:
        self.site, self.run, self.rule, self.watched = site, run, rule, watched
        self.replays = rule is None or isinstance(rule, RoutingTape)
        # nobody has to be told what stays as it is
        self._stays = type(rule) is NativeRule and run.on_choice is None
        self.hears = not self._stays and (not self.replays or watched is not None)
        self.reads = OWN_ROUTER
        # how groups without a bias are counted is seen by the model's own choice only
        told = site.n_groups is None or site.selection_bias is not None
        if not self.replays and run.on_choice is None and told:
            self.reads = reads_of(rule)
        self.count = SiteCount.of(site)
        self._gate = site.own_gate()
        self._hidden: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Keep the router's input and output until the choice is made."""
        self._hidden, self._scores = hidden, scores

    def decide(self, native: Choice | None) -> Choice:
        """Return what the experts are told [R, K']."""
        native = None if native is None else native.flat()
        rows, device = self._rows(native)
        tokens = self.run.begin().on(device)
        if rows != tokens.n_rows:
            raise SwapError(
                f"{self.site.info.module}: {tokens.n_rows} rows (batch x sequence) were expected, "
                f"but the router ran on {rows}."
            )
        choice, real = self._decided(native, tokens)
        self.run.previous = real
        self.count.add(choice, tokens.real)
        self._hidden = self._scores = None
        return choice

    def _rows(self, native: Choice | None) -> tuple[int, torch.device]:
        """Return how many rows the router ran on, or would have, and where."""
        if native is not None:
            return len(native.expert_ids), native.expert_ids.device
        hidden = self._heard()
        return hidden.numel() // hidden.shape[-1], hidden.device

    def _heard(self) -> torch.Tensor:
        if self._hidden is None:
            raise SwapError(f"{self.site.info.module}: its experts ran before its router did.")
        return self._hidden

    def _decided(self, native: Choice | None, tokens: PassTokens) -> tuple[Choice, Choice]:
        """Return the choice for all rows and for the real ones."""
        if self._stays and native is not None:
            own = _real_rows(native, tokens)
            return _on_all_rows(own, tokens), own
        if self.rule is not None and not isinstance(self.rule, RoutingTape):
            return self._asked(self.rule, native, tokens)
        assert native is not None  # what replays reads it
        if isinstance(self.rule, RoutingTape):
            forced = self.rule.next_choice(site_key(self.site), native, tokens)
            return forced, _real_rows(forced, tokens)
        own = _real_rows(native, tokens)
        if self.watched is not None:
            answer = self.watched.route(self._inputs(own, tokens))
            self.run.state = getattr(answer, "state", None)
        return native, own

    def _asked(
        self, rule: Rule, native: Choice | None, tokens: PassTokens
    ) -> tuple[Choice, Choice]:
        """Return the rule's choice for all rows and for the real ones."""
        inputs = self._inputs(None if native is None else _real_rows(native, tokens), tokens)
        answer = rule.route(inputs)
        choice = choice_of(self.site, answer, inputs, checked=self.run.checked)
        self.run.state = getattr(answer, "state", None)
        if self.run.on_choice is not None:
            self.run.on_choice(inputs, choice)
        return _on_all_rows(choice, tokens), choice

    def _inputs(self, native: Choice | None, tokens: PassTokens) -> RouterInputs:
        site, info = self.site, self.site.info
        hidden = self._heard()
        scores, gate = self._scores, self._gate
        device, before, state = hidden.device, self.run.previous, self.run.state
        inputs = RouterInputs(
            layer=info.layer,
            site=info.site,
            n_experts=info.n_experts,
            top_k=info.top_k,
            score_function=info.score_function,
            selection_bias=site.selection_bias,
            n_groups=site.n_groups,
            top_groups=site.top_groups,
            hidden=as_rows(hidden, tokens.real).float(),
            logits=None if scores is None else as_rows(scores, tokens.real).float(),
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            starts=tokens.starts,
            sequences=tokens.sequences,
            native=native,
            previous=before and Choice(*(t.to(device) for t in before)),
            previous_state=None if state is None else state.to(device),
            gate_weight=gate[0],
            gate_bias=gate[1],
        )
        live = self.run.attention
        return inputs if live is None else with_attention(inputs, live.of(info.layer))


def _real_rows(choice: Choice, tokens: PassTokens) -> Choice:
    """Return a choice [R, K] for the real rows only, [T, K]."""
    return Choice(*(as_rows(tensor, tokens.real) for tensor in choice))


def _on_all_rows(choice: Choice, tokens: PassTokens) -> Choice:
    """Give padding rows empty slots: the choice [T, K] becomes [R, K]."""
    if tokens.real is None:
        return choice
    shape = (tokens.n_rows, choice.expert_ids.shape[1])
    ids = choice.expert_ids.new_full(shape, -1).index_copy(0, tokens.real, choice.expert_ids)
    weights = choice.weights.new_zeros(shape).index_copy(0, tokens.real, choice.weights)
    return Choice(ids, weights)


def _rules_by_site(sites: Sequence[Site], rule: Any, only: Sequence[int | Place] | None) -> Any:
    """Return {(layer, site): rule} for the sites to be swapped."""
    keys = [site_key(site) for site in sites]
    known: set[int | Place] = {*keys, *(layer for layer, _ in keys)}
    asked = [*(only or ()), *(rule if isinstance(rule, Mapping) else ())]
    unknown = [place for place in asked if place not in known]
    if unknown:
        raise SwapError(
            f"Layer or (layer, site) {unknown[0]} has no router. There are: "
            f"{', '.join(str(k) for k in sorted(keys))}."
        )
    chosen = {}
    for key in keys:
        one = rule
        if isinstance(rule, Mapping):
            one = rule.get(key, rule.get(key[0]))
        if one is not None and (only is None or key in only or key[0] in only):
            chosen[key] = one
    if not chosen:
        raise SwapError("No router would be replaced: `rule` and `only` name no common site.")
    return chosen


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise SwapError(
            "An uncompiled model was expected, got one from torch.compile, which would go on to "
            "run the router it was compiled with. Pass the original model."
        )
    if model.training:
        raise SwapError("A model in evaluation mode was expected. Call model.eval() first.")


def _device(site: Site) -> torch.device:
    """Return where the site's router is, which is where its choice is made."""
    device = next(iter(site.router.parameters())).device
    return torch.device("cpu") if device.type == "meta" else device


def _bincount(expert_ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Count ids [..., K] per expert, empty slots left out; waits for nothing."""
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=expert_ids.device)
    ids = expert_ids.flatten() + 1
    return counts.index_add_(0, ids, torch.ones_like(ids))[1:]
