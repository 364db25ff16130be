"""Fit routers for a live comparison: inputs and choices come from the model itself.

So does how much heads, blocks and layers add to a token, which rules about them are fitted on.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from capture.model.context import Passes
from capture.model.flops import decoder_layers, head_count
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.measure import token_losses
from capture.swap.part_gates import gate_parts, output_layers, part_modules
from capture.swap.routers import swap
from capture.swap.rules import Choice, Decision, NativeRule, PartMask, RouterInputs, as_rows
from explorer.comparison.text_split import TokenTexts
from explorer.errors import RouterError
from explorer.router_cards import RouterSpec
from explorer.routers import PartRouter, Router, TrainedRouter, TrainingSession, fit_layers
from explorer.routers.by_name import make_router
from explorer.routers.live_rule import Convention, joined

LivePart = Literal["expert", "head", "layer", "block"]
ATTENTION = ("attention", "received")
Measured = dict[int, list[torch.Tensor]]
AsRows = Callable[[torch.Tensor], torch.Tensor]


class _Open:
    """A gate that lets everything through, and keeps what it was told."""

    def __init__(self, part: LivePart, columns: int) -> None:
        self.part: Literal["head", "layer"] = "head" if part == "head" else "layer"
        self.columns = columns
        self.seen: list[RouterInputs] = []

    def route(self, inputs: RouterInputs, /) -> PartMask:
        self.seen.append(inputs)
        ones = inputs.tensor("hidden").new_ones(inputs.n_tokens, self.columns)
        return PartMask(self.part, ones)


def measured_parts(
    model: nn.Module, sites: Sequence[Site], texts: TokenTexts, part: LivePart, *, attention: bool
) -> tuple[dict[Place, RouterInputs], dict[Place, Decision]]:
    """Run texts with all gates open; see what gates see and how much each part adds.

    Returns
    -------
    inputs, targets : dict of (layer, 0)
        A target's gate [T, P], 0..1: the norm of what the part adds, over that of the stream
        behind it for layers and blocks, over that of the token's heaviest head for heads.
    """
    if part == "expert":
        raise RouterError("Experts are no part of a layer here; their scores say how they matter.")
    modules = part_modules(model, sites, part)
    columns = {n: head_count(m, model) if part == "head" else 1 for n, m in modules.items()}
    rules = {layer: _Open(part, columns[layer]) for layer in modules}
    measured: Measured = {layer: [] for layer in modules}
    with _weighed(model, modules, columns, part, measured):
        token_losses(
            model,
            texts.sequences,
            swapped=lambda: gate_parts(model, sites, rules, part=part, attention=attention),
        )
    inputs: dict[Place, RouterInputs] = {}
    targets: dict[Place, Decision] = {}
    for layer, rule in rules.items():
        # passes before the first text belong to the tests that gates make of the model
        n_passes = len(rule.seen)
        inputs[layer, 0] = joined(rule.seen)
        targets[layer, 0] = PartMask(rule.part, torch.cat(measured[layer][-n_passes:]))
    return inputs, targets


@contextmanager
def _weighed(
    model: nn.Module,
    modules: Mapping[int, nn.Module],
    columns: Mapping[int, int],
    part: LivePart,
    measured: Measured,
) -> Iterator[None]:
    """Measure in every pass how much parts add, for the real tokens."""
    layers = decoder_layers(model)
    with ExitStack() as stack:
        passes = stack.enter_context(Passes().follow(model))

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return as_rows(tensor.detach(), passes.tokens.on(tensor.device).real).float()

        for number, module in modules.items():
            if part == "head":
                mixer = output_layers(module, columns[number])[0]
                _weigh_heads(mixer, columns[number], measured[number], rows, stack)
            else:
                inner = module if part == "block" else None
                _weigh_stream(layers[number], inner, measured[number], rows, stack)
        yield


def _weigh_heads(
    mixer: nn.Module, n_heads: int, found: list[torch.Tensor], rows: AsRows, stack: ExitStack
) -> None:
    """Add each head's share of the token's heaviest one, [T, H], to ``found``."""

    def before(mixer: nn.Module, args: tuple[Any, ...]) -> None:
        norms = _head_norms(mixer, rows(args[0]), n_heads)
        found.append(norms / norms.amax(-1, keepdim=True).clamp_min(1e-20))

    stack.callback(mixer.register_forward_pre_hook(before).remove)


def _weigh_stream(
    layer: nn.Module,
    block: nn.Module | None,
    found: list[torch.Tensor],
    rows: AsRows,
    stack: ExitStack,
) -> None:
    """Add the share of the stream that a block, or else the layer, adds, [T, 1], to ``found``."""
    before: list[torch.Tensor] = []  # the stream in front of the layer, or what the block adds

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before[:] = [rows(args[0] if args else kwargs["hidden_states"])]

    def inner(_: nn.Module, args: Any, output: Any) -> None:
        before[:] = [rows(_first(output))]

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        stream = rows(_first(output))
        added = before[0] if block is not None else stream - before[0]
        share = added.norm(dim=-1) / stream.norm(dim=-1).clamp_min(1e-20)
        found.append(share.clamp(0, 1)[:, None])

    if block is None:
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
    else:
        stack.callback(block.register_forward_hook(inner).remove)
    stack.callback(layer.register_forward_hook(leave).remove)


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _head_norms(mixer: nn.Module, heads: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return the norm of what each head adds to the stream, [T, H]."""
    weight: Any = mixer.weight
    split = weight.detach().float().reshape(weight.shape[0], n_heads, -1)  # [D, H, W]
    gram = torch.einsum("dhv,dhw->hvw", split, split)
    values = heads.reshape(len(heads), n_heads, -1)
    return torch.einsum("thv,hvw,thw->th", values, gram, values).clamp_min(0).sqrt()


class Fitted(NamedTuple):
    """A router that can run.

    Attributes
    ----------
    routers : dict of (layer, site) to Router
        Maybe one object for all of them.
    part : {"expert", "head", "layer", "block"}
        What it decides about.
    attention : bool or "before"
        Whether it asks for attention while it runs; "before" = that of the layer before.
    fit_tokens : int
        0 where there was nothing to learn.
    seconds : float
    curves : list of dict
        Of routers that learned on the model's loss.
    """

    routers: dict[Place, Router]
    part: LivePart
    attention: bool | Literal["before"]
    fit_tokens: int
    seconds: float
    curves: list[dict[str, Any]]

    @property
    def router(self) -> Router:
        """One of them, to read its card."""
        return next(iter(self.routers.values()))


class FitData:
    """What routers learn from, captured from the model when it is first asked for.

    Parameters
    ----------
    model : PreTrainedModel
    sites : sequence of Site
    texts : TokenTexts
        The fit split, maybe empty.
    skip : {"block", "layer"}
        What a rule about layers skips: the MoE block, or the whole layer.
    session : TrainingSession, optional
        Of routers that learn on the model's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        texts: TokenTexts,
        *,
        skip: Literal["block", "layer"] = "block",
        session: TrainingSession | None = None,
    ) -> None:
        self.model = model
        self.sites = list(sites)
        self.texts = texts
        self.skip: Literal["block", "layer"] = skip
        self.session = session
        self.places: list[Place] = [(site.info.layer, site.info.site) for site in sites]
        self._inputs: dict[bool, dict[Place, RouterInputs]] = {}
        self._parts: dict[
            tuple[str, bool], tuple[dict[Place, RouterInputs], dict[Place, Decision]]
        ] = {}

    def fit(self, spec: RouterSpec, seed: int | None) -> Fitted:
        """Make a router and fit it.

        Raises
        ------
        RouterError
            If it needs texts to learn from and there are none, or the model lacks what it needs.
        """
        begun = time.perf_counter()
        router = make_router(spec, seed=seed)
        info = router.info
        attention = bool(info.needs & set(ATTENTION))
        before = isinstance(router, PartRouter) and router.preceding
        part = self._part_of(router)
        if part == "layer" and attention and not before:
            raise RouterError(
                f"{spec.label} reads the attention of the layer that it decides about, and --skip "
                "layer leaves that out with the rest. Take --skip block, or a_mod, which reads the "
                "layer before."
            )
        learns = info.fits is not None
        if learns:
            self._check_texts(spec.label)
        routers: dict[Place, Router]
        if isinstance(router, TrainedRouter):
            if self.session is None:
                raise RouterError(f"{spec.label} learns on the model's loss; compare it live.")
            routers = dict.fromkeys(self.places, router.train(self.session))
        elif not learns:
            places = self._behind_a_map(part) if before else self.places
            routers = dict.fromkeys(places, router)
        else:
            inputs, targets = self._learned_from(router, part, attention)
            routers = fit_layers(router, inputs, targets)
        curves = [dict(row) for row in getattr(router, "curves_", [])]
        seconds = time.perf_counter() - begun
        return Fitted(
            routers,
            part,
            "before" if before else attention,
            self.texts.n_tokens if learns else 0,
            seconds,
            curves,
        )

    def _behind_a_map(self, part: LivePart) -> list[Place]:
        """Return the places with a layer before them that has a whole map of attention."""
        # a layer that some tokens skip has none, so that only every second one can be skipped
        step = 2 if part == "layer" else 1
        layers = sorted({layer for layer, _ in self.places if layer > 0})[::step]
        return [place for place in self.places if place[0] in layers]

    def _part_of(self, router: Router) -> LivePart:
        part: LivePart = getattr(router, "part", "expert")
        if part != "layer":
            return part
        # gates that learn on the loss learned to close MoE blocks
        return "block" if isinstance(router, TrainedRouter) else self.skip

    def _check_texts(self, label: str) -> None:
        if not self.texts.sequences:
            raise RouterError(
                f"{label} has to be fitted on texts that it is not reported on, but there are too "
                "few prompts to divide. Record more prompts, or choose routers without a fit."
            )

    def _learned_from(
        self, router: Router, part: LivePart, attention: bool
    ) -> tuple[dict[Place, RouterInputs], dict[Place, Decision] | None]:
        if part != "expert":
            return self.parts(part, attention)
        inputs = self.inputs(attention)
        if getattr(router, "part", None) is None:
            return inputs, None
        # an expert matters to a token as much as its score does beside the token's best
        targets: dict[Place, Decision] = {}
        for place, recorded in inputs.items():
            scores = recorded.decision().scores.clamp_min(0)
            best = scores.amax(-1, keepdim=True).clamp_min(1e-20)
            targets[place] = PartMask("expert", scores / best)
        return inputs, targets

    def inputs(self, attention: bool = False) -> dict[Place, RouterInputs]:
        """Return what every router of the model saw and chose on the fit split."""
        if attention not in self._inputs:
            seen: dict[Place, list[RouterInputs]] = {place: [] for place in self.places}

            def keep(inputs: RouterInputs, _: Choice) -> None:
                seen[inputs.layer, inputs.site].append(inputs)

            token_losses(
                self.model,
                self.texts.sequences,
                swapped=lambda: swap(
                    self.model, self.sites, NativeRule(), on_choice=keep, attention=attention
                ),
            )
            found = {place: joined(parts) for place, parts in seen.items()}
            self._inputs[attention] = found
        return self._inputs[attention]

    def conventions(self) -> dict[Place, Convention]:
        """Return how the model weighs its experts."""
        return {
            place: Convention(inputs.renormalize, inputs.scaling)
            for place, inputs in self.inputs().items()
        }

    def parts(
        self, part: LivePart, attention: bool = False
    ) -> tuple[dict[Place, RouterInputs], dict[Place, Decision]]:
        """Return what rules about parts see on the fit split, and how much each part mattered."""
        asked = (part, attention)
        if asked not in self._parts:
            self._parts[asked] = measured_parts(
                self.model, self.sites, self.texts, part, attention=attention
            )
        return self._parts[asked]
