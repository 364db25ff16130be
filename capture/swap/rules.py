"""What a rule that takes a router's place is told, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch

from capture.errors import SwapError
from capture.model.adapters import Choice as Choice  # what a rule may answer
from capture.model.attributes import flat_rows
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.attention import NAMES, AttentionRows

Part = Literal["head", "layer", "expert"]


class Routing(NamedTuple):
    """A choice with the scores behind it.

    Attributes
    ----------
    scores : Tensor [T, E], float32
        The router's score of every expert before selection, on the scale of the host model's own
        scores (probabilities of a softmax, or sigmoids) unless the router says otherwise.
    expert_ids : Tensor [T, K], int64
        Chosen experts, heaviest first; -1 fills the slots of tokens with fewer than ``K``, the
        number of experts of the widest token.
    weights : Tensor [T, K], float32
        Combine weights; 0 where ``expert_ids`` is -1. What they sum to is the host model's
        convention, see ``weighing`` of :class:`explorer.routers.RouterInfo`.
    state : Tensor [T, P], float32, or None
        What a recurrent router hands to the next layer.
    """

    scores: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    state: torch.Tensor | None = None


class PartMask(NamedTuple):
    """Which parts of one layer a token uses.

    Attributes
    ----------
    part : {"head", "layer", "expert"}
        What the columns are: attention heads of the layer, the layer itself (one column), or
        experts of the site.
    gate : Tensor [T, P], float32, 0..1
        0 = not executed; between 0 and 1 the part's output is multiplied.
    state : Tensor [T, W], float32, or None
        What a recurrent rule hands to the next layer.
    """

    part: Part
    gate: torch.Tensor
    state: torch.Tensor | None = None


Decision = Routing | PartMask

# how each field of RouterInputs gets filled, for the error that says it is missing
_HOW = {
    "hidden": "record router inputs: python -m capture MODEL --sample-tokens N",
    "logits": "record scores: python -m capture MODEL --level scores (or --sample-tokens N)",
    "native": "record the model's choices: python -m capture MODEL --level ids",
    "token_ids": "any run file holds them; pass token_ids",
    "positions": "any run file holds them; pass positions",
    "starts": "any run file holds positions; pass starts=(positions == 0)",
    "attention": "record attention: python -m capture MODEL --level attention",
    "received": "record attention: python -m capture MODEL --level attention",
    "gate_weight": "run live, or pass the weight of the model's own gate",
    "previous": "route layers in order and pass the layer before",
    "previous_state": "route layers in order and pass the state of the layer before",
}


def how_to_get(name: str) -> str:
    """Return how a field of :class:`RouterInputs` gets filled, to end an error with."""
    return f"To get {name}, {_HOW.get(name, f'pass {name}')}."


@dataclass(frozen=True, eq=False, kw_only=True)
class RouterInputs:
    """What is known of ``T`` tokens where a layer chooses its experts; None = not known.

    In a running model they are the real tokens of one pass, in the order of the batch's rows:
    padding is left out, so that no rule can be swayed by it. From a run file they are the tokens
    that were recorded.

    Attributes
    ----------
    layer, site : int
        Decoder layer, and which of its routers.
    n_experts, top_k : int
        Routed experts, and how many the model's own rule takes.
    score_function : str
        What ``logits`` are, as in :class:`capture.store.records.SiteInfo`.
    renormalize : bool
        Whether the model's combine weights sum to ``scaling`` for each token.
    scaling : float
        Factor on the model's combine weights (``routed_scaling_factor``).
    selection_bias : Tensor [E] or None
        The model's own; added to its scores for the choice only.
    n_groups, top_groups : int or None
        The model chooses within the best ``top_groups`` of ``n_groups`` equal groups.
    gate_weight, gate_bias : Tensor [E, D], [E] or None
        The model's own router, where it is one matrix. Read them, never write.
    hidden : Tensor [T, D], float32
        Input of the router; of a layer or block, where the rule gates those.
    logits : Tensor [T, E], float32
        Output of the model's own router; None where it hides them or the rule does not read them.
    native : Choice or Routing
        What the model's own router chose; a choice alone is in the model's own order of slots.
    token_ids : Tensor [T], int64
        None where the model was given embeddings.
    positions : Tensor [T], int64
        0 is the first token of a sequence, padding not counted.
    starts : Tensor [T], bool
        Whether the token is the first of its sequence, whose tokens are consecutive rows; none
        is, while decoding with a cache.
    sequences : Tensor [T], int64
        Row of the batch.
    previous : Choice or Routing
        What ran at the MoE site before this one; None at the first.
    previous_state : Tensor [T, P]
        What the rule handed on at the site before; None at the first.
    attention : Tensor [T, A], float32
        Statistics of each token's own attention row, averaged over heads, known from the past: of
        this layer at an MoE site, of the layer before where a layer or its heads are gated.
    attention_names : tuple of str
        What the columns of ``attention`` are, such as ``"entropy"``.
    received : Tensor [T], float32
        Attention that the queries of its sequence give to the token, later ones included.
    """

    layer: int
    n_experts: int
    top_k: int
    score_function: str
    site: int = 0
    renormalize: bool = True
    scaling: float = 1.0
    selection_bias: torch.Tensor | None = None
    n_groups: int | None = None
    top_groups: int | None = None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    native: Choice | Routing | None = None
    token_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    previous: Choice | Routing | None = None
    previous_state: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    attention_names: tuple[str, ...] = ()
    received: torch.Tensor | None = None

    @property
    def place(self) -> Place:
        """The layer and site."""
        return self.layer, self.site

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        for name in PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                return len(value if isinstance(value, torch.Tensor) else value.expert_ids)
        raise SwapError(f"Layer {self.layer} has no tokens: pass one of {', '.join(PER_TOKEN)}.")

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that must be there.

        Raises
        ------
        SwapError
            If it is None.
        """
        value = getattr(self, name)
        if not isinstance(value, torch.Tensor):
            raise SwapError(f"Layer {self.layer} has no {name}. {how_to_get(name)}")
        return value

    def decision(self) -> Routing:
        """Return the model's own decision with its scores, which must be there."""
        if not isinstance(self.native, Routing):
            raise SwapError(f"Layer {self.layer} has no native decision. {how_to_get('native')}")
        return self.native

    def statistic(self, name: str) -> torch.Tensor:
        """Return one statistic of each token's own attention row, [T]."""
        if name not in self.attention_names:
            raise SwapError(
                f"Layer {self.layer} has no attention statistic {name!r}; there are: "
                f"{', '.join(self.attention_names) or 'none'}. {how_to_get('attention')}"
            )
        return self.tensor("attention")[:, self.attention_names.index(name)]

    def take(self, rows: torch.Tensor | slice) -> "RouterInputs":
        """Return the inputs of some tokens, by row numbers [N], a mask [T] or a slice.

        ``starts`` is taken as it is: rows must keep a sequence whole or be read one by one. So is
        ``received``: what later queries give is in it.
        """
        return self.per_token(lambda tensor: tensor[rows])

    def per_token(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RouterInputs":
        """Return the inputs with every tensor that has a row for each token changed."""
        changed: dict[str, Any] = {}
        for name in PER_TOKEN:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                changed[name] = change(value)
            elif value is not None:
                parts = (None if part is None else change(part) for part in value)
                changed[name] = type(value)(*parts)
        return replace(self, **changed)


# fields with a row for each token
PER_TOKEN = (
    *("hidden", "logits", "native", "token_ids", "positions", "starts", "sequences"),
    *("previous_state", "previous", "attention", "received"),
)


# what a rule may read of the model's own router: its output, and the choice made of it
OWN_ROUTER = frozenset({"logits", "native"})


class Rule(Protocol):
    """Anything that chooses experts, or gates parts, for the tokens of one layer.

    ``route`` answers with a :class:`Choice` or :class:`Routing`, or with a :class:`PartMask`, or
    with anything that has these fields. ``K`` may differ from the model's.

    A rule that does not read all of ``OWN_ROUTER`` says so in an attribute ``reads``, a frozenset
    of what it reads: the model's own router is not computed further than that, and ``logits`` or
    ``native`` may be None then. See :func:`reads_of`.
    """

    def route(self, inputs: RouterInputs, /) -> Any:
        """Route the tokens of one layer in one forward pass; ``inputs`` must not be changed."""
        ...


def reads_of(rule: object) -> frozenset[str]:
    """Return what a rule reads of the model's own router; one that says nothing reads it all."""
    reads: frozenset[str] = getattr(rule, "reads", OWN_ROUTER)
    return reads


class NativeRule:
    """The model's own choice, unchanged: the baseline every other rule is paired with."""

    def route(self, inputs: RouterInputs, /) -> Choice | Routing:
        """Return what the model's own router chose."""
        if inputs.native is None:
            raise SwapError(
                f"Layer {inputs.layer} has no router of its own; NativeRule needs an MoE site."
            )
        return inputs.native


def choice_of(site: Site, answer: Any, inputs: RouterInputs, *, checked: bool) -> Choice:
    """Bring a rule's answer into the form of a choice; a gate is applied to the model's own.

    Parameters
    ----------
    site : Site
    answer : object
        What ``Rule.route`` gave.
    inputs : RouterInputs
        What it was given.
    checked : bool
        Whether to look at the values too, which waits for the device.

    Raises
    ------
    SwapError
        If the answer cannot be executed; the message names the site.
    """
    if getattr(answer, "part", None) is not None:
        return _gated(site, answer, inputs)
    ids: Any = getattr(answer, "expert_ids", None)
    weights: Any = getattr(answer, "weights", None)
    n_tokens = inputs.n_tokens
    problem = None
    if not isinstance(ids, torch.Tensor) or not isinstance(weights, torch.Tensor):
        problem = f"expert_ids and weights, got {type(answer).__name__}"
    elif ids.ndim != 2 or len(ids) != n_tokens or weights.shape != ids.shape:
        problem = (
            f"expert_ids and weights of shape [{n_tokens}, K], got {list(ids.shape)} "
            f"and {list(weights.shape)}"
        )
    elif ids.is_floating_point() or not weights.is_floating_point():
        problem = f"integer ids and floating weights, got {ids.dtype} and {weights.dtype}"
    elif checked:
        problem = _wrong_values(ids, weights, site.info.n_experts)
    if problem:
        raise SwapError(
            f"{site.info.module}: the rule put in its place should answer with {problem}. "
            "Correct its route()."
        )
    return Choice(ids.long(), weights)


def gate_of(answer: Any, *, part: str, place: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return a rule's gate [T, P] over ``part``.

    Raises
    ------
    SwapError
        If the rule gates another part or the shape does not fit.
    """
    gate = getattr(answer, "gate", None)
    if getattr(answer, "part", None) != part or not isinstance(gate, torch.Tensor):
        raise SwapError(
            f"{place}: the rule should answer with a gate over part {part!r}, got "
            f"{type(answer).__name__} over {getattr(answer, 'part', None)!r}."
        )
    if gate.shape != shape:
        raise SwapError(
            f"{place}: a gate of shape {list(shape)} was expected, got {list(gate.shape)}. "
            "One row a token; one column a head, an expert, or 1 for a layer."
        )
    return gate


def _gated(site: Site, answer: Any, inputs: RouterInputs) -> Choice:
    """Scale the model's own weights by a gate over experts; an expert gated to 0 does not run."""
    shape = (inputs.n_tokens, site.info.n_experts)
    gate = gate_of(answer, part="expert", place=site.info.module, shape=shape)
    if inputs.native is None:
        raise SwapError(
            f"{site.info.module}: a gate over experts needs the model's own choice. Put 'native' "
            "into the rule's `reads`."
        )
    ids, weights = inputs.native.expert_ids, inputs.native.weights
    share = gate.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    return Choice(ids.masked_fill(share == 0, -1), weights * share.to(weights.dtype))


def _wrong_values(ids: torch.Tensor, weights: torch.Tensor, n_experts: int) -> str | None:
    """Say what the values should have been, or None when they can be executed."""
    if not ids.numel():
        return None
    if int(ids.min()) < -1 or int(ids.max()) >= n_experts:
        return (
            f"ids from 0 to {n_experts - 1}, or -1 for an empty slot, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    empty = ids < 0
    if not bool(weights.isfinite().all()) or bool((weights[empty] != 0).any()):
        return "finite weights that are 0 in empty slots"
    ordered = ids.sort(dim=-1).values
    if bool(((ordered.diff(dim=-1) == 0) & (ordered[:, 1:] >= 0)).any()):
        return "distinct ids in a token, got one expert twice"
    return None


def with_attention(inputs: RouterInputs, rows: AttentionRows | None) -> RouterInputs:
    """Return the inputs with a layer's attention, where there is one."""
    if rows is None:
        return inputs
    return replace(inputs, attention=rows.statistics, attention_names=NAMES, received=rows.received)


def as_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return ``tensor`` [..., N] as [R, N], or its chosen rows only."""
    flat = flat_rows(tensor)
    return flat if rows is None else flat[rows]
