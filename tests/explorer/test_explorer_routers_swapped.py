"""Every registered router that needs no fit runs inside models, through swaps and gates."""

import pytest
import tiny_models
import torch
from checks import assert_close
from test_capture_swap import logits_of

from capture.model.selftest import attach
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from explorer.routers import ROUTERS
from explorer.routers.live_rule import LiveRule

# fp32 through three layers, weights computed in another order
ATOL = 5e-5
# renormalised or not, scaled, with biases and groups, sigmoid and softmax
RULES = ["qwen2_moe", "qwen3_moe", "deepseek_v2", "glm4_moe", "gpt_oss", "minimax_m2"]
# two groups have room for three experts a token in every tiny model
OPTIONS = {f"group_limited_v{n}": {"top_groups": 2} for n in (2, 3)}


def part_of(router):
    return getattr(router, "part", None)


def unfitted(*, gates):
    routers = [ROUTERS[name](**OPTIONS.get(name, {})) for name in ROUTERS]
    return [r for r in routers if r.info.fits is None and (part_of(r) is not None) == gates]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", RULES)
def test_the_models_own_rule_rebuilt_gives_the_models_own_logits(name):
    model = tiny_models.build(name)
    sites = attach(model)
    own = logits_of(model)
    for router in ("native", "top_k", "gate_row_attention"):
        with swap(model, sites, LiveRule(ROUTERS[router]())) as swapped:
            assert_close(router, logits_of(model), own, atol=ATOL)
        assert swapped.experts_per_token == sites[0].info.top_k


@pytest.mark.parametrize("router", unfitted(gates=False), ids=lambda r: r.info.name)
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_every_router_without_a_fit_runs(name, router):
    model = tiny_models.build(name)
    sites = attach(model)
    ids, mask = tiny_models.tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    choices = []
    with swap(model, sites, LiveRule(router), on_choice=lambda i, c: choices.append(c)) as swapped:
        logits = logits_of(model, ids, attention_mask=mask)
    assert bool(logits[mask.bool()].isfinite().all())
    assert len(choices) == len(sites)
    filled = sum(int((c.expert_ids >= 0).sum()) for c in choices)
    assert sum(int(c.rows.sum()) for c in swapped.counts.values()) == filled > 0


@pytest.mark.parametrize("router", unfitted(gates=True), ids=lambda r: r.info.name)
def test_every_gate_without_a_fit_runs(router):
    model = tiny_models.build("olmoe")
    part = "block" if part_of(router) == "layer" else part_of(router)
    with gate_parts(model, attach(model), LiveRule(router), part=part, attention=True) as gated:
        assert bool(logits_of(model).isfinite().all())
    assert 0 < gated.per_token <= len(gated.counts)
