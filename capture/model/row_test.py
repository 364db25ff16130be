"""Check that row ``b * S + s`` of a site is token ``s`` of prompt ``b``, padded or not."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from capture.errors import SiteError
from capture.model.adapters import attributes as probe
from capture.model.hooks import SiteObservation, tap
from capture.model.sites import Site

# a row differs from the same row alone by rounding, which may flip a near tie now and then;
# another token's row lies as far away as tokens lie from each other
NEAR = 0.5
ENOUGH = 0.75  # of a prompt's rows
NOTHING = 1e-4  # relative to the largest value


class Seen(NamedTuple):
    """What one forward pass over ids [B, S] showed.

    Attributes
    ----------
    sites : list of SiteObservation
    inputs : dict of int to Tensor [R, D]
        Copies of the routers' inputs, by the number of the site.
    output : Tensor [B * S, ...] or None
        Of the model, whose rows are surely in order.
    """

    sites: list[SiteObservation]
    inputs: dict[int, torch.Tensor]
    output: torch.Tensor | None


def padded(ids: torch.Tensor) -> torch.Tensor:
    """Return a mask [B, S] that makes padding of the ends of two prompts."""
    rows, length = ids.shape
    lengths = torch.full((rows, 1), length)
    lengths[rows // 2], lengths[rows - 1] = length - length // 4, (length + 1) // 2
    return (torch.arange(length) < lengths).long().to(ids.device)


def run(
    model: nn.Module,
    sites: Sequence[Site],
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    **arguments: Any,
) -> Seen:
    """Run the model on ids [B, S], without padding where there is no mask."""
    inputs: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        taps = stack.enter_context(tap(sites))
        for number, site in enumerate(sites):
            stack.callback(_keep_input(site.router, inputs, number))
        given = torch.ones_like(ids) if mask is None else mask
        output = model(input_ids=ids, attention_mask=given, use_cache=False, **arguments)
        return Seen(taps.take(), inputs, _output(output, ids))


def check_rows(
    model: nn.Module, sites: Sequence[Site], ids: torch.Tensor, mask: torch.Tensor, batch: Seen
) -> None:
    """Compare a padded batch with two of its prompts alone, row by row, at every site.

    Of one prompt only the beginning runs alone: in a causal model its rows are the same. Where the
    model's own output is not, as in encoders, the whole prompt is compared instead.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    ids : Tensor [B, S]
        Plain tokens.
    mask : Tensor [B, S]
        From :func:`padded`.
    batch : Seen
        Of these.

    Raises
    ------
    SiteError
        If rows come in another order, or depend on what else is in the batch.
    """
    rows, length = ids.shape
    together = _vectors(sites, batch, ids.numel())
    for row, cut in ((rows - 1, 0), (rows // 2, 1)):
        whole = int(mask[row].sum())
        for kept in dict.fromkeys((max(1, whole - cut), whole)):
            alone = run(model, sites, ids[row : row + 1, :kept])
            here = slice(row * length, row * length + kept)
            if batch.output is None or alone.output is None:
                break
            if _is_same(batch.output[here], alone.output):
                break
        single = _vectors(sites, alone, kept)
        differs = _first_difference(sites, together, single, here)
        if differs is not None:
            raise SiteError(
                f"{differs.info.module}: the rows of a padded batch should be those of each "
                "prompt alone, in the order [prompt, token], but they are not: they come in "
                "another order, or a token's routing depends on the other prompts. Such a "
                "model cannot be recorded token by token."
            )


def heeds_left_padding(
    model: nn.Module, sites: Sequence[Site], ids: torch.Tensor, **positions: bool
) -> bool:
    """Whether a prompt that is padded on its left, as for decoding, is routed as it is alone.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    ids : Tensor [B, S]
        Plain tokens.
    **positions : bool
        ``position_ids=True`` where the model takes them.
    """
    rows, length = ids.shape
    mask = torch.ones_like(ids)
    mask[-1, : length // 2] = 0
    given = {
        name: (mask.cumsum(-1) - 1).clamp_min(0) for name, is_taken in positions.items() if is_taken
    }
    batch = run(model, sites, ids, mask, **given)
    alone = run(model, sites, ids[-1:, length // 2 :])
    here = slice((rows - 1) * length + length // 2, rows * length)
    together = _vectors(sites, batch, ids.numel())
    single = _vectors(sites, alone, length - length // 2)
    return _first_difference(sites, together, single, here) is None


def _first_difference(
    sites: Sequence[Site],
    together: list[list[torch.Tensor]],
    alone: list[list[torch.Tensor]],
    here: slice,
) -> Site | None:
    """Return the first site whose rows ``here`` of a batch are not those of a prompt alone."""
    for site, inside, single in zip(sites, together, alone, strict=True):
        if not all(_is_same(a[here], b) for a, b in zip(inside, single, strict=True)):
            return site
    return None


def _vectors(sites: Sequence[Site], seen: Seen, n_rows: int) -> list[list[torch.Tensor]]:
    """Return each site's weights by expert [R, E + 1] and router input [R, D]."""
    vectors = []
    for number, (site, observation) in enumerate(zip(sites, seen.sites, strict=True)):
        found = [_weights(site, observation)]
        found += [seen.inputs[number]] if number in seen.inputs else []
        if any(len(rows) != n_rows for rows in found):
            raise SiteError(
                f"{site.info.module}: {n_rows} rows (prompts x tokens, padding included) were "
                f"expected, but it ran on {min(map(len, found))}. Such a site cannot be recorded."
            )
        vectors.append(found)
    return vectors


def _keep_input(
    router: nn.Module, inputs: dict[int, torch.Tensor], number: int
) -> Callable[[], None]:
    """Keep a copy of the router's input as rows [R, D]; returns what ends it."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            # a copy: the block may go on to write into this tensor
            inputs[number] = probe.flat_rows(hidden.detach()).to("cpu", torch.float32, copy=True)

    return router.register_forward_pre_hook(keep, with_kwargs=True).remove


def _weights(site: Site, seen: SiteObservation) -> torch.Tensor:
    """Return the weights by expert [R, E + 1]; the last column takes empty slots."""
    ids, weights = seen.expert_ids.cpu().long(), seen.weights.float().cpu()
    dense = torch.zeros(len(ids), site.info.n_experts + 1)
    return dense.scatter(1, ids % dense.shape[1], weights)


def _output(output: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the first tensor [B, S, ...] that a model put out, as rows."""
    if isinstance(output, torch.Tensor):
        output = (output,)
    values = output if isinstance(output, tuple | list) else getattr(output, "to_tuple", tuple)()
    for value in values:
        if (
            isinstance(value, torch.Tensor)
            and value.shape[:2] == ids.shape
            and value.ndim > ids.ndim
        ):
            return value.float().cpu().flatten(0, 1)
    return None


def _is_same(among: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether rows [n, ...] are the same ones in the same order."""
    among, alone = among.flatten(1), alone.flatten(1)
    own = (among - alone).norm(dim=-1)
    others = torch.cdist(among, alone, compute_mode="donot_use_mm_for_euclid_dist").median(dim=-1)
    slack = NOTHING * float(alone.abs().max()) * alone.shape[-1] ** 0.5
    return float((own <= NEAR * others.values + slack).float().mean()) >= ENOUGH
