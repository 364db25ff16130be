"""A column means one thing in replay and live, and controls stand where tokens differ."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch

from capture.model.load import load_model
from capture.model.selftest import attach
from capture.swap.rules import Choice, RouterInputs, Routing
from explorer.comparison.fit import Fitted
from explorer.comparison.live import LiveModel, WatchedChoice, Watcher
from explorer.comparison.matched_controls import controls_of
from explorer.comparison.replay import over_layers, site_row
from explorer.comparison.text_split import FitAndReport, TokenTexts
from explorer.routers.native import TopKRouter

BOTH = ("agreement", "jaccard", "exact_set", "top_1", "weighted_overlap", "entropy")


def inputs_of(scores, ids, weights):
    """Return one layer's inputs with the model's own choice."""
    n = len(ids)
    known = {"layer": 0, "n_experts": scores.shape[1], "top_k": ids.shape[1]}
    return RouterInputs(
        **known,
        score_function="softmax",
        token_ids=torch.arange(n),
        positions=torch.arange(n),
        starts=torch.arange(n) == 0,
        native=Routing(scores, ids, weights),
    )


class Given:
    """Answers what it was given."""

    info = TopKRouter.info

    def __init__(self, answer):
        self.answer = answer

    def route(self, inputs):
        return self.answer


def live(native, answer, sequences):
    """Measure an answer as a live run does."""
    _, ids, weights = native[:3]
    places = np.arange(len(ids))
    own = WatchedChoice(ids.numpy().astype(np.int16), weights.numpy(), sequences.numpy(), places)
    watcher = Watcher(int(sequences.max()) + 1, {(0, 0): [own]})
    watcher.before_batch(np.arange(int(sequences.max()) + 1))
    model = {"layer": 0, "n_experts": 4, "top_k": 2, "score_function": "softmax"}
    where = RouterInputs(**model, sequences=sequences, positions=torch.arange(len(ids)))
    watcher.spy((0, 0), Given(answer)).route(where)
    watcher.on_choice(where, Choice(answer.expert_ids, answer.weights))
    return watcher.sums[0, 0]


@pytest.mark.parametrize("lost", [0, 3, 8])
def test_tokens_without_experts_or_scores_count_alike_in_replay_and_live(lost):
    generator = torch.Generator().manual_seed(lost)
    scores, found = torch.rand(2, 8, 6, generator=generator)
    native, answer = (
        Routing(one, one.topk(2).indices, one.topk(2).values) for one in (scores, found)
    )
    for part, empty in zip(answer[:3], (0.0, -1, 0.0), strict=True):
        part[:lost] = empty
    sums = live(native, answer, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    row = site_row("x", Given(answer), inputs_of(*native[:3]), answer)
    for name in BOTH:
        assert sums.mean(name) == pytest.approx(row[name], abs=1e-6, nan_ok=True), name
    # a token without an expert has nothing in common with the model, and no weights to overlap
    kept = native.expert_ids[lost:], answer.expert_ids[lost:]
    both = [len(set(a) & set(b)) / 2 for a, b in zip(*(k.tolist() for k in kept), strict=True)]
    assert row["agreement"] == pytest.approx(sum(both) / 8)
    assert np.isnan([row["weighted_overlap"], row["entropy"], row["js"]]).all() == (lost == 8)
    if lost == 3:
        alone = site_row("x", Given(answer), inputs_of(*(part[3:] for part in native[:3])),
                         Routing(*(part[3:] for part in answer[:3])))  # fmt: skip
        for name in ("weighted_overlap", "entropy", "js"):
            assert row[name] == pytest.approx(alone[name], abs=1e-6)
        # the second text has all its tokens
        assert sums.mean("entropy", np.array([False, True])) > 0
    # a layer that has no value leaves the mean of the others
    other = {**row, "layer": 1, "weighted_overlap": 0.5}
    mean = over_layers([row, other])["weighted_overlap"]
    assert mean == pytest.approx(0.5 if lost == 8 else (row["weighted_overlap"] + 0.5) / 2)


class OneOrThree(TopKRouter):
    """Give every second token one expert and the others three: two on average."""

    info = replace(TopKRouter.info, name="one_or_three", variable_k=True)

    def __init__(self):
        super().__init__(k=3)

    def _route(self, inputs):
        routing = super()._route(inputs)
        routing.expert_ids[inputs.positions % 2 == 0, 1:] = -1
        return routing._replace(weights=routing.weights.where(routing.expert_ids >= 0, 0.0))


def test_a_rule_with_the_models_mean_number_of_experts_has_controls():
    model = tiny_models.build("mixtral", num_experts_per_tok=2)
    ids = np.random.default_rng(1).integers(3, 60, (2, 16)).astype(np.int32)
    texts = TokenTexts([*ids], ["", ""], [None, None], "given")
    lab = LiveModel(load_model(model), attach(model), FitAndReport(texts.take([]), texts))
    made = {}
    for router in (OneOrThree(), TopKRouter(k=2), TopKRouter(k=1)):
        fitted = Fitted(dict.fromkeys(lab.data.places, router), "expert", False, 0, 0.0, [])
        outcome = lab.run(fitted)
        if router.k == 3:
            assert set(outcome.experts.values()) == {2.0} == set(lab.native.experts.values())
        made[router.k] = controls_of("x", fitted, outcome, lab, seed=0)
    assert [one.kind for one in made[3]] == ["equal_compute", "matched_per_layer"]
    # each token as the model: random sets are the control of all such rules
    assert made[2] == [] and [one.kind for one in made[1]] == ["equal_compute"]
    matched = lab.run(made[3][1].fitted)
    assert sum(matched.sums[0, 0].counts[[0, 2]]) == 0  # one or three, by chance
    assert 0 < matched.sums[0, 0].counts[1] < 32
