"""Another rule in a router's place: what runs, what comes out, and that nothing stays behind."""

from collections import Counter

import pytest
import tiny_models
import torch
from checks import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from capture.errors import SwapError
from capture.model.hooks import tap
from capture.model.selftest import attach
from capture.swap.playback import recorded
from capture.swap.routers import swap
from capture.swap.rules import Choice, NativeRule

# fp32 through three layers, sums in another order
ATOL = 2e-5
REFUSED = {"doge", "inkling2_loop_text"}  # no place where a choice can be put in
ALL = [n for n in (*tiny_models.REQUIRED, *tiny_models.OTHERS) if n not in REFUSED]
FEW = ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe", "dbrx", "zaya"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def logits_of(model, ids=None, **arguments):
    """One forward pass; hidden states for the text models without a head."""
    ids = tiny_models.tokens() if ids is None else ids
    output = model(input_ids=ids, **{"use_cache": False, **arguments})
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def half_of(native, inputs):
    """Return which of the native slots [T, K] to keep: about half, by what cannot round."""
    odd = (inputs.positions + inputs.layer) % 2 == 1
    keep = odd[:, None].expand_as(native.expert_ids).clone()
    keep[:, 0] ^= True
    return keep


class Emptied:
    """About half of the model's own slots, the others empty: K stays, the work does not."""

    def route(self, inputs):
        ids, weights = inputs.native
        keep = half_of(inputs.native, inputs)
        return Choice(ids.masked_fill(~keep, -1), weights.masked_fill(~keep, 0.0))


class Weightless:
    """The same experts as ``Emptied``, but the others run with weight 0: masked, not skipped."""

    def route(self, inputs):
        keep = half_of(inputs.native, inputs)
        return inputs.native._replace(weights=inputs.native.weights.masked_fill(~keep, 0.0))


class Nothing:
    """No expert for any token."""

    def route(self, inputs):
        ids, weights = inputs.native
        return Choice(torch.full_like(ids, -1), torch.zeros_like(weights))


class Top:
    """Softmax top-k of the model's own logits, for any k."""

    def __init__(self, top_k):
        self.top_k = top_k

    def route(self, inputs):
        weights, ids = inputs.logits.softmax(-1).topk(self.top_k)
        return Choice(ids, weights)


class Broken:
    def route(self, inputs):
        raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_architecture_takes_another_rule(name):
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)
    with swap(model, sites, NativeRule()) as swapped:
        assert_close("native rule", logits_of(model), own, atol=1e-6)
    per_token = [c.load.sum() / c.tokens for c in swapped.counts.values()]
    assert per_token == [s.info.top_k for s in sites]

    with recorded(sites) as tape:
        logits_of(model)
    with swap(model, sites, tape):
        assert torch.equal(logits_of(model), own), "own routing must give the logits bit for bit"

    with swap(model, sites, Weightless()):
        expected = logits_of(model)
    with swap(model, sites, Emptied()):
        skipped = logits_of(model)
    assert float((expected - own).abs().max()) > 1e-3, "the rule must matter"
    assert_close("empty slots", skipped, expected, atol=ATOL * max(1, float(own.abs().max())))

    with swap(model, sites, Nothing()) as swapped:
        logits_of(model)
    assert swapped.experts_per_token == 0
    assert torch.equal(logits_of(model), own), "something stayed behind"


def test_architectures_without_a_seam_are_refused_by_name():
    model = tiny_models.build("doge")
    with pytest.raises(SwapError, match=r"model\.layers\.0\.mlp: no other rule.*product-keys"):
        swap(model, attach(model, alone=True), NativeRule()).__enter__()


def test_longcat_without_a_free_expert_is_refused_by_name():
    model = tiny_models.build("longcat_flash", zero_expert_num=0)
    with (
        pytest.raises(SwapError, match=r"model\.layers\.0\.mlp: empty slots need"),
        swap(model, attach(model), Emptied()),
    ):
        logits_of(model)


class ExpertRuns(TorchDispatchMode):
    """Count the matrix products with each expert's slice of a stacked weight: {expert: rows}."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows, self.calls = weight, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            if right.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr():
                expert = right.storage_offset() // self.weight.stride(0)
                self.rows[expert] += len(left)
                self.calls[expert] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "llama4_text", "jetmoe", "zaya"])
@pytest.mark.parametrize("rule", [Emptied(), Nothing(), Top(1)])
def test_only_what_is_chosen_runs(name, rule):
    """Counted by watching every product with an expert's weights, not by asking the swap."""
    model = tiny_models.build(name)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    sites = [s for s in attach(model) if s.info.site == 0]
    for site in sites:
        stacked = max((p for p in site.experts.parameters() if p.ndim == 3), key=torch.numel)
        with (
            swap(model, attach(model), rule, only=[(site.info.layer, 0)]) as swapped,
            ExpertRuns(stacked) as runs,
        ):
            logits_of(model)
        count = swapped.counts[site.info.layer, 0]
        computed = count.rows[: count.computing].tolist()
        assert [runs.rows[e] for e in range(count.computing)] == computed
        # an expert that ran on no row did no work, whether or not it was called
        ran = [int(runs.calls[e] > 0 and runs.rows[e] > 0) for e in range(count.computing)]
        assert ran == count.calls[: count.computing].tolist()
        assert sum(computed) < 14 * site.info.top_k or site.info.top_k == 1


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_every_experts_implementation_skips_and_replays(name, implementation):
    model = tiny_models.build(name)
    sites = attach(model)
    with swap(model, sites, Weightless()):
        expected = logits_of(model)
    model.set_experts_implementation(implementation)
    own = logits_of(model)
    with recorded(sites) as tape:
        logits_of(model)
    with swap(model, sites, tape):
        assert torch.equal(logits_of(model), own)
    with swap(model, sites, Emptied()):
        assert_close("empty slots", logits_of(model), expected, atol=ATOL)
    with swap(model, sites, Nothing()):
        assert bool(logits_of(model).isfinite().all())


@pytest.mark.parametrize("top_k", [1, 5, 8])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "llama4_text"])
def test_k_may_differ_from_the_models(name, top_k):
    model = tiny_models.build(name)
    sites = attach(model)
    with swap(model, sites, Top(top_k)) as swapped:
        logits_of(model)
    assert swapped.experts_per_token == top_k


def test_jetmoes_attention_has_as_many_queries_as_experts():
    model = tiny_models.build("jetmoe")
    with (
        pytest.raises(SwapError, match=r"self_attention\.experts: .* at most 3 experts, got 4"),
        swap(model, attach(model), Top(4)),
    ):
        logits_of(model)
    assert bool(logits_of(model).isfinite().all())


@pytest.mark.parametrize("name", FEW)
def test_nothing_stays_behind(name):
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)

    def installed():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return hooks, sum("forward" in vars(m) for m in model.modules())

    before = installed()
    with swap(model, sites, NativeRule()):
        assert installed() > before
    assert installed() == before
    for block in (swap(model, sites, Broken()), swap(model, sites, NativeRule())):
        with pytest.raises(ZeroDivisionError), block:
            logits_of(model)
            raise ZeroDivisionError
        assert installed() == before
    with pytest.raises(SwapError, match="no router"):
        swap(model, sites, NativeRule(), only=[99]).__enter__()
    assert installed() == before
    assert torch.equal(logits_of(model), own)


def test_a_forward_put_on_the_instance_comes_back():
    """Device maps replace forward on the instance; it is called, and stays."""
    model = tiny_models.build("olmoe")
    experts, calls = model.model.layers[0].mlp.experts, []
    stock = experts.forward

    def mapped(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    experts.forward = mapped
    sites = attach(model)
    calls.clear()
    with swap(model, sites, Emptied()):
        logits_of(model)
    assert calls == [1]
    assert vars(experts)["forward"] is mapped


def test_one_layer_or_one_rule_for_each():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    with swap(model, sites, {1: Top(1), (2, 0): Top(2)}) as swapped:
        logits_of(model)
    assert [c.experts_per_token for c in swapped.counts.values()] == [3, 1, 2]
    with swap(model, sites, Top(1), only=[0]) as swapped:
        one = logits_of(model)
    assert [c.experts_per_token for c in swapped.counts.values()] == [1, 3, 3]
    with swap(model, None, {0: Top(1)}):
        assert torch.equal(logits_of(model), one)
    with pytest.raises(SwapError, match="7 has no router"):
        swap(model, sites, {7: Top(1)}).__enter__()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4_text"])
def test_padding_is_neither_routed_nor_run(name, side):
    model = tiny_models.build(name)
    sites = attach(model)
    ids = tiny_models.tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    if side == "left":
        mask = mask.flip(-1)
    seen = []
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    with swap(model, sites, Emptied(), on_choice=lambda i, c: seen.append((i, c))) as swapped:
        padded = logits_of(model, ids, attention_mask=mask, **positions)
        real = ids[1][mask[1].bool()]
        alone = logits_of(model, real[None])
    assert_close("real tokens", padded[1][mask[1].bool()], alone[0], atol=ATOL)
    inputs = seen[0][0]
    assert inputs.token_ids.tolist() == ids[mask.bool()].tolist()
    assert inputs.positions.tolist() == [*range(7), *range(4)]
    assert inputs.sequences.tolist() == [0] * 7 + [1] * 4
    assert inputs.starts.nonzero().flatten().tolist() == [0, 7]
    for count in swapped.counts.values():
        assert (count.tokens, count.passes) == (15, 2)
        assert torch.equal(count.rows, count.load), "padding ran"


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_generation_with_a_cache_is_the_one_without(name):
    model = tiny_models.build(name)
    sites = attach(model)
    prompt, steps = tiny_models.tokens(1, 6), 5
    seen = []
    with swap(model, sites, Emptied(), on_choice=lambda i, c: seen.append(i)):
        cached = model.generate(prompt, max_new_tokens=steps, do_sample=False, eos_token_id=None)
        first = [i for i in seen if i.layer == sites[0].info.layer]
        plain = prompt
        for _ in range(steps):
            best = logits_of(model, plain)[:, -1].argmax(-1, keepdim=True)
            plain = torch.cat((plain, best), dim=1)
    assert cached.tolist() == plain.tolist()
    assert [i.positions.tolist() for i in first] == [[*range(6)], *([p] for p in range(6, 10))]
    assert [i.token_ids.tolist() for i in first[1:]] == [[t] for t in cached[0, 6:-1].tolist()]
    assert [bool(i.starts.any()) for i in first] == [True] + [False] * 4


def test_padded_prompts_generate_as_if_alone():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    seen = []
    with swap(model, sites, Emptied(), on_choice=lambda i, c: seen.append(i)):
        both = model.generate(ids, attention_mask=mask, **arguments)
        decoding = [i.positions.tolist() for i in seen if i.layer == 0][1:]
        alone = model.generate(ids[1:, 2:], attention_mask=mask[1:, 2:], **arguments)
    assert both[1, 6:].tolist() == alone[0, 4:].tolist()
    assert decoding == [[6 + step, 4 + step] for step in range(3)]


def test_generation_replays_bit_for_bit():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    arguments = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with recorded(sites) as tape:
        own = model.generate(tiny_models.tokens(2, 6), **arguments)
    assert tape.n_passes == len(own.logits)
    with swap(model, sites, tape):
        again = model.generate(tiny_models.tokens(2, 6), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(own.logits, again.logits, strict=True))


def test_a_tape_of_one_condition_changes_another():
    """Routing of float32 forced onto bfloat16: its sets are the tape's, slot by slot."""
    model = tiny_models.build("olmoe")
    with recorded(attach(model)) as tape:
        logits_of(model)
    half = tiny_models.build("olmoe", dtype=torch.bfloat16)
    sites = attach(half)
    with swap(half, sites, tape), tap(sites) as taps:
        logits_of(half)
        seen = taps.take()
    for site, observation in zip(sites, seen, strict=True):
        told = tape.choices((site.info.layer, 0))[0].expert_ids
        assert torch.equal(observation.expert_ids.sort(-1).values, told.sort(-1).values)
    with swap(half, sites, tape):
        logits_of(half)
        with pytest.raises(SwapError, match="tape holds 1 forward passes, but pass 2 runs"):
            logits_of(half)
    with (
        swap(half, sites, tape),
        pytest.raises(SwapError, match="recording of 6 rows was expected in pass 1, got 14"),
    ):
        logits_of(half, tiny_models.tokens(2, 3))


def test_a_tape_of_real_tokens_leaves_padding_alone():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    own = logits_of(model, ids, attention_mask=mask)
    with recorded(sites) as tape:
        logits_of(model, ids, attention_mask=mask)
    real = mask.flatten().bool()
    short = type(tape)()
    for site in sites:
        key = (site.info.layer, 0)
        choice = tape.choices(key)[0]
        short.append(key, Choice(choice.expert_ids[real], choice.weights[real]))
    with swap(model, sites, short):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), own)


def test_the_demo_model_replays_itself_bit_for_bit():
    from capture.model.load import load_model

    model = load_model("demo").model
    sites = attach(model)
    ids = torch.randint(10, 200, (3, 32), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 20:] = 0
    own = logits_of(model, ids, attention_mask=mask)
    with recorded(sites) as tape:
        logits_of(model, ids, attention_mask=mask)
    with swap(model, sites, tape):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), own)
    with swap(model, sites, NativeRule()):
        real = mask.bool()
        # padding is left out, so that products have other shapes
        swapped = logits_of(model, ids, attention_mask=mask)[real]
        assert_close("native rule", swapped, own[real], atol=1e-3)


class GateExperts:
    """A gate over experts, the answer of rules that skip: 0 for even experts, half for the rest."""

    part = "expert"

    def route(self, inputs):
        self.gate = torch.zeros(len(inputs.hidden), inputs.n_experts)
        self.gate[:, 1::2] = 0.5
        return self


def test_a_gate_over_experts_scales_and_skips():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    choices = []
    with swap(model, sites, GateExperts(), on_choice=lambda i, c: choices.append((i, c))):
        logits_of(model)
    for inputs, choice in choices:
        odd = inputs.native.expert_ids % 2 == 1
        assert torch.equal(choice.expert_ids >= 0, odd)
        assert_close("weights", choice.weights, inputs.native.weights * odd / 2, atol=0)


class Counting:
    """Hands on how many sites it has seen, and remembers what it was handed."""

    def __init__(self):
        self.states, self.previous = [], []

    def route(self, inputs):
        state = torch.zeros(len(inputs.hidden), 1)
        if inputs.previous_state is not None:
            state = inputs.previous_state
        self.states.append(float(state[0, 0]))
        self.previous.append(inputs.previous)
        answer = type("Answer", (), {})()
        answer.expert_ids, answer.weights = inputs.native
        answer.state = state + 1
        return answer


def test_state_and_routing_are_handed_from_site_to_site():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    rule = Counting()
    with swap(model, sites, rule), tap(sites) as taps:
        for _ in range(2):
            logits_of(model)
            seen = taps.take()
    assert rule.states == [0, 1, 2] * 2
    assert rule.previous[3] is None
    told = rule.previous[5].expert_ids
    assert torch.equal(told.sort(-1).values, seen[1].expert_ids.sort(-1).values)

    late = Counting()
    with swap(model, sites, late, only=[2], watch=dict.fromkeys((0, 1), late)):
        logits_of(model)
    assert late.states == [0, 1, 2]


def test_a_tap_inside_sees_what_ran_and_one_outside_what_would_have():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    with tap(sites) as taps:
        logits_of(model)
        own = taps.take()
    with swap(model, sites, Emptied()), tap(sites) as taps:
        logits_of(model)
        inside = taps.take()
    with tap(sites) as taps, swap(model, sites, Emptied()):
        logits_of(model)
        outside = taps.take()
    assert bool((inside[0].expert_ids == -1).any())
    assert torch.equal(outside[0].expert_ids, own[0].expert_ids)


def test_gradients_reach_a_rule():
    """Routers are trained through the frozen model."""
    model = tiny_models.build("olmoe").requires_grad_(False)
    sites = attach(model)
    scale = torch.ones((), requires_grad=True)

    class Scaled:
        def route(self, inputs):
            ids, weights = Emptied().route(inputs)
            return Choice(ids, weights * scale)

    # the last layer only: what the rule empties depends on its input in steps
    with torch.enable_grad(), swap(model, sites, Scaled(), only=[2]):
        loss = logits_of(model).square().mean()
        loss.backward()
    with torch.no_grad(), swap(model, sites, Scaled(), only=[2]):
        scale += 1e-3
        above = logits_of(model).double().square().mean()
        scale -= 2e-3
        below = logits_of(model).double().square().mean()
    assert_close("gradient", scale.grad, (above - below) / 2e-3, atol=1e-3)


class Attentive:
    """Keeps what it is told of attention and of the model's own gate."""

    def __init__(self):
        self.seen = []

    def route(self, inputs):
        self.seen.append(inputs)
        return inputs.native


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_rules_may_see_the_attention_of_their_layer(name):
    """Against the weights that the model itself puts out, averaged over heads by hand."""
    model = tiny_models.build(name)
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    rule = Attentive()
    with swap(model, sites, rule, attention=True):
        logits_of(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    shown = model(
        input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True
    ).attentions
    for inputs in rule.seen:
        weights = shown[inputs.layer].double()  # [B, H, T, T]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(1).flatten()
        largest = weights.amax(-1).mean(1).flatten()
        received = (weights * mask[:, None, :, None]).sum(2).mean(1).flatten()
        real = mask.flatten().bool()
        column = dict(zip(inputs.attention_names, inputs.attention.unbind(-1), strict=True))
        assert_close("entropy", column["entropy"], entropy[real], atol=1e-4)
        assert_close("largest weight", column["max_weight"], largest[real], atol=1e-4)
        assert_close("received", inputs.received, received[real], atol=1e-4)
    with swap(model, sites, rule):
        logits_of(model)
    assert rule.seen[-1].attention is None, "nothing is computed that is not asked for"


def test_attention_needs_whole_texts():
    model = tiny_models.build("olmoe")
    with (
        swap(model, attach(model), Attentive(), attention=True),
        pytest.raises(SwapError, match="not the tokens of the prompt"),
    ):
        model.generate(tiny_models.tokens(1, 5), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "dbrx", "jetmoe", "zaya"])
def test_rules_may_read_the_models_own_gate(name):
    model = tiny_models.build(name)
    sites = attach(model)
    rule = Attentive()
    with swap(model, sites, rule):
        logits_of(model)
    for inputs in rule.seen:
        if name == "zaya":
            assert inputs.gate_weight is None, "its router is no single matrix"
            continue
        logits = torch.nn.functional.linear(inputs.hidden, inputs.gate_weight, inputs.gate_bias)
        assert_close("logits", logits, inputs.logits, atol=1e-5)


class Answers:
    def __init__(self, make):
        self.make = make

    def route(self, inputs):
        return self.make(*inputs.native)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i, w: None, "expert_ids and weights, got NoneType"),
        (lambda i, w: Choice(i[:3], w[:3]), r"shape \[14, K\], got \[3, 3\]"),
        (lambda i, w: Choice(i.float(), w), "integer ids and floating weights"),
        (lambda i, w: Choice(i + 8, w), "ids from 0 to 7, or -1 for an empty slot"),
        (lambda i, w: Choice(i, w * torch.nan), "finite weights"),
        (lambda i, w: Choice(torch.full_like(i, -1), w), "0 in empty slots"),
        (lambda i, w: Choice(torch.zeros_like(i), w), "got one expert twice"),
    ],
)
def test_an_answer_that_cannot_run_names_the_site(make, message):
    model = tiny_models.build("olmoe")
    with (
        pytest.raises(SwapError, match=rf"model\.layers\.0\.mlp: .*{message}"),
        swap(model, attach(model), Answers(make)),
    ):
        logits_of(model)


def test_models_that_would_hide_a_swap_are_refused():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    with swap(model, sites, NativeRule()), pytest.raises(SwapError, match="whole model"):
        model.model(input_ids=tiny_models.tokens(), use_cache=False)
    with swap(model, sites, NativeRule()):
        with pytest.raises(SwapError, match="swapped already"):
            swap(model, sites, NativeRule()).__enter__()
        logits_of(model)
    with pytest.raises(SwapError, match="uncompiled"):
        swap(torch.compile(model, backend="eager"), sites, NativeRule()).__enter__()
    model.train()
    with pytest.raises(SwapError, match="evaluation mode"):
        swap(model, sites, NativeRule()).__enter__()
