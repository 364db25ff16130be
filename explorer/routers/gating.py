"""Gating-based rules: a number between 0 and 1 in front of each head, layer or expert."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from capture.swap.rules import Decision, PartMask, RouterInputs
from explorer.errors import RouterError
from explorer.routers.contract import PartRouter, registered
from explorer.routers.heads_and_layers import check_keep, quantile_threshold
from explorer.routers.learning.imitation import BATCH_TOKENS, LEARNING_RATE, STEPS, distill, seeded
from explorer.routers.scores import target_importance

Kind = Literal["sigmoid", "hard_concrete"]
Mode = Literal["skip", "modulate"]

# Louizos et al. 2018, arXiv:1712.01312, section 4: temperature and the interval it is stretched to
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(log_alpha: torch.Tensor, *, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """Return hard-concrete gates, which reach 0 and 1 exactly and still have a gradient between.

    Parameters
    ----------
    log_alpha : Tensor
        Location of each gate.
    uniform : Tensor, optional
        Random numbers in (0, 1) of the same shape, for training; None = the gate used afterwards.

    Returns
    -------
    Tensor, 0..1

    References
    ----------
    Louizos, Welling and Kingma 2018, arXiv:1712.01312, eq. 10-13.
    """
    if uniform is None:
        squashed = log_alpha.sigmoid()
    else:
        squashed = ((uniform.logit(eps=1e-6) + log_alpha) / TEMPERATURE).sigmoid()
    return (squashed * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def straight_through(gate: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Return 0 or 1 by the threshold, with the gradient of the gate itself.

    References
    ----------
    Bengio, Leonard and Courville 2013, arXiv:1308.3432; as Router-Tuning (2410.13184) uses it.
    """
    hard = (gate >= threshold).to(gate.dtype)
    # the bracket is exactly 0
    return hard + (gate - gate.detach())


@dataclass(kw_only=True, eq=False)
class _PartGate(PartRouter):
    """A gate for each part, from a linear map of the token.

    Parameters
    ----------
    kind : {"sigmoid", "hard_concrete"}
        How a logit becomes a gate.
    mode : {"skip", "modulate"}
        Whether a gate decides if the part runs, or multiplies its output.
    keep : float, optional
        Share of (token, part) pairs of the fit split that run with ``mode="skip"``; None = those
        whose gate is at least ``threshold``.
    threshold : float
    steps, seed : int
        Of the fit, whose target is the importance of each part for the token. To train the gates
        on the model's loss instead, use ``network`` and ``straight_through`` while it runs.
    """

    kind: Kind = "sigmoid"
    mode: Mode = "skip"
    keep: float | None = 0.75
    threshold: float = 0.5
    steps: int = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        if self.kind not in ("sigmoid", "hard_concrete") or self.mode not in ("skip", "modulate"):
            raise RouterError(
                "Expected kind 'sigmoid' or 'hard_concrete' and mode 'skip' or 'modulate', got "
                f"{self.kind!r} and {self.mode!r}."
            )
        self.keep = None if self.keep is None else check_keep(self.keep)

    def network(self, d: int, n_parts: int) -> nn.Linear:
        """Make the map from tokens to logits, with gates that start open."""

        def make() -> nn.Linear:
            linear = nn.Linear(d, n_parts)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.constant_(linear.bias, 2.0)
            return linear

        return seeded(make, self.seed)

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the gates of logits, [T, P], 0..1, before anything is skipped."""
        return logits.sigmoid() if self.kind == "sigmoid" else hard_concrete(logits)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").float()
        importance = target_importance(target, self.part)
        network = self.network(hidden.shape[-1], importance.shape[-1])
        generator = torch.Generator().manual_seed(self.seed)

        def loss(rows: torch.Tensor) -> torch.Tensor:
            logits, wanted = network(hidden[rows]), importance[rows]
            if self.kind == "sigmoid":
                return nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            drawn = torch.rand(logits.shape, generator=generator)
            return nn.functional.mse_loss(hard_concrete(logits, uniform=drawn), wanted)

        self.losses_ = distill(
            list(network.parameters()),
            loss,
            len(hidden),
            steps=self.steps,
            batch_tokens=BATCH_TOKENS,
            learning_rate=LEARNING_RATE,
            seed=self.seed,
        )
        self.network_ = network
        self.cut_ = self.threshold
        if self.keep is not None:
            with torch.no_grad():
                # on logits: gates may be 0 or 1 for many tokens, which no quantile can divide
                self.cut_ = quantile_threshold(network(hidden), self.keep)

    def _route(self, inputs: RouterInputs) -> PartMask:
        logits = self.network_(inputs.tensor("hidden").float())
        gate = self.gates(logits)
        if self.mode == "skip":
            gate = ((gate if self.keep is None else logits) >= self.cut_).float()
        return PartMask(self.part, gate)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of one logit per part; heads are taken as four before the fit."""
        parts = {"layer": 1, "head": 4, "expert": n_experts}[self.part]
        return 2.0 * d * (self.network_.out_features if self.fitted else parts)


@registered("layer_gate")
class LayerGateRouter(_PartGate):
    """Decide for each token whether the layer runs."""

    part = "layer"


@registered("head_gate")
class HeadGateRouter(_PartGate):
    """Decide for each token which heads run, with gates that can close entirely.

    Notes
    -----
    Differs from the source, whose gates belong to heads: here they depend on the token.
    """

    part = "head"
    kind: Kind = "hard_concrete"


@registered("expert_gate")
class ExpertGateRouter(_PartGate):
    """Multiply each expert's weight by a gate of its own."""

    part = "expert"
    mode: Mode = "modulate"
    keep: float | None = None
