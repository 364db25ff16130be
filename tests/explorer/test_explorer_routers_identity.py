"""With their identity setting, rules repeat models as they are built, not only toy ones."""

import functools
import runpy
from pathlib import Path

import pytest
import tiny_models
import torch
from causality_probe import toy_layers, toy_tokens
from checks import assert_close
from router_checks import identity_for

from capture.swap.routers import swap
from explorer.comparison.conditions.expert_pruning import KeptExperts
from explorer.routers import (
    ROUTERS,
    RouterInfo,
    RouterInputs,
    Threshold,
    TopK,
    TopP,
    fit_layers,
)
from explorer.routers.contract import dense
from explorer.routers.live_rule import LiveRule, completed
from explorer.routers.native import host_best

# softmax of all or of the chosen, sigmoid; renormalised or not, scaled; bias; groups by the best
# one or the best two
FAMILIES = [
    *("olmoe", "gpt_oss", "deepseek_v2", "mistral4", "ernie4_5_moe", "minimax_m2"),
    *("deepseek_v3", "llama4_text", "kolibri1"),
]


@functools.cache
def layers_of(family):
    """Return what every router of a model sees, and what the model's own code chooses."""
    model, seen = tiny_models.build(family), {}

    def keep(inputs, _):
        seen[inputs.layer, inputs.site] = inputs

    with torch.no_grad(), swap(model, None, LiveRule(ROUTERS["native"]()), on_choice=keep):
        model(input_ids=tiny_models.tokens(rows=3, length=12))
    return {place: completed(inputs) for place, inputs in seen.items()}


def settings(top_k):
    """Yield routers of experts with their identity settings, those trained on a loss aside."""
    for name in ROUTERS:
        info = ROUTERS[name]().info
        options = identity_for(info, top_k)
        if options is not None and info.fits != "trained":
            router = ROUTERS[name](**options)
            if getattr(router, "part", None) is None:
                yield router
    yield ROUTERS["top_k"](selector=TopK(top_k))
    yield KeptExperts({})


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_settings_repeat_models_of_many_families(family):
    layers = layers_of(family)
    top_k = next(iter(layers.values())).top_k
    for router in settings(top_k):
        if any(getattr(one, need) is None for need in router.info.needs for one in layers.values()):
            continue  # a gate that is not one matrix
        fitted = fit_layers(router, layers)
        for place, inputs in layers.items():
            chosen = fitted[place].route(inputs)
            own = dense(inputs.native)
            assert_close(f"{router.info.name} {place}", dense(chosen), own, atol=5e-6)


def biased(**options):
    return toy_layers(toy_tokens(6, 24, 3), score_function="sigmoid", biased=True, **options)[1, 0]


def chosen(routing):
    return [frozenset(e for e in row if e >= 0) for row in routing.expert_ids.tolist()]


def test_selectors_go_by_what_the_model_sorts_by():
    inputs = biased()
    scores, _ = host_best(inputs)
    order = scores + inputs.selection_bias
    groups = order.view(-1, 4, 2).sum(-1).topk(2).indices
    allowed = torch.zeros(len(order), 4).scatter(1, groups, 1.0).repeat_interleave(2, dim=1).bool()
    best = order.masked_fill(~allowed, -torch.inf).argmax(-1)
    found = {
        selector: ROUTERS["top_k"](selector=selector).route(inputs)
        for selector in (TopP(0.0), TopP(1.0), Threshold(0.0), Threshold(2.0, at_least=1))
    }
    for selector in (TopP(0.0), Threshold(2.0, at_least=1)):
        assert chosen(found[selector]) == [frozenset([e]) for e in best.tolist()]
    for selector in (TopP(1.0), Threshold(0.0)):
        everything = [frozenset(row.nonzero().flatten().tolist()) for row in allowed]
        assert chosen(found[selector]) == everything
    assert bool((best != scores.argmax(-1)).any()), "the bias changes nothing here"


def test_one_of_the_models_experts_is_its_best_by_its_own_rule():
    inputs = biased()
    best = chosen(ROUTERS["top_k"](k=1).route(inputs))
    assert chosen(ROUTERS["switch"]().route(inputs)) == best
    skipping = ROUTERS["random"](experts_per_token=1, choose="best").route(inputs)
    assert chosen(skipping) == best
    assert all(one <= both for one, both in zip(best, chosen(inputs.native), strict=True))


def test_groups_narrow_what_the_models_own_leave():
    inputs = biased()
    for name in ("group_limited_v2", "group_limited_v3"):
        for options in ({"n_groups": 4, "top_groups": 2}, {"n_groups": 1}, {"n_groups": 2}):
            routing = ROUTERS[name](**options).route(inputs)
            own = chosen(ROUTERS["top_k"](k=4).route(inputs))
            assert all(few <= all_ for few, all_ in zip(chosen(routing), own, strict=True))
            if options != {"n_groups": 2}:
                assert chosen(routing) == chosen(inputs.native)


def test_a_short_list_fills_up_outside_the_models_groups():
    inputs = biased(top_k=3)
    router = ROUTERS["cluster_shortlist"](n_clusters=1, shortlist=3).fit(inputs)
    routing = router.route(inputs)
    assert set(chosen(routing)) == {frozenset(router.listed_[0].nonzero().flatten().tolist())}


def test_experts_that_saturate_are_still_told_apart_by_their_logits():
    logits = torch.tensor([[20.0, 30.0, 25.0, 1.0]])
    inputs = RouterInputs(
        layer=0, n_experts=4, top_k=2, score_function="sigmoid_topk", logits=logits
    )
    scores, ids = host_best(inputs)
    assert float(scores[0, :3].min()) == 1.0 and ids.tolist() == [[1, 2]]
    assert chosen(ROUTERS["loss_free_bias"](steps=0).fit(inputs).route(inputs)) == [{1, 2}]


def test_what_a_rule_forgets_to_say_about_its_identity_is_an_error():
    info = ROUTERS["random"]().info
    assert identity_for(info, 2) == {"choose": "best"}
    assert identity_for(ROUTERS["policy_gradient"]().info, 3) == {"least": 3}
    assert identity_for(ROUTERS["kmeans"]().info, 2) is None
    silent = RouterInfo("mine", "gating", "", "", "", "", frozenset())
    with pytest.raises(AssertionError, match=r"Declare RouterInfo\.identity"):
        identity_for(silent, 2)


def test_the_example_of_a_router_repeats_every_host():
    example = Path(__file__).parents[2] / ".github" / "examples" / "own_router.py"
    try:
        router = runpy.run_path(str(example))["SecondIfUnsure"]
        inputs = biased()
        repeated = router(**identity_for(router.info, inputs.top_k)).route(inputs)
        assert torch.equal(repeated.expert_ids, inputs.native.expert_ids)
        assert torch.equal(repeated.weights, inputs.native.weights)
        alone = router(p=0.0).route(inputs)
        assert chosen(alone) == chosen(ROUTERS["top_k"](k=1).route(inputs))
    finally:
        ROUTERS.discard("second_if_unsure")
