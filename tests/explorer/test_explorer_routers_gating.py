"""Gates and recurrence: their range, their ends, their cells, and what they learn."""

import dataclasses

import pytest
import torch
from causality_probe import toy_layers, toy_targets, toy_tokens
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explorer_routers_clusters import agreement

from explorer.errors import RouterError
from explorer.routers import ROUTERS, fit_layers, route_layers
from explorer.routers.gating import hard_concrete, straight_through
from explorer.routers.recurrent import GTrXLGate

pytestmark = pytest.mark.slow

FIT = toy_layers(toy_tokens(30, 30, 1))
HELD_OUT = toy_layers(toy_tokens(20, 30, 2))
PLACE = (1, 0)


def importance(name, layers):
    return toy_targets(ROUTERS[name](), layers)


@settings(deadline=None, max_examples=40)
@given(st.floats(-60, 60), st.floats(0, 1))
def test_gates_lie_between_0_and_1(logit, drawn):
    alpha = torch.tensor([logit])
    for gate in (hard_concrete(alpha), hard_concrete(alpha, uniform=torch.tensor([drawn]))):
        assert 0 <= float(gate) <= 1


def test_hard_concrete_gates_reach_both_ends_and_have_a_gradient_between():
    gates = hard_concrete(torch.tensor([-5.0, 0.0, 5.0]))
    assert gates[0] == 0 and gates[2] == 1
    assert float(gates[1]) == pytest.approx(0.5)
    alpha = torch.zeros(1, requires_grad=True)
    hard_concrete(alpha).sum().backward()
    assert float(alpha.grad) == pytest.approx(1.2 / 4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4000, generator=generator)
    random = hard_concrete(torch.zeros(4000), uniform=drawn)
    # P(gate = 0) = sigmoid(-log alpha + beta ln(0.1 / 1.1)), the source's eq. 12
    closed = torch.sigmoid(2 / 3 * torch.log(torch.tensor(0.1 / 1.1)))
    assert float((random == 0).float().mean()) == pytest.approx(float(closed), abs=0.025)


def test_straight_through_is_hard_forwards_and_soft_backwards():
    logits = torch.tensor([-2.0, -0.1, 0.1, 2.0], requires_grad=True)
    gate = straight_through(logits.sigmoid())
    assert gate.tolist() == [0, 0, 1, 1]
    gate.sum().backward()
    soft = logits.detach().sigmoid()
    assert_close("gradient", logits.grad, soft * (1 - soft), atol=1e-7)


def test_a_constant_gate_of_1_is_1_everywhere():
    for part, width in (("layer", 1), ("expert", 8)):
        mask = ROUTERS["constant_gate"](part=part).route(HELD_OUT[PLACE])
        assert mask.part == part and torch.equal(mask.gate, torch.ones(600, width))
    heads = ROUTERS["constant_gate"](part="head", n_parts=4, value=0.0).route(HELD_OUT[PLACE])
    assert torch.equal(heads.gate, torch.zeros(600, 4))


@pytest.mark.parametrize("name", ["layer_gate", "head_gate"])
def test_skipping_meets_its_rate_and_follows_the_importance(name):
    wanted = importance(name, FIT)[PLACE]
    truth = importance(name, HELD_OUT)[PLACE].gate
    for keep in (0.25, 0.75):
        router = ROUTERS[name](keep=keep, steps=200).fit(FIT[PLACE], wanted)
        assert abs(float(router.route(FIT[PLACE]).gate.mean()) - keep) < 0.01
        gate = router.route(HELD_OUT[PLACE]).gate
        assert abs(float(gate.mean()) - keep) < 0.1
        assert set(gate.unique().tolist()) <= {0.0, 1.0}
        kept, skipped = truth[gate == 1].mean(), truth[gate == 0].mean()
        assert float(kept - skipped) > 0.2


def test_modulating_gates_learn_the_importance():
    wanted = importance("expert_gate", FIT)[PLACE]
    router = ROUTERS["expert_gate"](steps=300).fit(FIT[PLACE], wanted)
    truth = importance("expert_gate", HELD_OUT)[PLACE].gate
    gate = router.route(HELD_OUT[PLACE]).gate
    assert float((gate - truth).abs().mean()) < 0.1
    assert len(gate.unique()) > 1000
    by_threshold = ROUTERS["layer_gate"](keep=None, steps=20)
    by_threshold.fit(FIT[PLACE], importance("layer_gate", FIT)[PLACE])
    logits = by_threshold.network_(HELD_OUT[PLACE].hidden)
    expected = (logits.sigmoid() >= 0.5).float()
    assert torch.equal(by_threshold.route(HELD_OUT[PLACE]).gate, expected)
    with pytest.raises(RouterError, match="hard_concrete"):
        ROUTERS["layer_gate"](kind="soft")


def test_gates_start_open():
    network = ROUTERS["layer_gate"]().network(16, 1)
    gates = network(HELD_OUT[PLACE].hidden).sigmoid()
    assert float(gates.detach().min()) > 0.8


# recurrence


def test_gtrxl_starts_near_the_identity():
    gate = GTrXLGate(8)
    zero = torch.zeros(1, 8)
    update, _ = gate.update(zero, zero)
    assert_close("z", update, torch.full((1, 8), 0.1192), atol=1e-4)  # sigmoid(-2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 8, generator=generator).unbind(0)
    for parameter in (gate.from_y, gate.from_x, gate.from_reset):
        torch.nn.init.normal_(parameter.weight, std=0.05, generator=generator)
    moved = (gate(x, y) - x).norm() / x.norm()
    assert float(moved.detach()) < 0.25


def test_gtrxl_against_the_published_formula():
    torch.manual_seed(0)
    gate = GTrXLGate(4, bias=1.5)
    x, y = torch.randn(2, 5, 4).unbind(0)
    (w_r, w_z, w_g), (u_r, u_z) = gate.from_y.weight.chunk(3), gate.from_x.weight.chunk(2)
    r = torch.sigmoid(y @ w_r.T + x @ u_r.T)
    z = torch.sigmoid(y @ w_z.T + x @ u_z.T - 1.5)
    new = torch.tanh(y @ w_g.T + (r * x) @ gate.from_reset.weight.T)
    assert_close("out", gate(x, y), (1 - z) * x + z * new, atol=1e-6)


@pytest.fixture(scope="module")
def recurrent():
    return fit_layers(ROUTERS["gru_recurrent"](steps=300), FIT)


def test_one_recurrent_router_serves_all_layers(recurrent):
    assert len({id(router) for router in recurrent.values()}) == 1
    decisions = route_layers(recurrent, HELD_OUT)
    linear = fit_layers(ROUTERS["distilled_linear"](steps=300), FIT)
    for place, decision in decisions.items():
        found = agreement(decision, HELD_OUT[place])
        baseline = agreement(linear[place].route(HELD_OUT[place]), HELD_OUT[place])
        assert found > baseline - 0.12, (place, found, baseline)


def test_the_state_is_the_grus_and_each_tokens_own(recurrent):
    router = recurrent[PLACE]
    first = router.route(HELD_OUT[0, 0])
    network = router.network_
    expected = network.cell(network.project[0](HELD_OUT[0, 0].hidden), torch.zeros(600, 32))
    assert_close("state", first.state, expected, atol=1e-6)
    decisions = route_layers(recurrent, HELD_OUT)
    second = network.cell(network.project[1](HELD_OUT[1, 0].hidden), first.state)
    assert_close("next", decisions[1, 0].state, second, atol=1e-6)
    rows = torch.arange(100, 150)
    alone = route_layers(recurrent, {place: each.take(rows) for place, each in HELD_OUT.items()})
    assert torch.equal(alone[2, 0].expert_ids, decisions[2, 0].expert_ids[rows])


def test_a_layer_that_was_not_fitted_is_refused(recurrent):
    with pytest.raises(RouterError, match="layer 7"):
        recurrent[PLACE].route(dataclasses.replace(HELD_OUT[PLACE], layer=7))


@pytest.mark.parametrize("name", ["gtrxl_layer_gate", "layer_attention"])
def test_layers_compete_for_the_tokens(name):
    wanted = importance(name, FIT)
    routers = fit_layers(ROUTERS[name](keep=0.6, steps=200), FIT, wanted)
    masks = route_layers(routers, FIT)
    rates = [float(mask.gate.mean()) for mask in masks.values()]
    assert sum(rates) / 3 == pytest.approx(0.6, abs=0.02)
    truth = importance(name, HELD_OUT)
    kept = route_layers(routers, HELD_OUT)
    gain = [float(truth[p].gate[kept[p].gate == 1].mean() - truth[p].gate.mean()) for p in kept]
    assert min(gain) > 0.03, gain
