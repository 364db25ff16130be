"""What a model's experts really did, found without any adapter: by taking each expert away.

A place is measured where a module puts out one row for each token. With every parameter of one
expert set to zero, the rows that change are the tokens which that expert worked on, and the change
is what it gave them. What the run file says is then put through the model's own experts code, one
expert at a time, and has to give the same.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from capture.model.forward import cache_of, with_cache

STACK, MATRIX = 3, 2  # axes
# below this share of the largest change, a row did not change
NOTHING = 1e-7


class NoTruth(Exception):
    """A model does not say what its experts did in a way that is understood here."""


@dataclass(frozen=True, eq=False)
class Bank:
    """The routed experts of one block.

    Attributes
    ----------
    name : str
        Full name of the module that owns them.
    owner : Module
    n_experts : int
        Those that have parameters.
    """

    name: str
    owner: nn.Module
    n_experts: int

    def slices(self, expert: int) -> Iterator[torch.Tensor]:
        """Yield everything that belongs to one expert."""
        embeddings = _embeddings(self.owner)
        if embeddings:
            yield from (one.weight[expert] for one in embeddings)
            return
        if isinstance(self.owner, nn.ModuleList | nn.ModuleDict):
            yield from list(self.owner.children())[expert].parameters()
            return
        for parameter in self.owner.parameters(recurse=False):
            if parameter.shape[0] >= self.n_experts and parameter.ndim > 1:
                # matrices of all experts may lie one below the other
                is_flat = parameter.ndim == MATRIX and _is_flat(parameter, self.n_experts)
                rows = (
                    parameter.view(self.n_experts, -1, *parameter.shape[1:])
                    if is_flat
                    else parameter
                )
                yield rows[expert]

    @contextmanager
    def without(self, expert: int) -> Iterator[None]:
        """Let one expert give nothing, until the block is left."""
        parts = list(self.slices(expert))
        kept = [part.detach().clone() for part in parts]
        with torch.no_grad():
            try:
                for part in parts:
                    part.zero_()
                yield
            finally:
                for part, values in zip(parts, kept, strict=True):
                    part.copy_(values)


@dataclass
class Place:
    """Where the experts of a block are measured, and what one text did there.

    Attributes
    ----------
    bank : Bank
    module : Module
        Puts out one row for each token.
    args, kwargs : as the model called it
    """

    bank: Bank
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> torch.Tensor:
        """Return the rows [T, D] of the module, called as the model did."""
        return rows_of(self.module.forward(*_copied(self.args), **_copied(self.kwargs)))

    @property
    def hidden(self) -> torch.Tensor:
        """The rows [T, D] that came in."""
        values = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, torch.Tensor)]
        return values[0].reshape(-1, values[0].shape[-1])

    def gave(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each expert gave each token [E, T, D], and the rest of the rows [T, D]."""
        full = self.run()
        changes = []
        for expert in range(self.bank.n_experts):
            with self.bank.without(expert):
                changes.append(full - self.run())
        given = torch.stack(changes)
        return given, full - given.sum(dim=0)

    def alone(self, expert: int, weights: torch.Tensor) -> torch.Tensor | None:
        """Return what the model's own code makes of one expert with weights [T], or None."""
        hidden = self.hidden
        module: Any = self.module
        owner: Any = self.bank.owner
        if isinstance(owner, nn.ModuleList | nn.ModuleDict):
            return list(owner.children())[expert](hidden) * weights[:, None]  # type: ignore[no-any-return]
        embeddings = _embeddings(owner)
        if embeddings:
            down, up = (one.weight[expert] for one in embeddings)
            return (module.act_fn(hidden @ down) * weights)[:, None] * up  # type: ignore[no-any-return]
        told = self._told(expert, weights)
        if told is not None:
            args, kwargs = told
            return rows_of(self.module.forward(*args, **kwargs))
        is_scaled = getattr(module, "experts", None) is owner
        if is_scaled:  # weights scale what goes in
            blocks = hidden.new_zeros(self.bank.n_experts, *hidden.shape)
            blocks[expert] = hidden * weights[:, None]
            return rows_of(owner.forward(blocks.flatten(0, 1)).reshape(blocks.shape)[expert])
        if hasattr(module, "input_linear") and hasattr(module, "activation"):
            first, second = module.input_linear.weight, module.output_linear.weight
            gate, up = linear(hidden, first[expert]).chunk(2, dim=-1)
            given = linear(module.activation(gate) * up, second[expert])
            return given * weights[:, None]
        return None

    def _told(
        self, expert: int, weights: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return arguments that tell the experts one id and its weight, where they are told."""
        places: list[Any] = [*range(len(self.args)), *self.kwargs]
        values = {at: self.args[at] if isinstance(at, int) else self.kwargs[at] for at in places}
        tensors = {at: v for at, v in values.items() if isinstance(v, torch.Tensor)}
        after = list(tensors.items())[1:]
        ids = [at for at, v in after if not v.is_floating_point() and v.dtype != torch.bool]
        floats = [at for at, v in after if v.is_floating_point()]
        if len(ids) != 1 or len(floats) != 1 or values[ids[0]].shape != values[floats[0]].shape:
            return None
        # a second slot, without weight, keeps odd shapes away
        other = (expert + 1) % self.bank.n_experts
        values[ids[0]] = torch.tensor([[expert, other]]).expand(len(weights), 2)
        values[floats[0]] = torch.stack([weights, torch.zeros_like(weights)], dim=-1)
        return tuple(values[i] for i in range(len(self.args))), {k: values[k] for k in self.kwargs}


def banks(model: nn.Module, n_experts: int) -> list[Bank]:
    """Return what a model has ``n_experts`` of in one shape, wherever it stands.

    Of embeddings that are found by pairs of keys there are as many as they have rows.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        embeddings = _embeddings(module)
        if embeddings:
            found.append(Bank(name, module, embeddings[0].num_embeddings))
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            parts = sum(not isinstance(part, nn.Dropout) for part in module.children())
            if "expert" in name and parts == n_experts:
                found.append(Bank(name, module, n_experts))
            continue
        own = list(module.parameters(recurse=False))
        stacks = [p.shape[0] for p in own if p.ndim == STACK]
        flat = "expert" in name and any(p.ndim == MATRIX and _is_flat(p, n_experts) for p in own)
        if n_experts in stacks or (not stacks and flat and not hasattr(module, "in_features")):
            found.append(Bank(name, module, n_experts))
    return found


def measure(
    model: nn.Module,
    ids: torch.Tensor,
    n_experts: int,
    *,
    call: Callable[[], Any] | None = None,
    **arguments: Any,
) -> "Pass":
    """Run one text [1, T] and return what was seen of its experts.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor [1, T]
    n_experts : int
    call : callable, optional
        What runs the model on the text, where it is not called with its ids.
    **arguments : Any
        Further ones of the model's call, such as a cache.

    Raises
    ------
    NoTruth
        If experts ran in no module that puts out one row for each token.
    """
    known = banks(model, n_experts)
    calls: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor | None]]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        rows = rows_of(out) if _first(out) is not None else None
        calls.setdefault(module, []).append((args, kwargs, rows))

    def copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _copied(args), _copied(kwargs)

    ancestors = {bank: list(_ancestors(model, bank.name)) for bank in known}
    watched = [*(m for bank in known for m in bank.owner.children()), *chain(*ancestors.values())]
    seen: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        for module in dict.fromkeys(watched):
            stack.callback(module.register_forward_pre_hook(copy, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(_outputs(seen, name, ids.numel())).remove)
        with torch.no_grad():
            given = {"use_cache": False, **arguments}
            output = model(input_ids=ids, **given) if call is None else call()
    places = {}
    for bank in known:
        if calls.keys().isdisjoint((bank.owner, *bank.owner.children())):
            continue  # of a tower, or of images
        for module in ancestors[bank]:
            ran = calls.get(module, [])
            if len(ran) == 1 and ran[0][2] is not None and len(ran[0][2]) == ids.numel():
                # of the stacks of one block the last counts: nothing gets past it
                places[module] = Place(bank, module, ran[0][0], ran[0][1])
                break
        else:
            raise NoTruth(f"the experts of {bank.name} ran in no module with a row for each token")
    return Pass(list(places.values()), seen, output)


def _outputs(
    seen: dict[str, list[torch.Tensor]], name: str, n_tokens: int
) -> Callable[[nn.Module, Any, Any], None]:
    """Return a hook that keeps everything with a row for each token that a module puts out."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
                rows = value.detach().reshape(-1, value.shape[-1])
                if len(rows) == n_tokens:
                    seen.setdefault(name, []).append(rows.clone())

    return keep


class Pass(NamedTuple):
    """What one forward pass over one text showed.

    Attributes
    ----------
    places : list of Place
        Where experts ran.
    seen : dict of str to list of Tensor [T, N]
        What each module put out with a row for each token, by its name.
    output : object
        The model's.
    """

    places: list[Place]
    seen: dict[str, list[torch.Tensor]]
    output: Any


def decoding(
    model: nn.Module, prompt: list[int], written: list[int], n_experts: int
) -> Iterator[Pass]:
    """Yield a prompt and every token that was written after it, with a cache."""
    one = measure(model, torch.tensor([prompt]), n_experts, use_cache=True)
    yield one
    for token in written:
        cache = with_cache(model, cache_of(one.output))
        one = measure(model, torch.tensor([[token]]), n_experts, **cache)
        yield one


def answering(
    model: Any, prompt: list[int], written: list[int], n_experts: int
) -> Iterator[tuple[int, Pass]]:
    """Yield where in the text a pass begins: an encoder's prompt, then each token of a decoder."""
    ids = torch.tensor([prompt])
    one = measure(model, ids, n_experts, call=lambda: model.get_encoder()(input_ids=ids))
    yield 0, one
    encoded, cache = one.output, None
    for number, token in enumerate(written):
        new = torch.tensor([[token]])
        given = {"encoder_outputs": encoded, "decoder_input_ids": new, **with_cache(model, cache)}
        one = measure(model, new, n_experts, call=partial(model, **given))
        cache = cache_of(one.output)
        yield len(prompt) + number, one


def greedy(model: nn.Module, ids: list[int], n_tokens: int, ends: set[int]) -> list[int]:
    """Return what a model writes when it reads its text from the start for every token."""
    text = list(ids)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
        if text[-1] in ends:
            break
    return text[len(ids) :]


def rows_of(output: Any) -> torch.Tensor:
    """Return the first tensor of an output as rows."""
    first = _first(output)
    if first is None:
        raise NoTruth(f"no tensor came from a module that holds experts, but {type(output)}")
    return first.reshape(-1, first.shape[-1])


def _first(output: Any) -> torch.Tensor | None:
    for value in output if isinstance(output, tuple | list) else (output,):
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return value
    return None


def _embeddings(module: nn.Module) -> list[nn.Embedding]:
    """Return the two embeddings that hold a row of each expert (Doge), if there are such."""
    found = [one for one in module.children() if isinstance(one, nn.Embedding)]
    rows = {one.weight.shape for one in found}
    return found if len(found) == MATRIX and len(rows) == 1 and hasattr(module, "num_keys") else []


def _is_flat(parameter: torch.Tensor, n_experts: int) -> bool:
    return parameter.shape[0] > n_experts and parameter.shape[0] % n_experts == 0


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    while name:
        yield model.get_submodule(name)
        name = name.rpartition(".")[0]


def _copied(value: Any) -> Any:
    """Return arguments whose tensors are copies: modules may write into what they are given."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(one) for one in value)
    if type(value) is dict:
        return {name: _copied(one) for name, one in value.items()}
    return value
