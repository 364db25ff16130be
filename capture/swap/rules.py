"""What a rule that takes a router's place is told, and what it answers."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from capture.errors import SwapError
from capture.model import attributes as probe
from capture.model.sites import Site
from capture.swap.attention import NAMES, AttentionRows


class Choice(NamedTuple):
    """What experts are told to do for ``T`` tokens.

    Attributes
    ----------
    expert_ids : Tensor [T, K], int64
        In the order of the slots; -1 = empty slot, which costs nothing.
    weights : Tensor [T, K]
        Combine weights as the experts apply them; 0 in an empty slot.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, eq=False)
class RouteInputs:
    """What is known where a layer chooses its experts, for the ``T`` real tokens of a pass.

    Padding is left out: no rule can be swayed by it. Tokens are in the order of the batch's rows.

    Attributes
    ----------
    layer, site : int
        Decoder layer, and which of its routers.
    n_experts, top_k : int
        The model's own.
    score_function : str
        What ``logits`` are, as in :class:`capture.store.records.SiteInfo`.
    selection_bias : Tensor [E] or None
        The model's own; added to its scores for the choice only.
    n_groups, top_groups : int or None
        The model chooses within the best ``top_groups`` of ``n_groups`` equal groups.
    hidden : Tensor [T, D], float32
        Input of the router; of a layer or block, where the rule gates those.
    logits : Tensor [T, E] or None, float32
        Output of the model's own router; None where it hides them or the rule does not read them.
    token_ids : Tensor [T] or None, int64
        None where the model was given embeddings.
    positions : Tensor [T], int64
        0 is the first token of a sequence, padding not counted.
    starts : Tensor [T], bool
        Whether the token is the first of its sequence; none is, while decoding with a cache.
    sequences : Tensor [T], int64
        Row of the batch.
    native : Choice or None
        What the model's own router chose, in its own order of slots; None where the rule does
        not read it.
    previous : Choice or None
        What ran at the MoE site before this one; None at the first.
    previous_state : Tensor [T, P] or None
        What the rule handed on at the site before.
    gate_weight, gate_bias : Tensor [E, D], [E] or None
        The model's own router, where it is one matrix. Read them, never write.
    attention : Tensor [T, A] or None, float32
        Statistics of each token's own attention, averaged over heads: of this layer at an MoE
        site, of the layer before where a layer or its heads are gated. None unless asked for.
    attention_names : tuple of str
        What the columns of ``attention`` are.
    received : Tensor [T] or None, float32
        Attention that the queries of its sequence give to the token, later ones included.
    """

    layer: int
    site: int
    n_experts: int
    top_k: int
    score_function: str
    selection_bias: torch.Tensor | None
    n_groups: int | None
    top_groups: int | None
    hidden: torch.Tensor
    logits: torch.Tensor | None
    token_ids: torch.Tensor | None
    positions: torch.Tensor
    starts: torch.Tensor
    sequences: torch.Tensor
    native: Choice | None
    previous: Choice | None
    previous_state: torch.Tensor | None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    attention_names: tuple[str, ...] = ()
    received: torch.Tensor | None = None

    def first(self, n: int) -> "RouteInputs":
        """Return what is known of the first ``n`` tokens, as if the text had ended there.

        ``received`` stays as it is: what later queries give is in it.
        """
        cut: dict[str, Any] = {}
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                cut[name] = value[:n]
            elif value is not None:
                cut[name] = Choice(value.expert_ids[:n], value.weights[:n])
        return replace(self, **cut)


_PER_TOKEN = (
    *("hidden", "logits", "token_ids", "positions", "starts", "sequences", "native", "previous"),
    *("previous_state", "attention", "received"),
)


# what a rule may read of the model's own router: its output, and the choice made of it
OWN_ROUTER = frozenset({"logits", "native"})


class Rule(Protocol):
    """Anything that chooses experts, or gates parts, for the tokens of one layer.

    ``route`` answers with ``expert_ids`` [T, K] and ``weights`` [T, K] (and ``state`` [T, P],
    handed on to the next site), or with ``part`` and ``gate`` [T, P], where 0 = not executed.
    ``K`` may differ from the model's.

    A rule that does not read all of ``OWN_ROUTER`` says so in an attribute ``reads``, a frozenset
    of what it reads: the model's own router is not computed further than that, and ``logits`` or
    ``native`` may be None then. See :func:`reads_of`.
    """

    def route(self, inputs: RouteInputs, /) -> Any:
        """Route the tokens of one layer in one forward pass; ``inputs`` must not be changed."""
        ...


def reads_of(rule: object) -> frozenset[str]:
    """Return what a rule reads of the model's own router; one that says nothing reads it all."""
    reads: frozenset[str] = getattr(rule, "reads", OWN_ROUTER)
    return reads


class NativeRule:
    """The model's own choice, unchanged: the baseline every other rule is paired with."""

    def route(self, inputs: RouteInputs, /) -> Choice:
        """Return what the model's own router chose."""
        if inputs.native is None:
            raise SwapError(
                f"Layer {inputs.layer} has no router of its own; NativeRule needs an MoE site."
            )
        return inputs.native


def choice_of(site: Site, answer: Any, inputs: RouteInputs, *, checked: bool) -> Choice:
    """Bring a rule's answer into the form of a choice; a gate is applied to the model's own.

    Parameters
    ----------
    site : Site
    answer : object
        What ``Rule.route`` gave.
    inputs : RouteInputs
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
    n_tokens = len(inputs.hidden)
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


def _gated(site: Site, answer: Any, inputs: RouteInputs) -> Choice:
    """Scale the model's own weights by a gate over experts; an expert gated to 0 does not run."""
    shape = (len(inputs.hidden), site.info.n_experts)
    gate = gate_of(answer, part="expert", place=site.info.module, shape=shape)
    if inputs.native is None:
        raise SwapError(
            f"{site.info.module}: a gate over experts needs the model's own choice. Put 'native' "
            "into the rule's `reads`."
        )
    ids, weights = inputs.native
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


def with_attention(inputs: RouteInputs, rows: AttentionRows | None) -> RouteInputs:
    """Return the inputs with a layer's attention, where there is one."""
    if rows is None:
        return inputs
    return replace(inputs, attention=rows.statistics, attention_names=NAMES, received=rows.received)


def own_gate(site: Site) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return weight [E, D] and bias [E] of a router that is one matrix, else None."""
    weight = getattr(site.router, "weight", None)
    if not isinstance(weight, torch.Tensor):
        linear = [m for m in site.router.modules() if isinstance(m, nn.Linear)]
        weight = linear[0].weight if len(linear) == 1 else None
    if probe.weight_rows(site.router) != site.info.n_experts or weight is None or weight.ndim != 2:
        return None, None
    bias = getattr(site.router, "bias", None)
    is_bias = isinstance(bias, torch.Tensor) and bias.shape == (site.info.n_experts,)
    return weight, bias if is_bias else None


def as_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return ``tensor`` [..., N] as [R, N], or its chosen rows only."""
    flat = probe.flat_rows(tensor)
    return flat if rows is None else flat[rows]
