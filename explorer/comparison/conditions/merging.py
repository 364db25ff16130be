"""Merging: experts that the router treats alike become one, averaged by how much each is used."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from capture.model.flops import expert_parameters
from capture.store.records import Place
from capture.swap.routers import site_key
from explorer.comparison.conditions.calibration import SeenSite, collect
from explorer.comparison.conditions.condition import (
    CONDITIONS,
    Applied,
    ConditionInfo,
    PartsKept,
    Subject,
)
from explorer.comparison.conditions.expert_pruning import CALIBRATION_TOKENS, load_of
from explorer.comparison.conditions.weights import STACK, replaced
from explorer.errors import ConditionError
from explorer.routers.scores import host_logits

PAIR = ("gate_up_proj", "down_proj")


@CONDITIONS.add("merge")
@dataclass(eq=False)
class MergedExperts(PartsKept):
    """Merge experts into the most used ones, which the router goes on to call by all their names.

    Parameters
    ----------
    keep : float
        Experts left, as a share over all layers together.
    align : bool
        Bring the neurons of merged experts into the order in which they fit best, first.
    seed : int
        Draws the calibration texts.

    Notes
    -----
    The global variant: the cores are the most used experts of all layers together, by their share
    of their own layer's load, with at least one in each. An expert joins the core of its layer
    whose logits are most like its own. Experts are taken by usage, not by their number, which the
    source's variant within layers confuses.
    """

    info = ConditionInfo(
        name="merge",
        kind="merging",
        title="Merged experts (MC-SMoE)",
        summary=(
            "The most used experts stay as cores; every other one is averaged into the core whose "
            "router logits are most like its own, weighed by usage."
        ),
        formula="W_core = sum_{e in group} n_e W_e / sum n_e;  group by cos(z_e, z_core)",
        paper="2310.01334",
        calibrated=True,
    )

    _: KW_ONLY
    align: bool = True

    @property
    def label(self) -> str:
        """Name and share, such as ``merge 75%``."""
        return super().label + ("" if self.align else " unaligned")

    def _open(self, subject: Subject, applied: Applied) -> AbstractContextManager[Any]:
        texts = subject.calibration_tokens()
        seen = collect(subject, texts, tokens=CALIBRATION_TOKENS, seed=self.seed)
        usage = {
            key: load_of(one.inputs.decision(), one.inputs.n_experts).double()
            for key, one in seen.items()
        }
        groups = find_groups(seen, usage, self.keep)
        changes: dict[nn.Parameter, torch.Tensor] = {}
        for site in subject.sites:
            key = site_key(site)
            weights = expert_parameters(site)
            if any(p.ndim != STACK for p in weights):
                raise ConditionError(
                    f"{site.info.module}: experts in stacks [E, out, in] were expected. This "
                    "family cannot be merged."
                )
            merged = merged_stacks(site.experts, groups[key], usage[key], align=self.align)
            changes |= merged
            gone = site.info.n_experts - len(set(groups[key]))
            size = sum(p.numel() * p.element_size() for p in weights)
            applied.weight_bytes -= size * gone / site.info.n_experts
            applied.chosen[f"layer {site.info.layer}"] = list(groups[key])
        cores = sum(len(set(group)) for group in groups.values())
        applied.method = f"{cores} cores by usage over all layers"
        return replaced(changes)


def find_groups(
    seen: Mapping[Place, SeenSite], usage: Mapping[Place, torch.Tensor], keep: float
) -> dict[Place, tuple[int, ...]]:
    """Return the core that each expert belongs to, by (layer, site)."""
    total = sum(len(used) for used in usage.values())
    wanted = max(round(keep * total), len(usage))
    shares = {key: used / used.sum().clamp_min(1) for key, used in usage.items()}
    # the most used of each layer first, so that none is left without a core
    ranked = sorted(
        ((int(share.argmax()) != e, -float(share[e]), key, e)
         for key, share in shares.items() for e in range(len(share)))
    )  # fmt: skip
    cores: dict[Place, list[int]] = {key: [] for key in usage}
    for _, _, key, e in ranked[:wanted]:
        cores[key].append(e)
    return {key: nearest_cores(host_logits(seen[key].inputs), sorted(cores[key])) for key in usage}


def nearest_cores(logits: torch.Tensor, cores: Sequence[int]) -> tuple[int, ...]:
    """Return for each expert the core whose logits over tokens [T, E] are most like its own."""
    columns = nn.functional.normalize(logits.double(), dim=0)
    similarity = columns.T @ columns[:, list(cores)]  # [E, C]
    nearest = [cores[i] for i in similarity.argmax(dim=-1).tolist()]
    return tuple(e if e in cores else core for e, core in enumerate(nearest))


def merged_stacks(
    experts: nn.Module, groups: Sequence[int], usage: torch.Tensor, *, align: bool
) -> dict[nn.Parameter, torch.Tensor]:
    """Return all stacked weights and biases of experts, each with its group's average.

    Parameters
    ----------
    experts : Module
    groups : sequence of int
        Core of each expert.
    usage : Tensor [E], assignments
    align : bool
    """
    named = {n: p for n, p in experts.named_parameters() if p.shape[0] == len(groups)}
    values = {name: p.data.cpu().clone().float() for name, p in named.items()}
    if align:
        _check_alignable(experts, named)
        for e, core in enumerate(groups):
            if e != core:
                _reorder(values, e, neuron_order(values, core, e))
    # an expert that was never used still counts as a core of its own
    amount = usage.float().clamp_min(1e-6)
    for core in set(groups):
        members = [e for e, own in enumerate(groups) if own == core]
        share = amount[members] / amount[members].sum()
        for stack in values.values():
            average = torch.tensordot(share, stack[members], dims=1)
            stack[members] = average.expand(len(members), *average.shape)
    return {p: values[name].to(p) for name, p in named.items()}


def _check_alignable(experts: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    plain = not getattr(experts, "is_transposed", False) and set(named) == set(PAIR)
    if not plain or named["gate_up_proj"].shape[1] != 2 * named["down_proj"].shape[2]:
        raise ConditionError(
            "Experts of gate_up_proj [E, 2I, D] and down_proj [E, D, I] without biases were "
            f"expected for aligning neurons, got {sorted(named)}. Pass align=False."
        )


def neuron_order(values: Mapping[str, torch.Tensor], core: int, other: int) -> torch.Tensor:
    """Return the order [I] in which an expert's neurons fit best those of the core."""
    gate_up, down = (values[name] for name in PAIR)
    gate, up = gate_up.chunk(2, dim=1)
    similarity = gate[core] @ gate[other].T + up[core] @ up[other].T + down[core].T @ down[other]
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(order)


def _reorder(values: Mapping[str, torch.Tensor], expert: int, order: torch.Tensor) -> None:
    """Put an expert's neurons in another order, which leaves what it computes as it is."""
    gate_up, down = (values[name] for name in PAIR)
    gate, up = gate_up[expert].chunk(2, dim=0)
    gate_up[expert] = torch.cat((gate[order], up[order]))
    down[expert] = down[expert][:, order]
