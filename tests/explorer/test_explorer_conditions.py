"""Conditions: what each does to a model, that it is undone exactly, and what is measured."""

import copy
import itertools

import numpy as np
import pytest
import tiny_models
import torch

from capture.swap.measure import Kept, sequence_losses
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from capture.swap.rules import PartMask, Routing
from explorer.comparison.conditions import USUAL
from explorer.comparison.conditions import expert_pruning as pruning
from explorer.comparison.conditions.calibration import collect, expert_outputs
from explorer.comparison.conditions.catalogue import (
    CONDITIONS,
    make_condition,
    make_conditions,
)
from explorer.comparison.conditions.condition import Subject
from explorer.comparison.conditions.effects import measure, run_texts
from explorer.comparison.conditions.expert_pruning import (
    FrequencyPruning,
    KeptExperts,
    RandomPruning,
    ReapPruning,
    ReconstructionPruning,
    load_of,
    reap_sums,
    reconstruction_error,
)
from explorer.comparison.conditions.head_pruning import best_heads, find_heads, head_products
from explorer.comparison.conditions.merging import (
    MergedExperts,
    find_groups,
    merged_stacks,
    nearest_cores,
)
from explorer.comparison.conditions.routing_changes import traced
from explorer.comparison.conditions.weights import (
    LowRankExperts,
    Precision,
    Quantised,
    fake_quantise,
    part_parameters,
    truncated,
)
from explorer.errors import ConditionError, UnknownNameError
from explorer.routers.subsets import best_to_drop

FAMILIES = ("olmoe", "mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "granitemoe")


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 64, (n,), generator=generator).numpy() for n in lengths]


def subject_of(family="olmoe", **changes):
    return Subject.of(tiny_models.build(family, **changes), texts(12, seed=1))


HELD_OUT = texts(6, seed=2)


@torch.no_grad()
def logits(model, seed=0):
    return model(input_ids=tiny_models.tokens(seed=seed), use_cache=False).logits


# ---- quantisation


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(("group", "axis"), [(0, -1), (8, -1), (4, -2)])
def test_a_rounded_weight_is_off_by_half_a_scale_at_most(bits, group, axis):
    weight = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(bits))
    rounded = fake_quantise(weight, bits, group=group, axis=axis)
    size = group or weight.shape[axis]
    blocks = weight.movedim(axis, -1).reshape(-1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (rounded.movedim(axis, -1).reshape(-1, size) - blocks).abs()
    assert bool((error <= scale / 2 * (1 + 1e-5)).all())
    assert error.max() > scale.min() / 4, "nothing was rounded"
    steps = rounded.movedim(axis, -1).reshape(-1, size) / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    again = fake_quantise(rounded, bits, group=group, axis=axis)
    torch.testing.assert_close(again, rounded, rtol=1e-6, atol=0)


def test_rounding_on_paper():
    """The largest of 4 bits is 7, so a group of scale 1: halves go to the even neighbour."""
    weight = torch.tensor([[7.0, 3.4, -2.6, 0.2, 0.0, 0.0, 0.0, 0.0]])
    rounded = fake_quantise(weight, 4, group=4)
    assert rounded.tolist() == [[7, 3, -3, 0, 0, 0, 0, 0]]
    assert fake_quantise(torch.tensor([[3.0, 1.4]]), 3).tolist() == [[3, 1]]


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ConditionError, match="divides the 10 inputs"):
        fake_quantise(torch.ones(2, 10), 4, group=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_experts_are_quantised_and_the_rest_is_left_alone(family):
    subject = subject_of(family)
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    parts = part_parameters(subject)
    with Quantised(4, group=8, parts=("experts",)).open(subject) as applied:
        changed = {n for n, p in subject.model.named_parameters() if not p.equal(before[n])}
    stacks = {n for n, p in parts["experts"].items() if p.ndim == 3}
    assert changed == stacks and stacks
    assert sum(p.numel() for p in before.values()) == sum(
        p.numel() for part in parts.values() for p in part.values()
    )
    saved = sum(before[n].numel() * (4 - (4 + 16 / 8) / 8) for n in stacks)
    assert applied.weight_bytes == pytest.approx(
        sum(p.numel() * 4 for p in before.values()) - saved
    )


def test_transposed_experts_share_scales_along_their_inputs():
    """gpt-oss holds [E, in, out]: a column of its experts is one output."""
    subject = subject_of("gpt_oss")
    weight = subject.sites[0].experts.gate_up_proj
    with Quantised(3, group=0, parts=("experts",)).open(subject):
        levels = [len(column.unique()) for column in weight[0].T]
    assert max(levels) <= 7


# ---- precision


def test_a_whole_model_in_16_bits_is_the_model_loaded_so(tmp_path):
    subject = subject_of()
    subject.model.save_pretrained(tmp_path)
    loaded = type(subject.model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with Precision("bfloat16").open(subject) as applied:
        assert torch.equal(logits(subject.model), logits(loaded))
    assert applied.weight_bytes == sum(p.numel() * 2 for p in subject.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["router", "experts", "attention"])
def test_a_part_set_apart_gets_and_gives_the_models_dtype(family, part):
    subject = subject_of(family)
    native = logits(subject.model)
    dtypes = {n: p.dtype for n, p in subject.model.named_parameters()}
    own = set(part_parameters(subject)[part])
    with Precision("bfloat16", (part,)).open(subject):
        rounded = logits(subject.model)
        changed = {n for n, p in subject.model.named_parameters() if p.dtype != dtypes[n]}
    assert rounded.dtype == torch.float32 and changed == own and own
    assert 0 < (rounded - native).abs().max() < 0.5
    assert torch.equal(logits(subject.model), native)


def test_the_router_alone_in_16_bits_computes_rounded_logits():
    subject = subject_of()
    site, seen = subject.sites[0], []
    hook = site.router.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    with Precision("bfloat16", ("router",)).open(subject):
        logits(subject.model)
    hook.remove()
    (args, output) = seen[0]
    expected = args[0].reshape(-1, 32).bfloat16() @ site.router.weight.bfloat16().T
    assert torch.equal(output[0].bfloat16(), expected)


def test_a_precision_says_whether_it_tests_weights_or_the_arithmetic_alone():
    subject = subject_of()
    with Precision("bfloat16").open(subject) as applied:
        share, rest = applied.method.split("%", 1)
    assert (
        95 < float(share) < 100
        and rest == " of the weights are rounded: tests weights and arithmetic"
    )
    # a checkpoint that was stored in bfloat16, computed in float32
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.copy_(parameter.bfloat16())
        exact = next(iter(part_parameters(subject)["router"].values()))
        for parts in (("router",), ("attention", "router", "experts", "rest")):
            with Precision("bfloat16", parts).open(subject) as applied:
                assert applied.method.endswith("tests the arithmetic alone")
        exact.view(-1)[0] += 1e-3
    with Precision("bfloat16").open(subject) as applied:
        assert applied.method.startswith("less than 0.1% of the weights are rounded")


def test_the_rest_has_no_boundary():
    with pytest.raises(ConditionError, match="no boundary"):
        Precision("float16", ("rest", "router"))


# ---- everything is undone


@pytest.mark.parametrize("text", [*USUAL, "merge(keep=0.5, align=False)"])
def test_the_model_is_put_back_exactly(text):
    subject = subject_of()
    before = {n: (p.data_ptr(), p.clone()) for n, p in subject.model.named_parameters()}
    native, hooks = logits(subject.model), count_hooks(subject.model)
    for condition in make_condition(text).members()[:1]:
        with pytest.raises(KeyError, match="inside"), condition.open(subject):
            changed = not torch.equal(logits(subject.model), native)
            raise KeyError("inside")
        assert changed, "the condition did nothing"
    for name, parameter in subject.model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    assert torch.equal(logits(subject.model), native)
    assert count_hooks(subject.model) == hooks


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- pruning of experts


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_experts_never_run(family):
    """Their weights are nan here, and what is computed stays finite."""
    subject = subject_of(family)
    native = sequence_losses(subject.model, HELD_OUT)
    condition = RandomPruning(0.75, seeds=1)
    with condition.open(subject) as applied, torch.no_grad():
        kept = {p: p.clone() for site in subject.sites for p in site.experts.parameters()}
        for site in subject.sites:
            for parameter in site.experts.parameters():
                parameter[applied.chosen[f"layer {site.info.layer}"]] = torch.nan
        run = run_texts(subject, HELD_OUT)
        for parameter, value in kept.items():
            parameter.copy_(value)
    assert np.isfinite(run.losses.sums).all()
    assert not np.array_equal(run.losses.sums, native.sums)
    for site in subject.sites:
        used = set(run.trace.sets((site.info.layer, site.info.site)).flatten().tolist()) - {-1}
        assert used and used.isdisjoint(applied.chosen[f"layer {site.info.layer}"])
        assert len(applied.chosen[f"layer {site.info.layer}"]) == 2


def test_masked_rows_are_deleted_rows():
    """A model whose router and experts lack the pruned rows computes the same."""
    subject = subject_of(norm_topk_prob=True)
    condition = RandomPruning(0.75, seeds=1)
    with condition.open(subject) as applied:
        pruned = logits(subject.model)
    smaller = tiny_models.build("olmoe", norm_topk_prob=True, num_experts=6)
    state = subject.model.state_dict()
    for name, value in smaller.state_dict().items():
        source = state[name]
        if source.shape != value.shape:
            gone = applied.chosen[f"layer {name.split('.')[2]}"]
            source = source[[e for e in range(8) if e not in gone]]
        value.copy_(source)
    torch.testing.assert_close(pruned, logits(smaller), rtol=1e-4, atol=1e-4)


def layer_of(subject, number=1, tokens=40):
    seen = collect(subject, subject.calibration, tokens=tokens)
    return seen[sorted(seen)[number]]


def test_reconstruction_reads_as_many_tokens_as_fit_in_memory(monkeypatch):
    subject = subject_of(norm_topk_prob=True)
    experts, width = 8, subject.model.config.hidden_size
    monkeypatch.setattr(pruning, "MOST_OUTPUTS", 20 * experts * width + 1)
    with ReconstructionPruning(keep=0.75).open(subject) as applied:
        assert applied.method == "enumeration, 28 subsets, 20 tokens"


def test_reconstruction_finds_the_least_error_of_all_subsets():
    """Against each expert computed by hand, for all 28 ways to drop two of eight experts."""
    subject = subject_of(norm_topk_prob=True)
    seen = layer_of(subject)
    experts, hidden = seen.site.experts, seen.inputs.hidden

    def output(members):
        kept = [e for e in range(8) if e not in members]
        out = torch.zeros_like(hidden)
        for token, row in enumerate(seen.inputs.logits):
            share = row[kept].softmax(-1)
            top = share.topk(3)
            for weight, place in zip(top.values / top.values.sum(), top.indices, strict=True):
                e = kept[place]
                gate, up = (experts.gate_up_proj[e] @ hidden[token]).chunk(2)
                value = experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                out[token] += weight * value
        return out

    with torch.no_grad():
        full = output(())
        errors = {m: float((output(m) - full).norm()) for m in itertools.combinations(range(8), 2)}
    dropped = ReconstructionPruning().search(seen, 2)
    assert dropped.members == min(errors, key=errors.get)
    assert dropped.error == pytest.approx(min(errors.values()), rel=1e-3)
    assert dropped.method == "enumeration, 28 subsets"
    error = reconstruction_error(seen)
    assert all(error(m) == pytest.approx(e, rel=1e-3) for m, e in errors.items())
    greedy = ReconstructionPruning(most=27).search(seen, 2)
    assert greedy.method == "greedy, 15 subsets" and greedy.error >= dropped.error


def test_searching_tries_all_or_goes_greedily():
    """Two members that cost little only together: greed takes the cheapest one first."""
    costs = {(0,): 1, (1,): 5, (2,): 6, (0, 1): 9, (0, 2): 8, (1, 2): 2}
    whole = best_to_drop(3, 2, costs.__getitem__)
    assert whole.members == (1, 2) and whole.exhaustive and whole.tried == 3
    greedy = best_to_drop(3, 2, costs.__getitem__, most=2)
    assert greedy.members == (0, 2) and not greedy.exhaustive and greedy.tried == 3 + 2
    assert best_to_drop(3, 0, lambda members: len(members)).members == ()


def test_reap_on_paper():
    """Expert 0 served two tokens with 0.5 x 2 and 0.25 x 4, expert 1 one with 1 x 3."""
    norms = torch.tensor([[2.0, 9.0, 9.0], [4.0, 9.0, 9.0], [9.0, 3.0, 9.0]])
    ids, weights = torch.tensor([[0], [0], [1]]), torch.tensor([[0.5], [0.25], [1.0]])
    routing = Routing(torch.zeros(3, 3), ids, weights)
    assert reap_sums(norms, routing).tolist() == [2.0, 3.0, 0.0]
    assert load_of(routing, 3).tolist() == [2, 1, 0]
    empty = Routing(torch.zeros(1, 3), torch.tensor([[2, -1]]), torch.tensor([[1.0, 0.0]]))
    assert load_of(empty, 3).tolist() == [0, 0, 1]
    assert reap_sums(norms[:1], empty).tolist() == [0.0, 0.0, 9.0]


def test_reap_of_a_model_is_the_mean_over_the_tokens_served():
    subject = subject_of()
    seen = layer_of(subject)
    outputs = expert_outputs(seen, seen.inputs.hidden)
    routing, expected = seen.inputs.native, []
    for e in range(8):
        served = [
            float(routing.weights[t, k] * outputs[t, e].norm())
            for t, k in (routing.expert_ids == e).nonzero().tolist()
        ]
        expected.append(np.mean(served) if served else 0.0)
    np.testing.assert_allclose(ReapPruning().score(seen).numpy(), expected, rtol=1e-4)


def test_the_least_used_experts_go():
    """A router that cannot choose experts 2 and 5: their rows point away from every token."""
    subject = subject_of()
    with torch.no_grad():
        for site in subject.sites:
            hidden = collect(subject, subject.calibration, tokens=60)
            away = -hidden[site.info.layer, 0].inputs.hidden.mean(0)
            site.router.weight[[2, 5]] = 50 * away / away.norm()
    condition = FrequencyPruning(0.75)
    with condition.open(subject) as applied:
        pass
    for site in subject.sites:
        load = load_of(
            collect(subject, subject.calibration, tokens=4096)[site.info.layer, 0].inputs.native,
            8,
        )
        gone = applied.chosen[f"layer {site.info.layer}"]
        kept = [e for e in range(8) if e not in gone]
        assert load[gone].max() <= load[kept].min()


def test_too_few_experts_are_refused():
    with pytest.raises(ConditionError, match="At least 3"), RandomPruning(0.25).open(subject_of()):
        pass


# ---- heads


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_a_pruned_head_is_a_masked_head(family):
    subject = subject_of(family)
    condition = make_condition("prune_heads(keep=0.75)")
    with condition.open(subject) as applied:
        pruned = logits(subject.model)

    class Mask:
        def route(self, inputs):
            gate = torch.ones(len(inputs.hidden), 4)
            gate[:, applied.chosen[f"layer {inputs.layer}"]] = 0
            return PartMask("head", gate)

    with gate_parts(subject.model, subject.sites, Mask(), part="head"):
        masked = logits(subject.model)
    torch.testing.assert_close(pruned, masked, rtol=1e-4, atol=1e-5)
    assert all(len(gone) == 1 for gone in applied.chosen.values())
    assert applied.method == "enumeration, 4 subsets"


def test_heads_are_chosen_by_what_they_add_together():
    """Two heads that cancel each other out are the ones to drop, though each adds much."""
    product = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0], [0.0, 0.0, 1.0]]).double()
    assert best_heads(product, 2).members == (0, 1)
    assert best_heads(product, 1).members == (2,)
    assert best_heads(product, 2, most=1).members == (0, 2)


def test_products_of_heads_are_those_of_their_contributions():
    subject = subject_of()
    heads = find_heads(subject.model)
    products = head_products(subject, heads, tokens=10_000)
    inputs = []
    mixer = heads[0].mixer
    hook = mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for text in subject.calibration:
            subject.model(input_ids=torch.tensor(text)[None].long(), use_cache=False)
    hook.remove()
    rows, weight = torch.cat(inputs).double(), mixer.weight.detach().double()
    added = [(rows * (torch.arange(32) // 8 == h)) @ weight.T for h in range(4)]
    expected = [[float((a * b).sum()) for b in added] for a in added]
    np.testing.assert_allclose(products[0].numpy(), expected, rtol=1e-4, atol=1e-6)


# ---- low rank


def test_full_rank_changes_nothing_and_lower_ranks_drop_singular_values():
    subject = subject_of()
    native = logits(subject.model)
    with LowRankExperts(1.0).open(subject):
        torch.testing.assert_close(logits(subject.model), native, rtol=0, atol=1e-5)
    stack = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(stack)
    for rank in (1, 2, 3):
        error = (truncated(stack, rank) - stack).flatten(1).norm(dim=1)
        torch.testing.assert_close(error, singular[:, rank:].norm(dim=1))
        assert torch.linalg.matrix_rank(truncated(stack, rank), rtol=1e-4).tolist() == [rank] * 2


# ---- merging


def test_experts_that_compute_the_same_merge_into_themselves():
    """Their neurons may lie in another order, which aligning finds."""
    subject = subject_of()
    width = subject.sites[0].experts.down_proj.shape[-1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for site in subject.sites:
            gate_up, down = site.experts.gate_up_proj, site.experts.down_proj
            for e in range(1, 8):
                turned = order.roll(e)
                gate, up = gate_up[0].chunk(2)
                gate_up[e] = torch.cat((gate[turned], up[turned]))
                down[e] = down[0][:, turned]
    native = logits(subject.model)
    with MergedExperts(0.5).open(subject) as applied:
        merged = logits(subject.model)
    torch.testing.assert_close(merged, native, rtol=0, atol=1e-4)
    with MergedExperts(0.5, align=False).open(subject):
        assert (logits(subject.model) - native).abs().max() > 1e-2
    assert applied.method == "12 cores by usage over all layers"


def test_a_merged_expert_is_the_average_by_usage():
    experts = tiny_models.build("olmoe").model.layers[0].mlp.experts
    usage = torch.tensor([3, 1, 0, 0, 2, 2, 2, 2])
    values = merged_stacks(experts, (0, 0, 2, 3, 4, 5, 6, 6), usage, align=False)
    own = experts.down_proj
    merged = values[own]
    torch.testing.assert_close(merged[0], 0.75 * own[0] + 0.25 * own[1], atol=1e-5, rtol=0)
    assert torch.equal(merged[0], merged[1]) and torch.equal(merged[6], merged[7])
    torch.testing.assert_close(merged[2:6], own[2:6], atol=1e-6, rtol=0)


def test_experts_join_the_core_with_the_most_similar_logits():
    """Columns of logits: 0 and 2 point one way, 1 and 3 the other; cores keep themselves."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 0.1], [0.0, 1.0, 0.2, 3.0], [1.0, 0.0, 1.9, 0.0]])
    assert nearest_cores(logits, [0, 1]) == (0, 1, 0, 1)
    assert nearest_cores(logits, [2, 3]) == (2, 3, 2, 3)


def test_cores_are_the_most_used_of_all_layers_and_one_in_each():
    subject = subject_of()
    seen = collect(subject, subject.calibration, tokens=50)
    keys = sorted(seen)
    flat = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    steep = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    groups = find_groups(seen, {keys[0]: flat, keys[1]: steep, keys[2]: steep}, 6 / 24)
    assert set(groups[keys[0]]) == {0, 1, 2, 3}
    assert set(groups[keys[1]]) == set(groups[keys[2]]) == {0}


# ---- what is measured


def test_forcing_a_models_own_routing_gives_its_logits_bit_for_bit():
    subject = subject_of()
    with traced(subject) as trace:
        native = logits(subject.model)
    with swap(subject.model, subject.sites, trace.tape):
        assert torch.equal(logits(subject.model), native)
    base = run_texts(subject, HELD_OUT)
    assert np.array_equal(run_texts(subject, HELD_OUT, base.trace).losses.sums, base.losses.sums)


def test_the_table_of_own_and_forced_routing():
    subject = subject_of()
    conditions = [Quantised(3, group=8), RandomPruning(0.75, seeds=2), Precision("bfloat16")]
    tables = measure(subject, HELD_OUT, conditions)
    cells = tables.conditions.set_index(["condition", "weights", "routing"])
    native = sequence_losses(subject.model, HELD_OUT)
    assert cells.loc[("base", "base", "base"), "loss"] == native.mean
    with conditions[0].open(subject):
        own = Kept(lambda: traced(subject))
        losses = sequence_losses(subject.model, HELD_OUT, swapped=own)
    assert cells.loc[("int3 group 8", "condition", "condition"), "loss"] == losses.mean
    forced = sequence_losses(
        subject.model,
        HELD_OUT,
        swapped=lambda: swap(subject.model, subject.sites, own.values[0].tape),
    )
    assert cells.loc[("int3 group 8", "base", "condition"), "loss"] == forced.mean
    assert (
        len(
            {
                cells.loc[("int3 group 8", *place), "loss"]
                for place in [
                    ("condition", "condition"),
                    ("condition", "base"),
                    ("base", "condition"),
                ]
            }
        )
        == 3
    )
    # experts that are gone cannot be forced, and on the base their routing is all there is to it
    pruned = cells.loc["prune_random 75%"]
    assert list(pruned.index) == [("condition", "condition"), ("base", "condition")]
    assert pruned["loss"].nunique() == 1 and (pruned["draws"] == 2).all()
    single = [
        measure(subject, HELD_OUT, [RandomPruning(0.75, seed=s, seeds=1)])
        .conditions["loss"]
        .iloc[1]
        for s in (0, 1)
    ]
    assert pruned["loss"].iloc[0] == pytest.approx(np.mean(single))
    assert pruned["draw_spread"].iloc[0] == pytest.approx(np.std(single, ddof=1))
    assert not subject.model.training


def test_texts_of_the_fit_split_are_not_reported_on():
    subject = subject_of()
    with pytest.raises(ConditionError, match="held-out"):
        measure(subject, subject.calibration[:2], [Quantised(4, group=8)])


# ---- names


@pytest.mark.parametrize("name", CONDITIONS)
def test_cards(name):
    info = CONDITIONS[name]().info
    assert info.name == name and info.title and info.formula
    assert 1 <= info.summary.count(". ") + info.summary.endswith(".") <= 2


def test_conditions_from_text():
    condition = make_condition("quantised(bits=3, parts='router+experts', group=16)")
    assert (
        condition.parts == ("router", "experts")
        and condition.label == "int3 router+experts group 16"
    )
    assert len({one.label for one in make_conditions(USUAL)}) == len(USUAL)
    with pytest.raises(UnknownNameError, match="quantised"):
        make_condition("quantized")
    for wrong in (
        "quantised(bit=4)",
        "quantised(bits=9)",
        "merge(keep=0)",
        "low_rank(share=2)",
        "1 +",
    ):
        with pytest.raises(ConditionError):
            make_condition(wrong)
    with pytest.raises(ConditionError, match="twice"):
        make_conditions(["merge", "merge(keep=0.75)"])


def test_the_rule_of_kept_experts_keeps_a_selection_bias_away_from_pruned_ones():
    """A bias that would win for a pruned expert does not."""
    subject = subject_of("deepseek_v3")
    seen = layer_of(subject, number=0)
    inputs = seen.inputs
    bias = torch.zeros(8)
    bias[4] = 10.0
    inputs = copy.copy(inputs)
    object.__setattr__(inputs, "selection_bias", bias)
    routing = KeptExperts({inputs.place: (4,)}).route(inputs)
    assert not bool((routing.expert_ids == 4).any())
