"""What routers did with the batches of a training step: sums on the device, figures on the host."""

import json
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from capture.model.sites import Site
from capture.recorder.observe import SiteGroup
from capture.recorder.own_loop.listening import Seen
from capture.store.records import Array
from kernels.ops.gate import gate_batch

REAL, PADDING = 0, 1
Figures = dict[str, float]


class GroupSums(NamedTuple, Generic[Array]):
    """Sums of S routers of one shape over the tokens of a step; [., 0] real ones, [., 1] padding.

    Attributes
    ----------
    load : array [S, 2, E], assignments
    importance : array [S, 2, E] or None
        Sums of probabilities; None where the routers' scores are not known.
    entropy, squares : array [S] or None
        Sums over real tokens of the gate entropy (nats) and of logsumexp squared.
    tokens : array [2]
    """

    load: Array
    importance: Array | None
    entropy: Array | None
    squares: Array | None
    tokens: Array


Sums = list[GroupSums[torch.Tensor]]


@torch.no_grad()
def sums_of(seen: Seen, groups: Sequence[SiteGroup]) -> Sums:
    """Return the sums of one call; nothing waits for the device."""
    valid = seen.call.valid
    n_rows = seen.call.rows * seen.call.width
    found = []
    for group in groups:
        picked = [seen.sites[i] for i in group.members]
        device = picked[0].expert_ids.device
        real = torch.ones(n_rows, dtype=torch.bool, device=device)
        if valid is not None:
            real = valid.flatten().to(device, non_blocking=True)
        scores = [one.scores for one in picked if one.scores is not None]
        with torch.autocast(device.type, enabled=False):
            out = gate_batch(
                scores if len(scores) == len(picked) else None,
                expert_ids=[one.expert_ids for one in picked],
                weights=[one.weights for one in picked],
                rows=None,
                n_experts=group.n_experts,
                top_k=group.top_k,
                score_function=group.score_function,
                segments=(~real).long(),
                n_segments=2,
                importance=True,
            )
        squares = None
        if out.logsumexp is not None and group.logsumexp_known:
            squares = torch.where(real, out.logsumexp.square(), 0.0).sum(-1)
        found.append(
            GroupSums(
                load=out.load,
                importance=out.importance,
                entropy=None if out.entropy is None else torch.where(real, out.entropy, 0).sum(-1),
                squares=squares,
                tokens=torch.stack([real.sum(), n_rows - real.sum()]),
            )
        )
    return found


def added(sums: Sums | None, more: Sums) -> Sums:
    """Add the sums of two calls."""
    if sums is None:
        return more

    def plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None or other is None else one + other

    return [
        GroupSums(*(plus(a, b) for a, b in zip(one, other, strict=True)))  # type: ignore[arg-type]
        for one, other in zip(sums, more, strict=True)
    ]


def figures_of(
    sums: Sequence[GroupSums[npt.NDArray[Any]]], groups: Sequence[SiteGroup], sites: Sequence[Site]
) -> tuple[Figures, list[dict[str, Any]]]:
    """Return the figures of a step: over all routers, and of each.

    Returns
    -------
    figures : dict
        Means over the routers: ``max_violation`` (busiest expert's excess, fair shares),
        ``load_entropy`` (share of ln E), ``gate_entropy`` (nats), ``z_loss`` (mean square of
        logsumexp); ``dead_experts``, how many took no token, of all routers together; and
        ``aux_loss``, the load-balancing loss as transformers computes it over all routers, with
        ``aux_loss_with_padding``, what it is where padding counts. What is not known is left out.
    routers : list of dict
        ``layer``, ``site``, ``load`` (E counts) and the same figures.

    References
    ----------
    Fedus et al. 2021, arXiv:2101.03961, eq. 4-6; Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    routers: list[dict[str, Any]] = []
    pooled: dict[str, list[float]] = {}
    for group, one in zip(groups, sums, strict=True):
        n_real, n_all = float(one.tokens[REAL]), float(one.tokens.sum())
        if not n_real:
            continue
        for place, index in enumerate(group.members):
            info = sites[index].info
            load = one.load[place, REAL].astype(np.float64)
            here: dict[str, Any] = {"layer": info.layer, "site": info.site}
            here["load"] = one.load[place, REAL].tolist()
            here |= _balance(load)
            if one.entropy is not None:
                here["gate_entropy"] = float(one.entropy[place]) / n_real
            if one.squares is not None:
                here["z_loss"] = float(one.squares[place]) / n_real
            if one.importance is not None:
                importance = one.importance[place].astype(np.float64)
                here["aux_loss"] = _aux_loss(load, importance[REAL], n_real)
                both = one.load[place].sum(axis=0).astype(np.float64)
                here["aux_loss_with_padding"] = _aux_loss(both, importance.sum(axis=0), n_all)
            routers.append(here)
        if one.importance is not None:
            n_sites = len(group.members)
            load, importance = one.load.sum(axis=0), one.importance.sum(axis=0)
            pooled.setdefault("aux_loss", []).append(
                _aux_loss(load[REAL], importance[REAL], n_real * n_sites)
            )
            pooled.setdefault("aux_loss_with_padding", []).append(
                _aux_loss(load.sum(axis=0), importance.sum(axis=0), n_all * n_sites)
            )
    routers.sort(key=lambda router: (router["layer"], router["site"]))
    figures: Figures = {}
    for name in ("max_violation", "load_entropy", "gate_entropy", "z_loss"):
        values = [router[name] for router in routers if name in router]
        if values:
            figures[name] = float(np.mean(values))
    if routers:
        figures["dead_experts"] = float(sum(router["dead_experts"] for router in routers))
    # routers of different shapes have no common one
    figures |= {name: values[0] for name, values in pooled.items() if len(groups) == 1}
    return figures, routers


def _balance(load: npt.NDArray[np.float64]) -> dict[str, float]:
    share = load / load.sum() if load.sum() else load
    used = share[share > 0]
    n_experts = len(load)
    entropy = float(-(used * np.log(used)).sum())
    return {
        "max_violation": float(share.max() * n_experts - 1),
        "load_entropy": entropy / np.log(n_experts) if n_experts > 1 else 1.0,
        "dead_experts": int((load == 0).sum()),
    }


def _aux_loss(load: npt.NDArray[Any], importance: npt.NDArray[Any], n_tokens: float) -> float:
    """Return E times the sum over experts of assignments a token times mean probability."""
    product = (load.astype(np.float64) / n_tokens) * (importance.astype(np.float64) / n_tokens)
    return float(len(load) * product.sum())


def as_line(step: int, figures: Figures, routers: Sequence[dict[str, Any]]) -> str:
    """Write the figures of a step as one line of JSON; what is no number is left out."""

    def numbers(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in values.items()
            if not isinstance(value, float) or np.isfinite(value)
        }

    rows = [numbers(router) for router in routers]
    return json.dumps({"step": step, **numbers(figures), "routers": rows}) + "\n"
