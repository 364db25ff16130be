"""Attention-based routers and the fit loop: identities, and students of a linear teacher."""

import functools

import pytest
import torch
from causality_probe import probe, toy_layers, toy_targets, toy_tokens
from checks import assert_close
from test_explorer_routers_clusters import FIT, HELD_OUT, agreement

from capture.errors import SwapError
from explorer.errors import RouterError
from explorer.routers import ROUTERS, PartMask, RouterInputs, Threshold, TopK, TopP
from explorer.routers.attention import KeyAttention, YuanAttention
from explorer.routers.controls import ConstantGateRouter
from explorer.routers.distilled import CosineGate
from explorer.routers.heads_and_layers import quantile_threshold
from explorer.routers.learning.imitation import distill, imitation_loss, seeded

HEADS = toy_targets(ROUTERS["head_attention"](), {(1, 0): FIT})[1, 0]
HEADS_HELD_OUT = toy_targets(ROUTERS["head_attention"](), {(1, 0): HELD_OUT})[1, 0]


@functools.cache
def student(name, **options):
    return ROUTERS[name](steps=250, batch_tokens=256, **options).fit(FIT)


def captured(mask, importance):
    """Return the share of all importance that the kept parts carry."""
    return float((mask.gate * importance.gate).sum() / importance.gate.sum())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "softmax_topk"])
def test_gate_rows_as_keys_reproduce_the_model_exactly(score_function, biased):
    inputs = toy_layers(toy_tokens(6, 30, 0), score_function=score_function, biased=biased)[2, 0]
    routing = ROUTERS["gate_row_attention"]().route(inputs)
    assert torch.equal(routing.expert_ids, inputs.native.expert_ids)
    assert_close("weights", routing.weights, inputs.native.weights, atol=1e-6)


def test_the_recorded_gate_recomputes_the_recorded_logits():
    assert_close("z", FIT.hidden @ FIT.gate_weight.T, FIT.logits + 0, atol=1e-5)
    with pytest.raises(RouterError, match="gate_weight"):
        ROUTERS["gate_row_attention"]().route(
            RouterInputs(layer=0, n_experts=8, top_k=2, score_function="softmax", hidden=FIT.hidden)
        )


def test_a_gate_bias_counts():
    bias = torch.linspace(-3, 3, 8)
    inputs = RouterInputs(
        layer=0,
        n_experts=8,
        top_k=2,
        score_function="softmax",
        hidden=FIT.hidden,
        gate_weight=FIT.gate_weight,
        gate_bias=bias,
    )
    routing = ROUTERS["gate_row_attention"]().route(inputs)
    assert_close("p", routing.scores, (FIT.logits + bias).softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("distilled_linear", (), 0.95),
        ("expert_key_attention", (("rank", 8),), 0.9),
        ("cosine", (("width", 16),), 0.85),
        ("yuan_attention", (), 0.5),
    ],
)
def test_students_agree_with_their_teacher(name, options, least):
    router = student(name, **dict(options))
    assert router.losses_[-1] < router.losses_[0] / 2
    found = agreement(router.route(HELD_OUT), HELD_OUT)
    assert found > least, found


def test_full_rank_keys_can_be_the_linear_gate_itself():
    """With r = d, keys = gate rows and the identity as the query, the scores are the logits."""
    network = KeyAttention(16, 8, 16)
    with torch.no_grad():
        network.query.weight.copy_(torch.eye(16) * 4)  # sqrt(r)
        network.keys.copy_(FIT.gate_weight)
        assert_close("z", network(FIT.hidden), FIT.logits, atol=1e-4)


def test_yuans_attention_on_paper():
    network = YuanAttention(2, 3)
    hidden = torch.tensor([[1.0, -2.0]])
    with torch.no_grad():
        query, key, value = (
            part(hidden)[0] for part in (network.query, network.key, network.value)
        )
        expected = [float((query[i] * key).softmax(0) @ value) for i in range(3)]
        assert_close("z", network(hidden), torch.tensor([expected]), atol=1e-6)


def test_the_cosine_gate_ignores_length_and_bounds_its_scale():
    network = CosineGate(16, 8, 4)
    with torch.no_grad():
        network.project.bias.zero_()
        hidden = FIT.hidden[:10]
        assert_close("z", network(hidden * 7), network(hidden), atol=1e-5)
        assert float(network(hidden).abs().max()) <= 2 + 1e-5
        network.log_scale.fill_(50.0)
        assert float(network(hidden).abs().max()) <= 100 + 1e-3


@pytest.mark.slow
def test_selectors_choose_for_students():
    for selector in (TopK(3), Threshold(0.2), TopP(0.6)):
        router = student("expert_key_attention", selector=selector)
        routing = router.route(HELD_OUT)
        assert torch.equal((routing.expert_ids >= 0).sum(-1), selector.mask(routing.scores).sum(-1))
        assert router.info.variable_k == selector.variable


def test_imitation_losses_are_divergences():
    teacher = FIT.logits[:50]
    softmax = imitation_loss(teacher + 3, teacher.softmax(-1), FIT)
    assert abs(float(softmax)) < 1e-6  # a softmax does not see a constant
    sigmoid = RouterInputs(layer=0, n_experts=8, top_k=2, score_function="sigmoid", logits=teacher)
    assert abs(float(imitation_loss(teacher, teacher.sigmoid(), sigmoid))) < 1e-5
    assert float(imitation_loss(teacher + 3, teacher.sigmoid(), sigmoid)) > 0.1


def test_the_fit_loop_is_seeded_and_leaves_the_global_seed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    networks = [seeded(lambda: torch.nn.Linear(4, 2), 7) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    x = torch.randn(64, 4)
    losses = [
        distill(
            list(network.parameters()),
            lambda rows, network=network: network(x[rows]).square().mean(),
            64,
            steps=5,
            batch_tokens=16,
            learning_rate=1e-2,
            seed=3,
        )
        for network in networks
    ]
    assert losses[0] == losses[1]
    assert not any(parameter.requires_grad for parameter in networks[0].parameters())
    with pytest.raises(RouterError, match="no token"):
        distill([], lambda rows: rows, 0, steps=1, batch_tokens=1, learning_rate=1.0, seed=0)
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(RouterError, match="nan"):
        distill(
            [weight],
            lambda rows: weight.sum() * float("nan"),
            4,
            steps=3,
            batch_tokens=2,
            learning_rate=1.0,
            seed=0,
        )


# heads and layers


def test_heads_by_attention_beat_static_and_random_heads():
    router = ROUTERS["head_attention"](keep=0.5, steps=250).fit(FIT, HEADS)
    ours = router.route(HELD_OUT)
    assert bool((ours.gate.sum(-1) == 2).all())
    static = ROUTERS["static_parts"](keep=0.5).fit(FIT, HEADS).route(HELD_OUT)
    random = ROUTERS["random_parts"](keep=0.5).fit(FIT, HEADS).route(HELD_OUT)
    best = PartMask("head", TopK(2).mask(HEADS_HELD_OUT.gate).float())
    found = [captured(each, HEADS_HELD_OUT) for each in (random, static, ours, best)]
    assert found == sorted(found) and found[2] - found[1] > 0.1, found
    assert abs(found[0] - 0.5) < 0.05


def test_fewer_heads_as_the_threshold_rises():
    kept = []
    for selector in (Threshold(0.0), Threshold(0.2), Threshold(0.3), Threshold(1.1), TopK(4)):
        router = ROUTERS["head_attention"](selector=selector, steps=20).fit(FIT, HEADS)
        kept.append(float(router.route(HELD_OUT).gate.mean()))
    assert kept[:4] == sorted(kept[:4], reverse=True)
    assert kept[0] == kept[4] == 1 and kept[3] == 0
    attention = router.attention(HELD_OUT)
    assert_close("rows", attention.sum(-1), torch.ones(len(attention)), atol=1e-6)


def test_part_rules_need_a_target_about_their_parts():
    with pytest.raises(RouterError, match="importance of each head"):
        ROUTERS["head_attention"]().fit(FIT)
    with pytest.raises(RouterError, match="one about heads"):
        ROUTERS["layer_gate"]().fit(FIT, HEADS)
    with pytest.raises(RouterError, match="routes to experts"):
        ROUTERS["distilled_linear"]().fit(FIT, HEADS)
    with pytest.raises(RouterError, match="keep"):
        ROUTERS["attention_received"](keep=1.5)


def test_attention_received_keeps_the_top_of_each_sequence():
    inputs = RouterInputs(
        layer=0,
        n_experts=4,
        top_k=2,
        score_function="softmax",
        received=torch.tensor([3.0, 1, 2, 9, 5, 7, 6]),
        starts=torch.tensor([True, False, False, True, False, False, False]),
    )
    half = ROUTERS["attention_received"](keep=0.5).route(inputs)
    assert half.gate[:, 0].tolist() == [1, 0, 1, 1, 0, 1, 0]
    for keep, expected in ((1.0, 7), (0.0, 0)):
        assert int(ROUTERS["attention_received"](keep=keep).route(inputs).gate.sum()) == expected


def test_the_causal_substitute_keeps_the_wanted_share():
    for keep in (0.25, 0.75):
        router = ROUTERS["attention_given"](keep=keep).fit(FIT)
        assert abs(float(router.route(FIT).gate.mean()) - keep) < 0.01
    with pytest.raises(SwapError, match="'spread'"):
        ROUTERS["attention_given"](statistic="spread").fit(FIT)
    assert probe(ROUTERS["attention_given"]()).causal
    assert not probe(ROUTERS["attention_received"]()).causal


def test_quantile_thresholds():
    scores = torch.arange(10.0)
    for keep in (0.0, 0.1, 0.5, 1.0):
        assert int((scores >= quantile_threshold(scores, keep)).sum()) == round(keep * 10)


def test_matched_random_parts_follow_the_rule_beside():
    beside = ROUTERS["head_attention"](selector=Threshold(0.25), steps=20).fit(FIT, HEADS)
    mask = beside.route(FIT)
    control = ROUTERS["random_parts"](keep=None).fit(FIT, mask).route(FIT)
    wanted = mask.gate.sum(-1).long().bincount(minlength=5) / len(mask.gate)
    got = control.gate.sum(-1).long().bincount(minlength=5) / len(mask.gate)
    assert float((wanted - got).abs().max()) < 0.05
    with pytest.raises(RouterError, match="n_parts"):
        ConstantGateRouter(part="head")
