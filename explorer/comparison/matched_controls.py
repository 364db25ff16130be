"""The two random controls that stand beside every router that changes how much is computed."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from capture.store.records import Place
from explorer.comparison.fit import Fitted
from explorer.comparison.live import LiveModel, Outcome, SiteSums
from explorer.routers import ROUTERS, PartMask, Router, RouterInputs
from explorer.routers.controls import MatchedRandomRouter

ControlKind = Literal["equal_compute", "matched_per_layer"]
# differences below are rounding of a share over tokens
SAME = 1e-3
NATIVE = "native"


class Control(NamedTuple):
    """A control that can run.

    Attributes
    ----------
    kind : {"equal_compute", "matched_per_layer"}
        The same mean over all layers, or the same counts layer by layer.
    label : str
        How it is called in tables.
    fitted : Fitted
    """

    kind: ControlKind
    label: str
    fitted: Fitted


def controls_of(
    label: str,
    fitted: Fitted,
    outcome: Outcome,
    live: LiveModel,
    seed: int,
    *,
    only: Place | None = None,
) -> list[Control]:
    """Return the controls of a router, none where every token gets as much as in the model.

    A rule that gives all tokens as many experts as the model does stands beside router ``random``;
    one whose tokens differ has controls of its own, whatever its mean is.

    Parameters
    ----------
    label : str
        Of the router.
    fitted : Fitted
    outcome : Outcome
        Its run: controls copy the compute that was measured there.
    live : LiveModel
    seed : int
    only : (layer, site), optional
        The one that was swapped. Both kinds are the same there, so that one of them is enough.
    """
    if fitted.router.info.family == "control" or fitted.router.info.name == NATIVE:
        return []
    if fitted.part == "expert":
        native = live.native.experts
        made = _of_experts(outcome, native if only is None else {only: native[only]}, seed)
    else:
        made = _of_parts(outcome, seed)
    if only is not None and len(made) > 1:
        del made["equal_compute"]
    return [
        Control(kind, f"{_TITLES[kind]} for {label}", fitted._replace(
            routers=routers, attention=False, fit_tokens=0, seconds=0.0, curves=[]))
        for kind, routers in made.items()
    ]  # fmt: skip


_TITLES: dict[ControlKind, str] = {
    "equal_compute": "random",
    "matched_per_layer": "random matched per layer",
}


def _of_experts(
    outcome: Outcome, native: Mapping[Place, float], seed: int
) -> dict[ControlKind, dict[Place, Router]]:
    """Return controls that run as many experts at the sites of ``native``.

    Where a rule decides how many experts a token gets, chance decides that, and takes the model's
    best. Where it gives all tokens the same number, chance decides which; layer by layer that is
    the same control once more.
    """
    sums = outcome.sums
    mean = sum(outcome.experts[key] for key in native) / len(native)
    constant = {tuple(np.flatnonzero(sums[key].counts).tolist()) for key in native}
    fixed = len(constant) == 1 and len(next(iter(constant))) == 1
    if fixed and all(abs(outcome.experts[key] - native[key]) < SAME for key in native):
        return {}
    equal: Any = {
        "experts_per_token": round(mean) if fixed else mean,
        "choose": "random" if fixed else "best",
        "seed": seed,
    }
    made: dict[ControlKind, dict[Place, Router]] = {
        "equal_compute": dict.fromkeys(native, ROUTERS["random"](**equal))
    }
    if not fixed:
        matched = {key: MatchedRandomRouter(seed=seed).match(_counts(sums[key])) for key in sums}
        made["matched_per_layer"] = {**matched}
    return made


def _counts(sums: SiteSums) -> torch.Tensor:
    return torch.from_numpy(sums.counts)


def _of_parts(outcome: Outcome, seed: int) -> dict[ControlKind, dict[Place, Router]]:
    """Use as many parts of a layer as the rule does, drawn by chance."""
    gates = outcome.gates
    share = sum(float((g > 0).float().mean()) for g in gates.values()) / max(1, len(gates))
    if not gates or share > 1 - SAME:
        return {}
    kinds: dict[ControlKind, float | None] = {"equal_compute": share, "matched_per_layer": None}
    made: dict[ControlKind, dict[Place, Router]] = {}
    for kind, keep in kinds.items():
        made[kind] = {}
        for layer, gate in gates.items():
            part: Any = "head" if gate.shape[-1] > 1 else "layer"
            control = ROUTERS["random_parts"](keep=keep, part=part, seed=seed)
            # the control learns rates from gates; tokens only have to be as many
            tokens = torch.arange(len(gate))
            inputs = RouterInputs(
                layer=layer,
                n_experts=1,
                top_k=1,
                score_function="other",
                token_ids=tokens,
                starts=tokens == 0,
            )
            made[kind][layer, 0] = control.fit(inputs, PartMask(part, (gate > 0).float()))
    return made
