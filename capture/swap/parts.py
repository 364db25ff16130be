"""Gate layers, MoE blocks and attention heads token by token: what is gated to 0 does not run.

Heads are the exception: they are computed and then multiplied, so that nothing is saved. A gate
over heads is *simulated* and says so, and so is every gate that is masked for training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from capture.errors import SwapError
from capture.model.context import Passes, PassTokens
from capture.model.flops import attention_modules, decoder_layers, head_count
from capture.model.selftest import attach, probe_tokens
from capture.model.sites import Site
from capture.model.switches import plain_forward
from capture.swap.attention import LiveAttention
from capture.swap.inject import Forward, forward_replaced
from capture.swap.part_counts import Gated, Part, PartCount, Reached, count_experts
from capture.swap.row_subset import Kept, kept_rows, on_kept_rows
from capture.swap.rules import RouteInputs, Rule, as_rows, gate_of, with_attention

OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")


@contextmanager
def gate_parts(
    model: nn.Module,
    sites: Sequence[Site] | None,
    rule: Rule | Mapping[int, Rule],
    *,
    part: Part,
    only: Sequence[int] | None = None,
    attention: bool | Literal["before"] = False,
    masked: bool = False,
) -> Iterator[Gated]:
    """Let ``rule`` decide which tokens use which parts, until the block is left.

    A token that skips a layer passes it unchanged, and the tokens that use the layer do not see
    it there (mixture of depths). A token that skips an MoE block gets nothing added by router,
    experts and shared experts. A gate between 0 and 1 scales what the part adds.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode. Layers cannot be skipped with a cache: call with ``use_cache=False``.
    sites : sequence of Site or None
        From :func:`capture.model.selftest.attach`, or None to find them now.
    rule : Rule, or mapping of layer to Rule
        Answers with ``part`` ("head", or "layer" for layers and blocks) and ``gate`` [T, P].
        ``RouteInputs.hidden`` is the input of the layer, the block or the attention.
    part : {"layer", "block", "head"}
    only : sequence of int, optional
        Layers to gate. Default: all that have the part.
    attention : bool or "before"
        Give rules attention: of the same layer for a block, of the layer before for a layer and
        its heads; "before" = of the layer before for a block too, which the first layer has none
        of. A layer that some tokens skipped has none to give.
    masked : bool
        Compute every part and multiply it by its gate, so that gradients reach closed gates too:
        for training. Nothing is skipped, and tokens that skip a layer are still seen there.

    Yields
    ------
    Gated
        Counts of what was executed.

    Raises
    ------
    SwapError
        If a layer has no such part, or skipping it would leave something out of step.
    """
    if model.training:
        raise SwapError("A model in evaluation mode was expected. Call model.eval() first.")
    sites = attach(model) if sites is None else list(sites)
    modules = part_modules(model, sites, part)
    wanted = list(rule if isinstance(rule, Mapping) else modules)
    if only is not None:
        wanted = [layer for layer in only if layer in wanted or layer not in modules]
    for layer in wanted:
        if layer not in modules:
            raise SwapError(
                f"Layer {layer} has no {part} to gate. There are: {', '.join(map(str, modules))}."
            )
    gated = Gated(part, simulated=masked or part == "head")
    with ExitStack() as stack:
        shapes = {} if part == "head" else _outputs(model, {n: modules[n] for n in wanted})
        passes = stack.enter_context(Passes().follow(model))
        own = part == "block" and attention != "before"
        run = _Run(passes, back=0 if own else 1, reached=Reached(passes))
        if attention:
            layers = {layer - run.back for layer in wanted}
            live = LiveAttention(model, sites, layers)
            run.attention = stack.enter_context(live.open(run.passes))
        for layer in sorted(wanted):
            one = rule[layer] if isinstance(rule, Mapping) else rule
            gate = _Gate(layer, _place(model, modules[layer]), sites, one, run)
            gated.counts[layer] = gate.count
            if part == "head":
                _gate_heads(gate, modules[layer], head_count(modules[layer], model), stack)
            else:
                skip = _Skip(gate, shapes[layer], adds=part == "block")
                wrap = skip.mask if masked else skip.wrap
                stack.enter_context(forward_replaced(modules[layer], wrap))
        if not masked:
            count_experts(gated, sites, run.reached, stack)
        yield gated


@dataclass
class _Run:
    """What the gates of one forward pass share."""

    passes: Passes
    back: int  # layers back whose attention is known: a layer's own has not run yet
    reached: Reached
    attention: LiveAttention | None = None
    number: int = 0
    state: torch.Tensor | None = None


@dataclass
class _Gate:
    """Asks the rule of one layer."""

    layer: int
    name: str
    sites: Sequence[Site]
    rule: Rule
    run: _Run
    count: PartCount = field(default_factory=PartCount)

    def ask(self, hidden: torch.Tensor, *, columns: int, part: str) -> torch.Tensor:
        """Return the gate [R, columns] of all rows; padding gets 0."""
        tokens = self._tokens(hidden)
        answer = self.rule.route(self._inputs(hidden, tokens))
        shape = (len(tokens.positions), columns)
        gate = gate_of(answer, part=part, place=self.name, shape=shape).to(hidden.dtype)
        self.run.state = getattr(answer, "state", None)
        self.count.passes += 1
        self.count.tokens += len(gate)
        self.count.kept += float((gate > 0).double().mean(dim=-1).sum())
        if tokens.real is None:
            return gate
        return gate.new_zeros(tokens.n_rows, columns).index_copy(0, tokens.real, gate)

    def _tokens(self, hidden: torch.Tensor) -> PassTokens:
        if self.run.number != self.run.passes.count:
            self.run.number, self.run.state = self.run.passes.count, None
        tokens = self.run.passes.tokens.on(hidden.device)
        rows = hidden.numel() // hidden.shape[-1]
        if rows != tokens.n_rows:
            raise SwapError(
                f"{self.name}: {tokens.n_rows} rows (batch x sequence) were expected, got {rows}."
            )
        return tokens

    def _inputs(self, hidden: torch.Tensor, tokens: PassTokens) -> RouteInputs:
        site = next((s for s in self.sites if s.info.layer == self.layer), None)
        inputs = RouteInputs(
            layer=self.layer,
            site=0,
            n_experts=site.info.n_experts if site else 0,
            top_k=site.info.top_k if site else 0,
            score_function=site.info.score_function if site else "other",
            selection_bias=None,
            n_groups=None,
            top_groups=None,
            hidden=as_rows(hidden, tokens.real).float(),
            logits=None,
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            starts=tokens.starts,
            sequences=tokens.sequences,
            native=None,
            previous=None,
            previous_state=self.run.state,
        )
        live = self.run.attention
        return (
            inputs if live is None else with_attention(inputs, live.of(self.layer - self.run.back))
        )


@dataclass
class _Skip:
    """Runs a layer or block on the rows whose gate is above 0."""

    gate: _Gate
    output: Any  # what the module put out in the probe
    adds: bool  # a block's output is added by its layer; a layer adds itself

    def wrap(self, stock: Forward) -> Forward:
        """Return the forward that asks first."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            asked = self.gate.ask(hidden, columns=1, part="layer")
            tokens = self.gate.run.passes.tokens.on(hidden.device)
            real = asked if tokens.real is None else asked[tokens.real]
            if bool((real > 0).all()):
                output = stock(*args, **kwargs)
                self.gate.count.rows += tokens.n_rows
                return output if bool((real == 1).all()) else self._scaled(output, hidden, asked)
            kept = kept_rows(asked[:, 0] > 0, hidden.shape, flat=self.adds)
            self.gate.count.rows += kept.n_rows
            first = torch.zeros_like(hidden) if self.adds else hidden
            if kept.n_rows:
                with self.gate.run.reached.only(kept):
                    output = on_kept_rows(stock, kept, args, kwargs, place=self.gate.name)
                first = self._put_back(output, first, kept)
            return self._scaled(self._like_probe(first, hidden), hidden, asked)

        return forward

    def mask(self, stock: Forward) -> Forward:
        """Return the forward that computes all and multiplies, without a cut for gradients."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            gate = self.gate.ask(hidden, columns=1, part="layer")
            output = stock(*args, **kwargs)
            self.gate.count.rows += len(gate)
            first = output[0] if isinstance(output, tuple) else output
            shaped = gate.reshape(*first.shape[:-1], 1)
            base = 0.0 if self.adds else hidden
            # at a gate of 1 the product is 0, and the output the module's own, bit for bit
            mixed = first - (first - base) * (1 - shaped)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return forward

    def _put_back(self, output: Any, first: torch.Tensor, kept: Kept) -> torch.Tensor:
        """Return ``first`` [..., D] with the kept rows replaced by the output's."""
        rows = output[0] if isinstance(output, tuple) else output
        flat = first.reshape(-1, first.shape[-1])
        return flat.index_copy(0, kept.place, kept.real(rows)).reshape(first.shape)

    def _like_probe(self, first: torch.Tensor, hidden: torch.Tensor) -> Any:
        """Return the output in the form in which the module itself puts it out."""
        own = self.output[0] if isinstance(self.output, tuple) else self.output
        first = first.reshape(-1, first.shape[-1]) if own.ndim < hidden.ndim else first
        if not isinstance(self.output, tuple):
            return first
        return (first, *(value.new_zeros(0, *value.shape[1:]) for value in self.output[1:]))

    def _scaled(self, output: Any, hidden: torch.Tensor, gate: torch.Tensor) -> Any:
        """Scale what the part adds by the gate; a skipped token has nothing to scale."""
        first = output[0] if isinstance(output, tuple) else output
        base = 0.0 if self.adds else hidden
        shaped = gate.reshape(*first.shape[:-1], 1)
        scaled = torch.where(shaped == 1, first, base + (first - base) * shaped)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


def _gate_heads(gate: _Gate, attention: nn.Module, n_heads: int, stack: ExitStack) -> None:
    """Multiply each head's output before the heads are mixed."""
    asked: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        asked[:] = [gate.ask(hidden, columns=n_heads, part="head")]
        gate.count.rows += len(asked[0])

    def mix(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = args[0].reshape(len(asked[0]), n_heads, -1)
        return ((heads * asked[0][..., None]).reshape(args[0].shape), *args[1:])

    stack.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
    for layer in output_layers(attention, n_heads):
        stack.callback(layer.register_forward_pre_hook(mix).remove)


def output_layers(attention: nn.Module, n_heads: int) -> list[nn.Linear]:
    """Return the layer that mixes the heads, whose input is one head after the other."""
    layers = [getattr(attention, name, None) for name in OUTPUT_NAMES]
    return [m for m in layers if isinstance(m, nn.Linear) and m.in_features % n_heads == 0][:1]


def part_modules(model: nn.Module, sites: Sequence[Site], part: Part) -> dict[int, nn.Module]:
    """Return the module that a gate acts on, by layer; layers without one are left out."""
    layers = decoder_layers(model)
    if part == "layer":
        return layers
    if part == "block":
        blocks = {s.info.layer: s.parent for s in sites if s.info.site == 0}
        own = set(layers.values())
        for layer, block in blocks.items():
            if block in own:
                raise SwapError(
                    f"Layer {layer}: its router and experts lie open in the layer, beside other "
                    "parts, so they cannot be skipped as one block. Gate layers instead."
                )
        return blocks
    found = {}
    for number, whole in layers.items():
        attention = attention_modules(whole)
        n_heads = head_count(attention[0], model) if len(attention) == 1 else 0
        if n_heads and output_layers(attention[0], n_heads):
            found[number] = attention[0]
    if not found:
        raise SwapError(
            f"{type(model).__name__} has no layer with {' or '.join(OUTPUT_NAMES)} behind its "
            "attention heads, so heads cannot be told apart. Gate layers instead."
        )
    return found


def _outputs(model: nn.Module, modules: Mapping[int, nn.Module]) -> dict[int, Any]:
    """Run one short pass and return what each module puts out; refuse what cannot be skipped."""
    seen: dict[int, Any] = {}
    with ExitStack() as stack:
        for layer, module in modules.items():

            def keep(_: nn.Module, args: object, output: Any, layer: int = layer) -> None:
                seen[layer] = output

            stack.callback(module.register_forward_hook(keep).remove)
        with torch.inference_mode(), plain_forward(model):
            model(input_ids=probe_tokens(model), use_cache=False)
    for layer, module in modules.items():
        output = seen.get(layer)
        rest = output[1:] if isinstance(output, tuple) else ()
        # a second output of two axes is router logits, which only reports read
        if output is None or any(not isinstance(r, torch.Tensor) or r.ndim != 2 for r in rest):
            raise SwapError(
                f"{_place(model, module)} ({type(module).__name__}) hands more than hidden states "
                "to the next layer, or is not called as a whole, so it cannot be skipped."
            )
    return seen


def _place(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, m in model.named_modules() if m is module), "?")
