"""What adapters share to put another choice in a router's place.

The model's own router runs only where it is read: for a rule that reads nothing of it, zeros in the
form of its output stand in, see :class:`OwnRouter`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from capture.model.adapters.base import Decider, Seat
from capture.model.attributes import flat_rows, gate_matrix, scores_of

Forward = Callable[..., Any]
Hook = TypeVar("Hook", bound=Callable[..., Any])

# batch and sequence of the router's try-out: no usual numbers of experts or slots
TRIED = (1, 3)
SEED = 0


def deaf(hook: Hook) -> Hook:
    """Mark a hook that looks at no value of the model's own router: it need not run for it."""
    setattr(hook, "is_deaf", True)  # noqa: B010  mypy forbids the assignment
    return hook


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


@contextmanager
def heard_router(seat: Seat, decider: Decider) -> Iterator[None]:
    """Show the decider what goes into the router and what comes out."""

    @deaf
    def on_router(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        decider.see(hidden, scores_of(output, seat.parts.n_experts))

    handle = seat.parts.router.register_forward_hook(on_router, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


class OwnRouterCall:
    """A site's own router in a forward pass: heard if it runs, stood in for if nobody reads it.

    Attributes
    ----------
    ran : bool
        Whether it ran in the call before the experts'.
    fills : bool
        Whether every slot of the choice that the experts are told next is filled.
    """

    def __init__(self, seat: Seat, decider: Decider) -> None:
        self.seat, self.decider = seat, decider
        self.ran, self.fills = True, False

    def open(self, stack: ExitStack) -> None:
        """Follow the router until the stack is left."""
        if "native" in self.decider.reads:
            if self.decider.hears:
                stack.enter_context(heard_router(self.seat, self.decider))
            return
        self._own = OwnRouter(self.seat, logits="logits" in self.decider.reads)
        stack.enter_context(forward_replaced(self.seat.parts.router, self._wrap))

    def _wrap(self, stock: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            instead = self._own.instead(*args, *kwargs.values())
            self.ran = instead is None
            if instead is not None:
                self.decider.see(hidden, instead[1])
                return instead[0]
            output = stock(*args, **kwargs)
            self.decider.see(hidden, scores_of(output, self.seat.parts.n_experts))
            return output

        return forward


class _Form(NamedTuple):
    """One tensor of a router's output: its last axis, its dtype, and whether its rows are flat."""

    size: int
    dtype: torch.dtype
    flat: bool


class _Tried(NamedTuple):
    """What a try-out showed: the output's tensors, and whether logits are one product."""

    forms: tuple[_Form, ...]
    is_tuple: bool
    is_product: bool


class OwnRouter:
    """The router of one site, left out of a forward pass where nobody reads what it says.

    A block goes on with what its router returns before its experts are told something else, so
    zeros in the same form stand in for an output that is not computed. For a rule that reads the
    logits only, they are one product of matrices, where a try-out gave the router's own to the
    last bit. Everywhere else the router runs as it is.

    Parameters
    ----------
    seat : Seat
    logits : bool
        Whether the rule reads the router's output [R, E].
    """

    def __init__(self, seat: Seat, *, logits: bool) -> None:
        self.parts = seat.parts
        self._wants_logits = logits
        self._weight, self._bias = gate_matrix(self.parts.router, self.parts.n_experts)
        self._known: dict[tuple[torch.dtype, int], _Tried | None] = {}
        self._made: tuple[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, ...]] | None = None
        for axes in (2, 3):  # blocks give their router rows, or batch and sequence
            self._try(next((p.dtype for p in self.parts.experts.parameters()), torch.float32), axes)

    def instead(self, *values: Any) -> tuple[Any, torch.Tensor | None] | None:
        """Return what stands in for the router's output and the logits [R, E], if they are read.

        None = the router has to run: it takes more than hidden states, or somebody listens.
        """
        if len(values) != 1 or not isinstance(values[0], torch.Tensor):
            return None
        hidden = values[0]
        tried = self._try(hidden.dtype, hidden.ndim)
        if tried is None or (self._wants_logits and not tried.is_product) or self._is_heard():
            return None
        logits = self._product(hidden) if self._wants_logits else None
        return self._zeros(tried, hidden), logits

    def _zeros(self, tried: _Tried, hidden: torch.Tensor) -> Any:
        """Return zeros in the form of the output: the last ones, unless they were written into."""
        lead, place = hidden.shape[:-1], (hidden.shape[:-1], hidden.dtype)
        if self._made is None or self._made[0] != place or any(z._version for z in self._made[1]):
            rows = hidden.numel() // hidden.shape[-1]
            with torch.inference_mode(False):  # tensors that count what is written into them
                zeros = tuple(
                    torch.zeros((rows, form.size) if form.flat else (*lead, form.size),
                                dtype=form.dtype, device=hidden.device)
                    for form in tried.forms
                )  # fmt: skip
            self._made = place, zeros
        return self._made[1] if tried.is_tuple else self._made[1][0]

    def _is_heard(self) -> bool:
        """Whether somebody listens to the router, or to what experts are told without the rule."""
        router, experts = self.parts.router, self.parts.experts
        if torch.is_autocast_enabled():
            return True  # outputs have another dtype then
        if not router._forward_hooks and len(experts._forward_pre_hooks) == 1:
            return False  # only the hook that puts the choice in
        hooks = (*router._forward_hooks.values(), *experts._forward_pre_hooks.values())
        return not all(getattr(hook, "is_deaf", False) for hook in hooks)

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._weight is not None
        return nn.functional.linear(flat_rows(hidden), self._weight, self._bias)

    def _try(self, dtype: torch.dtype, axes: int) -> _Tried | None:
        """Return what the router makes of inputs like these, None = nothing can stand in."""
        if (dtype, axes) not in self._known:
            self._known[dtype, axes] = self._tried(dtype, axes)
        return self._known[dtype, axes]

    def _tried(self, dtype: torch.dtype, axes: int) -> _Tried | None:
        weight = self._weight
        if weight is None or weight.is_meta or not dtype.is_floating_point:
            return None
        generator = torch.Generator().manual_seed(SEED)
        hidden = torch.randn(*TRIED[3 - axes :], weight.shape[1], generator=generator)
        hidden = hidden.to(weight.device, dtype)
        try:
            with torch.no_grad():
                output = self.parts.router.forward(hidden)
                product = self._product(hidden)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return None  # it takes more than hidden states, or states of another form
        values = output if isinstance(output, tuple) else (output,)
        forms = [_form_of(value) for value in values]
        if None in forms:
            return None
        scores = scores_of(output, self.parts.n_experts)
        same = scores is not None and torch.equal(flat_rows(scores), product)
        return _Tried(tuple(f for f in forms if f), isinstance(output, tuple), same)


def _form_of(value: Any) -> _Form | None:
    """Return the form of one output of the try-out, None where it is not a row for each token."""
    if not isinstance(value, torch.Tensor) or value.ndim < len(("rows", "size")):
        return None
    lead = tuple(value.shape[:-1])
    flat = lead == TRIED[1:]
    return _Form(value.shape[-1], value.dtype, flat) if flat or lead == TRIED else None
