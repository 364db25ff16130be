"""A small transformer in whose layers a rule of :mod:`explorer.routers` chooses the experts."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from capture.swap.rules import RouterInputs, Routing
from explorer.routers.attention import YuanAttention
from explorer.routers.contract import RoutingRouter
from explorer.routers.native import host_best
from explorer.routers.scores import host_scores
from explorer.survey.from_scratch.arms import Arm


class ModelShape(NamedTuple):
    """Sizes of a model.

    Attributes
    ----------
    vocabulary, width, layers, heads, expert_width, context : int
        ``context`` in tokens.
    """

    vocabulary: int = 1024
    width: int = 64
    layers: int = 3
    heads: int = 4
    expert_width: int = 128
    context: int = 64


class Facts(NamedTuple):
    """What rules are told about the tokens of a batch, in the order of the rows.

    Attributes
    ----------
    keys, positions : Tensor [T], int64
        What stands for the token id, and the position in the window.
    starts : Tensor [T], bool
    """

    keys: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor


class Experts(nn.Module):
    """Gated feed-forward networks, each run on the tokens that chose it.

    Parameters
    ----------
    n_experts, width, inner : int
    """

    def __init__(self, n_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.randn(n_experts, 2 * inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(n_experts, width, inner) * inner**-0.5 / 2)

    def forward(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, [T, D]; 0 where there is none."""
        token, slot = (routing.expert_ids >= 0).nonzero(as_tuple=True)
        chosen = routing.expert_ids[token, slot]
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.n_experts).tolist()
        token, slot = token[order], slot[order]
        outputs = []
        inputs = torch.split(hidden[token], counts)
        parts = zip(inputs, self.gate_up.unbind(0), self.down.unbind(0), strict=True)
        for rows, gate_up, down in parts:
            gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, down))
        weighted = torch.cat(outputs) * routing.weights[token, slot].unsqueeze(-1)
        return torch.zeros_like(hidden).index_add(0, token, weighted)


class MoE(nn.Module):
    """A gate, a rule and experts.

    Parameters
    ----------
    arm : Arm
    rule : RoutingRouter
        Decides with gradients, which ``Router.route`` would switch off.
    shape : ModelShape
    layer : int

    Attributes
    ----------
    routing : Routing
        Of the last call.
    balance, density : Tensor []
        The balance loss, and what ReMoE's L1 loss weighs: each expert's mean output of the gate
        times how far it is used above its share.
    bias : Tensor [E]
        Selection bias, moved by :meth:`even_out`.
    """

    routing: Routing
    balance: torch.Tensor
    density: torch.Tensor
    bias: torch.Tensor

    def __init__(self, arm: Arm, rule: RoutingRouter, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.arm, self.rule, self.layer = arm, rule, layer
        self.gate: nn.Module | None = None
        if arm.gate == "linear":
            self.gate = nn.Linear(shape.width, arm.n_experts, bias=False)
        elif arm.gate == "yuan":
            self.gate = YuanAttention(shape.width, arm.n_experts)
        self.experts = Experts(arm.n_experts, shape.width, shape.expert_width)
        self.register_buffer("bias", torch.zeros(arm.n_experts))

    def forward(self, hidden: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Return what the experts add to the tokens [T, D]."""
        inputs = RouterInputs(
            layer=self.layer,
            n_experts=self.arm.n_experts,
            top_k=self.arm.top_k,
            score_function=self.arm.score_function,
            renormalize=self.arm.renormalize,
            selection_bias=self.bias if self.arm.bias_rate else None,
            logits=None if self.gate is None else self.gate(hidden),
            token_ids=facts.keys,
            positions=facts.positions,
            starts=facts.starts,
        )
        self.routing = self.rule._route(inputs)
        if inputs.logits is not None:
            self._losses(inputs, inputs.logits)
        output: torch.Tensor = self.experts(hidden, self.routing)
        return output

    def load(self) -> torch.Tensor:
        """Return how many tokens of the last call chose each expert, [E] int64."""
        ids = self.routing.expert_ids
        return ids[ids >= 0].bincount(minlength=self.arm.n_experts)

    def _losses(self, inputs: RouterInputs, logits: torch.Tensor) -> None:
        # shares of what was wanted: a capacity that drops must not hide that too much came
        wanted = host_best(inputs)[1].flatten()
        share = wanted.bincount(minlength=self.arm.n_experts) / len(wanted)
        scores = host_scores(logits, inputs)
        mean = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=0)
        self.balance = self.arm.n_experts * (share * mean).sum()
        used = self.load() * (self.arm.n_experts / (self.arm.top_k * len(logits)))
        self.density = (used * logits.relu().mean(dim=0)).sum()

    def even_out(self) -> None:
        """Move the selection bias towards equal loads, by the sign of the error."""
        load = self.load().float()
        self.bias += self.arm.bias_rate * (load.mean() - load).sign()


class Block(nn.Module):
    """Attention and experts, each added to the stream.

    Parameters
    ----------
    moe : MoE
    shape : ModelShape
    """

    def __init__(self, moe: MoE, shape: ModelShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.norm = nn.RMSNorm(shape.width)
        self.moe = moe

    def forward(self, stream: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Return the stream [B, S, D] after this block."""
        batch, length, width = stream.shape
        parts = self.query_key_value(self.attention_norm(stream))
        query, key, value = (
            part.transpose(1, 2)
            for part in parts.view(batch, length, 3, self.heads, -1).unbind(dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        added = self.moe(self.norm(stream).flatten(0, 1), facts)
        output: torch.Tensor = stream + added.view_as(stream)
        return output


class ScratchModel(nn.Module):
    """A language model with learned positions.

    Its head is not tied to the embeddings: a token that no expert serves would otherwise be
    predicted to follow itself, which punishes rules that leave tokens out.

    Parameters
    ----------
    arm : Arm
    rules : list of RoutingRouter
        One a layer.
    shape : ModelShape
    seed : int
        Of the first weights. Models of different arms start with the same trunk.
    """

    def __init__(
        self, arm: Arm, rules: list[RoutingRouter], shape: ModelShape, *, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            blocks = []
            for layer, rule in enumerate(rules):
                torch.manual_seed(seed * 1009 + layer)
                moe = MoE(arm, rule, shape, layer)
                torch.manual_seed(seed * 1009 + 500 + layer)
                blocks.append(Block(moe, shape))
            torch.manual_seed(seed * 1009 + 999)
            self.embedding = nn.Embedding(shape.vocabulary, shape.width)
            nn.init.normal_(self.embedding.weight, std=shape.width**-0.5)
            self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
            self.position = nn.Parameter(torch.randn(shape.context, shape.width) * 0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(shape.width)

    @property
    def moes(self) -> list[MoE]:
        """The layers' experts, in order."""
        return [block.moe for block in self.blocks if isinstance(block, Block)]

    def forward(self, ids: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Return logits of the next token [B, S, V] of token ids [B, S]."""
        stream = self.embedding(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            stream = block(stream, facts)
        logits: torch.Tensor = self.head(self.norm(stream))
        return logits
