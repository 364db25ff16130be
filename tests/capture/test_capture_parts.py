"""Gates over layers, blocks and heads: what is gated to 0 does not run, except for heads."""

import pytest
import tiny_models
import torch
from checks import assert_close
from test_capture_swap import Counting, logits_of

from capture.errors import SwapError
from capture.model.flops import counted_flops, model_flops
from capture.model.selftest import attach
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from capture.swap.rules import NativeRule

ATOL = 2e-5
PARTS = ["layer", "block", "head"]
PLAIN = ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "dbrx"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Gate:
    """A gate by position, the same for all columns unless a row of columns is given."""

    def __init__(self, part, by_position=lambda p: torch.ones(len(p)), columns=None):
        self.part, self.by_position = part, by_position
        self.columns = torch.ones(1) if columns is None else torch.tensor(columns)

    def route(self, inputs):
        answer = type("Mask", (), {"part": self.part})()
        answer.gate = self.by_position(inputs.positions)[:, None].float() * self.columns
        self.hidden = inputs.hidden
        return answer


def odd(positions):
    return positions % 2 == 1


def few(positions):
    return positions >= 5


def half(positions):
    return torch.full((len(positions),), 0.5)


def none(positions):
    return torch.zeros(len(positions))


def masked_layer(stock, keep):
    """Mixture of depths by definition: compute all, hide skipped tokens as keys, pick."""

    def forward(hidden, *args, **kwargs):
        length = hidden.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        seen = mask if mask.dtype == torch.bool else mask == 0
        # a token always sees itself, so that no row is empty; skipped ones are not looked at
        seen = (seen & keep[None, None, None]) | torch.eye(length, dtype=torch.bool)
        if mask.dtype != torch.bool or "attn" not in str(kwargs):
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = stock(hidden, *args, **{**kwargs, "attention_mask": seen})
        first = output[0] if isinstance(output, tuple) else output
        picked = torch.where(keep[None, :, None], first, hidden)
        return (picked, *output[1:]) if isinstance(output, tuple) else picked

    return forward


@pytest.mark.parametrize("keep", [odd, few])
@pytest.mark.parametrize("name", PLAIN)
def test_skipping_a_layer_is_masking_it(name, keep):
    """Against the definition: all tokens are computed, then the skipped ones are thrown away."""
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)
    with gate_parts(model, sites, Gate("layer", keep), part="layer") as gated:
        skipped = logits_of(model)
    kept = keep(torch.arange(7))
    layers = getattr(model, "model", getattr(model, "transformer", None))
    layers = getattr(layers, "layers", getattr(layers, "blocks", None))
    for layer in layers:
        layer.forward = masked_layer(layer.forward, kept)
    masked = logits_of(model)
    assert float((masked - own).abs().max()) > 0.01
    assert_close("logits", skipped, masked, atol=ATOL)
    assert gated.per_token == pytest.approx(len(layers) * float(kept.double().mean()))
    assert [c.rows for c in gated.counts.values()] == [2 * int(kept.sum())] * len(layers)
    assert not gated.simulated


@pytest.mark.parametrize("part", ["layer", "block"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4_text", "jetmoe"])
def test_what_no_token_uses_is_not_called(name, part):
    model = tiny_models.build(name)
    sites = attach(model)
    own, called = logits_of(model), []
    for site in sites:
        site.experts.register_forward_hook(lambda *_: called.append(1))
    gate = Gate("layer", none)
    with gate_parts(model, sites, gate, part=part) as gated, counted_flops(model) as counted:
        called.clear()  # a short pass finds out what the parts put out
        logits = logits_of(model)
    inside = sum(s.info.site == 1 for s in sites) if part == "block" else 0
    # JetMoE's attention experts are called twice a pass, and are no part of the block
    assert len(called) == inside
    assert gated.per_token == 0
    assert all(c.rows == 0 for c in gated.counts.values())
    if part == "layer":
        assert counted.total == 14 * model_flops(model, sites).head
        embedded = model.model.embed_tokens(tiny_models.tokens())
        expected = model.lm_head(getattr(model.model, "norm", torch.nn.Identity())(embedded))
        assert_close("embedding through the head", logits, expected, atol=1e-6)
    assert torch.equal(logits_of(model), own)


def test_skipped_layers_cost_nothing():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    ids = tiny_models.tokens(1, 7)
    with (
        gate_parts(model, sites, Gate("layer", few), part="layer", only=[1]),
        counted_flops(model) as counted,
    ):
        logits_of(model, ids)
    paper = model_flops(model, sites)
    expected = 7 * paper.head
    for layer, tokens in zip(paper.layers, (7, 2, 7), strict=True):
        key = (layer.layer, 0)
        one = layer.attention + layer.attention_key * tokens
        expected += tokens * (one + layer.router[key] + 3 * layer.expert[key])
    assert counted.total == expected


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx"])
def test_a_block_adds_nothing_to_skipped_tokens(name):
    model = tiny_models.build(name)
    sites = attach(model)
    seen = {}
    site = sites[-1]

    def keep(_, args, output):
        output = output[0] if isinstance(output, tuple) else output
        seen["in"], seen["out"] = args[0], output

    handle = site.parent.register_forward_hook(keep)
    logits_of(model)
    own, given = seen["out"].reshape(2, 7, -1), seen["in"]
    rule = Gate("layer", odd)
    with gate_parts(model, sites, rule, part="block", only=[site.info.layer]) as gated:
        logits_of(model)
    handle.remove()
    output = seen["out"].reshape(2, 7, -1)
    assert torch.equal(rule.hidden, given.reshape(14, -1))
    assert_close("used", output[:, 1::2], own[:, 1::2], atol=ATOL)
    assert bool((output[:, ::2] == 0).all())
    assert gated.counts[site.info.layer].rows == 6


@pytest.mark.parametrize("part", ["layer", "block"])
def test_a_soft_gate_scales_what_is_added(part):
    model = tiny_models.build("olmoe")
    sites = attach(model)
    seen = {}
    module = model.model.layers[2] if part == "layer" else sites[2].parent
    handle = module.register_forward_hook(
        lambda _, args, output: seen.update(given=args[0], put=output)
    )
    logits_of(model)
    base = seen["given"] if part == "layer" else 0.0
    expected = base + (seen["put"] - base) / 2
    with gate_parts(model, sites, Gate("layer", half), part=part, only=[2]):
        logits_of(model)
    handle.remove()
    assert_close("output", seen["put"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_gate_over_heads_is_zero_columns_of_the_output_layer(name):
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)
    keep = [1.0, 0.0, 0.5, 0.0]
    gate = Gate("head", columns=keep)
    with gate_parts(model, sites, gate, part="head") as gated:
        masked = logits_of(model)
    assert gated.simulated, "heads are computed and then multiplied"
    assert gated.per_token == len(gated.counts) / 2
    for layer in gated.counts:
        weight = model.model.layers[layer].self_attn.o_proj.weight
        weight *= torch.tensor(keep).repeat_interleave(weight.shape[1] // 4)
    assert float((masked - own).abs().max()) > 1e-3
    assert_close("logits", masked, logits_of(model), atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", PARTS)
def test_padding_is_not_gated_and_changes_nothing(part, side):
    model = tiny_models.build("olmoe")
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    if side == "left":
        mask = mask.flip(-1)
    real = mask[1].bool()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    columns = [1.0, 0.0, 1.0, 1.0] if part == "head" else None
    gate = Gate("head" if part == "head" else "layer", odd, columns)
    with gate_parts(model, sites, gate, part=part) as gated:
        padded = logits_of(model, ids, attention_mask=mask, position_ids=positions)
        assert len(gate.hidden) == 11
        alone = logits_of(model, ids[1][real][None])
    assert_close("real tokens", padded[1][real], alone[0], atol=ATOL)
    assert all(c.tokens == 15 for c in gated.counts.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in ("olmoe", "deepseek_v3", "llama4_text") for part in PARTS),
        *(("jetmoe", part) for part in ("layer", "block")),
        ("zaya", "head"),
    ],
)
def test_experts_are_counted_for_the_tokens_that_reach_them(name, part):
    """Against each text alone, where every row that an expert runs on is a token."""
    model = tiny_models.build(name)
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    gate = Gate("head", columns=[1.0, 0.0, 1.0, 1.0]) if part == "head" else Gate("layer", odd)
    with gate_parts(model, sites, gate, part=part) as together:
        padded = logits_of(model, ids, attention_mask=mask)
    with gate_parts(model, sites, gate, part=part) as apart:
        first, second = logits_of(model, ids[:1]), logits_of(model, ids[1:, :4])
    assert_close("first", padded[0], first[0], atol=ATOL)
    assert_close("second", padded[1, :4], second[0], atol=ATOL)
    assert (together.passes, apart.passes) == (1, 2)
    assert together.sites.keys() == {(s.info.layer, s.info.site) for s in sites}
    reached = {"head": 11, "layer": 5, "block": 5}[part]
    for site in sites:
        key = site.info.layer, site.info.site
        here, alone = together.sites[key], apart.sites[key]
        # what a block skips is its own experts, not those of JetMoE's attention
        tokens = 11 if part == "block" and site.info.site == 1 else reached
        assert here.tokens == alone.tokens == tokens
        assert torch.equal(here.load, alone.load) and torch.equal(alone.load, alone.rows)
        filled = int(here.load[: here.computing].sum())
        assert here.experts_per_token == filled / tokens


def test_counting_experts_changes_nothing():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    own = logits_of(model)
    with gate_parts(model, sites, Gate("head", columns=[1.0] * 4), part="head") as gated:
        assert torch.equal(logits_of(model), own)
    with swap(model, sites, NativeRule()) as swapped:
        logits_of(model)
    for key, count in swapped.counts.items():
        assert torch.equal(gated.sites[key].load, count.load)
        assert gated.sites[key].distinct_experts == count.distinct_experts


def test_state_is_handed_from_layer_to_layer():
    model = tiny_models.build("deepseek_v3")

    class Recurrent(Counting):
        def route(self, inputs):
            state = inputs.previous_state
            state = torch.zeros(len(inputs.hidden), 1) if state is None else state
            self.states.append(float(state[0, 0]))
            answer = Gate("layer").route(inputs)
            answer.state = state + 1
            return answer

    rule = Recurrent()
    with gate_parts(model, attach(model), rule, part="layer"):
        logits_of(model)
        logits_of(model)
    assert rule.states == [0, 1, 2] * 2


class Received:
    """A-MoD: the half of each sequence that receives most attention uses the layer."""

    part = "layer"

    def __init__(self):
        self.seen = []

    def route(self, inputs):
        self.seen.append((inputs.layer, inputs.received))
        if inputs.received is None:
            return Gate("layer").route(inputs)
        self.gate = torch.zeros(len(inputs.received), 1)
        for number in inputs.sequences.unique():
            own = (inputs.sequences == number).nonzero().flatten()
            best = inputs.received[own].topk(len(own) // 2).indices
            self.gate[own[best]] = 1.0
        return self


@pytest.mark.parametrize("part", ["block", "layer"])
def test_gates_by_attention_get_the_layers_or_the_one_before(part):
    model = tiny_models.build("olmoe")
    sites = attach(model)
    rule = Received()
    with gate_parts(model, sites, rule, part=part, attention=True) as gated:
        logits_of(model)
    seen = dict(rule.seen)
    model.set_attn_implementation("eager")
    shown = model(
        input_ids=tiny_models.tokens(), use_cache=False, output_attentions=True
    ).attentions
    received = shown[0].sum(2).mean(1).flatten()
    if part == "block":
        assert_close("own attention", seen[0], received, atol=1e-4)
        assert gated.per_token == pytest.approx(3 * 3 / 7)
        return
    assert seen[0] is None, "there is no layer before the first"
    assert_close("the layer before", seen[1], received, atol=1e-4)
    assert seen[2] is None, "layer 1 ran on some tokens only"
    assert gated.per_token == pytest.approx(2 + 3 / 7)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("zaya", "layer", r"model\.layers\.0 \(ZayaDecoderLayer\) hands more than hidden"),
        ("zaya", "block", r"model\.layers\.0\.mlp \(ZayaSparseMoeBlock\) hands more"),
        ("gemma4_text", "block", "router and experts lie open in the layer"),
        ("jetmoe", "head", "JetMoeForCausalLM has no layer with o_proj"),
    ],
)
def test_what_cannot_be_skipped_is_refused_by_name(name, part, message):
    model = tiny_models.build(name)
    with pytest.raises(SwapError, match=message):
        gate_parts(model, attach(model), Gate("layer"), part=part).__enter__()


def test_errors_say_what_to_do_and_leave_nothing_behind():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    own = logits_of(model)
    with (
        gate_parts(model, sites, Gate("layer", odd), part="layer"),
        pytest.raises(SwapError, match="use_cache=False"),
    ):
        logits_of(model, use_cache=True)
    with (
        gate_parts(model, sites, Gate("head"), part="layer"),
        pytest.raises(SwapError, match="gate over part 'layer', got Mask over 'head'"),
    ):
        logits_of(model)
    with (
        gate_parts(model, sites, Gate("layer", columns=[1.0, 1.0]), part="layer"),
        pytest.raises(SwapError, match=r"gate of shape \[14, 1\] was expected, got \[14, 2\]"),
    ):
        logits_of(model)
    with pytest.raises(SwapError, match="Layer 9 has no layer to gate"):
        gate_parts(model, sites, Gate("layer"), part="layer", only=[9]).__enter__()
    assert torch.equal(logits_of(model), own)
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(SwapError, match="evaluation mode"):
        gate_parts(model.train(), sites, Gate("layer"), part="layer").__enter__()
