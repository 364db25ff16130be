"""What experts give: what kind each is, and the factor of their sum; measured, not read."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from capture.errors import SiteError
from capture.model import attributes
from capture.model.attributes import flat_rows
from capture.model.sites import Site

# of the largest change, in 32 bits and fewer
NEAR, HALF_NEAR = 1e-3, 3e-2
IDENTICAL = 1e-2  # of tokens between -1 and 1, in any dtype
Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def calls_kept(sites: Sequence[Site]) -> Iterator[dict[int, Call]]:
    """Keep the arguments that each site's block is called with, by the number of the site."""
    kept: dict[int, Call] = {}
    with ExitStack() as stack:
        for number, site in enumerate(sites):

            def keep(_: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                kept[number] = _copied(args), _copied(kwargs)

            handle = site.parent.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        yield kept


def with_factor(site: Site, call: Call | None) -> Site:
    """Return the site with what its block multiplies the sum of its experts by.

    Experts put out twice what they did; what the block puts out then changes by their sum times
    the factor. Where it changes otherwise the factor is not known: a norm or an attention lies
    between, or the experts have no sum of their own (Llama 4, JetMoE).

    Parameters
    ----------
    site : Site
    call : tuple of arguments and keyword arguments, or None
        Of the block, from :func:`calls_kept`.
    """
    summed: list[torch.Tensor] = []

    def double(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return None
        summed.append(output.detach().clone())
        return output * 2

    if call is None:
        return replace(site, factor=None)
    try:
        once = _rows(site.parent.forward(*_copied(call[0]), **_copied(call[1])))
        handle = site.experts.register_forward_hook(double)
        try:
            twice = _rows(site.parent.forward(*_copied(call[0]), **_copied(call[1])))
        finally:
            handle.remove()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return replace(site, factor=None)  # it cannot run by itself
    return replace(site, factor=_factor(twice - once, summed))


@torch.no_grad()
def with_kinds(site: Site) -> Site:
    """Return the site with what kind each of its experts is.

    Experts without the parameters of the others are asked for what they make of some tokens:
    nothing (``zero``), the token itself (``identity``), or something else, as those that mix in a
    learned constant do (``constant``). A choice to leave out the block is ``skip``.
    """
    n_experts = site.info.n_experts
    kinds = ["routed"] * n_experts
    if site.parts.skips:
        kinds[-1] = "skip"
    for expert in attributes.odd_experts(site.experts, n_experts - site.parts.skips):
        kinds[expert] = _kind(site, expert)
    return replace(site, info=site.info._replace(expert_kinds=tuple(kinds)))


def _kind(site: Site, expert: int) -> str:
    experts: Any = attributes.inner(site.experts)
    weight = next(p for p in experts.parameters() if p.is_floating_point())
    width = max(weight.shape)
    gate = next((p for p in site.router.parameters() if p.ndim == len(("E", "D"))), None)
    if gate is not None:
        width = gate.shape[-1]
    hidden = torch.linspace(-1, 1, 2 * width, device=weight.device, dtype=weight.dtype)
    hidden = hidden.reshape(2, width)
    try:
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            given = _rows(list(experts.children())[expert](hidden))
        else:
            # a second slot without weight: some cannot be called with one
            ids = torch.tensor([[expert, 0]], device=weight.device).expand(2, 2)
            weights = torch.tensor([[1.0, 0.0]], device=weight.device, dtype=weight.dtype)
            given = _rows(experts.forward(hidden, ids, weights.expand(2, 2)))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise SiteError(
            f"{site.info.module}: expert {expert} is built otherwise than the others, and what it "
            f"does cannot be told ({type(error).__name__}). This architecture is not supported."
        ) from error
    if not bool(given.any()):
        return "zero"
    return "identity" if torch.allclose(given, hidden, atol=IDENTICAL) else "constant"


def _factor(change: torch.Tensor, summed: list[torch.Tensor]) -> float | None:
    if len(summed) != 1 or flat_rows(summed[0]).shape != change.shape:
        return None
    rows, change = flat_rows(summed[0]).float(), change.float()
    factor = float((rows * change).sum() / rows.square().sum())
    half = summed[0].element_size() < torch.float32.itemsize
    limit = (HALF_NEAR if half else NEAR) * float(change.norm(dim=-1).max())
    if not float((factor * rows - change).norm(dim=-1).max()) <= limit:
        return None
    # rounding is not a factor
    return 1.0 if abs(factor - 1) < (HALF_NEAR if half else NEAR) else float(f"{factor:.4g}")


def _rows(output: Any) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple | list) else output
    return flat_rows(first)


def _copied(value: Any) -> Any:
    """Return arguments whose tensors are copies: a block may write into what it is given."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(one) for one in value)
    if type(value) is dict:
        return {name: _copied(one) for name, one in value.items()}
    return value
