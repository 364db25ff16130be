"""Registered routers inside running models."""

import pytest
import tiny_models
import torch
from checks import assert_close
from test_capture_swap import logits_of

from capture.parts import gate_parts
from capture.rules import Choice
from capture.selftest import attach
from capture.swap import swap
from explorer.errors import RouterError
from explorer.routers import ROUTERS
from explorer.routers.live import (
    Convention,
    LiveRule,
    convention_of,
    live_rules,
    router_inputs,
    weight_conventions,
)

ATOL = 5e-5

# score functions, renormalised or not, scaling factors, selection biases, groups
CONVENTIONS = {
    "mixtral": Convention(True, 1.0),
    "olmoe": Convention(False, 1.0),
    "qwen2_moe": Convention(False, 1.0),
    "qwen3_moe": Convention(True, 1.0),
    "deepseek_v3": Convention(True, 2.5),
    "deepseek_v2": Convention(False, 1.7),
    "glm4_moe": Convention(True, 1.5),
    "gpt_oss": Convention(True, 1.0),
    "minimax_m2": Convention(True, 1.0),
    "llama4_text": Convention(False, 1.0),
}


def part_of(router):
    return getattr(router, "part", None)


def unfitted(wanted):
    """Registered routers that need no fit and route to experts, or gate parts."""
    # two groups have room for three experts a token in every tiny model
    options = dict.fromkeys(("group_limited_v2", "group_limited_v3"), {"top_groups": 2})
    routers = [ROUTERS[name](**options.get(name, {})) for name in ROUTERS]
    return [r for r in routers if r.info.fits is None and (part_of(r) is not None) == wanted]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_the_models_own_rule_rebuilt_gives_the_models_own_logits(name):
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)
    conventions = weight_conventions(model, sites)
    assert set(conventions.values()) == {CONVENTIONS[name]}
    for router in ("native", "top_k", "gate_row_attention"):
        with swap(model, sites, live_rules(ROUTERS[router](), conventions)) as swapped:
            assert_close(router, logits_of(model), own, atol=ATOL)
        assert swapped.experts_per_token == sites[0].info.top_k


@pytest.mark.parametrize("router", unfitted(False), ids=lambda r: r.info.name)
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_every_router_without_a_fit_runs(name, router):
    model = tiny_models.build(name)
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    choices = []
    rules = live_rules(router, weight_conventions(model, sites))
    with swap(model, sites, rules, on_choice=lambda i, c: choices.append(c)) as swapped:
        logits = logits_of(model, ids, attention_mask=mask)
    assert bool(logits[mask.bool()].isfinite().all())
    assert len(choices) == len(sites)
    filled = sum(int((c.expert_ids >= 0).sum()) for c in choices)
    executed = sum(int(c.rows.sum()) for c in swapped.counts.values())
    assert executed == filled > 0


@pytest.mark.parametrize("router", unfitted(True), ids=lambda r: r.info.name)
def test_every_gate_without_a_fit_runs(router):
    model = tiny_models.build("olmoe")
    sites = attach(model)
    part = "block" if part_of(router) == "layer" else part_of(router)
    rule = LiveRule(router)
    with gate_parts(model, sites, rule, part=part, attention=True) as gated:
        assert bool(logits_of(model).isfinite().all())
    assert 0 < gated.per_token <= 3


def test_a_fitted_router_for_each_layer_and_a_gate_over_experts():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    conventions = weight_conventions(model, sites)
    seen = {}

    def keep(inputs, choice):
        seen[inputs.layer, inputs.site] = router_inputs(inputs, Convention())

    with swap(model, sites, live_rules(ROUTERS["native"](), conventions), on_choice=keep):
        logits_of(model)
    routers = {place: ROUTERS["kmeans"]().fit(inputs) for place, inputs in seen.items()}
    with swap(model, sites, live_rules(routers, conventions)) as swapped:
        assert bool(logits_of(model).isfinite().all())
    assert swapped.experts_per_token > 0
    with pytest.raises(RouterError, match="Layer 7, site 0 has no router"):
        live_rules({(7, 0): routers[0, 0]}, conventions)


def test_conventions_on_paper():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    ids = torch.tensor([[0, 1], [2, 0]])
    chosen = scores.gather(-1, ids)
    even = chosen / chosen.sum(-1, keepdim=True)
    assert convention_of(scores, Choice(ids, chosen * 2.5)) == Convention(False, 2.5)
    assert convention_of(scores, Choice(ids, even * 2.5)) == Convention(True, 2.5)
    assert convention_of(None, Choice(ids, chosen)) == Convention(False, 1.0)
