"""Top-k, threshold and top-p with every attention-based rule, and what they make of causality."""

import dataclasses
import functools
import itertools

import pytest
import router_checks
import torch
from causality_probe import LAYERS, probe, toy_layers, toy_targets, toy_tokens
from checks import assert_close
from test_explorer_routers_clusters import FIT, HELD_OUT

from explorer.router_cards import parse_router
from explorer.routers import ROUTERS, Selector, Threshold, TopK, TopP
from explorer.routers.by_name import make_router
from explorer.routers.sequences import choose_tokens

LAYER_RULES = ("layer_attention", "attention_received", "attention_given")
RULES = ("gate_row_attention", "expert_key_attention", "yuan_attention", "head_attention")
# one of each kind, on scores that sum to 1 over experts or heads
OF_PARTS = (TopK(3), Threshold(0.2), TopP(0.6))
# of a sequence's tokens, on 0..1
OF_TOKENS = (TopK(6), Threshold(0.5), Threshold(0.9, at_least=3), TopP(0.6))
CASES = [
    *((name, selector) for name in RULES for selector in OF_PARTS),
    *((name, selector) for name in LAYER_RULES for selector in OF_TOKENS),
]


def made(name, selector):
    steps = {"steps": 12} if hasattr(ROUTERS[name](), "steps") else {}
    return ROUTERS[name](selector=selector, **steps)


@functools.cache
def layers_fitted(name, selector):
    """Return the router of layer 1, fitted on the toy model's three layers."""
    layers = router_checks.inputs_of("softmax", router_checks.FIT_SEED)
    return router_checks.fit_here(made(name, selector), layers)


def gate(name, selector, inputs=None):
    inputs = router_checks.inputs_of("softmax", 3)[1, 0] if inputs is None else inputs
    return layers_fitted(name, selector).route(inputs).gate[:, 0]


def received_of(values, starts):
    return dataclasses.replace(
        HELD_OUT.take(torch.arange(len(values))),
        received=torch.tensor(values),
        starts=torch.tensor(starts),
        positions=None,
    )


@pytest.mark.parametrize(("name", "selector"), CASES, ids=str)
def test_the_contract_holds_with_every_selector(name, selector):
    """The conformance suite; what a rule depends on is found out and must be what its card says."""
    make = functools.partial(made, name, selector)
    for check in router_checks.CHECKS:
        check(make)


@pytest.mark.parametrize("name", ["layer_attention", "attention_given"])
def test_only_what_compares_tokens_looks_ahead(name):
    assert probe(made(name, Threshold(0.5))).causal
    for selector in (TopK(6), TopP(0.6), Threshold(0.9, at_least=3)):
        router = made(name, selector)
        assert not router.info.causal and not probe(router).causal
        assert "starts" in router.info.needs and str(selector) in router.info.formula
    assert ROUTERS[name]().info.causal, "the card of the class has changed"


@pytest.mark.parametrize("name", LAYER_RULES)
def test_fewer_tokens_run_as_a_selector_narrows(name):
    sweeps = [
        [Threshold(t) for t in (0.0, 0.3, 0.5, 0.7, 30.0)],
        [TopP(p) for p in (1.0, 0.9, 0.6, 0.3, 0.0)],
        [TopK(k) for k in (24, 18, 6, 2, 1)],
    ]
    for sweep in sweeps:
        kept = [gate(name, selector) for selector in sweep]
        shares = [float(each.mean()) for each in kept]
        assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] < 0.1
        for wide, narrow in itertools.pairwise(kept):
            assert bool((wide >= narrow).all()), "a narrower selector keeps a token of its own"


@pytest.mark.parametrize("name", LAYER_RULES)
def test_the_share_that_runs_is_what_was_asked_for(name):
    for k in (1, 6, 23):
        per_sequence = gate(name, TopK(k)).view(4, 24).sum(-1)
        assert per_sequence.tolist() == [k] * 4
    assert gate(name, TopK(100)).tolist() == [1.0] * 96, "a sequence shorter than k runs whole"


def test_a_threshold_on_the_own_row_keeps_the_share_of_the_fit_split():
    for threshold in (0.25, 0.5, 0.9):
        router = ROUTERS["attention_given"](selector=Threshold(threshold)).fit(FIT)
        assert abs(float(router.route(FIT).gate.mean()) - (1 - threshold)) < 0.01


def test_the_mean_token_receives_one():
    inputs = toy_layers(toy_tokens(3, 20, 5))[1, 0]
    assert_close("received", inputs.received.view(3, 20).mean(-1), torch.ones(3), atol=1e-5)
    kept = ROUTERS["attention_received"](selector=Threshold(1.0)).route(inputs).gate[:, 0]
    assert torch.equal(kept.bool(), inputs.received >= 1.0)


def test_selectors_over_tokens_on_paper():
    starts = [True, False, False, True, False, False, False]
    inputs = received_of([3.0, 1, 2, 4, 3, 2, 1], starts)
    found = {
        TopK(1): [1, 0, 0, 1, 0, 0, 0],
        TopK(4): [1, 1, 1, 1, 1, 1, 1],
        TopP(0.0): [1, 0, 0, 1, 0, 0, 0],
        TopP(0.5): [1, 0, 0, 1, 1, 0, 0],  # 3 of 6; 4 + 3 of 10
        TopP(0.8): [1, 0, 1, 1, 1, 1, 0],
        Threshold(2.5): [1, 0, 0, 1, 1, 0, 0],
        Threshold(9.0, at_least=2): [1, 0, 1, 1, 1, 0, 0],
    }
    for selector, expected in found.items():
        kept = choose_tokens(inputs.received, selector, inputs)
        assert kept.shape == (7, 1) and kept[:, 0].tolist() == expected, selector


def test_a_sequence_does_not_touch_its_neighbour():
    starts = [True, False, False, True, False, False, False]
    first = received_of([3.0, 1, 2, 4, 3, 2, 1], starts)
    other = received_of([3.0, 1, 2, 40, 0, 0, 0], starts)
    for selector in OF_TOKENS:
        here, there = (choose_tokens(i.received, selector, i)[:3] for i in (first, other))
        assert torch.equal(here, there)


def test_the_layers_of_layer_attention_compete_for_a_threshold():
    """One threshold on the keys' scores serves all layers, so that they run for unequal shares."""
    router = made("layer_attention", Threshold(0.5))
    layers = router_checks.inputs_of("softmax", router_checks.FIT_SEED)
    targets = toy_targets(router, layers)
    for place, target in targets.items():  # the last layer matters, the first does not
        target.gate.fill_(place[0] / (LAYERS - 1))
    router.steps = 150
    router.fit_across(layers, targets)
    shares = [float(router.route(each).gate.mean()) for each in layers.values()]
    assert shares[0] < 0.1 and shares[-1] > 0.9


def test_the_card_says_the_selector_in_place_of_the_best():
    for name in (*RULES, *LAYER_RULES):
        own = ROUTERS[name]().info.formula
        formula = made(name, Threshold(0.2)).info.formula
        assert formula.startswith(own.split(";  ")[0]) and "threshold=0.2" in formula
        assert "TopK" not in formula, name


def test_selectors_are_written_like_other_arguments():
    router = make_router(parse_router("attention_given(selector=TopP(p=0.7))"))
    assert router.selector == TopP(0.7) and not router.info.causal


def test_a_selector_of_another_kind_is_taken_to_compare():
    class Evens(Selector):
        variable = False

        def mask(self, scores):
            return torch.arange(scores.shape[-1]).expand_as(scores) % 2 == 0

    assert not ROUTERS["layer_attention"](selector=Evens()).info.causal
    inputs = received_of([3.0, 1, 2], [True, False, False])
    assert choose_tokens(inputs.received, Evens(), inputs)[:, 0].tolist() == [1, 0, 1]
