"""Gates trained on the loss: exact at their ends, gradients where they belong, rates that hold."""

import functools

import numpy as np
import pytest
import torch
from causality_probe import toy_session
from checks import assert_close

from capture.swap.measure import summed, token_losses
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from explorer.routers import ROUTERS, PartMask
from explorer.routers.controls import ClosedBlocks
from explorer.routers.learning.gates import open_probability, weighed
from explorer.routers.live_rule import LiveRule

pytestmark = pytest.mark.slow

GATES = ("layer_gate_trained", "head_gate_trained", "expert_gate_trained", "gtrxl_gate_trained")
WHERE = {"layer": "block", "head": "head"}


@functools.cache
def session():
    return toy_session(n_sequences=8, length=20)


def logits_of():
    ids = torch.from_numpy(np.stack(session().sequences))
    return session().model(input_ids=ids, use_cache=False).logits


class Constant:
    """The same gate for every token and part, as a leaf that gradients reach."""

    def __init__(self, value, part, width):
        self.gate = torch.tensor(float(value), requires_grad=True)
        self.part, self.width = part, width

    def route(self, inputs):
        return PartMask(self.part, self.gate.expand(len(inputs.hidden), self.width))


class ConstantExperts(Constant):
    def route(self, inputs):
        return weighed(inputs, self.gate.expand(len(inputs.hidden), inputs.n_experts))


def gated(value, part, *, masked):
    width = {"layer": 1, "head": 4, "expert": 8}[part]
    if part == "expert":
        rule = (ConstantExperts if masked else Constant)(value, part, width)
        return rule, swap(session().model, session().sites, rule)
    rule = Constant(value, part, width)
    where = WHERE[part]
    return rule, gate_parts(session().model, session().sites, rule, part=where, masked=masked)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("part", ["layer", "head", "expert"])
def test_a_gate_of_1_is_the_identity_bit_for_bit(part, masked):
    with torch.no_grad():
        own = logits_of()
        _, host = gated(1.0, part, masked=masked)
        with host:
            assert torch.equal(logits_of(), own)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("part", ["layer", "expert"])
def test_a_gate_of_0_removes_the_block(part, masked):
    """The block's output is set to 0 by a hook of the test's own."""
    removed = [
        site.parent.register_forward_hook(lambda module, args, output: zeros_like(output))
        for site in session().sites
    ]
    with torch.no_grad():
        expected = logits_of()
        for handle in removed:
            handle.remove()
        assert not torch.equal(expected, logits_of())
        _, host = gated(0.0, part, masked=masked)
        with host:
            assert_close("logits", logits_of(), expected, atol=1e-6)


def zeros_like(output):
    first = output[0] if isinstance(output, tuple) else output
    empty = torch.zeros_like(first)
    return (empty, *output[1:]) if isinstance(output, tuple) else empty


def test_masked_gates_say_that_nothing_is_saved_and_executed_gates_do_not():
    with torch.no_grad():
        for masked in (True, False):
            _, host = gated(0.0, "layer", masked=masked)
            with host as gates:
                logits_of()
            assert gates.simulated == masked and gates.per_token == 0
            rows = sum(count.rows for count in gates.counts.values())
            assert rows == (3 * 160 if masked else 0)


@pytest.mark.parametrize("part", ["layer", "head", "expert"])
def test_the_gradient_of_a_closed_gate_is_that_of_opening_it(part):
    """Finite differences of the loss; a gate that skips its part would have none."""

    def loss(value):
        rule, host = gated(value, part, masked=True)
        with host:
            return rule, logits_of().double().log_softmax(-1)[:, :, 3].mean()

    rule, at_0 = loss(0.0)
    at_0.backward()
    with torch.no_grad():
        slope = (loss(2e-2)[1] - loss(0.0)[1]) / 2e-2
    assert abs(float(slope)) > 1e-5
    assert float(rule.gate.grad) == pytest.approx(float(slope), rel=0.1)
    session().model.zero_grad()


@functools.cache
def trained(name):
    return ROUTERS[name](keep=0.5, steps=40, batch_tokens=160).train(toy_session())


@pytest.mark.parametrize("name", GATES)
def test_the_share_that_runs_is_as_asked_for(name):
    router, own = trained(name), toy_session()
    ids = torch.from_numpy(np.stack(own.sequences))
    with torch.no_grad():
        if router.part == "expert":
            with swap(own.model, own.sites, LiveRule(router)) as swapped:
                own.model(input_ids=ids, use_cache=False)
            share = swapped.experts_per_token / 2
        else:
            where = WHERE[router.part]
            with gate_parts(own.model, own.sites, LiveRule(router), part=where) as gates:
                own.model(input_ids=ids, use_cache=False)
            share = float(np.mean([count.share for count in gates.counts.values()]))
    # the threshold was met with all parts computed, and a few rounds leave a little
    assert share == pytest.approx(0.5, abs=0.12)


def one_block_matters():
    """Make a session whose model has three blocks, of which all but that of layer 1 add nothing."""
    own = toy_session(n_sequences=12)
    for site in own.sites:
        for name, weight in site.experts.named_parameters():
            if site.info.layer != 1:
                weight.data.mul_(0.0 if "down" in name else 1.0)
            else:
                weight.data.mul_(12.0 if "down" in name else 4.0)
    own.model.lm_head.weight.data.mul_(8.0)
    ids = torch.from_numpy(np.stack(own.sequences))
    with torch.no_grad():
        for _ in range(20):  # until the texts are what the model itself would write
            ids[:, 1:] = own.model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    own.sequences[:] = list(ids.numpy())
    return own, ids


def test_gates_learn_which_block_matters():
    """Gates of blocks that add nothing close first, the other's stay open."""
    own, ids = one_block_matters()
    router = ROUTERS["layer_gate_trained"](keep=0.34, steps=100, batch_tokens=96).train(own)
    with (
        torch.no_grad(),
        gate_parts(own.model, own.sites, LiveRule(router), part="block") as gates,
    ):
        own.model(input_ids=ids, use_cache=False)
    share = {layer: count.share for layer, count in gates.counts.items()}
    assert share[1] > max(share[0], share[2]) + 0.1, share


def test_the_best_static_drop_keeps_the_block_that_matters():
    own, _ = one_block_matters()
    router = ROUTERS["static_layers"](keep=1 / 3).train(own)
    assert router.dropped_ == {0, 2}
    losses = {
        dropped: summed(
            token_losses(
                own.model,
                own.sequences,
                swapped=lambda dropped=dropped: gate_parts(
                    own.model, own.sites, ClosedBlocks(frozenset(dropped)), part="block"
                ),
            )
        ).mean
        for dropped in ((0, 1), (0, 2), (1, 2))
    }
    assert min(losses, key=losses.get) == (0, 2)
    assert max(row["reward"] for row in router.curves_) == pytest.approx(-losses[0, 2])
    # what it does in the model is what was tried
    ran = token_losses(
        own.model,
        own.sequences,
        swapped=lambda: gate_parts(own.model, own.sites, LiveRule(router), part="block"),
    )
    assert summed(ran).mean == pytest.approx(losses[0, 2], abs=1e-6)
    assert losses[0, 2] < losses[0, 1] - 1e-3
    # a share between is rounded up to whole blocks, and 1 keeps all
    assert len(ROUTERS["static_layers"](keep=0.5).train(own).dropped_) == 1
    assert ROUTERS["static_layers"](keep=1.0).train(own).dropped_ == set()


def test_hard_concrete_gates_open_with_their_published_probability():
    generator = torch.Generator().manual_seed(0)
    from explorer.routers.gating import hard_concrete

    for log_alpha in (-2.0, 0.0, 1.0):
        alpha = torch.full((20_000,), log_alpha)
        gates = hard_concrete(alpha, uniform=torch.rand(20_000, generator=generator))
        found = float((gates > 0).float().mean())
        assert float(open_probability(alpha[:1])) == pytest.approx(found, abs=0.015)


def test_the_gtrxl_gate_hands_its_stream_from_layer_to_layer():
    router, own = trained("gtrxl_gate_trained"), toy_session()
    seen = []

    class Watched(LiveRule):
        def route(self, inputs):
            answer = super().route(inputs)
            seen.append((inputs.previous_state, answer.state))
            return answer

    ids = torch.from_numpy(np.stack(own.sequences))
    with torch.no_grad(), gate_parts(own.model, own.sites, Watched(router), part="block"):
        own.model(input_ids=ids, use_cache=False)
    assert seen[0][0] is None and len(seen) == 3
    assert all(torch.equal(seen[i + 1][0], seen[i][1]) for i in range(2))
    assert float((seen[2][1] - seen[1][1]).abs().max()) > 0
