"""Find a model's MoE sites: every block that owns a router and experts, by structure.

A block that seems to route by its parameters, whatever they are called, and is no site is refused:
a run would lack it.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from capture.errors import SiteError, SwapError
from capture.model import attributes
from capture.model.adapters import ADAPTERS, Adapter, Decider, Parts, Replacing, Seat
from capture.model.adapters.expert_list import is_called
from capture.model.inputs import has_two_sides
from capture.store.records import SiteInfo
from capture.store.schema import SIDES

STACK, MATRIX = 3, 2  # axes
ENCODER, DECODER = SIDES
# lists of layers are stacks too, but nothing chooses among them
LAYER_LISTS = ("layers", "layer", "blocks", "block", "h")
log = logging.getLogger(__name__)
# parts of a multi-modal or multi-token model that a forward pass over text does not run
OTHER_STACKS = (
    "visual", "vision_tower", "vision_model", "vision_moe", "audio_tower", "talker", "code2wav",
    "mtp",
)  # fmt: skip
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_COUNTS = (
    "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
)  # fmt: skip
LIST = (
    ": its experts are a list of modules, each called with tokens of its own, as in code for "
    "transformers 4, and no known rule makes its gate's output the weights of their sum. Load the "
    "model with the class that transformers has for it (trust_remote_code=False)"
)
MASKED = ": its experts are told by a mask whom to work on, and work on others than it says"
PRODUCT_KEYS = ": it finds experts by product keys, and no known rule makes them what it puts out"


class Suspect(NamedTuple):
    """A block that has several parts of one shape, and what may choose among them.

    Attributes
    ----------
    module : str
    parts : str
        Name of the list or parameter that holds them.
    size : int
    gate : str
        Parameter with as many rows or columns; empty where only a name tells.
    """

    module: str
    parts: str
    size: int
    gate: str


class _Stack(NamedTuple):
    name: str
    size: int
    parameters: set[torch.Tensor]


def suspects(model: nn.Module, known: Set[nn.Module], blocks: Set[nn.Module]) -> Iterator[Suspect]:
    """Yield blocks that no site explains although they seem to route.

    Parameters
    ----------
    model : Module
    known : set of Module
        Routers and experts of the sites with all that is in them, and what does not run.
    blocks : set of Module
        The blocks that own those.
    """
    explained: set[torch.Tensor] = {p for module in known for p in module.parameters(recurse=False)}
    parents = {c: module for module in model.modules() for c in module.children()}
    for name, module in model.named_modules():
        if module in known:
            continue
        for stack in _stacks(module):
            if stack.parameters & explained:
                continue
            gate = _gate(module, parents.get(module), stack, explained)
            is_named = "expert" in f"{name}.{stack.name}".lower()
            if gate or (is_named and not _inside(module, blocks, parents)):
                yield Suspect(name, stack.name, stack.size, gate)


def _inside(module: nn.Module, blocks: Set[nn.Module], parents: dict[nn.Module, nn.Module]) -> bool:
    """Whether a module is one of the blocks or lies in one: shared experts, a second layer."""
    at: nn.Module | None = module
    while at is not None:
        if at in blocks:
            return True
        at = parents.get(at)
    return False


def _stacks(module: nn.Module) -> Iterator[_Stack]:
    """Yield what a module has several of in one shape: modules of a list, slices of a tensor."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) and name not in LAYER_LISTS:
            shapes = [[p.shape for p in one.parameters()] for one in part.children()]
            alike = len(shapes) > 1 and all(shape == shapes[0] for shape in shapes)
            if alike and any(len(shape) >= MATRIX for shape in shapes[0]):
                yield _Stack(name, len(shapes), set(part.parameters()))
        elif not isinstance(part, nn.modules.conv._ConvNd):
            yield from _tensors(part, f"{name}.")
    yield from _tensors(module, "")


def _tensors(module: nn.Module, prefix: str) -> Iterator[_Stack]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == STACK and min(parameter.shape) > 1:
            yield _Stack(f"{prefix}{name}", parameter.shape[0], {parameter})


def _gate(
    module: nn.Module, parent: nn.Module | None, stack: _Stack, explained: set[torch.Tensor]
) -> str:
    """Return the matrix that has a row or column for every part, or nothing."""
    near: list[tuple[str, torch.Tensor]] = list(module.named_parameters())
    for name, beside in parent.named_children() if parent is not None else ():
        if isinstance(beside, nn.Linear):
            near += [(f"../{name}", beside.weight)]
    for name, parameter in near:
        is_own = parameter in stack.parameters or parameter in explained
        if not is_own and parameter.ndim == MATRIX and stack.size in parameter.shape:
            return name
    return ""


@dataclass(frozen=True, eq=False)
class Site:
    """One router with its experts, and how to listen to it.

    Attributes
    ----------
    info : SiteInfo
        What the run file stores. ``score_function`` is "other" until the self-test measured it.
    parent : Module
        The block that owns both.
    parts : Parts
        Router, experts and their counts.
    adapter : Adapter
        Knows where ids, weights and scores appear.
    selection_bias : Tensor [E] or None
        Added to the scores for the choice only. The model's own tensor: read it, never write.
    n_groups, top_groups : int or None
        The choice is made within the best ``top_groups`` of ``n_groups`` equal groups.
    ranking : str or None
        What the choice is made by, of ``capture.model.scoring.RANKINGS``; None = the score
        function.
    margin_known : bool
        Whether the self-test could explain every choice by scores, bias and groups. Where it is
        False, margins are not known (hash routing, families with a rule of their own).
    scores_known : bool
        False where the self-test found that what looks like scores are the weights, spread over
        all experts.
    factor : float or None
        What the block multiplies the sum of its experts by, measured by the self-test; None = not
        known. It is not part of the weights.
    alone : bool
        Whether a token's routing depends on the other texts of a forward pass, so that only texts
        by themselves can be recorded.
    """

    info: SiteInfo
    parent: nn.Module
    parts: Parts
    adapter: Adapter
    selection_bias: torch.Tensor | None = None
    n_groups: int | None = None
    top_groups: int | None = None
    ranking: str | None = None
    margin_known: bool = False
    scores_known: bool = True
    factor: float | None = 1.0
    alone: bool = False

    def choice(self) -> dict[str, Any] | None:
        """Return what besides the scores decides about the choice, for ``run.notes``.

        Returns
        -------
        dict or None
            ``layer``, ``site``, and where there are such ``selection_bias`` (list of E numbers),
            ``n_groups`` and ``top_groups``. None where scores alone decide, as far as is known.
        """
        if self.selection_bias is None and self.n_groups is None:
            return None
        found: dict[str, Any] = {"layer": self.info.layer, "site": self.info.site}
        if self.selection_bias is not None:
            # nine digits say a float32 exactly
            values = self.selection_bias.detach().float().cpu().tolist()
            found["selection_bias"] = [float(f"{value:.9g}") for value in values]
        if self.n_groups is not None:
            found |= {"n_groups": self.n_groups, "top_groups": self.top_groups}
        return found

    def after_sum(self) -> dict[str, Any]:
        """Return the factor between the sum of the experts and what their block adds."""
        return {"layer": self.info.layer, "site": self.info.site, "factor": self.factor}

    @property
    def can_be_replaced(self) -> bool:
        """Whether this kind of block has a place where another choice can be put in."""
        return isinstance(self.adapter, Replacing)

    def replaced(self, decider: Decider) -> AbstractContextManager[None]:
        """Execute what ``decider`` says in place of the router's choice, until it is left.

        Raises
        ------
        SwapError
            If this kind of block has no place where a choice can be put in.
        """
        if isinstance(self.adapter, Replacing):
            return self.adapter.replace(Seat(self.info.module, self.parent, self.parts), decider)
        known = sorted(adapter.name for adapter in ADAPTERS if isinstance(adapter, Replacing))
        raise SwapError(
            f"{self.info.module}: no other rule can be put in place of a router of kind "
            f"{self.adapter.name!r}, only recorded. There are: {', '.join(known)}."
        )

    @property
    def n_computing(self) -> int:
        """How many of the experts have weights: the others pass a token on or skip it."""
        return attributes.n_computing(self.experts, self.info.n_experts)

    def own_gate(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return weight [E, D] and bias [E] of a router that is one matrix, else None."""
        return attributes.gate_matrix(self.router, self.info.n_experts)

    @property
    def router(self) -> nn.Module:
        """The module that scores the experts."""
        return self.parts.router

    @property
    def experts(self) -> nn.Module:
        """The module that holds the experts."""
        return self.parts.experts


def find_sites(model: nn.Module, *, two_sides: bool = False) -> list[Site]:
    """Return the MoE sites of a text model, in the order of its layers.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model.
    two_sides : bool
        Whether it may be an encoder-decoder. The decoder's layers are then counted on from the
        encoder's.

    Raises
    ------
    SiteError
        If there is no MoE layer, the model is an encoder-decoder and may not be, or a block that
        routes has no place where ids and weights can be read.
    """
    name = type(model).__name__
    config = text_config(model)
    _check_kind(model, two_sides=two_sides)
    before = _encoder_layers(model)
    found = []
    for module, parent, adapter, parts in _blocks(model, config):
        layer = layer_of(module) + (before if _side(model, module) == DECODER else 0)
        found.append((layer, module, parent, adapter, parts))
    if not found:
        raise SiteError(
            f"A mixture-of-experts model was expected, but {name} has no MoE layers: no block "
            "owns a router and experts. Choose a model with routed experts, such as 'demo'."
        )
    count: dict[int, int] = {}
    sites = []
    for layer, module, parent, adapter, parts in found:
        index = count.get(layer, 0)
        count[layer] = index + 1
        sites.append(_site(model, config, (layer, index, module), parent, adapter, parts))
    return sorted(sites, key=lambda s: (s.info.layer, s.info.site))


def _side(model: nn.Module, module: str) -> str | None:
    """Return the side of an encoder-decoder that a module is on, None in any other model."""
    if not has_two_sides(model):
        return None
    return next((word for word in module.split(".") if word in (ENCODER, DECODER)), DECODER)


def _encoder_layers(model: nn.Module) -> int:
    """Return how many layers an encoder has, 0 without one."""
    names = [name for name, _ in model.named_modules() if _side(model, name) == ENCODER]
    return 1 + max((layer_of(name) for name in names if re.search(r"\.\d", name)), default=-1)


def _check_kind(model: nn.Module, *, two_sides: bool) -> None:
    """Refuse a model that does not write one token after another behind its prompt."""
    name, problem = type(model).__name__, None
    if has_two_sides(model):
        if not two_sides:
            problem = "is an encoder-decoder, which capture.record alone can record"
    elif "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        problem = (
            "writes a block of tokens at once into a canvas (decoder_input_ids), as diffusion "
            "does: its routers run once for every step of denoising, and no token is the next one"
        )
    if problem:
        raise SiteError(
            f"A decoder-only language model was expected, but {name} {problem}. Choose a causal "
            "language model."
        )


def text_config(model: nn.Module) -> object:
    """Return the configuration of the model's language part."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def layer_of(module: str) -> int:
    """Return the decoder layer in a module's name: the first number after ``layers`` or the like.

    A model without such a list has one layer, 0.
    """
    words = module.split(".")
    for word, number in pairwise(words):
        if word in LAYER_LISTS and number.isdigit():
            return int(number)
    number_anywhere = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(number_anywhere.group(1)) if number_anywhere else 0


def _blocks(model: nn.Module, config: object) -> Iterator[tuple[str, nn.Module, Adapter, Parts]]:
    """Yield every block that an adapter recognises; refuse one that routes unrecognised."""
    unknown: list[tuple[str, nn.Module]] = []
    blocks: set[nn.Module] = set()
    known: set[nn.Module] = attributes.idle(model)
    for module, parent in model.named_modules():
        if set(module.split(".")) & set(OTHER_STACKS):
            known.add(parent)
        if parent in known:
            continue
        for adapter in ADAPTERS:
            parts = adapter.find(parent, config)
            if parts is not None:
                blocks.add(parent)
                known.update((*parts.router.modules(), *parts.experts.modules()))
                yield module, parent, adapter, parts
                break
        else:
            if any(name == "experts" or "router" in name for name, _ in parent.named_children()):
                unknown.append((module, parent))
    for module, parent in unknown:
        if parent not in known and (known | blocks).isdisjoint(parent.children()):
            experts = getattr(parent, "experts", None)
            why = PRODUCT_KEYS if hasattr(parent, "num_keys") else ""
            if isinstance(experts, nn.ModuleList | nn.ModuleDict):
                why = MASKED if is_called(experts) else LIST
            raise SiteError(
                f"{module} ({type(parent).__name__}) routes to experts, but no place was found "
                f"where ids and weights can be read{why}. This architecture is not supported."
            )
    for suspect in suspects(model, known, blocks):
        beside = f" beside {suspect.gate}" if suspect.gate else ""
        kind = type(model.get_submodule(suspect.module)).__name__
        raise SiteError(
            f"{suspect.module} ({kind}) seems to route: {suspect.parts} holds {suspect.size} "
            f"parts of one shape{beside}. No place was found where ids and weights can be read, "
            "and a run would lack them. This architecture is not supported."
        )


def _site(
    model: nn.Module,
    config: object,
    place: tuple[int, int, str],
    parent: nn.Module,
    adapter: Adapter,
    parts: Parts,
) -> Site:
    layer, index, module = place
    info = SiteInfo(
        layer=layer,
        site=index,
        module=module,
        n_experts=parts.n_experts,
        top_k=parts.top_k,
        n_shared_experts=_n_shared(model, config, module, parent),
        score_function=parts.score_function or "other",
        side=_side(model, module),
    )
    router = attributes.inner(parts.router)
    groups = attributes.groups(router, parts.n_experts)
    return Site(
        info=info,
        parent=parent,
        parts=parts,
        adapter=adapter,
        selection_bias=attributes.selection_bias(parent, router, parts.n_experts),
        n_groups=groups[0] if groups else None,
        top_groups=groups[1] if groups else None,
    )


def _n_shared(model: nn.Module, config: object, module: str, parent: nn.Module) -> int:
    """Return how many always-on experts a block has, inside it or beside it."""
    owners = [parent]
    if "." in module:
        owners.append(model.get_submodule(module.rsplit(".", 1)[0]))
    names = [n for o in owners for n in SHARED_NAMES if isinstance(getattr(o, n, None), nn.Module)]
    if not names:
        return 0
    counted = attributes.first_int([config], SHARED_COUNTS)
    return counted or 1
