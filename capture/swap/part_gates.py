"""Gate layers, MoE blocks and attention heads token by token: what is gated to 0 does not run.

A layer that some tokens skip runs on the rows of the others, taken out of every argument. Heads are
the exception: they are computed and then multiplied, so that nothing is saved. A gate over heads is
*simulated* and says so, and so is every gate that is masked for training.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from capture.errors import SwapError
from capture.model.adapters.replacing import Forward, forward_replaced
from capture.model.context import Passes, PassTokens
from capture.model.flops import attention_modules, decoder_layers, head_count
from capture.model.forward import probe_tokens
from capture.model.inputs import plain_forward
from capture.model.selftest import attach
from capture.model.sites import Site
from capture.store.records import Place
from capture.swap.attention import LiveAttention
from capture.swap.routers import SiteCount, site_key
from capture.swap.rules import (
    OWN_ROUTER,
    Choice,
    RouterInputs,
    Rule,
    as_rows,
    gate_of,
    with_attention,
)

CACHES = ("past_key_values", "past_key_value", "cache")
MASK_DIMS = 4
Part = Literal["head", "layer", "block"]
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows of a batch [B, S] packed into [B', S'], sequences without a kept token left out.

    Attributes
    ----------
    shape : (int, int)
        B and S; 1 and R where rows are not told apart by sequence.
    sequences : Tensor [B'], int64
    index : Tensor [B', S'], int64
        Places in the sequence; the places after a sequence's last token repeat it.
    filled : Tensor [B', S'], bool
        False where a place repeats.
    """

    shape: tuple[int, int]
    sequences: torch.Tensor
    index: torch.Tensor
    filled: torch.Tensor

    @property
    def n_rows(self) -> int:
        """Rows that are computed."""
        return self.index.numel()

    @property
    def place(self) -> torch.Tensor:
        """Return the row of the batch [N] of every kept token."""
        rows: torch.Tensor = self.sequences[:, None] * self.shape[1] + self.index
        return rows[self.filled]

    def real(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the kept tokens [N, D] of an output [B' * S' rows, D]."""
        return rows.reshape(-1, rows.shape[-1])[self.filled.flatten()]

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return the kept rows of ``value`` [B or 1, S, ...]."""
        whole = value.expand(self.shape[0], *value.shape[1:])
        return whole[self.sequences[:, None], self.index]


def kept_rows(keep: torch.Tensor, shape: torch.Size, *, flat: bool) -> KeptRows:
    """Pack the rows to keep.

    Parameters
    ----------
    keep : Tensor [R], bool
    shape : Size
        Of the hidden states [..., D].
    flat : bool
        Take all rows as one sequence: right where rows do not see each other.
    """
    batch, length = (1, len(keep)) if flat or len(shape) < len("BSD") else (shape[0], shape[1])
    grid = keep.reshape(batch, length)
    counts = grid.sum(dim=-1)
    sequences = counts.nonzero().flatten()
    longest = int(counts.max()) if len(sequences) else 0
    grid, counts = grid[sequences], counts[sequences]
    # a stable sort brings the kept places to the front, in their order
    order = (~grid).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :longest]
    last = order.gather(-1, (counts - 1).clamp_min(0)[:, None])
    filled = torch.arange(longest, device=keep.device) < counts[:, None]
    return KeptRows((batch, length), sequences, torch.where(filled, order, last), filled)


def on_kept_rows(
    stock: Callable[..., Any],
    kept: KeptRows,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    place: str,
) -> Any:
    """Call ``stock`` with the kept rows of its arguments.

    Raises
    ------
    SwapError
        If an argument's rows cannot be told, or there is a cache that the others would miss.
    """
    if any(kwargs.get(name) is not None for name in CACHES):
        raise SwapError(
            f"{place}: tokens that skip a layer would be missing in its cache. Call the model "
            "with use_cache=False."
        )
    hidden = args[0] if args else kwargs["hidden_states"]
    first = kept.take(hidden.reshape(*kept.shape, hidden.shape[-1]))
    if hidden.ndim < len("BSD"):
        first = first[0]
    take = _Take(kept, place)
    if args:
        rest = tuple(take(f"argument {i}", v) for i, v in enumerate(args[1:], start=1))
        return stock(first, *rest, **{k: take(k, v) for k, v in kwargs.items()})
    others = {k: take(k, v) for k, v in kwargs.items() if k != "hidden_states"}
    return stock(hidden_states=first, **others)


@dataclass(frozen=True)
class _Take:
    """Takes the kept rows out of one argument, by its shape."""

    kept: KeptRows
    place: str

    def __call__(self, name: str, value: Any) -> Any:
        batch, length = self.kept.shape
        if isinstance(value, tuple | list):
            return type(value)(self(name, v) for v in value)
        if isinstance(value, dict):
            return {k: self(name, v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == MASK_DIMS and value.shape[1] == 1 and value.shape[2:] == (length, length):
            return self._mask(value)
        if value.ndim > 1 and value.shape[0] in (1, batch) and value.shape[1] == length:
            return self.kept.take(value)
        raise SwapError(
            f"{self.place}: some tokens cannot skip it, because its {name} of shape "
            f"{list(value.shape)} has no rows for tokens. Skip it for all tokens or for none."
        )

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Take rows and columns of a mask [B or 1, 1, S, S]; repeated places are seen by nobody."""
        kept = self.kept
        whole = mask.expand(kept.shape[0], 1, *mask.shape[2:])[kept.sequences, 0]
        numbers = torch.arange(len(kept.sequences), device=mask.device)[:, None, None]
        taken = whole[numbers, kept.index[:, :, None], kept.index[:, None, :]]
        hidden = ~kept.filled[:, None, :]
        no: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return taken.masked_fill(hidden, no)[:, None]


@dataclass
class PartCount:
    """What one layer executed since its gate was put in.

    Attributes
    ----------
    passes : int
    tokens : int
        Real tokens that came by.
    kept : float
        Tokens that used the part; for heads, the mean over heads.
    rows : int
        Rows that were computed, padding between sequences of different length included.
    """

    passes: int = 0
    tokens: int = 0
    kept: float = 0.0
    rows: int = 0

    @property
    def share(self) -> float:
        """Share of the real tokens that used the part."""
        return self.kept / max(self.tokens, 1)


@dataclass
class Gated:
    """Open gates.

    Attributes
    ----------
    part : {"head", "layer", "block"}
    simulated : bool
        Whether gated parts were computed all the same, as heads are.
    counts : dict of int to PartCount
        By decoder layer.
    sites : dict of (layer, site) to SiteCount
        What the experts executed. ``tokens`` and ``passes`` are those that came to the site, so
        a token that skipped it is not among them. Sites whose kind cannot be reached are missing.
    """

    part: Part
    simulated: bool
    counts: dict[int, PartCount] = field(default_factory=dict)
    sites: dict[Place, SiteCount] = field(default_factory=dict)

    @property
    def per_token(self) -> float:
        """Parts that a token used, summed over layers; a layer's heads count as one."""
        return sum(count.share for count in self.counts.values())

    @property
    def passes(self) -> int:
        """Forward passes of the model."""
        return max((count.passes for count in self.counts.values()), default=0)


class Reached:
    """Which rows that come to a layer now are tokens.

    Attributes
    ----------
    rows : Tensor [R], bool, or None
        Where some tokens skip the layer, the rows that are no filling; None = as the pass has it.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.rows: torch.Tensor | None = None

    @contextmanager
    def only(self, kept: KeptRows) -> Iterator[None]:
        """Take it that only some tokens come, until the block is left."""
        self.rows = kept.filled.flatten()
        try:
            yield
        finally:
            self.rows = None

    def real(self, device: torch.device) -> torch.Tensor | None:
        """Return what tells tokens from other rows, None where all rows are tokens."""
        return self.passes.tokens.on(device).real if self.rows is None else self.rows.to(device)


def count_experts(gated: Gated, sites: Sequence[Site], reached: Reached, stack: ExitStack) -> None:
    """Count in ``gated.sites`` what experts execute, until the stack is left."""
    for site in sites:
        if site.can_be_replaced:
            counter = _CountedChoice(SiteCount.of(site), reached)
            gated.sites[site_key(site)] = counter.count
            stack.enter_context(site.replaced(counter))


class _CountedChoice:
    """Leaves the model's own choice as it is, and counts it."""

    replays = True
    reads = OWN_ROUTER
    hears = False

    def __init__(self, count: SiteCount, reached: Reached) -> None:
        self.count, self.reached = count, reached

    def see(self, hidden: torch.Tensor, scores: torch.Tensor | None) -> None:
        """Take no interest in scores."""

    def decide(self, native: Choice | None) -> Choice:
        """Return the choice as it came."""
        assert native is not None  # what reads it gets it
        flat = native.flat()
        self.count.add(flat, self.reached.real(flat.expert_ids.device))
        return native


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
        ``RouterInputs.hidden`` is the input of the layer, the block or the attention.
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
        run = _GatedPass(passes, back=0 if own else 1, reached=Reached(passes))
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
class _GatedPass:
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
    run: _GatedPass
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

    def _inputs(self, hidden: torch.Tensor, tokens: PassTokens) -> RouterInputs:
        site = next((s for s in self.sites if s.info.layer == self.layer), None)
        inputs = RouterInputs(
            layer=self.layer,
            site=0,
            n_experts=site.info.n_experts if site else 0,
            top_k=site.info.top_k if site else 0,
            score_function=site.info.score_function if site else "other",
            hidden=as_rows(hidden, tokens.real).float(),
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            starts=tokens.starts,
            sequences=tokens.sequences,
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

    def _put_back(self, output: Any, first: torch.Tensor, kept: KeptRows) -> torch.Tensor:
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
