"""Every registered router, through every check; and checks that can fail.

ROUTER_FILE=my_router.py in the environment adds the routers of a file of your own.
"""

import dataclasses
import functools
import os

import pytest
import router_checks
import torch

from explorer.comparison.names import load_router_file
from explorer.routers import ROUTERS, PartMask, PartRouter, RouterInfo, Routing, RoutingRouter
from explorer.routers.native import TopKRouter
from explorer.routers.probe import EXPERTS, HIDDEN, TOP_K

OURS = tuple(ROUTERS)
if "ROUTER_FILE" in os.environ:
    load_router_file(os.environ["ROUTER_FILE"])

STEPS = 12  # a rule is kept or broken by any fit, however short


@functools.cache
def quick(name):
    """Return what makes the router, with a short fit where there is one."""
    stepwise = hasattr(ROUTERS[name](), "steps")
    return functools.partial(ROUTERS[name], steps=STEPS) if stepwise else ROUTERS[name]


@pytest.mark.parametrize("check", router_checks.CHECKS, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name, check):
    check(quick(name))


@pytest.mark.parametrize("name", ROUTERS)
def test_cards_carry_the_name_of_the_registry(name):
    assert ROUTERS[name]().info.name == name


# whose operations are not, or not only, products that torch counts: what is left, and why
NOT_COUNTED = {
    "base": "a solver assigns",
    "sinkhorn": "the iterations are elementwise",
    "attention_received": "a sum over recorded attention",
    "attention_given": "an entropy of recorded attention",
    "nearest_neighbours": "distances are one operation of torch, which it counts as none",
}
ASIDE = {
    "yuan_attention": 2 * EXPERTS**2,  # the outer product of queries and keys is elementwise
    "layer_attention": 2 * 16,  # a product with one vector, the layer's key
}
VARIANTS = [
    *((name, {}) for name in OURS if name not in NOT_COUNTED),
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


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_operations_on_paper_are_those_that_run(name, options):
    make = functools.partial(quick(name), **options) if options else quick(name)
    paper = router_checks.fitted(make, "softmax").flops(EXPERTS, HIDDEN, TOP_K)
    assert paper == pytest.approx(router_checks.counted(make) + ASIDE.get(name, 0))


WEIGHED = [
    *((name, options) for name, options in VARIANTS if options),
    ("switch", {"renormalize": True}),
    ("relu_threshold", {"weights": "relu"}),
    ("capacity_probs", {"capacity_factor": 1.0}),
    ("expert_choice", {"experts_per_token": 1.5, "window": 16}),
    ("random", {"experts_per_token": 1.5}),
    ("top_k", {"k": 1}),
]


@pytest.mark.parametrize(("name", "options"), WEIGHED, ids=str)
def test_weights_are_on_the_declared_scale_whatever_the_options(name, options):
    make = functools.partial(quick(name), **options)
    router_checks.check_weights_are_on_the_scale_that_it_declares(make)


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
