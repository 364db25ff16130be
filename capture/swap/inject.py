"""Tell a site's experts something else than its router said, and run nothing but that.

Every kind of block is reached through the same seam at which capture listens to it. The model's
own experts code runs throughout, on fewer rows where slots are empty, so that a swapped layer is
as fast or slow as the implementation the model was loaded with.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn

from capture.errors import SwapError
from capture.model import attributes as probe
from capture.model.adapters.jetmoe import FIELDS, SortedTokensAdapter, unsorted
from capture.model.adapters.llama4 import ScaledInputAdapter
from capture.model.adapters.standard import StandardAdapter, scores_of
from capture.model.adapters.zaya import SkipExpertAdapter
from capture.model.attributes import inner
from capture.model.sites import Site
from capture.swap.own_router import OwnRouter
from capture.swap.rules import Choice

Forward = Callable[..., Any]


class Decider(Protocol):
    """Decides what a site executes; :mod:`capture.swap.routers` has the one that asks a rule.

    Attributes
    ----------
    replays : bool
        Whether it tells experts what a model told them, so that the model's own code runs as is.
    reads : frozenset of str
        What it reads of the model's own router: ``"logits"``, ``"native"``, both or nothing.
    hears : bool
        Whether :meth:`see` has to be called.
    """

    replays: bool
    reads: frozenset[str]
    hears: bool

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Take the router's input [..., D] and its output [..., E]."""
        ...

    def decide(self, native: Choice | None) -> Choice:
        """Return what the experts are told instead of ``native`` [R, K]; None = not computed."""
        ...


def can_inject(site: Site) -> bool:
    """Whether this kind of block has a seam where a choice can be put in."""
    return type(site.adapter) in _INJECTIONS


@contextmanager
def injected(site: Site, decider: Decider) -> Iterator[None]:
    """Route everything the site executes through ``decider``, until the block is left.

    Raises
    ------
    SwapError
        If this kind of block has no seam where a choice can be put in.
    """
    inject = _INJECTIONS.get(type(site.adapter))
    if inject is None:
        raise SwapError(
            f"{site.info.module}: no other rule can be put in place of a router of kind "
            f"{site.adapter.name!r}, only recorded. There are: "
            f"{', '.join(sorted(a.name for a in _INJECTIONS))}."
        )
    with ExitStack() as stack:
        inject(site, decider, stack)
        yield


@contextmanager
def forward_replaced(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Run ``wrap(forward)`` instead of a module's forward; hooks on the module stay as they are."""
    replaced = vars(module).get("forward")  # device maps put one on the instance
    setattr(module, "forward", wrap(module.forward))  # noqa: B010  mypy forbids the assignment
    try:
        yield
    finally:
        if replaced is None:
            delattr(module, "forward")
        else:
            setattr(module, "forward", replaced)  # noqa: B010


def n_computing(site: Site) -> int:
    """Return how many of the experts have weights: the others pass a token on or skip it."""
    stacks = [p.shape[0] for p in site.experts.parameters() if p.ndim == len(("E", "out", "in"))]
    return min([site.info.n_experts, *stacks])


def _listen_to_router(site: Site, decider: Decider, stack: ExitStack) -> None:
    """Show the decider what goes into the router and what comes out."""

    def on_router(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        decider.see(hidden, scores_of(output, site.info.n_experts))

    stack.callback(site.router.register_forward_hook(on_router, with_kwargs=True).remove)


class _OwnRouterCall:
    """A site's own router in a forward pass: heard if it runs, stood in for if nobody reads it.

    Attributes
    ----------
    ran : bool
        Whether it ran in the call before the experts'.
    fills : bool
        Whether every slot of the choice that the experts are told next is filled.
    """

    def __init__(self, site: Site, decider: Decider) -> None:
        self.site, self.decider = site, decider
        self.ran, self.fills = True, False

    def open(self, stack: ExitStack) -> None:
        """Follow the router until the stack is left."""
        if "native" in self.decider.reads:
            if self.decider.hears:
                _listen_to_router(self.site, self.decider, stack)
            return
        self._own = OwnRouter(self.site, logits="logits" in self.decider.reads)
        stack.enter_context(forward_replaced(self.site.router, self._wrap))

    def _wrap(self, stock: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            instead = self._own.instead(*args, *kwargs.values())
            self.ran = instead is None
            if instead is not None:
                self.decider.see(hidden, instead[1])
                return instead[0]
            output = stock(*args, **kwargs)
            self.decider.see(hidden, scores_of(output, self.site.info.n_experts))
            return output

        return forward


def _standard(site: Site, decider: Decider, stack: ExitStack) -> None:
    """Replace ids and weights among the experts' arguments."""
    own = _OwnRouterCall(site, decider)
    own.open(stack)
    has_skip_class = isinstance(site.adapter, SkipExpertAdapter)

    def on_experts(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = _named(args, kwargs)
        ids_at, weights_at = _places(site, values)
        ids, weights = values[ids_at], values[weights_at]
        native = Choice(ids.long(), weights) if own.ran else None
        if native is not None and has_skip_class:
            native = _name_skipped(native, site.info.n_experts - 1)
        choice = decider.decide(native)
        stays = native is not None and choice.expert_ids is native.expert_ids
        if has_skip_class:
            choice = _hide_skipped(choice, site.info.n_experts - 1, as_model=decider.replays)
        values[ids_at] = choice.expert_ids.to(ids.dtype)
        values[weights_at] = choice.weights.to(weights.dtype)
        own.fills = (stays and not has_skip_class) or not bool((choice.expert_ids < 0).any())
        return tuple(values[i] for i in range(len(args))), {k: values[k] for k in kwargs}

    def wrap(stock: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if own.fills:
                return stock(*args, **kwargs)
            values = _named(args, kwargs)
            ids_at, weights_at = _places(site, values)

            def call(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
                ids, weights = _second_slot(site, ids, weights)
                values.update({next(iter(values)): hidden, ids_at: ids, weights_at: weights})
                given = {k: values[k] for k in kwargs}
                return stock(*(values[i] for i in range(len(args))), **given)

            return run_filled(call, next(iter(values.values())), values[ids_at], values[weights_at])

        return forward

    handle = site.experts.register_forward_pre_hook(on_experts, with_kwargs=True)
    stack.callback(handle.remove)
    stack.enter_context(forward_replaced(site.experts, wrap))


def run_filled(
    call: Forward, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run experts on the filled slots only: a token appears once for every expert it visits.

    Parameters
    ----------
    call : callable
        The experts' own code, called as ``call(hidden [N, D], ids [N, 1], weights [N, 1])``; not
        called at all without a filled slot.
    hidden : Tensor [..., D]
    expert_ids, weights : Tensor [T, K]
        -1 = empty.

    Returns
    -------
    Tensor [..., D]
        0 for a token without experts.
    """
    n_tokens, n_slots = expert_ids.shape
    slots = (expert_ids.flatten() >= 0).nonzero().flatten()  # [N]
    if not len(slots):
        return torch.zeros_like(hidden)
    rows = hidden.reshape(n_tokens, -1)[slots.div(n_slots, rounding_mode="floor")]
    output = call(rows, expert_ids.flatten()[slots, None], weights.flatten()[slots, None])
    output = output.reshape(len(slots), -1)
    # a copy to places that are all different, then a sum: unlike index_add the same on every run
    spread = output.new_zeros(n_tokens * n_slots, output.shape[-1]).index_copy(0, slots, output)
    summed: torch.Tensor = spread.view(n_tokens, n_slots, -1).sum(dim=1)
    return summed.reshape(hidden.shape)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Return the arguments by place or name, in their order."""
    values: dict[int | str, Any] = dict(enumerate(args))
    return values | cast(dict[int | str, Any], kwargs)


def _places(site: Site, values: dict[int | str, Any]) -> tuple[int | str, int | str]:
    """Return where ids and weights are among the experts' arguments."""
    after = {k: v for k, v in list(values.items())[1:] if isinstance(v, torch.Tensor)}
    ids = [k for k, v in after.items() if not v.is_floating_point() and v.dtype != torch.bool]
    weights = [k for k, v in after.items() if v.is_floating_point()]
    if len(ids) != 1 or len(weights) != 1:
        raise SwapError(
            f"{site.info.module}: its experts were not told ids [T, K] and weights [T, K], so no "
            "other choice can be put in."
        )
    return ids[0], weights[0]


def _second_slot(
    site: Site, expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a weightless slot [N, 2] where experts cannot be called with one; it computes nothing.

    LongCat drops the axis of the slots when there is only one of them.
    """
    if not hasattr(inner(site.experts), "identity_expert"):
        return expert_ids, weights
    free = site.info.n_experts - 1
    if n_computing(site) > free:
        raise SwapError(
            f"{site.info.module}: empty slots need a zero-computation expert in this family, but "
            "the model has none. Fill every slot."
        )
    ids = torch.cat((expert_ids, torch.full_like(expert_ids, free)), dim=-1)
    return ids, torch.cat((weights, torch.zeros_like(weights)), dim=-1)


def _name_skipped(choice: Choice, skip: int) -> Choice:
    """Name the class "skip", which the model hides as expert 0 with weight 0."""
    hidden = (choice.weights == 0) & (choice.expert_ids == 0)
    return choice._replace(expert_ids=choice.expert_ids.masked_fill(hidden, skip))


def _hide_skipped(choice: Choice, skip: int, *, as_model: bool) -> Choice:
    """Turn the class "skip" into an empty slot, or into what the model itself makes of it."""
    skipped = choice.expert_ids == skip
    ids = choice.expert_ids.masked_fill(skipped, 0 if as_model else -1)
    return Choice(ids, choice.weights.masked_fill(skipped, 0.0))


def _scaled_input(site: Site, decider: Decider, stack: ExitStack) -> None:
    """Llama 4: replace the scores that scale the experts' inputs, and run chosen rows only."""
    if inner(site.experts) is not site.experts:
        raise SwapError(
            f"{site.info.module}: experts with an adapter around them run on all their inputs, so "
            "no other choice can be put in. Merge the adapter into the model first."
        )
    chosen: list[Choice] = []

    def on_router(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        applied, logits = output
        decider.see(args[0] if args else kwargs["hidden_states"], logits)
        weights, ids = applied.topk(site.info.top_k, dim=-1)
        choice = decider.decide(Choice(ids.masked_fill(weights == 0, -1), weights))
        chosen[:] = [choice]
        # added, as an empty slot must not erase the weight of expert 0
        scores = torch.zeros_like(applied).scatter_add(
            -1, choice.expert_ids.clamp_min(0), choice.weights.to(applied.dtype)
        )
        return scores, logits

    def wrap(stock: Forward) -> Forward:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            if decider.replays:
                return stock(hidden)  # type: ignore[no-any-return]
            return _run_scaled(site.experts, hidden, chosen[0].expert_ids)

        return forward

    stack.callback(site.router.register_forward_hook(on_router, with_kwargs=True).remove)
    stack.enter_context(forward_replaced(site.experts, wrap))


def _run_scaled(experts: Any, hidden: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Run the experts on the chosen rows of their scaled inputs [E * T, D]; the rest stays 0."""
    n_tokens = len(expert_ids)
    output = torch.zeros_like(hidden)
    filled = expert_ids >= 0
    token = torch.arange(n_tokens, device=hidden.device)[:, None].expand_as(expert_ids)[filled]
    expert, order = expert_ids[filled].sort()
    counts = expert.bincount(minlength=len(experts.gate_up_proj)).tolist()
    for e, rows in enumerate(torch.split(expert * n_tokens + token[order], counts)):
        if len(rows):
            gate, up = (hidden[rows] @ experts.gate_up_proj[e]).chunk(2, dim=-1)
            out = (up * experts.act_fn(gate)) @ experts.down_proj[e]
            output = output.index_copy(0, rows, out)
    return output


def _sorted_tokens(site: Site, decider: Decider, stack: ExitStack) -> None:
    """JetMoE: replace the router's assignments, which are sorted by expert, without empty slots."""
    # the attention block gives every slot its own query, so it has no place for more of them
    top_k, is_attention = site.info.top_k, not hasattr(site.parent, "activation")

    def on_router(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Any, ...]:
        if not (isinstance(output, tuple) and len(output) == FIELDS):
            raise SwapError(f"{site.info.module}: its router did not return sorted assignments.")
        order, _, sorted_weights, sizes, logits = output
        decider.see(args[0] if args else kwargs["hidden_states"], logits)
        choice = decider.decide(Choice(*unsorted(order, sorted_weights, sizes, top_k)))
        ids, weights = choice.expert_ids, choice.weights.to(sorted_weights.dtype)
        if is_attention and ids.shape[1] > top_k:
            raise SwapError(
                f"{site.info.module}: the attention of this model has {top_k} queries a token, "
                f"so at most {top_k} experts, got {ids.shape[1]}."
            )
        if is_attention and ids.shape[1] < top_k:
            missing = (0, top_k - ids.shape[1])
            ids = nn.functional.pad(ids, missing, value=-1)
            weights = nn.functional.pad(weights, missing)
        n_slots = ids.shape[1]
        # empty slots sort to the front and are cut off
        order = ids.flatten().sort(0).indices[int((ids < 0).sum()) :]
        token = order.div(n_slots, rounding_mode="trunc")
        load = ids.flatten()[order].bincount(minlength=site.info.n_experts)
        return order, token, weights.flatten()[order], load.tolist(), logits

    stack.callback(site.router.register_forward_hook(on_router, with_kwargs=True).remove)


_INJECTIONS: dict[type[Any], Callable[[Site, Decider, ExitStack], None]] = {
    StandardAdapter: _standard,
    SkipExpertAdapter: _standard,
    ScaledInputAdapter: _scaled_input,
    SortedTokensAdapter: _sorted_tokens,
}


def flat_choice(choice: Choice) -> Choice:
    """Return a choice [..., K] as [R, K]."""
    return Choice(probe.flat_rows(choice.expert_ids), probe.flat_rows(choice.weights))
