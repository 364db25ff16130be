"""Routers in running models: the model's convention is found, and routers keep it."""

import dataclasses

import pytest
import tiny_models
import torch
from causality_probe import toy_layers, toy_tokens
from checks import assert_close

from capture.swap.routers import swap
from explorer.errors import RouterError
from explorer.routers import ROUTERS, fit_layers
from explorer.routers.live_rule import Convention, LiveRule, completed, convention_of

TOKENS = tiny_models.tokens(rows=3, length=12)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def watched(model):
    """Return the inputs of every layer in one pass of the model itself."""
    seen = {}
    with swap(
        model,
        None,
        LiveRule(ROUTERS["native"]()),
        on_choice=lambda inputs, _: seen.update({(inputs.layer, inputs.site): inputs}),
    ):
        logits_of(model)
    return {place: completed(inputs) for place, inputs in seen.items()}


@pytest.mark.parametrize(
    ("name", "convention"),
    [("mixtral", (True, 1.0)), ("olmoe", (False, 1.0)), ("deepseek_v3", (True, 2.5))],
)
def test_the_models_convention_is_found_and_kept(name, convention):
    model = tiny_models.build(name)
    own = logits_of(model)
    for inputs in watched(model).values():
        assert (inputs.renormalize, inputs.scaling) == (
            convention[0],
            pytest.approx(convention[1], abs=1e-4),
        )
    for router in ("native", "top_k", "gate_row_attention"):
        with swap(model, None, LiveRule(ROUTERS[router]())):
            assert_close(router, logits_of(model), own, atol=1e-4)


@pytest.mark.slow
def test_other_rules_run_in_a_model_and_change_it():
    model = tiny_models.build("mixtral")
    own = logits_of(model)
    seen = watched(model)
    names = ("random", "kmeans", "cluster_linear", "expert_choice", "top_p", "loss_free_bias")
    for name in names:
        routers = fit_layers(ROUTERS[name](), seen)
        rules = {place: LiveRule(router) for place, router in routers.items()}
        with swap(model, None, rules) as swapped:
            changed = logits_of(model)
        assert bool(changed.isfinite().all())
        if name == "random":
            assert float((changed - own).abs().max()) > 1e-2
            assert swapped.experts_per_token == 3
    exact = fit_layers(ROUTERS["cluster_linear"](n_clusters=1, ridge=1e-9), seen)
    with swap(model, None, {place: LiveRule(router) for place, router in exact.items()}):
        assert_close("a linear teacher", logits_of(model), own, atol=1e-2)


def test_a_recurrent_router_is_handed_its_state():
    model = tiny_models.build("mixtral")
    seen = watched(model)
    routers = fit_layers(ROUTERS["gru_recurrent"](steps=5), seen)
    states = []
    with swap(
        model,
        None,
        {place: LiveRule(router) for place, router in routers.items()},
        on_choice=lambda inputs, _: states.append(inputs.previous_state),
    ):
        logits_of(model)
    assert states[0] is None
    assert [state.shape for state in states[1:]] == [(36, 32)] * (len(states) - 1)


def test_conventions_on_paper():
    inputs = toy_layers(toy_tokens(4, 20, 0))[0, 0]
    scores = inputs.native.scores
    ids = inputs.native.expert_ids
    raw = scores.gather(-1, ids)
    shared = raw / raw.sum(-1, keepdim=True)
    assert convention_of(scores, ids, raw * 3) == (False, pytest.approx(3))
    assert convention_of(scores, ids, shared * 2.5) == (True, pytest.approx(2.5))
    assert convention_of(scores, ids, shared.bfloat16()) == (True, pytest.approx(1, abs=0.01))
    one = scores[:1], ids[:1]
    assert convention_of(*one, shared[:1]) == (True, pytest.approx(1))
    assert convention_of(*one, raw[:1]) == (False, pytest.approx(1))
    with pytest.raises(RouterError, match="neither"):
        convention_of(scores, ids, raw.square())
    with pytest.raises(RouterError, match="at least one token"):
        convention_of(scores, torch.full_like(ids, -1), raw)
    assert Convention(True, 1.0) == (True, 1.0)


def test_a_given_convention_is_not_looked_for():
    model = tiny_models.build("mixtral")
    given = Convention(True, 7.0)
    seen = []

    class Notes(LiveRule):
        def route(self, inputs):
            seen.append(completed(inputs, self.convention).scaling)
            return super().route(dataclasses.replace(inputs, token_ids=None))

    with swap(model, None, Notes(ROUTERS["top_k"](), given)):
        logits_of(model)
    assert set(seen) == {7.0}
