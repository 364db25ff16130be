"""Heads and layers chosen by attention: keys of parts, and attention that tokens receive."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import nn

from capture.store.records import Place
from capture.swap.rules import Decision, PartMask, RouterInputs
from explorer.errors import RouterError
from explorer.routers.attention import KeyAttention
from explorer.routers.contract import AcrossLayers, PartRouter, registered
from explorer.routers.learning.imitation import (
    BATCH_TOKENS,
    LEARNING_RATE,
    STEPS,
    distill,
    learn_shares,
    seeded,
)
from explorer.routers.scores import target_importance
from explorer.routers.selectors import SELECTOR_DECIDES, Selector, TopK, chosen_formula
from explorer.routers.sequences import choose_tokens, sequence_rows, with_selector


def check_keep(keep: float) -> float:
    """Return a share of parts or tokens to keep, if it is one."""
    if not 0 <= keep <= 1:
        raise RouterError(f"Expected 0 <= keep <= 1, got {keep}; 0.75 skips a quarter.")
    return keep


def quantile_threshold(scores: torch.Tensor, keep: float) -> float:
    """Return the threshold that a share ``keep`` of the scores reaches."""
    ordered = scores.flatten().sort(descending=True).values
    kept = round(keep * len(ordered))
    if kept == 0:
        return float("inf")
    if kept == len(ordered):
        return -float("inf")
    return float(ordered[kept - 1] + ordered[kept]) / 2


@registered("head_attention")
class HeadAttentionRouter(PartRouter):
    """Choose attention heads by the token's query against a learned key of each head.

    Parameters
    ----------
    keep : float
        Share of the heads that each token uses, rounded up to whole heads.
    selector : Selector, optional
        Another way to choose, on shares that sum to 1; replaces ``keep``.
    rank : int
        Width of query and keys.
    steps, seed : int
        Of the fit, whose target is each head's share of the heads' output norms.
    """

    part = "head"
    keep: float = 0.75
    selector: Selector | None = None
    rank: int = 16
    steps: int = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = check_keep(self.keep)
        if self.selector is not None:
            formula = chosen_formula(self.info.formula, self.selector)
            self.info = replace(self.info, formula=formula, identity=SELECTOR_DECIDES)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").float()
        importance = target_importance(target, self.part)
        width, n_parts = hidden.shape[-1], importance.shape[-1]
        network = seeded(lambda: KeyAttention(width, n_parts, self.rank), self.seed)
        self.losses_ = learn_shares(network, hidden, importance, steps=self.steps, seed=self.seed)
        self.network_ = network

    def attention(self, inputs: RouterInputs) -> torch.Tensor:
        """Return each token's attention over the heads, [T, H], rows sum to 1."""
        logits: torch.Tensor = self.network_(inputs.tensor("hidden").float())
        return logits.softmax(dim=-1)

    def _route(self, inputs: RouterInputs) -> PartMask:
        attention = self.attention(inputs)
        heads = attention.shape[-1]
        selector = self.selector or TopK(max(1, ceil(self.keep * heads - 1e-9)))
        return PartMask(self.part, selector.mask(attention).float())

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the query and of the heads' keys; four heads before the fit."""
        n_heads = len(self.network_.keys) if self.fitted else 4
        return 2.0 * self.rank * (d + n_heads)


class LayerKeys(nn.Module):
    """One query for all layers, and a key and a bias of each layer.

    Parameters
    ----------
    d, n_layers, rank : int
    """

    def __init__(self, d: int, n_layers: int, rank: int) -> None:
        super().__init__()
        self.scale = rank**-0.5
        self.query = nn.Linear(d, rank, bias=False)
        self.keys = nn.Parameter(torch.randn(n_layers, rank))
        self.bias = nn.Parameter(torch.zeros(n_layers))

    def forward(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the logit of running one layer, [T]."""
        logit: torch.Tensor = self.query(hidden) @ self.keys[layer] * self.scale
        return logit + self.bias[layer]


@dataclass(kw_only=True, eq=False)
class _KeptTokens(PartRouter):
    """A rule that runs a layer for a share of the tokens, or for those that a selector takes.

    Parameters
    ----------
    keep : float
    selector : Selector, optional
        Another way to choose; replaces ``keep``. See
        :func:`explorer.routers.sequences.choose_tokens`.
    """

    part = "layer"
    keep: float = 0.75
    selector: Selector | None = None

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = check_keep(self.keep)
        self.info = with_selector(self.info, self.selector)


@registered("layer_attention")
class LayerAttentionRouter(_KeptTokens, AcrossLayers):
    """Run a layer for the tokens whose query meets the layer's key.

    Parameters
    ----------
    keep : float
        Share of (token, layer) pairs that run, over all layers together: the layers compete.
    selector : Selector, optional
        Another way to choose, on ``a_l``, 0..1; replaces ``keep``. See
        :func:`explorer.routers.sequences.choose_tokens`.
    rank : int
        Width of query and keys.
    steps, seed : int
        Of the fit, whose target is each layer's importance for the token.

    Notes
    -----
    With ``keep`` a token decides alone, by a threshold from the fit split. A selector that takes a
    sequence's best tokens instead, as mixture-of-depths does in training, looks at later ones.
    """

    rank: int = 16
    steps: int = STEPS
    seed: int = 0

    def fit_across(
        self, inputs: Mapping[Place, RouterInputs], targets: Mapping[Place, Decision]
    ) -> None:
        """Learn one query and all keys from the same tokens in several layers."""
        places = sorted(inputs)
        hidden = [inputs[place].tensor("hidden").float() for place in places]
        wanted = [target_importance(targets.get(place), self.part)[:, 0] for place in places]
        network = seeded(lambda: LayerKeys(hidden[0].shape[-1], len(places), self.rank), self.seed)

        def loss(rows: torch.Tensor) -> torch.Tensor:
            logits = torch.stack([network(h[rows], at) for at, h in enumerate(hidden)])
            truth = torch.stack([importance[rows] for importance in wanted])
            return nn.functional.binary_cross_entropy_with_logits(logits, truth)

        self.losses_ = distill(
            list(network.parameters()),
            loss,
            len(hidden[0]),
            steps=self.steps,
            batch_tokens=BATCH_TOKENS,
            learning_rate=LEARNING_RATE,
            seed=self.seed,
        )
        self.network_, self.places_ = network, places
        with torch.no_grad():
            logits = torch.cat([network(h, at) for at, h in enumerate(hidden)])
        self.threshold_ = quantile_threshold(logits, self.keep)

    def _route(self, inputs: RouterInputs) -> PartMask:
        if inputs.place not in self.places_:
            raise RouterError(
                f"Router {self.info.name!r} has no key of layer {inputs.layer}. "
                "Fit it on all layers with fit_layers."
            )
        at = self.places_.index(inputs.place)
        logits = self.network_(inputs.tensor("hidden").float(), at)
        if self.selector is not None:
            return PartMask(self.part, choose_tokens(logits.sigmoid(), self.selector, inputs))
        return PartMask(self.part, (logits >= self.threshold_).float().unsqueeze(-1))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the query and of one key."""
        return 2.0 * (d + 1) * self.rank


@registered("attention_received")
class AttentionReceivedRouter(_KeptTokens):
    """Run a layer for the tokens of a sequence that receive most attention.

    Parameters
    ----------
    keep : float
        Share of each sequence's tokens, rounded up.
    selector : Selector, optional
        Another way to choose, on what a token receives; replaces ``keep``. Every query of a
        sequence gives 1 in all, so that the mean token receives 1: ``Threshold(1.0)`` keeps those
        above the mean. See :func:`explorer.routers.sequences.choose_tokens`.

    Notes
    -----
    Published for images. In a model that reads from left to right, later tokens decide how much
    attention a token receives, so the rule cannot be used while generating.
    """

    def _route(self, inputs: RouterInputs) -> PartMask:
        received = inputs.tensor("received").float()
        if self.selector is not None:
            return PartMask(self.part, choose_tokens(received, self.selector, inputs))
        gate = torch.zeros(len(received), 1, device=received.device)
        for rows in sequence_rows(inputs):
            best = received[rows].sort(descending=True, stable=True).indices
            gate[rows[best[: ceil(self.keep * len(rows) - 1e-9)]]] = 1.0
        return PartMask(self.part, gate)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of summing what a token receives, some thousand queries at most."""
        return 2048.0


@registered("attention_given")
class AttentionGivenRouter(_KeptTokens):
    """Run a layer for the tokens whose own attention row looks as if it mattered.

    Parameters
    ----------
    keep : float
        Share of the fit split's tokens.
    selector : Selector, optional
        Another way to choose, on the share of the fit split's tokens that score lower, 0..1;
        replaces ``keep``. ``Threshold(0.25)`` keeps about 75% of the tokens. See
        :func:`explorer.routers.sequences.choose_tokens`.
    statistic : str
        Which statistic of a token's own row of attention decides.
    highest : bool
        Whether the tokens with the highest or the lowest values run the layer.
    """

    statistic: str = "entropy"
    highest: bool = True

    def _scores(self, inputs: RouterInputs) -> torch.Tensor:
        values = inputs.statistic(self.statistic).float()
        return values if self.highest else -values

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        scores = self._scores(inputs)
        self.threshold_ = quantile_threshold(scores, self.keep)
        self.recorded_ = scores.sort().values

    def _route(self, inputs: RouterInputs) -> PartMask:
        scores = self._scores(inputs)
        if self.selector is not None:
            lower = torch.searchsorted(self.recorded_.to(scores.device), scores.contiguous())
            share = lower.float() / max(1, len(self.recorded_))
            return PartMask(self.part, choose_tokens(share, self.selector, inputs))
        chosen = scores >= self.threshold_
        return PartMask(self.part, chosen.float().unsqueeze(-1))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of one row's entropy, some thousand keys at most."""
        return 3.0 * 2048


@registered("moh_heads")
class MoHRouter(PartRouter):
    """Keep the first heads of every layer on, and choose among the others by a linear gate.

    Parameters
    ----------
    keep : float
        Share of the heads that each token uses, the shared ones among them, rounded up.
    shared : float
        Share of the heads that every token uses: the first ones, as the source takes them in a
        model that was trained without.
    steps, seed : int
        Of the fit, whose target is each routed head's share of the routed heads' output norms.
    """

    part = "head"
    keep: float = 0.75
    shared: float = 0.5
    steps: int = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what was given."""
        self.keep = check_keep(self.keep)
        self.shared = check_keep(self.shared)

    def _fit(self, inputs: RouterInputs, target: Decision | None) -> None:
        hidden = inputs.tensor("hidden").float()
        importance = target_importance(target, self.part)
        heads = importance.shape[-1]
        # at least one head is routed, or there is nothing to choose
        self.always_ = min(round(self.shared * heads), heads - 1)
        routed = importance[:, self.always_ :]
        width, n_routed = hidden.shape[-1], heads - self.always_
        gate = seeded(lambda: nn.Linear(width, n_routed, bias=False), self.seed)
        self.losses_ = learn_shares(gate, hidden, routed, steps=self.steps, seed=self.seed)
        self.gate_ = gate

    def _route(self, inputs: RouterInputs) -> PartMask:
        scores = self.gate_(inputs.tensor("hidden").float()).softmax(dim=-1)
        heads = self.always_ + scores.shape[-1]
        routed = max(ceil(self.keep * heads - 1e-9), self.always_, 1) - self.always_
        chosen = TopK(routed).mask(scores) if routed else torch.zeros_like(scores)
        always = torch.ones(len(scores), self.always_, device=scores.device)
        return PartMask(self.part, torch.cat((always, chosen.float()), dim=-1))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the linear gate; two routed heads before the fit."""
        return 2.0 * d * (self.gate_.out_features if self.fitted else 2)


@registered("a_mod")
class AModRouter(AttentionReceivedRouter):
    """Run a layer for the tokens that receive most attention in the layer before it.

    Parameters
    ----------
    keep : float
        Share of each sequence's tokens, rounded up.
    selector : Selector, optional
        As of :class:`AttentionReceivedRouter`.

    Notes
    -----
    Layers without a map before them run for all tokens: the first one, and where whole layers are
    gated every second one, as in the source, since a layer that some tokens skip has no map. A
    comparison leaves them alone.
    """

    preceding = True
