"""The oracle of the last layer: what it tries, what it says, and that tokens do not mix."""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch

import capture
from capture.model.load import load_model
from capture.model.selftest import attach
from explorer.__main__ import main
from explorer.comparison import oracle
from explorer.comparison.live import LiveModel
from explorer.comparison.oracle import OneSet, last_layer_oracle, least_of
from explorer.comparison.text_split import FitAndReport, TokenTexts
from explorer.errors import ComparisonError
from explorer.pages.compare.figures import oracle_bound
from explorer.routers.live_rule import LiveRule
from explorer.routers.scores import host_scores, slots, weigh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab():
    model = tiny_models.build("mixtral")
    ids = np.random.default_rng(1).integers(3, 60, (2, 24)).astype(np.int32)
    text = TokenTexts([ids[0]], [""], [None], "given")
    fit = TokenTexts([ids[1]], [""], [None], "given")
    return LiveModel(load_model(model), attach(model), FitAndReport(fit, text))


@pytest.fixture(scope="module")
def rows(lab):
    return pd.DataFrame(last_layer_oracle(lab))


class EachItsOwn(OneSet):
    """Give every token of one text its own set."""

    def _route(self, inputs):
        scores = host_scores(inputs.tensor("logits"), inputs)
        ids = torch.tensor(self.experts)
        return slots(scores, ids, weigh(scores, ids, inputs))


def test_the_best_sets_of_all_tokens_together_give_the_loss_that_was_said(lab, rows):
    site = lab.sites[-1].info
    place = (site.layer, site.site)
    sets = list(combinations(range(site.n_experts), site.top_k))
    losses = []
    for experts in sets:
        rule = LiveRule(OneSet(experts), lab.conventions[place])
        losses.append(lab.losses({place: rule}, only=[place])[0])
    best = np.argmin(losses, axis=0)
    # the last token has nothing to predict
    chosen = tuple(sets[number] for number in [*best, 0])
    rule = LiveRule(EachItsOwn(chosen), lab.conventions[place])
    found = lab.losses({place: rule}, only=[place])[0]
    np.testing.assert_allclose(found, np.min(losses, axis=0), atol=1e-5)
    kinds = rows.drop_duplicates("kind").set_index("kind")
    assert kinds.loc["best", "loss"] == pytest.approx(found.mean(), abs=1e-5)
    assert kinds.loc["worst", "loss"] == pytest.approx(np.max(losses, axis=0).mean(), abs=1e-5)
    assert kinds.loc["random", "loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert kinds.loc["model", "loss"] == pytest.approx(lab.native.losses[0].mean(), abs=1e-6)
    assert kinds.loc["best", "loss_change"] == pytest.approx(
        kinds.loc["best", "loss"] - kinds.loc["model", "loss"]
    )
    own = lab.native.losses[0]
    ranks = 1 + (np.array(losses) < own - 1e-5).sum(axis=0)
    assert rows["native_rank"][0] == pytest.approx(ranks.mean())
    assert rows["native_best"][0] == pytest.approx((ranks == 1).mean())
    assert rows["enumerated"].all() and (rows["sets"] == len(sets)).all()


def test_the_best_of_more_sets_is_better(rows):
    drawn = rows[rows["kind"].isin(("random", "best of n"))]
    assert drawn["loss"].is_monotonic_decreasing and len(drawn) > 2
    assert rows.iloc[1]["kind"] == "best" and (rows["loss"] >= rows.iloc[1]["loss"]).all()
    assert (rows["loss"] <= rows.iloc[-1]["loss"]).all()


@pytest.mark.parametrize(("n", "total"), [(1, 5), (2, 5), (3, 6), (6, 6)])
def test_the_least_of_n_by_enumeration(n, total):
    counts = np.zeros(total)
    for drawn in combinations(range(total), n):
        counts[min(drawn)] += 1
    np.testing.assert_allclose(least_of(n, total), counts / counts.sum())


def test_too_many_sets_are_sampled_and_that_is_said(lab, monkeypatch):
    monkeypatch.setattr(oracle, "MOST_SETS", 3)
    told = []
    found = last_layer_oracle(lab, seed=1, told=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert all(row["sets"] == 3 and not row["enumerated"] for row in found)
    assert [row["n"] for row in found] == [None, None, None, 2, None]
    assert found == last_layer_oracle(lab, seed=1)


def test_a_model_whose_last_layer_has_no_router_is_refused(lab, monkeypatch):
    monkeypatch.setattr(lab, "sites", lab.sites[:-1])
    with pytest.raises(ComparisonError, match="what comes after it mixes tokens"):
        last_layer_oracle(lab)


def test_the_command_keeps_it_in_the_file_and_prints_it(tmp_path, capsys):
    run = tmp_path / "tiny.duckdb"
    model = tiny_models.build("mixtral")
    model.save_pretrained(tmp_path / "model")
    prompts = [[*range(3, 20)], [*range(20, 44)], [*range(5, 40)], [*range(8, 30)]]
    capture.record(model, prompts, run, sample_tokens=50, progress=False)
    asked = ["compare", str(run), "--routers", "native", "--live", "--no-latency", "--quiet"]
    asked += ["--no-controls", "--oracle", "--model", str(tmp_path / "model")]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["oracle"]
    assert [row["kind"] for row in found][:3] == ["model", "best", "random"]
    assert found[1]["loss"] < found[0]["loss"] < found[-1]["loss"]
    assert main(asked) == 0
    assert "a bound that sees the next token" in capsys.readouterr().out
    assert main([*asked, "--against", "top_k(k=1)", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["paired"]
    assert (pair["router"], pair["other"]) == ("native", "top_k(k=1)")


@pytest.mark.parametrize("dark", [False, True])
def test_the_figure_says_that_it_is_a_bound(rows, dark):
    figure = oracle_bound(rows, dark=dark)
    assert list(figure.data[0].x) == [1, 2, 4, 8, 16, int(rows["sets"][0])]
    text = figure.layout.title.text + figure.layout.title.subtitle.text
    assert "bound" in text and "no router can" in text.replace("<br>", " ")
