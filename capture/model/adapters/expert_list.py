"""A list of expert modules, each called with tokens of its own, as in code for transformers 4."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from capture.model import attributes as probe
from capture.model.adapters.base import Channel, Parts
from capture.model.adapters.standard import router_of
from capture.model.attributes import child, flat_rows, inner

SEED, TRIED = 0, 24  # tokens of the try-out
TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2  # of the largest row
# how a gate's scores become weights of those that were chosen
RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda scores, chosen: scores.softmax(-1) * chosen,
    "softmax of the chosen": lambda scores, chosen: _shares(scores.softmax(-1) * chosen),
    "sigmoid": lambda scores, chosen: scores.sigmoid() * chosen,
    "sigmoid of the chosen": lambda scores, chosen: _shares(scores.sigmoid() * chosen),
}
DENSE, TOLD = "weights of all experts", "ids and weights"
# what a list is told that is called as a whole
MASK, AS_IDS = "a mask", "a mask that is taken for ids"
TAKEN_FOR_IDS = (
    "The experts are told a mask of zeros and ones, and take it for ids: experts 0 and 1 do the "
    "work of all, whatever the router chose. Recorded is what the experts did; what the router "
    "scored is in the scores."
)


class _Rule(NamedTuple):
    """How one block's weights are known.

    Attributes
    ----------
    name : str
        Of ``RULES``, or one of the words above: the gate puts them out itself.
    scale : float
        Factor of all weights.
    block : weak reference to Module
    """

    name: str
    scale: float
    block: "weakref.ref[nn.Module]"


class ExpertListAdapter:
    """Who was chosen from what each expert is called with, how much from the gate.

    An expert is called with the hidden states of its tokens: a row's bits tell which token it is
    (equal rows are routed equally). The weights are the gate's own output, or follow from its
    scores by one of a few rules. Which one is tried out when the block is found: the experts' own
    outputs, weighted so, have to add up to what the block adds. Where none does, the block is not
    recognised, and refused by name.

    Where the list is a module that is called with a mask and weights (Switch), these are what is
    recorded: a token over an expert's capacity is in no mask, and has an empty slot. NLLB-MoE's
    experts take the mask for ids since transformers 5; the run says what they do, and notes it.
    """

    name = "expert-list"

    def __init__(self) -> None:
        self._rules: weakref.WeakKeyDictionary[nn.Module, _Rule] = weakref.WeakKeyDictionary()

    def find(self, block: nn.Module, config: object) -> Parts | None:
        """Recognise a gate beside a list of modules, whose weights a rule explains."""
        router, experts = router_of(block), child(block, "experts")
        if router is None or not isinstance(experts, nn.ModuleList | nn.ModuleDict):
            return None
        scorer, n_experts = inner(router), len(_modules(experts))
        owners = (scorer, block, getattr(scorer, "config", None), config)
        top_k = probe.first_int(owners, probe.TOP_KS)
        if (top_k is None and not is_called(experts)) or probe.weight_rows(scorer) != n_experts:
            return None
        tried = _tried(block, Parts(router, experts, n_experts, top_k or 0))
        if tried is None:
            return None
        parts, self._rules[experts] = tried
        return parts

    def listen(self, parts: Parts, channel: Channel) -> Sequence[RemovableHandle]:
        """Listen at the gate, at every expert, and at the end of the block."""
        rule = self._rules[parts.experts]
        block = rule.block()
        assert block is not None
        calls = _Calls(parts)
        if rule.name in WHOLE:
            return _listen_to_masks(parts, rule, channel)

        def on_router(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if hidden is None:
                channel.problems.append("its gate was called without hidden states")
                return
            calls.start(hidden, output)
            scores = None if rule.name in (DENSE, TOLD) else calls.scores
            channel.put_scores(scores, hidden)

        def on_block(*_: Any) -> None:
            if calls.keys is None:
                return
            weights = calls.weights(rule)
            if weights is None:
                channel.problems.append("its gate did not put out what it did when it was tried")
                return
            kept, ids = weights.topk(parts.top_k, dim=-1)
            channel.put_choice(ids.masked_fill(kept == 0, -1), kept)
            calls.keys = None

        return [
            parts.router.register_forward_hook(on_router, with_kwargs=True),
            *calls.listen(),
            block.register_forward_hook(on_block),
        ]


def _modules(experts: nn.Module) -> list[nn.Module]:
    """Return the experts in a list, which may hold a dropout of all beside them (NLLB)."""
    return [one for one in experts.children() if not isinstance(one, nn.Dropout)]


def is_called(experts: nn.Module) -> bool:
    """Whether a list of experts is called as a whole, and tells each what to do."""
    return type(experts).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)


def _listen_to_masks(parts: Parts, rule: _Rule, channel: Channel) -> Sequence[RemovableHandle]:
    """Listen to what the whole list is told, and to the router's last scores."""

    def on_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dense = WHOLE[rule.name]((*args, *kwargs.values()), parts.n_experts)
        if dense is None:
            channel.problems.append("its experts were not told a mask [T, E] and weights")
            return
        kept, ids = (dense * rule.scale).topk(parts.top_k, dim=-1)
        channel.put_choice(ids.masked_fill(kept == 0, -1), kept)

    def on_router(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        outputs = output[::-1] if isinstance(output, tuple | list) else output
        channel.put_scores(probe.scores_of(outputs, parts.n_experts), hidden)

    return [
        parts.experts.register_forward_pre_hook(on_experts, with_kwargs=True),
        parts.router.register_forward_hook(on_router, with_kwargs=True),
    ]


def _by_mask(told: Sequence[Any], n_experts: int) -> torch.Tensor | None:
    """Return weights of all experts [T, E] from hidden states, a mask [.., E] and weights."""
    tensors = [value.detach() for value in told if isinstance(value, torch.Tensor)]
    if len(tensors) != len(("hidden states", "mask", "weights")):
        return None
    _, mask, weights = tensors
    if mask.is_floating_point() or mask.shape[-1] != n_experts:
        return None
    if weights.shape[-1] == n_experts:
        return flat_rows(weights)
    return flat_rows(mask) * flat_rows(weights) if weights.shape[-1] == 1 else None


def _by_ids(told: Sequence[Any], n_experts: int) -> torch.Tensor | None:
    """Return weights of all experts [T, E] from hidden states, ids [.., S] and their weights.

    Unlike ids of a choice they may repeat: an expert then works more than once on a token.
    """
    tensors = [value.detach() for value in told if isinstance(value, torch.Tensor)]
    if len(tensors) != len(("hidden states", "ids", "weights")):
        return None
    _, ids, weights = tensors
    if ids.is_floating_point() or ids.shape != weights.shape:
        return None
    ids, weights = flat_rows(ids).long().clamp(0, n_experts - 1), flat_rows(weights)
    return weights.new_zeros(len(ids), n_experts).scatter_add(-1, ids, weights)


WHOLE = {MASK: _by_mask, AS_IDS: _by_ids}


class _Calls:
    """What a gate and its experts were called with during one forward pass of the block."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.keys: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.output: Any = None
        self.told: Sequence[Any] = ()
        self.called: list[list[torch.Tensor]] = [[] for _ in range(parts.n_experts)]

    def start(self, hidden: torch.Tensor, output: Any) -> None:
        """Keep what the gate took and gave."""
        self.keys, self.output = _keys(hidden), output
        self.scores = probe.scores_of(output, self.parts.n_experts)
        self.called = [[] for _ in self.called]

    def listen(self) -> list[RemovableHandle]:
        """Keep which rows every expert is called with."""

        def on_expert(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
                self.called[number].append(_keys(args[0]))

            return keep

        def on_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.told = (*args, *kwargs.values())

        modules = _modules(self.parts.experts)
        return [
            self.parts.experts.register_forward_pre_hook(on_experts, with_kwargs=True),
            *(m.register_forward_pre_hook(on_expert(n)) for n, m in enumerate(modules)),
        ]

    def chosen(self) -> torch.Tensor:
        """Return which expert was called with which token, [T, E]."""
        assert self.keys is not None
        nobody = torch.zeros_like(self.keys, dtype=torch.bool)
        return torch.stack(
            [torch.isin(self.keys, torch.cat(keys)) if keys else nobody for keys in self.called],
            dim=-1,
        )

    def weights(self, rule: _Rule) -> torch.Tensor | None:
        """Return the weights by expert [T, E], 0 where a token did not go."""
        found = _dense(rule.name, self.output, self.scores, self.chosen())
        return None if found is None else found * rule.scale


def _dense(
    name: str, output: Any, scores: torch.Tensor | None, chosen: torch.Tensor
) -> torch.Tensor | None:
    """Return weights [T, E] by one rule, before the factor of the block."""
    if name == TOLD:
        told = _told(output, len(chosen))
        if told is None:
            return None
        ids, weights = told
        dense = torch.zeros(chosen.shape, dtype=weights.dtype, device=weights.device)
        return dense.scatter(-1, ids, weights)
    if scores is None:
        return None
    rows = flat_rows(scores.detach())
    if name == DENSE:
        return rows * chosen
    return RULES[name](rows.float(), chosen)


def _told(output: Any, n_rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return ids and weights [T, K] that a gate put out, if it did."""
    values = output if isinstance(output, tuple | list) else (output,)
    tensors = [v.detach() for v in values if isinstance(v, torch.Tensor) and v.ndim > 1]
    for ids in tensors:
        for weights in tensors:
            is_pair = not ids.is_floating_point() and weights.is_floating_point()
            if is_pair and ids.shape == weights.shape and flat_rows(ids).shape[0] == n_rows:
                return flat_rows(ids), flat_rows(weights)
    return None


def _keys(hidden: torch.Tensor) -> torch.Tensor:
    """Return a number [R] for each row's bits."""
    rows = flat_rows(hidden.detach()).contiguous()
    words = rows.view(torch.int16 if rows.element_size() == 2 else torch.int32).long()
    generator = torch.Generator().manual_seed(SEED)
    factors = torch.randint(-(2**62), 2**62, (words.shape[-1],), generator=generator)
    return (words * factors.to(words.device)).sum(dim=-1)  # wraps around, as it should


@torch.no_grad()
def _tried(block: nn.Module, parts: Parts) -> tuple[Parts, _Rule] | None:
    """Run the block on its own and return the rule that explains its output, if one does.

    Where ``top_k`` is 0 it is not known, and the most experts of a token count.
    """
    weight = next((p for p in parts.router.parameters() if p.ndim == 2), None)
    if weight is None or weight.is_meta or not weight.is_floating_point() or block.training:
        return None
    generator = torch.Generator().manual_seed(SEED)
    first = next(parts.experts.parameters())
    hidden = torch.randn(1, TRIED, weight.shape[1], generator=generator).to(
        first.device, first.dtype
    )
    given: list[torch.Tensor] = [hidden.new_zeros(TRIED, hidden.shape[-1])] * parts.n_experts
    try:
        calls = _Calls(parts)
        outputs: list[list[torch.Tensor]] = [[] for _ in range(parts.n_experts)]
        with ExitStack() as stack:
            keep = parts.router.register_forward_hook(
                lambda _, args, out: calls.start(args[0], out)
            )
            for handle in (keep, *calls.listen(), *_keep_outputs(parts, outputs)):
                stack.callback(handle.remove)
            full = _rows(block.forward(hidden))
        with ExitStack() as stack:
            for module in _modules(parts.experts):
                silent = module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
                stack.callback(silent.remove)
            rest = _rows(block.forward(hidden))
        chosen, keys = calls.chosen(), calls.keys
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError):
        return None  # the block takes more than hidden states, or calls something else
    if keys is None:
        return None
    if not parts.top_k:
        parts = parts._replace(top_k=int(chosen.sum(dim=-1).max()))
    for number, (rows, out) in enumerate(zip(calls.called, outputs, strict=True)):
        if rows:
            place = (torch.cat(rows)[:, None] == keys).int().argmax(dim=-1)
            given[number] = torch.zeros_like(given[number]).index_copy(0, place, torch.cat(out))
    rule = _explains(parts, calls, (full - rest).float(), torch.stack(given, dim=1).float())
    if rule is None:
        return None
    note = TAKEN_FOR_IDS if rule[0] == AS_IDS else ""
    return parts._replace(is_proven=True, note=note), _Rule(*rule, weakref.ref(block))


def _explains(
    parts: Parts, calls: _Calls, routed: torch.Tensor, given: torch.Tensor
) -> tuple[str, float] | None:
    """Return the rule and the scale by which what experts gave adds up to what came out.

    Parameters
    ----------
    parts : Parts
    calls : _Calls
    routed : Tensor [T, D]
        What came out less what comes out without experts.
    given : Tensor [T, E, D]
        What each expert gave, unweighted.
    """
    chosen = calls.chosen()
    n_chosen = chosen.sum(dim=-1)
    # who is told as a whole may drop tokens
    least = 0 if calls.told else parts.top_k
    if not parts.top_k or bool(((n_chosen < least) | (n_chosen > parts.top_k)).any()):
        return None
    half = next(parts.experts.parameters()).element_size() < torch.float32.itemsize
    limit = (HALF_TOLERANCE if half else TOLERANCE) * float(routed.norm(dim=-1).max())
    for name in WHOLE if calls.told else (TOLD, DENSE, *RULES):
        dense = (
            WHOLE[name](calls.told, parts.n_experts)
            if calls.told
            else _dense(name, calls.output, calls.scores, chosen)
        )
        if dense is None:
            continue
        weighed = dense != 0
        # who is called as a whole may call an expert for nothing
        if not torch.equal(weighed & chosen if calls.told else chosen, weighed):
            continue
        summed = (dense.float()[..., None] * given).sum(dim=1)
        scale = float((summed * routed).sum() / summed.square().sum())
        if scale > 0 and float((scale * summed - routed).norm(dim=-1).max()) <= limit:
            return name, 1.0 if abs(scale - 1) < TOLERANCE else scale
    return None


def _keep_outputs(parts: Parts, outputs: list[list[torch.Tensor]]) -> Iterator[RemovableHandle]:
    for number, module in enumerate(_modules(parts.experts)):

        def keep(_: nn.Module, __: Any, out: Any, number: int = number) -> None:
            outputs[number].append(flat_rows(out.detach()))

        yield module.register_forward_hook(keep)


def _rows(output: Any) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple | list) else output
    return flat_rows(first)


def _shares(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum(dim=-1, keepdim=True)
