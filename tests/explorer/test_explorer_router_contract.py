"""Every registered router, through every check; and checks that can fail.

ROUTER_FILE=my_router.py in the environment adds the routers of a file of your own. A router is one
case: what it learned serves all checks, whichever process runs it, and all that it breaks is told.
"""

import dataclasses
import functools
import math
import os

import pytest
import router_checks
import torch
from causality_probe import EXPERTS, HIDDEN, TOP_K

from explorer.router_cards import CARDS
from explorer.routers import ROUTERS, PartMask, PartRouter, RouterInfo, Routing, RoutingRouter
from explorer.routers.by_name import load_router_file
from explorer.routers.native import TopKRouter
from explorer.routers.scores import slots, weigh
from explorer.routers.selectors import top_ids

pytestmark = pytest.mark.slow

OURS = tuple(ROUTERS)
if "ROUTER_FILE" in os.environ:
    load_router_file(os.environ["ROUTER_FILE"])


def test_every_card_is_a_routers_and_says_what_it_decides_about():
    assert {name: ROUTERS[name].info for name in OURS if name in CARDS} == dict(CARDS)
    parts = {name: getattr(ROUTERS[name](), "part", "expert") for name in CARDS}
    assert parts == {name: card.part for name, card in CARDS.items()}


STEPS = 12  # a rule is kept or broken by any fit, however short


@functools.cache
def quick(name):
    """Return what makes the router, with a short fit where there is one."""
    stepwise = hasattr(ROUTERS[name](), "steps")
    return functools.partial(ROUTERS[name], steps=STEPS) if stepwise else ROUTERS[name]


# whose operations are not, or not only, products that torch counts: what is left, and why
NOT_COUNTED = {
    "base": "a solver assigns",
    "sinkhorn": "the iterations are elementwise",
    "attention_received": "a sum over recorded attention",
    "a_mod": "a sum over recorded attention",
    "attention_given": "an entropy of recorded attention",
    "nearest_neighbours": "distances are one operation of torch, which it counts as none",
}
ASIDE = {
    "yuan_attention": 2 * EXPERTS**2,  # the outer product of queries and keys is elementwise
    "layer_attention": 2 * 16,  # a product with one vector, the layer's key
}
VARIANTS = [
    ("policy_gradient", {"actions": "subset", "most": 3}),
    ("policy_gradient", {"actions": "skip"}),
    ("policy_gradient", {"state": "gate"}),
    ("q_learning", {"least": 0, "most": 4, "width": 5}),
    ("cluster_low_rank", {"n_clusters": 3, "rank": 2}),
    ("cluster_low_rank", {"n_clusters": 3, "rank": 8}),
    ("cluster_shortlist", {"n_clusters": 4, "shortlist": 2}),
    ("kmeans", {"n_clusters": 4, "soft": True}),
    ("gmm", {"n_components": 4, "covariance": "full"}),
]


WEIGHED = [
    ("switch", {"renormalize": True}),
    ("relu_threshold", {"weights": "relu"}),
    ("capacity_probs", {"capacity_factor": 1.0}),
    ("expert_choice", {"experts_per_token": 1.5, "window": 16}),
    ("random", {"experts_per_token": 1.5}),
    ("top_k", {"k": 1}),
]


def check_operations_on_paper_are_those_that_run(make, name):
    paper = router_checks.fitted(make, "softmax").flops(EXPERTS, HIDDEN, TOP_K)
    assert paper == pytest.approx(router_checks.counted(make) + ASIDE.get(name, 0))


def broken(make, checks):
    """Return what each check that fails says, with the check's name as a note."""
    found = []
    for check in checks:
        try:
            check(make)
        except (Exception, pytest.fail.Exception) as error:
            error.add_note(f"in {getattr(check, 'func', check).__name__}")
            found.append(error)
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name):
    make, checks = quick(name), list(router_checks.CHECKS)
    if name in OURS and name not in NOT_COUNTED:
        checks.append(functools.partial(check_operations_on_paper_are_those_that_run, name=name))
    failures = broken(make, checks)
    if ROUTERS[name]().info.name != name:
        failures.append(AssertionError(f"the card of {name} carries another name"))
    if failures:
        raise BaseExceptionGroup(f"{name} breaks {len(failures)} of its rules", failures)


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *WEIGHED], ids=str)
def test_options_keep_the_operations_and_the_scale_of_weights(name, options):
    make = functools.partial(quick(name), **options)
    router_checks.check_weights_are_on_the_scale_that_it_declares(make)
    if (name, options) in VARIANTS:
        check_operations_on_paper_are_those_that_run(make, name)


def plain_choice(logits, inputs):
    """Return one token's experts and weights in plain numbers: a second way to what hosts do."""
    function = inputs.score_function
    exps = [math.exp(z) for z in logits]
    scores = {
        "softmax": [e / sum(exps) for e in exps],
        "softmax_topk": [e / sum(exps) for e in exps],
        "sigmoid": [1 / (1 + math.exp(-z)) for z in logits],
        "sigmoid_topk": [1 / (1 + math.exp(-z)) for z in logits],
        "probabilities": logits,
    }[function]
    bias = [0.0] * len(scores) if inputs.selection_bias is None else inputs.selection_bias.tolist()
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    possible = range(len(scores))
    if inputs.n_groups:
        size = len(scores) // inputs.n_groups
        counted = 1 if inputs.selection_bias is None else 2
        groups = [range(g * size, (g + 1) * size) for g in range(inputs.n_groups)]
        groups.sort(key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:counted]))
        possible = [e for group in groups[: inputs.top_groups] for e in group]
    chosen = sorted(possible, key=lambda e: -biased[e])[: inputs.top_k]
    divided = inputs.renormalize or function == "softmax_topk"
    total = sum(scores[e] for e in chosen) if divided else 1.0
    return {e: scores[e] / total * inputs.scaling for e in chosen}


@pytest.mark.parametrize("kind", router_checks.KINDS)
def test_hosts_choose_and_weigh_as_their_kind_says(kind):
    inputs = router_checks.layers_of(kind, router_checks.HELD_OUT_SEED)[router_checks.PLACE]
    ids, weights = inputs.native.expert_ids.tolist(), inputs.native.weights.tolist()
    for row, logits in enumerate(inputs.logits.double().tolist()):
        expected = plain_choice(logits, inputs)
        assert dict(zip(ids[row], weights[row], strict=True)) == pytest.approx(expected, rel=1e-5)


class Broken(RoutingRouter):
    """A router that breaks one rule, given by name."""

    info = RouterInfo(
        name="broken",
        family="control",
        title="Broken",
        summary="Breaks a rule.",
        formula="?",
        paper="",
        needs=frozenset({"logits"}),
        identity={},
    )

    def __init__(self, fault):
        self.fault = fault
        self.calls = 0
        if fault == "fit":
            self.info = dataclasses.replace(self.info, fits="statistics")
        if fault == "card":
            self.info = dataclasses.replace(self.info, summary="One. Two. Three.")
        if fault in ("excuse", "own"):
            self.info = dataclasses.replace(self.info, weighing="own")
        if fault == "borrowed":
            self.info = dataclasses.replace(self.info, paper="1701.06538")
        if fault == "silent":
            self.info = dataclasses.replace(self.info, identity=None)
        if fault == "pickle":
            self.function = lambda: None

    @property
    def fitted(self):
        return True

    def _fit(self, inputs, target):
        if self.fault == "view":
            self.view_ = inputs.logits

    def _route(self, inputs):
        out = TopKRouter().route(inputs)
        scores, ids, weights = (part.clone() for part in out[:3])
        if self.fault == "dtype":
            ids = ids.int()
        elif self.fault == "twice":
            ids[:, 1] = ids[:, 0]
        elif self.fault == "negative" and len(weights):
            weights[0, 1] = -1
        elif self.fault == "dropped" and len(weights):
            ids[0, 1], weights[0, 1] = -1, 0
        elif self.fault in ("triple", "own"):
            weights = weights * 3
        elif self.fault == "lost":
            weights = weights * 0.9
        elif self.fault == "renormalised":  # also where the model does not
            weights = weights / weights.sum(-1, keepdim=True) * inputs.scaling
        elif self.fault == "global":
            weights = weights * torch.rand(1)
        elif self.fault == "needs":
            weights = weights * inputs.tensor("hidden").abs().max()
        elif self.fault == "one":
            ids[0]
        elif self.fault == "counts":
            self.calls += 1
        elif self.fault == "future":
            weights = weights * scores.max()
        elif self.fault == "length":  # bears other tokens, not fewer
            weights = weights / len(weights)
        elif self.fault == "forgetful":  # of the model's bias and groups
            ids = top_ids(scores, inputs.top_k)
            return slots(scores, ids, weigh(scores, ids, inputs))
        elif self.fault == "view":
            weights = weights * (1 + self.view_.abs().mean())
        return Routing(scores, ids, weights)

    def flops(self, n_experts, d, top_k):
        return {"free": 0.0, "cheap": 1.0}.get(self.fault, 2.0 * d * n_experts)


class WideGate(PartRouter):
    """A mask that multiplies by more than 1."""

    info = dataclasses.replace(Broken.info, name="wide")
    part = "layer"

    def _route(self, inputs):
        return PartMask("layer", inputs.logits[:, :1].abs() + 1)

    def flops(self, n_experts, d, top_k):
        return 1.0


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("card", "a_card_describes_it"),
        ("dtype", "shapes_and_types"),
        ("twice", "experts_are_distinct_and_in_range"),
        ("negative", "weights_are_finite_and_not_negative"),
        ("triple", "weights_are_on_the_scale_that_it_declares"),
        ("lost", "weights_are_on_the_scale_that_it_declares"),
        ("renormalised", "weights_are_on_the_scale_that_it_declares"),
        ("excuse", "weights_are_on_the_scale_that_it_declares"),
        ("dropped", "the_number_of_experts_is_as_declared"),
        ("global", "the_same_seed_gives_the_same_decision"),
        ("one", "no_token_and_one_token"),
        ("counts", "routing_changes_nothing"),
        ("view", "fit_copies_what_it_keeps"),
        ("future", "what_it_depends_on_is_declared"),
        ("length", "what_it_depends_on_is_declared"),
        ("silent", "its_identity_setting_repeats_the_model"),
        ("borrowed", "it_says_how_it_differs_from_its_paper"),
        ("forgetful", "its_identity_setting_repeats_the_model"),
        ("triple", "its_identity_setting_repeats_the_model"),
        ("needs", "needs_are_honest"),
        ("fit", "an_unfitted_router_says_so"),
        ("pickle", "it_pickles"),
        ("free", "its_own_cost_is_counted"),
        ("cheap", "its_own_cost_is_counted"),
    ],
)
def test_a_broken_router_is_caught(fault, check):
    with pytest.raises((Exception, pytest.fail.Exception)):
        getattr(router_checks, f"check_{check}")(lambda: Broken(fault))


def test_a_scale_of_its_own_is_free_once_it_is_declared():
    router_checks.check_weights_are_on_the_scale_that_it_declares(lambda: Broken("own"))
    with pytest.raises(AssertionError, match=r"'own'.*RouterInfo\.weighing"):
        router_checks.check_weights_are_on_the_scale_that_it_declares(lambda: Broken("triple"))


def test_a_gate_above_1_is_caught():
    with pytest.raises(AssertionError):
        router_checks.check_gates_lie_between_0_and_1(WideGate)
