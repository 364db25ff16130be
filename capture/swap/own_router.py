"""A model's own router while another rule sits in its place: it runs only where it is read."""

from typing import Any, NamedTuple

import torch
from torch import nn

from capture.model.adapters.standard import scores_of
from capture.model.attributes import flat_rows
from capture.model.sites import Site
from capture.swap.rules import own_gate

# batch and sequence of the router's try-out: no usual numbers of experts or slots
TRIED = (1, 3)
SEED = 0
# modules whose hooks look at no value of the router: they put the choice in, or count operations
DEAF = ("capture.swap.inject", "capture.model.flops")


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
    site : Site
    logits : bool
        Whether the rule reads the router's output [R, E].
    """

    def __init__(self, site: Site, *, logits: bool) -> None:
        self.site = site
        self._wants_logits = logits
        self._weight, self._bias = own_gate(site)
        self._known: dict[tuple[torch.dtype, int], _Tried | None] = {}
        self._made: tuple[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, ...]] | None = None
        for axes in (2, 3):  # blocks give their router rows, or batch and sequence
            self._try(next((p.dtype for p in site.experts.parameters()), torch.float32), axes)

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
        router, experts = self.site.router, self.site.experts
        if torch.is_autocast_enabled():
            return True  # outputs have another dtype then
        if not router._forward_hooks and len(experts._forward_pre_hooks) == 1:
            return False  # only the hook that puts the choice in
        hooks = (*router._forward_hooks.values(), *experts._forward_pre_hooks.values())
        return any(hook.__module__ not in DEAF for hook in hooks)

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
                output = self.site.router.forward(hidden)
                product = self._product(hidden)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            return None  # it takes more than hidden states, or states of another form
        values = output if isinstance(output, tuple) else (output,)
        forms = [_form_of(value) for value in values]
        if None in forms:
            return None
        scores = scores_of(output, self.site.info.n_experts)
        same = scores is not None and torch.equal(flat_rows(scores), product)
        return _Tried(tuple(f for f in forms if f), isinstance(output, tuple), same)


def _form_of(value: Any) -> _Form | None:
    """Return the form of one output of the try-out, None where it is not a row for each token."""
    if not isinstance(value, torch.Tensor) or value.ndim < len(("rows", "size")):
        return None
    lead = tuple(value.shape[:-1])
    flat = lead == TRIED[1:]
    return _Form(value.shape[-1], value.dtype, flat) if flat or lead == TRIED else None
