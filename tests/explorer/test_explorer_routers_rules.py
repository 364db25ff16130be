"""Rules that need one token only: the host's convention, selectors, and what papers say of them."""

from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
import torch
from causality_probe import toy_layers, toy_tokens
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.errors import SwapError
from explorer.errors import RouterError, UnknownNameError
from explorer.routers import ROUTERS, PartMask, RouterInputs, Routing, Threshold, TopK, TopP
from explorer.routers.contract import dense
from explorer.routers.native import keep_best_groups
from explorer.routers.scores import host_scores, masked_ids, slots, weigh
from explorer.routers.selectors import top_ids
from explorer.routers.sequences import normal, token_keys, uniform


def inputs_from(logits, **options):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    options = {"score_function": "softmax", "top_k": 2} | options
    return RouterInputs(layer=0, n_experts=logits.shape[1], logits=logits, **options)


def random_inputs(n_tokens=200, n_experts=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return inputs_from(torch.randn(n_tokens, n_experts, generator=generator) * 2, **options)


def sets(routing):
    return [frozenset(e for e in row if e >= 0) for row in routing.expert_ids.tolist()]


def toy(seed=3, **options):
    return toy_layers(toy_tokens(6, 32, seed), **options)[1, 0]


# the host's convention


def test_host_scores_by_score_function():
    logits = [[0.0, 1.0, -1.0]]
    values = torch.tensor(logits)
    for name in ("softmax", "softmax_topk"):
        inputs = inputs_from(logits, score_function=name)
        assert_close(
            name,
            host_scores(values, inputs),
            torch.tensor([[1, np.e, 1 / np.e]]).float() / float(1 + np.e + 1 / np.e),
            atol=1e-7,
        )
    sigmoid = host_scores(values, inputs_from(logits, score_function="sigmoid"))
    assert_close("sigmoid", sigmoid, 1 / (1 + torch.exp(-values)), atol=1e-7)
    given_ = host_scores(values, inputs_from(logits, score_function="probabilities"))
    assert torch.equal(given_, values)
    with pytest.raises(RouterError, match="score function"):
        host_scores(values, inputs_from(logits, score_function="other"))


def test_softmax_then_top_k_renormalised_is_top_k_then_softmax():
    inputs = random_inputs()
    routing = ROUTERS["top_k"]().route(inputs)
    best = inputs.logits.topk(2, dim=-1)
    assert torch.equal(routing.expert_ids, best.indices)
    assert_close("weights", routing.weights, best.values.softmax(dim=-1), atol=1e-6)


def test_weights_that_are_not_renormalised_are_raw_probabilities():
    inputs = random_inputs(renormalize=False, scaling=3.0)
    routing = ROUTERS["top_k"](k=3).route(inputs)
    probs = inputs.logits.softmax(dim=-1)
    assert_close("weights", routing.weights, 3 * probs.topk(3, dim=-1).values, atol=1e-6)
    again = weigh(host_scores(inputs.logits, inputs), routing.expert_ids, inputs)
    assert_close("weights", again, routing.weights, atol=1e-7)


def test_all_experts_with_the_models_weights_are_the_dense_mixture():
    inputs = random_inputs(renormalize=False)
    routing = ROUTERS["top_k"](k=8).route(inputs)
    assert_close("dense", dense(routing), inputs.logits.softmax(dim=-1), atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "probabilities"])
def test_top_k_repeats_the_models_decision(score_function, biased):
    inputs = toy(score_function=score_function, biased=biased)
    native = ROUTERS["native"]().route(inputs)
    again = ROUTERS["top_k"]().route(inputs)
    assert torch.equal(native.expert_ids, again.expert_ids)
    assert torch.equal(native.weights, again.weights)


def test_a_biased_model_chooses_by_biased_scores_and_weighs_without():
    inputs = inputs_from(
        [[2.0, 1.0, 0.0, -1.0]],
        score_function="sigmoid",
        selection_bias=torch.tensor([0.0, -5.0, 0.0, 5.0]),
        scaling=2.5,
    )
    routing = ROUTERS["top_k"]().route(inputs)
    assert routing.expert_ids.tolist() == [[0, 3]]  # heaviest first, not best choice first
    chosen = torch.tensor([[2.0, -1.0]]).sigmoid()
    assert_close("weights", routing.weights, 2.5 * chosen / chosen.sum(), atol=1e-6)


def test_native_puts_unsorted_recorded_slots_in_order():
    recorded = Routing(
        torch.zeros(2, 4),
        torch.tensor([[3, -1, 1], [0, 2, -1]]),
        torch.tensor([[0.2, 0, 0.8], [0.5, 0.5, 0]]),
    )
    inputs = RouterInputs(layer=0, n_experts=4, top_k=3, score_function="softmax", native=recorded)
    routing = ROUTERS["native"]().route(inputs)
    assert routing.expert_ids.tolist() == [[1, 3], [0, 2]]
    assert_close("weights", routing.weights, torch.tensor([[0.8, 0.2], [0.5, 0.5]]), atol=0)


def test_missing_inputs_name_the_field_and_the_command():
    inputs = RouterInputs(layer=4, n_experts=4, top_k=2, score_function="softmax")
    with pytest.raises(RouterError, match=r"'top_k'.*layer 4.*logits.*--level scores"):
        ROUTERS["top_k"]().route(inputs)
    with pytest.raises(SwapError, match="no tokens"):
        _ = inputs.n_tokens
    with pytest.raises(UnknownNameError, match="top_k"):
        ROUTERS["topk"]


# selectors


def test_ties_go_to_the_lower_id():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0, 2.0]])
    assert top_ids(scores, 2).tolist() == [[0, 1], [1, 2], [0, 1]]
    assert top_ids(torch.zeros(3, 64), 5).tolist() == [[0, 1, 2, 3, 4]] * 3


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_top_ids_against_a_stable_sort(n, seed, data):
    k = data.draw(st.integers(1, n))
    scores = torch.randint(0, 3, (20, n), generator=torch.Generator().manual_seed(seed)).float()
    expected = [sorted(range(n), key=lambda e: (-row[e], e))[:k] for row in scores.tolist()]
    assert top_ids(scores, k).tolist() == expected


def test_fewer_parts_are_kept_as_the_threshold_rises():
    scores = random_inputs().logits.softmax(dim=-1)
    kept = [int(Threshold(tau).mask(scores).sum()) for tau in (0.0, 0.05, 0.2, 0.5, 0.9, 1.1)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == scores.numel() and kept[-1] == 0
    one = Threshold(1.1, at_least=1).mask(scores)
    assert torch.equal(one, TopK(1).mask(scores))


def test_top_k_of_all_keeps_all():
    scores = random_inputs().logits
    assert bool(TopK(8).mask(scores).all())
    with pytest.raises(RouterError, match="k=9"):
        TopK(9).mask(scores)


def dynamic_moe_count(probs, p):
    """Return how many experts arXiv:2403.07652 takes: until the sum reaches p."""
    total, count = 0.0, 0
    for value in sorted(probs, reverse=True):
        count += 1
        total += value
        if total >= p:
            break
    return count


def xmoe_mask(probs, p):
    """Return what XMoE's code keeps: experts whose sum of better ones is below p."""
    kept = []
    for value in probs:
        kept.append(sum(other for other in probs if other > value) < p)
    return kept


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4, 0.7, 0.95, 1.0])
def test_top_p_equals_both_published_codes(p):
    probs = random_inputs(n_tokens=60).logits.double().softmax(dim=-1)
    mask = TopP(p).mask(probs)
    counts = mask.sum(dim=-1).tolist()
    if p == 1:
        assert counts == [8] * 60
    else:
        assert counts == [dynamic_moe_count(row, p) for row in probs.tolist()]
    if 0 < p < 1:
        assert mask.tolist() == [xmoe_mask(row, p) for row in probs.tolist()]
    if p == 0:
        assert counts == [1] * 60


def test_top_p_takes_more_as_p_rises():
    inputs = random_inputs()
    masks = [TopP(p).mask(inputs.logits.softmax(-1)) for p in (0.1, 0.3, 0.6, 0.9, 1.0)]
    for fewer, more in pairwise(masks):
        assert bool((fewer <= more).all())
    with pytest.raises(RouterError, match=r"0 <= p <= 1"):
        TopP(1.5)


@pytest.mark.parametrize("selector", [TopK(3), Threshold(0.2), TopP(0.6)])
def test_selectors_choose_for_the_router(selector):
    inputs = random_inputs()
    routing = ROUTERS["top_k"](selector=selector).route(inputs)
    mask = selector.mask(routing.scores)
    assert [set(row) for row in sets(routing)] == [
        {e for e in range(8) if row[e]} for row in mask.tolist()
    ]


def test_masked_ids_and_slots_on_paper():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert masked_ids(mask).tolist() == [[0, 2], [-1, -1], [1, -1]]
    routing = slots(
        torch.zeros(1, 5), torch.tensor([[4, -1, 2, 0]]), torch.tensor([[1.0, 9, 1, 2]])
    )
    assert routing.expert_ids.tolist() == [[0, 2, 4]]
    assert routing.weights.tolist() == [[2.0, 1.0, 1.0]]


# literature


def test_noise_of_zero_changes_nothing_and_much_noise_makes_sets_random():
    inputs = toy()
    quiet = ROUTERS["noisy_top_k"](noise=0.0).route(inputs)
    assert torch.equal(quiet.expert_ids, inputs.native.expert_ids)
    loud = ROUTERS["noisy_top_k"](noise=1e4).route(inputs)
    overlap = np.mean(
        [len(a & b) / 2 for a, b in zip(sets(loud), sets(inputs.native), strict=True)]
    )
    assert abs(overlap - 2 / 8) < 0.1  # 192 tokens: four standard errors
    other = ROUTERS["noisy_top_k"](noise=1e4, seed=1).route(inputs)
    assert not torch.equal(other.expert_ids, loud.expert_ids)


def test_switch_keeps_the_raw_probability():
    inputs = random_inputs()
    routing = ROUTERS["switch"]().route(inputs)
    probs = inputs.logits.softmax(dim=-1)
    assert_close("weight", routing.weights, probs.max(-1, keepdim=True).values, atol=1e-7)
    renormalised = ROUTERS["switch"](renormalize=True).route(inputs)
    assert bool((renormalised.weights == 1).all())


def violation(routing, n_experts):
    load = routing.expert_ids[routing.expert_ids >= 0].bincount(minlength=n_experts).double()
    return float(load.max() / load.mean() - 1)


def test_loss_free_bias_evens_out_the_load_and_leaves_the_weights():
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(-1.5, 1.5, 16)
    logits = torch.randn(4096, 16, generator=generator) + skew
    inputs = inputs_from(logits, score_function="sigmoid", top_k=4)
    before = violation(ROUTERS["top_k"]().route(inputs), 16)
    router = ROUTERS["loss_free_bias"]().fit(inputs)
    routing = router.route(inputs)
    after = violation(routing, 16)
    assert before > 1 and after < 0.15, (before, after)
    assert bool((router.bias_.diff() < 0).all())  # busier experts are held back more
    assert_close(
        "w",
        routing.weights,
        weigh(host_scores(logits, inputs), routing.expert_ids, inputs),
        atol=1e-7,
    )


def test_max_score_groups_with_as_many_groups_as_experts_change_nothing():
    """The k winners' groups are among the best k groups (a theorem, not a tendency)."""
    inputs = random_inputs(n_experts=12, top_k=3)
    plain = ROUTERS["top_k"]().route(inputs)
    for top_groups in (3, 4, 6):
        routing = ROUTERS["group_limited_v2"](n_groups=6, top_groups=top_groups).route(inputs)
        assert torch.equal(routing.expert_ids, plain.expert_ids)


@pytest.mark.parametrize("name", ["group_limited_v2", "group_limited_v3"])
def test_groups_bound_where_a_token_goes(name):
    inputs = random_inputs(n_experts=16, top_k=4)
    plain = ROUTERS["top_k"]().route(inputs)
    mass = plain.scores.gather(-1, plain.expert_ids).sum(-1)
    for top_groups in (1, 2, 4):
        routing = ROUTERS[name](n_groups=4, top_groups=top_groups).route(inputs)
        groups = [len({e // 4 for e in row}) for row in routing.expert_ids.tolist()]
        assert max(groups) <= top_groups
        assert bool((routing.scores.gather(-1, routing.expert_ids).sum(-1) <= mass + 1e-6).all())
        if top_groups == 4:
            assert torch.equal(routing.expert_ids, plain.expert_ids)
    with pytest.raises(RouterError, match="room"):
        ROUTERS[name](n_groups=8, top_groups=1).route(inputs)


def test_how_groups_count_matters():
    """E=64, 8 groups, M=3, k=6, standard normal logits: both agree on 66% of tokens."""
    inputs = inputs_from(random_inputs(n_tokens=4000, n_experts=64).logits / 2, top_k=6)
    by_max = ROUTERS["group_limited_v2"](n_groups=8, top_groups=3).route(inputs)
    by_sum = ROUTERS["group_limited_v3"](n_groups=8, top_groups=3).route(inputs)
    same = np.mean([a == b for a, b in zip(sets(by_max), sets(by_sum), strict=True)])
    assert same == pytest.approx(0.66, abs=0.03)  # four standard errors


def test_outside_the_groups_means_minus_infinity():
    """A mask of 0.0, as in transformers, differs only where a bias makes scores negative."""
    probs = random_inputs(n_tokens=500, n_experts=16).logits.sigmoid()

    def zero_masked(scores):
        kept = keep_best_groups(scores, 4, 2, 2)
        return kept.masked_fill(kept == -torch.inf, 0.0)

    both = top_ids(keep_best_groups(probs, 4, 2, 2), 4), top_ids(zero_masked(probs), 4)
    assert torch.equal(*both)
    biased = probs - 0.8
    ours, theirs = top_ids(keep_best_groups(biased, 4, 2, 2), 4), top_ids(zero_masked(biased), 4)
    assert not torch.equal(ours, theirs)
    groups = [len({expert // 4 for expert in row}) for row in ours.tolist()]
    assert max(groups) <= 2


def test_skipping_by_the_median_drops_half_of_the_second_experts():
    inputs = random_inputs(n_tokens=1000)
    router = ROUTERS["expert_skipping"]().fit(inputs)
    count = (router.route(inputs).expert_ids >= 0).sum(-1)
    assert abs(float(count.float().mean()) - 1.5) < 0.01
    ratio = inputs.logits.softmax(-1).topk(2).values
    dropped = ratio[:, 1] / ratio[:, 0] < router.beta_[1]
    assert torch.equal(count == 1, dropped)
    everything = ROUTERS["expert_skipping"](quantile=0.0).fit(inputs).route(inputs)
    assert bool((everything.expert_ids >= 0).all())


def test_relu_thresholds_meet_the_wanted_number_of_experts():
    inputs = random_inputs(n_tokens=1000)
    for wanted in (1.0, 2.0, 3.5):
        routing = ROUTERS["relu_threshold"](experts_per_token=wanted).fit(inputs).route(inputs)
        assert abs(float((routing.expert_ids >= 0).sum() / 1000) - wanted) < 0.01
    per_expert = ROUTERS["relu_threshold"](per_expert=True).fit(inputs).route(inputs)
    assert violation(per_expert, 8) < 1e-3
    all_on = ROUTERS["relu_threshold"](experts_per_token=8).fit(inputs).route(inputs)
    assert bool((all_on.expert_ids >= 0).all())
    raw = ROUTERS["relu_threshold"](weights="relu").fit(inputs)
    routing = raw.route(inputs)
    active = (inputs.logits - raw.threshold_).relu()
    expected = active / active.sum(-1, keepdim=True).clamp_min(1e-20)
    assert_close("relu weights", dense(routing), expected, atol=1e-6)


# hash and controls


def test_a_random_hash_depends_on_the_token_id_only():
    inputs = toy()
    routing = ROUTERS["hash_random"]().route(inputs)
    seen = {}
    for token, row in zip(inputs.token_ids.tolist(), routing.expert_ids.tolist(), strict=True):
        assert seen.setdefault(token, row) == row
    assert len({tuple(row) for row in seen.values()}) > 5
    assert bool((routing.weights == 0.5).all())


def test_a_fitted_hash_is_the_mean_score_of_each_token_id():
    inputs = toy()
    router = ROUTERS["hash_fitted"]().fit(inputs)
    routing = router.route(inputs)
    probs = inputs.logits.softmax(-1)
    for token in inputs.token_ids.unique().tolist():
        rows = inputs.token_ids == token
        mean = probs[rows].mean(0)
        assert_close("score", routing.scores[rows][0], mean, atol=1e-6)
    unseen = RouterInputs(
        layer=1, n_experts=8, top_k=2, score_function="softmax", token_ids=torch.tensor([10**6, -4])
    )
    assert_close("unseen", router.route(unseen).scores, probs.mean(0).expand(2, -1), atol=1e-6)


def test_random_numbers_are_uniform_normal_and_each_tokens_own():
    inputs = toy_layers(toy_tokens(40, 50, 0))[0, 0]
    keys = token_keys(inputs, seed=0)
    draws = uniform(keys, 8)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 4 * (1 / 12 / draws.numel()) ** 0.5
    gauss = normal(keys, 8)
    assert abs(float(gauss.mean())) < 4 / gauss.numel() ** 0.5
    assert abs(float(gauss.std()) - 1) < 0.03
    assert len(set(keys.tolist())) > 0.99 * len(set(range(2000)))
    assert not torch.equal(keys, token_keys(inputs, seed=1))
    alone = inputs.take(torch.arange(50, 100))
    assert torch.equal(token_keys(alone, seed=0), keys[50:100])


def test_random_sets_meet_the_anchors_of_chance():
    """E|A and B|/k = k/E, and every expert is as likely."""
    inputs = toy_layers(toy_tokens(80, 50, 0))[0, 0]
    first = ROUTERS["random"](seed=0).route(inputs)
    second = ROUTERS["random"](seed=1).route(inputs)
    overlap = np.array([len(a & b) / 2 for a, b in zip(sets(first), sets(second), strict=True)])
    assert abs(overlap.mean() - 2 / 8) < 4 * overlap.std() / 4000**0.5
    assert violation(first, 8) < 0.15
    weights = weigh(host_scores(inputs.logits, inputs), first.expert_ids, inputs)
    assert_close("host weights", first.weights, weights, atol=1e-7)


def test_random_at_a_fractional_cost():
    inputs = toy_layers(toy_tokens(80, 50, 0))[0, 0]
    for mean in (0.0, 0.5, 1.25, 2.0):
        routing = ROUTERS["random"](experts_per_token=mean, choose="best").route(inputs)
        count = (routing.expert_ids >= 0).sum(-1).float()
        assert abs(float(count.mean()) - mean) < 0.04
        assert float(count.max() - count.min()) <= 1
        for row, best in zip(sets(routing), sets(inputs.native), strict=True):
            assert row <= best
    with pytest.raises(RouterError, match="experts_per_token"):
        ROUTERS["random"](experts_per_token=9).route(inputs)


def test_matched_random_has_the_other_rules_counts():
    inputs = toy_layers(toy_tokens(80, 50, 0))[0, 0]
    beside = ROUTERS["top_p"](p=0.6).route(inputs)
    router = ROUTERS["random_matched"]().fit(inputs, beside)
    routing = router.route(inputs)
    wanted = (beside.expert_ids >= 0).sum(-1).bincount(minlength=9) / 4000
    got = (routing.expert_ids >= 0).sum(-1).bincount(minlength=9) / 4000
    assert float((wanted - got).abs().max()) < 0.03
    assert float((wanted > 0).sum()) > 2
    with pytest.raises(RouterError, match="target"):
        ROUTERS["random_matched"]().fit(inputs, PartMask("layer", torch.ones(4000, 1)))


def test_the_static_router_sends_all_tokens_to_the_best_experts_on_average():
    inputs = toy()
    routing = ROUTERS["static_best"]().fit(inputs).route(inputs)
    mean = inputs.logits.softmax(-1).mean(0)
    assert len(set(sets(routing))) == 1
    assert routing.expert_ids[0].tolist() == mean.topk(2).indices.tolist()


def test_chance_of_any_repeat():
    """1 - C(E - k, k) / C(E, k), by enumeration for E = 8, k = 2."""
    pairs = [set(pair) for pair in combinations(range(8), 2)]
    any_repeat = np.mean([bool(a & b) for a in pairs for b in pairs])
    assert (
        any_repeat == pytest.approx(1 - comb(6, 2) / comb(8, 2)) == pytest.approx(0.4643, abs=1e-4)
    )
