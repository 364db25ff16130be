"""The factor between what experts sum up to and what their block adds: measured, not read."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from capture.model.attributes import flat_rows
from capture.model.sites import Site

# of the largest change, in 32 bits and fewer
NEAR, HALF_NEAR = 1e-3, 3e-2
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
