"""Attention-based routers to experts: a token's query meets the keys of the experts."""

from dataclasses import replace

import torch
from torch import nn

from capture.swap.rules import RouterInputs, Routing
from explorer.routers.contract import RoutingRouter, registered
from explorer.routers.learning.imitation import Student
from explorer.routers.native import choose
from explorer.routers.scores import slots, student_scores, weigh
from explorer.routers.selectors import SELECTOR_DECIDES, Selector, chosen_formula


@registered("gate_row_attention")
class GateRowRouter(RoutingRouter):
    """Take the token as the query and the rows of the model's gate as the experts' keys.

    Parameters
    ----------
    selector : Selector, optional
        How experts are chosen; None = the model's own way.

    Notes
    -----
    A linear gate followed by a softmax *is* attention of one query over expert keys: this router
    reproduces the model's decisions exactly, which the tests hold it to.
    """

    selector: Selector | None = None

    def __post_init__(self) -> None:
        """Fit the card to what was given."""
        if self.selector is not None:
            formula = chosen_formula(self.info.formula, self.selector)
            self.info = replace(
                self.info,
                variable_k=self.selector.variable,
                formula=formula,
                identity=SELECTOR_DECIDES,
            )

    def _route(self, inputs: RouterInputs) -> Routing:
        hidden, keys = inputs.tensor("hidden").float(), inputs.tensor("gate_weight").float()
        bias = None if inputs.gate_bias is None else inputs.gate_bias.float()
        scores = student_scores(nn.functional.linear(hidden, keys, bias), inputs)
        ids = choose(scores, inputs, selector=self.selector)
        return slots(scores, ids, weigh(scores, ids, inputs))

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of one query and all keys."""
        return 2.0 * d * n_experts


class KeyAttention(nn.Module):
    """Scores of one query against learned keys, in few dimensions.

    Parameters
    ----------
    d, n_parts, rank : int
        Width of the token, number of keys, width of query and keys.
    """

    def __init__(self, d: int, n_parts: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.query = nn.Linear(d, rank, bias=False)
        self.keys = nn.Parameter(torch.randn(n_parts, rank))
        self.bias = nn.Parameter(torch.zeros(n_parts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [T, P]."""
        logits: torch.Tensor = self.query(hidden) @ self.keys.T / self.rank**0.5 + self.bias
        return logits


@registered("expert_key_attention")
class ExpertKeyRouter(Student):
    """Learn a low-rank query of the token and a key of each expert.

    Parameters
    ----------
    rank : int
        Width of query and keys.
    **options
        Of :class:`explorer.routers.learning.imitation.Student`.
    """

    rank: int = 16

    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make the query's projection and the keys."""
        return KeyAttention(d, n_experts, self.rank)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the query and of the keys."""
        return 2.0 * self.rank * (d + n_experts)


class YuanAttention(nn.Module):
    """Attention among experts: three numbers per expert and token make query, key and value.

    Parameters
    ----------
    d, n_experts : int
    """

    def __init__(self, d: int, n_experts: int) -> None:
        super().__init__()
        self.query = nn.Linear(d, n_experts, bias=False)
        self.key = nn.Linear(d, n_experts, bias=False)
        self.value = nn.Linear(d, n_experts, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [T, E]."""
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        attention = (query.unsqueeze(-1) * key.unsqueeze(-2)).softmax(dim=-1)  # [T, E, E]
        logits: torch.Tensor = (attention @ value.unsqueeze(-1)).squeeze(-1)
        return logits


@registered("yuan_attention")
class YuanRouter(Student):
    """Let the experts attend to each other before one is chosen.

    Notes
    -----
    As in the source, without scaling by the width. Distilled, where the source trains it with the
    model.
    """

    rows = 2048  # each holds a square of experts

    def make(self, d: int, n_experts: int) -> nn.Module:
        """Make the three projections."""
        return YuanAttention(d, n_experts)

    def flops(self, n_experts: int, d: int, top_k: int) -> float:
        """Return the operations of the projections and of the attention among experts."""
        return 6.0 * d * n_experts + 4.0 * n_experts**2
