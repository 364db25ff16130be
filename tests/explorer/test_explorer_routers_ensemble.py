"""An ensemble of models by cluster: its limits, its clusters, and a mixture by hand."""

import json

import numpy as np
import pytest
import torch
from test_explorer_routers_from_scratch import model_of

from capture.demo.streams import encode_texts
from explorer.survey.from_scratch import ensemble
from explorer.survey.from_scratch.arms import ARMS
from explorer.survey.from_scratch.ensemble import (
    PREFIX,
    Clusters,
    EnsemblePlan,
    compared,
    held_out_texts,
    log_probabilities,
    mixed_losses,
    mixture,
    table,
)
from explorer.survey.from_scratch.model import ModelShape
from explorer.survey.from_scratch.train import Corpus, Setting, learn_tokenizer, train

NAMES = ["one model", "clusters, T = 0.1", "clusters, nearest", "clusters, all alike"]
NAMES.append("by chance, all alike")


@pytest.fixture(scope="module")
def texts():
    """Two languages that share no word."""
    random = np.random.default_rng(0)
    words = (["red", "green", "blue", "grey"], ["uno", "dos", "tres", "otto"])
    return [" ".join(random.choice(words[n % 2], 60)) for n in range(24)]


def test_cold_is_the_nearest_model_and_hot_is_all_alike():
    squared = np.array([[0.1, 0.4, 0.3], [0.9, 0.2, 0.25]])
    assert mixture(squared, 0.0).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert torch.allclose(mixture(squared, 1e-4), mixture(squared, 0.0))
    assert torch.allclose(mixture(squared, np.inf), torch.full((2, 3), 1 / 3).double())
    expected = np.exp(-squared / 0.1)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mixture(squared, 0.1).numpy(), expected)
    logs = torch.log(torch.tensor([[[0.5, 0.2]], [[0.1, 0.6]], [[0.3, 0.3]]]))  # [C, N=1, S=2]
    nearest = mixed_losses(logs, mixture(squared[:1], 0.0))
    assert nearest[0].tolist() == pytest.approx((-logs[0, 0]).tolist())
    alike = mixed_losses(logs, mixture(squared[:1], np.inf))
    assert alike[0].exp().tolist() == pytest.approx([1 / 0.3, 3 / 1.1])


def test_clusters_are_topics_of_equal_size(texts):
    clusters = Clusters(2).fit(texts)
    assert len(set(clusters.labels_[::2])) == len(set(clusters.labels_[1::2])) == 1
    near = clusters.squared_distances(["blue grey red", "tres uno"])
    assert near.argmin(axis=1).tolist() == [clusters.labels_[0], clusters.labels_[1]]
    three = Clusters(3).fit(texts)
    assert np.bincount(three.labels_).tolist() == [8, 8, 8]


def test_only_tokens_after_the_prefix_are_scored(texts):
    tokenizer = learn_tokenizer(texts, 280)
    found = held_out_texts(tokenizer, [*texts[:3], "too short"], 48)
    ids = [tokenizer.encode(text).ids for text in texts[:3]]
    assert found.windows.shape == (3, 49)
    for row, scored, prefix, whole in zip(*found, ids, strict=True):
        kept = [tokenizer.token_to_id("<bos>"), *whole][:49]
        assert row.tolist() == kept + [0] * (49 - len(kept))
        assert scored.nonzero().flatten().tolist() == list(range(PREFIX, len(kept) - 1))
        assert prefix == tokenizer.decode(whole[:PREFIX])


@pytest.mark.slow
def test_one_cluster_after_another_is_learned_and_compared(texts, tmp_path, monkeypatch, capsys):
    shape = ModelShape(vocabulary=280, width=16, layers=1, heads=2, expert_width=16, context=48)
    plan = EnsemblePlan(2, Setting(steps=80, windows=4, shape=shape))
    results = compared(plan, texts, texts[:6], seed=0)
    assert [row["model"] for row in results] == NAMES
    loss = {row["model"]: row["loss"] for row in results}
    ran = {row["model"]: row["run"] for row in results}
    assert ran["one model"] == ran["clusters, nearest"] == 1 and ran["clusters, all alike"] == 2
    # a model that learned one language alone is worse on the other one
    assert loss["clusters, nearest"] < loss["clusters, all alike"]
    frame = table([*results, *({**row, "seed": 1, "loss": row["loss"] + 1} for row in results)])
    assert frame["minus one model"].tolist() == pytest.approx(
        [loss[name] - loss["one model"] for name in NAMES]
    )
    assert frame["se"].tolist() == pytest.approx([0] * 5, abs=1e-12)
    stored = [{"model": name, "seed": 3, "loss": 2.0, "run": 1.0} for name in NAMES]
    asked = ["--clusters", "2", "--seeds", "3", "--steps", "8", "--out", str(tmp_path)]
    key = Setting(steps=8).key
    (tmp_path / f"ensemble-2-3-{key}.json").write_text(json.dumps(stored))
    monkeypatch.setattr(ensemble, "compared", lambda *a: pytest.fail("it is there already"))
    assert ensemble.main(asked) == 0 and "by chance, all alike" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ensemble.main(["--clusters", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        ensemble.main(["--seeds", "0,", "--out", str(tmp_path)])
    assert "Expected --seeds such as 0,1,2, got 0,." in capsys.readouterr().err


def test_a_copy_learns_on_from_where_its_model_was(texts):
    shape = ModelShape(vocabulary=280, width=16, layers=1, heads=2, expert_width=16, context=48)
    tokenizer = learn_tokenizer(texts, 280)
    stream = encode_texts(tokenizer, texts).astype(np.int64)
    corpus, arm = Corpus(stream, stream), ARMS["dense"]
    first = train(arm, Setting(steps=20, windows=4, shape=shape), corpus, 0)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    again = train(arm, Setting(steps=0, windows=4, shape=shape), corpus, 0, start=first)
    further = train(arm, Setting(steps=20, windows=4, shape=shape), corpus, 0, start=first)
    for name, value in before.items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(first.state_dict()[name], value), "the model itself is left alone"
    windows = held_out_texts(tokenizer, texts, 48).windows
    assert log_probabilities(further, windows).mean() > log_probabilities(first, windows).mean()


def test_a_model_gives_each_token_its_probability(texts):
    shape = ModelShape(vocabulary=280, width=16, layers=1, heads=2, expert_width=16, context=48)
    tokenizer = learn_tokenizer(texts, 280)
    found = held_out_texts(tokenizer, texts, 48)
    stream = found.windows.flatten().numpy()
    model = model_of("dense", Corpus(stream, stream), setting=Setting(shape=shape))
    logs = log_probabilities(model, found.windows)
    assert logs.shape == (len(texts), 48) and bool((logs < 0).all())
    changed = found.windows.clone()
    changed[:, 40:] = 7
    again = log_probabilities(model, changed)
    assert torch.allclose(again[:, :39], logs[:, :39], atol=1e-5)
    assert not torch.allclose(again[:, 39:], logs[:, 39:], atol=1e-3)
