"""Tiny models trained from scratch: experts, rules with gradients, controllers, and verdicts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from checks import assert_close
from torch.nn import functional

from explorer.routers import RouterInputs, Routing
from explorer.routers.hashing import HashRouter
from explorer.survey.from_scratch import train as training
from explorer.survey.from_scratch.__main__ import main
from explorer.survey.from_scratch.arms import ARMS, CLAIMS, EXPERTS, claims_table, judge, make_table
from explorer.survey.from_scratch.model import Experts, ModelShape, ScratchModel
from explorer.survey.from_scratch.train import Corpus, Setting, facts_of, make_rules, score, train

SHAPE = ModelShape(vocabulary=48, width=16, layers=2, heads=2, expert_width=16, context=16)
SETTING = Setting(steps=4, windows=4, held_out=8, shape=SHAPE)


@pytest.fixture(scope="module")
def corpus():
    """A chain: each token is one of two that follow the one before, so that there is something."""
    generator = np.random.default_rng(0)
    follows = generator.integers(4, 48, (48, 2))
    stream = [4]
    for choice in generator.integers(0, 2, 6000):
        stream.append(int(follows[stream[-1], choice]))
    return Corpus(np.array(stream[:5000]), np.array(stream[5000:]))


def model_of(name, corpus, seed=0, setting=SETTING):
    arm = ARMS[name]
    return ScratchModel(arm, make_rules(arm, setting, corpus, seed), setting.shape, seed=seed)


def batch_of(corpus, setting=SETTING):
    length = setting.shape.context + 1
    rows = [corpus.train[n * length : (n + 1) * length] for n in range(setting.windows)]
    return torch.from_numpy(np.stack(rows))


def test_experts_are_the_weighted_sum_of_what_was_chosen():
    torch.manual_seed(0)
    experts = Experts(4, 6, 5)
    hidden = torch.randn(7, 6)
    ids = torch.tensor([[0, 3], [1, -1], [3, 0], [-1, -1], [2, 1], [3, 2], [0, -1]])
    weights = torch.rand(7, 2) * (ids >= 0)
    expected = torch.zeros(7, 6)
    for token in range(7):
        for slot in range(2):
            expert = int(ids[token, slot])
            if expert >= 0:
                gate, up = (experts.gate_up[expert] @ hidden[token]).chunk(2)
                out = experts.down[expert] @ (functional.silu(gate) * up)
                expected[token] += weights[token, slot] * out
    found = experts(hidden, Routing(torch.zeros(7, 4), ids, weights))
    assert_close("sum", found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_and_only_those_without_a_gate_have_none_to_train(name, corpus):
    model = model_of(name, corpus)
    windows = batch_of(corpus)
    facts = facts_of(windows, ARMS[name].key, SHAPE.vocabulary)
    loss = functional.cross_entropy(
        model(windows[:, :-1], facts).flatten(0, 1), windows[:, 1:].flatten()
    )
    loss.backward()
    for moe in model.moes:
        assert (moe.gate is None) == (ARMS[name].gate == "none")
        for parameter in [] if moe.gate is None else moe.gate.parameters():
            assert float(parameter.grad.abs().max()) > 0, "the rule keeps no gradient"
        assert float(moe.experts.down.grad.abs().max()) > 0


# how many tokens there are says how many places an expert has; which tokens they are does not
PLACES = {f"{arm}_{factor}" for arm in ("switch", "top_2_cap") for factor in ("1.0", "1.25", "2.0")}


@pytest.mark.parametrize("name", [n for n in ARMS if ARMS[n].causal or n in PLACES])
def test_arms_do_not_see_which_tokens_come(name, corpus):
    """In capacities, too, earlier tokens take the places of later ones only."""
    model = model_of(name, corpus).eval()
    windows = batch_of(corpus)[:1]
    changed = windows.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 48
    outputs = [
        model(each[:, :-1], facts_of(each, ARMS[name].key, SHAPE.vocabulary))
        for each in (windows, changed)
    ]
    assert_close("past", outputs[0][:, :9], outputs[1][:, :9], atol=1e-5)
    assert not torch.allclose(outputs[0][:, 9:], outputs[1][:, 9:], atol=1e-3)


def test_arms_that_see_the_future_say_so():
    assert {name for name in ARMS if not ARMS[name].causal} == {
        "hash_next",
        "expert_choice_1",
        "expert_choice_2",
        *PLACES,
    }


def test_keys_stand_for_what_they_are_called():
    windows = torch.tensor([[5, 6, 7, 8], [9, 5, 5, 4]])
    expected = {
        "token": [5, 6, 7, 9, 5, 5],
        "previous": [0, 5, 6, 0, 9, 5],
        "next": [6, 7, 8, 5, 5, 4],
        "bigram": [5, 506, 607, 9, 905, 505],
        "position": [0, 1, 2, 0, 1, 2],
    }
    for key, wanted in expected.items():
        facts = facts_of(windows, key, 100)
        assert facts.keys.tolist() == wanted
        assert facts.starts.tolist() == [True, False, False, True, False, False]


def test_arms_of_a_seed_share_the_trunk_and_the_windows(corpus):
    first, second = model_of("top_1", corpus), model_of("hash", corpus)
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    for one, other in zip(first.blocks, second.blocks, strict=True):
        assert torch.equal(one.query_key_value.weight, other.query_key_value.weight)
    assert not torch.equal(first.embedding.weight, model_of("top_1", corpus, 1).embedding.weight)
    torch.manual_seed(1)
    again = [score(train(ARMS["top_1"], SETTING, corpus, 3), ARMS["top_1"], SETTING, corpus)]
    torch.manual_seed(2)
    again.append(score(train(ARMS["top_1"], SETTING, corpus, 3), ARMS["top_1"], SETTING, corpus))
    assert again[0] == again[1]


def test_training_lowers_the_loss(corpus):
    long = dataclasses.replace(SETTING, steps=60)
    untrained = score(model_of("top_1", corpus), ARMS["top_1"], long, corpus)
    trained = score(train(ARMS["top_1"], long, corpus, 0), ARMS["top_1"], long, corpus)
    # uniform: ln 48 = 3.87; all that is to be known: ln 2
    assert untrained["loss"] > 3.7 and math.log(2) < trained["loss"] < untrained["loss"] - 1


@torch.no_grad()
def test_held_out_loss_and_load_are_what_the_model_gives(corpus):
    model = model_of("switch_1.0", corpus)
    found = score(model, ARMS["switch_1.0"], SETTING, corpus)
    length = SHAPE.context + 1
    starts = np.linspace(0, len(corpus.held_out) - length, SETTING.held_out).astype(int)
    losses, load = [], torch.zeros(2, EXPERTS)
    for number in range(0, SETTING.held_out, SETTING.windows):
        rows = np.stack(
            [corpus.held_out[s : s + length] for s in starts[number : number + SETTING.windows]]
        )
        windows = torch.from_numpy(rows)
        logits = model(windows[:, :-1], facts_of(windows, "token", 48)).log_softmax(-1)
        losses.append(-logits.gather(-1, windows[:, 1:, None]).mean())
        for layer, moe in enumerate(model.moes):
            load[layer] += torch.bincount(
                moe.routing.expert_ids.clamp_min(-1).flatten() + 1, minlength=EXPERTS + 1
            )[1:]
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    violation = (load.amax(-1) / load.mean(-1) - 1).mean()
    assert found["max_violation"] == pytest.approx(float(violation), abs=1e-5)
    places = math.ceil(SETTING.windows * SHAPE.context / EXPERTS)
    assert load.max() <= places * SETTING.held_out / SETTING.windows
    tokens = SETTING.held_out * SHAPE.context
    assert found["experts_per_token"] == pytest.approx(float(load.sum()) / 2 / tokens)


def test_the_balance_loss_is_1_when_even_and_grows(corpus):
    model = model_of("top_1", corpus)
    windows = batch_of(corpus)
    moe = model.moes[0]
    facts = facts_of(windows, "token", 48)
    hidden = torch.randn(64, 16)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe(hidden, facts)
        assert float(moe.balance) == pytest.approx(1.0)
        moe.gate.weight[0] = 50.0 * hidden.mean(0)
        moe(hidden.abs(), facts)
        probabilities = moe.gate(hidden.abs()).softmax(-1)
        share = probabilities.argmax(-1).bincount(minlength=EXPERTS) / 64
        assert_close("aux", moe.balance, 8 * (share * probabilities.mean(0)).sum(), atol=1e-5)


def test_the_bias_evens_out_the_load_and_stays_out_of_the_weights(corpus):
    arm = dataclasses.replace(ARMS["loss_free"], bias_rate=0.05)
    model = ScratchModel(arm, [arm.rule() for _ in range(2)], SHAPE, seed=0)
    moe, hidden = model.moes[0], torch.randn(400, 16).abs()
    facts = facts_of(torch.zeros(1, 401, dtype=torch.int64), "token", 48)
    spread = []
    with torch.no_grad():
        for _ in range(60):
            moe(hidden, facts)
            spread.append(float(moe.load().float().std()))
            before = moe.bias.clone()
            moe.even_out()
            under = moe.load() < moe.load().float().mean()
            assert bool((moe.bias[under] > before[under]).all())
        scores = moe.gate(hidden).sigmoid().gather(-1, moe.routing.expert_ids)
    assert spread[-1] < 0.5 * spread[0]
    assert_close("weights", moe.routing.weights, scores, atol=1e-6)


@pytest.mark.slow
def test_the_l1_loss_finds_the_wanted_number_of_experts(corpus):
    setting = dataclasses.replace(SETTING, steps=200)
    start = score(model_of("remoe", corpus), ARMS["remoe"], setting, corpus)
    end = score(train(ARMS["remoe"], setting, corpus, 0), ARMS["remoe"], setting, corpus)
    assert start["experts_per_token"] > 3
    assert 0.4 < end["experts_per_token"] < 1.4


def test_tables_deal_out_the_tokens_as_they_say(corpus):
    counts = np.bincount(corpus.train, minlength=48)
    loads = {}
    for kind in ("balanced", "clusters", "dispersed"):
        table = make_table(kind, corpus.train, 48, seed=0).numpy()
        assert table.shape == (48,) and set(table) <= set(range(EXPERTS))
        loads[kind] = np.bincount(table, counts, minlength=EXPERTS)
    random = HashRouter(k=1).route(
        RouterInputs(
            layer=0, n_experts=8, top_k=1, score_function="softmax", token_ids=torch.arange(48)
        )
    )
    loads["random"] = np.bincount(random.expert_ids[:, 0].numpy(), counts, minlength=EXPERTS)
    spread = {kind: load.std() / load.mean() for kind, load in loads.items()}
    assert spread["balanced"] < 0.2 < min(spread["random"], spread["clusters"])
    clusters = make_table("clusters", corpus.train, 48, seed=0).numpy()
    apart = make_table("dispersed", corpus.train, 48, seed=0).numpy()
    largest = np.bincount(clusters).argmax()
    assert len(set(apart[clusters == largest])) == min(8, int((clusters == largest).sum()))


def test_claims_are_judged_by_the_spread_of_the_seeds():
    assert judge([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])[2] == "met"
    assert judge([2.0, 2.2, 1.8], [1.0, 1.1, 0.9])[2] == "not met"
    mean, error, verdict = judge([1.0, 1.2, 1.1], [1.1, 1.1, 1.1])
    assert (mean, verdict) == (pytest.approx(0.0), "not told apart")
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert judge([1.0, 1.0, 1.05], [1.01, 1.02, 1.04])[2] == "not told apart"  # a seed dissents
    # three and five standard errors: the limit of three seeds is 4.30
    for distance, expected in ((3.0, "not told apart"), (5.0, "met")):
        apart = distance * 0.1 / math.sqrt(3)
        assert judge([0.9, 1.0, 1.1], [1 + apart] * 3)[2] == expected
    assert judge([1.0], [2.0])[2] == "not told apart"


def test_claims_pair_the_same_seeds():
    def row(arm, seed, loss):
        return {"arm": arm, "seed": seed, "loss": loss, "max_violation": 0.0}

    rows = [row("loss_free", s, 1.0 + s) for s in (0, 1, 2)]
    rows += [row("sigmoid_aux", s, 1.1 + s + 0.001 * s) for s in (2, 0)]
    table = claims_table(rows, CLAIMS)
    perplexity = table[table["in"] == "loss"].iloc[0]
    assert perplexity["seeds"] == 2 and perplexity["verdict"] == "met"
    assert perplexity["difference"] == pytest.approx(-0.101)
    assert set(table["better"]) == {"loss_free"}


def test_claims_name_arms_that_exist():
    for claim in CLAIMS:
        assert claim.better in ARMS and claim.worse in ARMS and claim.better != claim.worse


def test_the_command_trains_what_is_missing_and_prints_both_tables(
    tmp_path, capsys, monkeypatch, corpus
):
    import explorer.survey.from_scratch.__main__ as command

    monkeypatch.setattr(command, "load_corpus", lambda vocabulary: corpus)
    monkeypatch.setattr(training, "SHAPE", SHAPE)
    monkeypatch.setattr(command, "Setting", lambda steps: dataclasses.replace(SETTING, steps=steps))
    arguments = ["--arms", "dense,switch_1.0", "--seeds", "0,1", "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "switch_1.0" in out and "-1.561, -1.731" in out
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    changed = json.loads(files[0].read_text()) | {"loss": 123.0}
    files[0].write_text(json.dumps(changed))
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "123.0" in capsys.readouterr().err, "what is there is not trained again"
    assert main(["--arms", "nobody", "--out", str(tmp_path)]) == 2
    assert "Expected --arms among" in capsys.readouterr().err
