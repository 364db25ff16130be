"""Rules that carry a paper's name do what the paper does, or say how they differ."""

from pathlib import Path

import pytest
import torch
from causality_probe import toy_layers, toy_tokens

from capture.model.selftest import attach
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from explorer import routers
from explorer.__main__ import main
from explorer.comparison.live_results import source_of
from explorer.routers import ROUTERS, PartMask, route_layers
from explorer.routers.live_rule import Convention, LiveRule
from tests import tiny_models

SURVEY = Path(routers.__file__).with_name("SURVEY.md")
LAYERS = toy_layers(toy_tokens(4, 24, 5), score_function="softmax")


def test_every_rule_with_a_paper_says_how_it_differs(capsys):
    """In the same words on the command line, in the survey and on the card in a comparison."""
    main(["routers"])
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    survey = SURVEY.read_text("utf-8")
    for name in ROUTERS:
        info = ROUTERS[name]().info
        assert bool(info.paper) == (info.differs is not None)
        if info.paper:
            how = info.differs or "as published"
            assert f"| `{name}` | {info.paper} | {how} |" in survey
            assert info.paper in source_of(info) and info.differs in source_of(info)
            assert info.shelved or listed[name].split(info.paper)[1].strip() == how


def test_expert_choice_weighs_as_its_source():
    """2202.09368, eq. 1-2: G holds the softmax scores of the chosen; nothing divides them."""
    inputs = LAYERS[1, 0]
    scores = inputs.logits.softmax(-1)
    routing = ROUTERS["expert_choice"](raw=True).route(inputs)
    places = len(scores) * inputs.top_k // inputs.n_experts
    for expert in range(inputs.n_experts):
        gains, tokens = scores[:, expert].topk(places)
        rows, at = (routing.expert_ids == expert).nonzero(as_tuple=True)
        assert sorted(rows.tolist()) == sorted(tokens.tolist())
        weights = dict(zip(rows.tolist(), routing.weights[rows, at].tolist(), strict=True))
        assert weights == pytest.approx(dict(zip(tokens.tolist(), gains.tolist(), strict=True)))
    assert ROUTERS["expert_choice"](raw=True).info.differs == ""


def test_the_next_gate_reads_what_the_layer_before_saw():
    """2312.17238, section 3.2."""
    router = ROUTERS["next_gate"]()
    routings = route_layers(dict.fromkeys(LAYERS, router), LAYERS)
    first, second = sorted(LAYERS)[:2]
    for place, source in ((first, first), (second, first)):
        inputs = LAYERS[place]
        logits = LAYERS[source].hidden @ inputs.gate_weight.T
        if inputs.gate_bias is not None:
            logits = logits + inputs.gate_bias
        torch.testing.assert_close(routings[place].scores, logits.softmax(-1))


def test_the_next_gate_of_the_first_layer_is_the_model():
    model = tiny_models.build("olmoe")
    sites = attach(model)
    rule = LiveRule(ROUTERS["next_gate"](), Convention(renormalize=False, scaling=1.0))
    seen = {}

    def keep(inputs, choice):
        seen[inputs.layer] = inputs, choice

    with torch.no_grad(), swap(model, sites, rule, on_choice=keep):
        model(input_ids=tiny_models.tokens(), use_cache=False)
    inputs, choice = seen[0]
    assert torch.equal(choice.expert_ids.sort(-1).values, inputs.native.expert_ids.sort(-1).values)
    later = [(i, c) for layer, (i, c) in seen.items() if layer]
    assert any(
        not torch.equal(c.expert_ids.sort(-1).values, i.native.expert_ids.sort(-1).values)
        for i, c in later
    )


@pytest.mark.parametrize(("keep", "shared", "always", "each"), [(0.75, 0.5, 2, 3), (0.5, 1, 3, 3)])
def test_shared_heads_are_always_on_and_others_are_chosen(keep, shared, always, each):
    """2410.11842: the first heads for every token, the best of the others by a gate."""
    router = ROUTERS["moh_heads"](keep=keep, shared=shared, steps=20)
    inputs = LAYERS[1, 0]
    generator = torch.Generator().manual_seed(0)
    target = PartMask("head", torch.rand(len(inputs.hidden), 4, generator=generator))
    gate = router.fit(inputs, target).route(inputs).gate
    assert bool((gate[:, :always] == 1).all())
    assert bool((gate.sum(-1) == each).all())
    if each > always:
        chosen = router.gate_(inputs.hidden).argmax(-1) + always
        assert torch.equal(gate[:, always:].argmax(-1) + always, chosen)
        assert len(chosen.unique()) > 1


def test_a_mod_reads_the_attention_of_the_layer_before():
    """2412.20875: what layer l - 1 gave a token decides whether layer l runs for it."""
    model = tiny_models.build("olmoe")
    model.set_attn_implementation("eager")
    sites = attach(model)
    asked = {}

    class Note(LiveRule):
        def route(self, inputs):
            answer = super().route(inputs)
            asked[inputs.layer] = inputs, answer.gate
            return answer

    ids = tiny_models.tokens()
    rules = dict.fromkeys((1, 2), Note(ROUTERS["a_mod"](keep=0.5)))
    with torch.no_grad():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        with gate_parts(model, sites, rules, part="block", attention="before"):
            model(input_ids=ids, use_cache=False)
    received = maps[0].mean(dim=1).sum(dim=1)  # [B, keys], over heads and queries of layer 0
    inputs, gate = asked[1]
    torch.testing.assert_close(inputs.received, received.flatten(), atol=1e-4, rtol=1e-4)
    kept = ids.shape[1] // 2 + ids.shape[1] % 2
    expected = torch.zeros_like(received).scatter(1, received.topk(kept).indices, 1.0)
    assert torch.equal(gate.flatten(), expected.flatten())
    assert not torch.allclose(asked[2][0].received, inputs.received)
