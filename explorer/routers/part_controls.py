"""Controls of rules about heads and layers: chance, constants, and gates that are always open."""

from dataclasses import replace
from math import ceil, floor
from typing import Any

import torch

from explorer.errors import RouterError
from explorer.routers.base import (
    ROUTERS,
    Decision,
    Part,
    PartMask,
    PartRouter,
    RouterInfo,
    RouterInputs,
)
from explorer.routers.parts import check_keep
from explorer.routers.scores import target_importance
from explorer.routers.sequences import token_keys, uniform


class _PartControl(PartRouter):
    """A control of rules about parts, which learns the kind and number of parts from its target.

    Parameters
    ----------
    keep : float, optional
        Share of the parts that a token uses; None = as often as in the target of fit.
    seed : int
    """

    part: Part = "head"

    def __init__(self, *, keep: float | None = 0.75, part: Part = "head", seed: int = 0) -> None:
        self.keep = None if keep is None else check_keep(keep)
        self.part = part
        self.seed = seed

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        gate = target_importance(target, self.part)
        n_parts = gate.shape[-1]
        if self.keep is None:
            shares = (gate > 0).sum(dim=-1).bincount(minlength=n_parts + 1).double()
        else:
            mean = self.keep * n_parts
            shares = torch.zeros(n_parts + 1, dtype=torch.float64)
            shares[floor(mean)] = 1 - (mean - floor(mean))
            shares[ceil(mean)] += mean - floor(mean)
        # share of tokens that use at most 0, 1, ... P - 1 parts
        self.at_most_ = (shares / shares.sum()).cumsum(dim=0)[:-1]
        self.mean_ = gate.mean(dim=0)

    def _gate(self, inputs: RouterInputs, order: torch.Tensor) -> PartMask:
        drawn = uniform(token_keys(inputs, self.seed, 2), 1)
        used = (drawn >= self.at_most_.to(drawn.device)).float()  # [T, P], ones first
        best = order.sort(dim=-1, descending=True, stable=True).indices
        return PartMask(self.part, torch.zeros_like(used).scatter(-1, best, used))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0


def _control(name: str, title: str, summary: str, formula: str) -> dict[str, Any]:
    return {
        "name": name,
        "family": "control",
        "title": title,
        "summary": summary,
        "formula": formula,
        "paper": "",
        "needs": frozenset({"token_ids", "starts"}),
        "fits": "statistics",
        "identity": {"keep": 1.0},
    }


@ROUTERS.add("random_parts")
class RandomPartRouter(_PartControl):
    """Choose heads, or whether a layer runs, by chance, as often as told in each layer."""

    info = RouterInfo(
        **_control(
            "random_parts",
            "Random parts",
            "Heads or layers are drawn at random, at the rate of the rule that it stands beside.",
            "parts = n drawn without replacement",
        )
    )

    def _route(self, inputs: RouterInputs) -> PartMask:
        return self._gate(inputs, uniform(token_keys(inputs, self.seed, 1), len(self.mean_)))


@ROUTERS.add("static_parts")
class StaticPartRouter(_PartControl):
    """Give every token the parts that matter most on average."""

    info = RouterInfo(
        **_control(
            "static_parts",
            "Static best parts",
            "All tokens use the same heads or layers: those with the highest mean importance.",
            "parts = the n with the largest mean importance",
        )
    )

    def _route(self, inputs: RouterInputs) -> PartMask:
        return self._gate(inputs, self.mean_.expand(inputs.n_tokens, -1))


@ROUTERS.add("constant_gate")
class ConstantGateRouter(PartRouter):
    """Multiply every part by the same number.

    Parameters
    ----------
    value : float, 0..1
        1 changes nothing, which is how a host of gates is tested; 0 removes the parts.
    part : {"head", "layer", "expert"}
    n_parts : int, optional
        Needed for heads; a layer is one part, and experts are known.
    """

    info = replace(
        RandomPartRouter.info,
        name="constant_gate",
        title="Constant gate",
        summary="Multiplies every part by one number. At 1 the model must not change at all.",
        formula="g = value",
        needs=frozenset(),
        fits=None,
        identity={"value": 1.0},
    )

    def __init__(
        self, *, value: float = 1.0, part: Part = "layer", n_parts: int | None = None
    ) -> None:
        if part == "head" and n_parts is None:
            raise RouterError(
                "Expected n_parts for heads: the router cannot see how many there are."
            )
        self.value = check_keep(value)
        self.part = part
        self.n_parts = n_parts

    def _route(self, inputs: RouterInputs) -> PartMask:
        known = inputs.n_experts if self.part == "expert" else 1
        gate = torch.full((inputs.n_tokens, self.n_parts or known), self.value)
        return PartMask(self.part, gate)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return 0: nothing is computed."""
        return 0.0
