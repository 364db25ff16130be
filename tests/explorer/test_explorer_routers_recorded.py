"""Router inputs from run files: what the model computed, and splits that never meet."""

import numpy as np
import pytest
import synthetic
import tiny_models
import torch
from checks import assert_close
from test_explorer_routers_clusters import agreement

import capture
from explorer import open_run
from explorer.errors import RouterError
from explorer.routers import ROUTERS
from explorer.routers.recorded import fit_split, recorded_inputs

STORED = 2e-3  # a stored weight is rounded to 2**-11 relative


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Return a model and a run in which every token was sampled."""
    model = tiny_models.build("mixtral")
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 60, int(n)).tolist() for n in random.integers(4, 20, 12)]
    path = tmp_path_factory.mktemp("runs") / "mixtral.duckdb"
    capture.record(model, prompts, path, sample_tokens=1000, progress=False)
    with open_run(path) as run:
        yield model, run


def test_a_run_gives_what_the_router_saw(mixtral):
    model, run = mixtral
    for layer in run.layers:
        inputs, tokens = recorded_inputs(run, layer)
        gate = model.model.layers[layer].mlp.gate.weight.detach()
        assert inputs.hidden.shape == (len(tokens), 32)
        assert_close("logits", inputs.hidden @ gate.T, inputs.logits, atol=1e-5)
        assert (inputs.renormalize, inputs.scaling) == (True, pytest.approx(1, abs=STORED))
        assert int(inputs.starts.sum()) == 12
        again = ROUTERS["top_k"]().route(inputs)
        native = ROUTERS["native"]().route(inputs)
        same = [
            set(a) == set(b)
            for a, b in zip(*(r.expert_ids.tolist() for r in (again, native)), strict=True)
        ]
        assert all(same)
        assert_close("weights", again.weights, native.weights, atol=STORED)


def test_routers_are_fitted_on_one_split_and_reported_on_the_other(mixtral):
    _, run = mixtral
    inputs, tokens = recorded_inputs(run, 1)
    fit = fit_split(tokens)
    assert not set(tokens["prompt_id"][fit]) & set(tokens["prompt_id"][~fit])
    assert tokens["prompt_id"][fit].nunique() == 6
    fit_rows, held_out_rows = (torch.from_numpy(np.flatnonzero(side)) for side in (fit, ~fit))
    router = ROUTERS["cluster_linear"](n_clusters=1, ridge=1e-6).fit(inputs.take(fit_rows))
    held_out = inputs.take(held_out_rows)
    assert agreement(router.route(held_out), held_out) > 0.9
    assert np.array_equal(fit, fit_split(tokens))
    assert not np.array_equal(fit, fit_split(tokens, seed=1))


def test_the_choice_is_that_of_the_run_file(tmp_path):
    known = synthetic.write_run(tmp_path / "run.duckdb", level="scores")
    with open_run(known.path) as run:
        inputs, tokens = recorded_inputs(run, 3, 1)  # its score function is not known
        assert inputs.hidden is None
        prompt_tokens = [token for token in known.tokens if token["phase"] == "prompt"]
        assert tokens["token_id"].tolist() == [token["token_id"] for token in prompt_tokens]
        assert tokens["domain"].tolist() == [token["domain"] or "" for token in prompt_tokens]
        for row, token in enumerate(prompt_tokens):
            route = known.routes[token["token_id"], 3, 1]
            found = inputs.native
            assert [e for e in found.expert_ids[row].tolist() if e >= 0] == [
                expert for expert, _ in route["experts"]
            ]
            assert inputs.logits[row].tolist() == route["scores"]
            for slot, (_, weight) in enumerate(route["experts"]):
                assert float(found.weights[row, slot]) == weight
    with pytest.raises(RouterError, match="does not know"):
        ROUTERS["top_k"]().route(inputs)


def test_a_run_without_choices_says_what_to_record(tmp_path):
    known = synthetic.write_run(tmp_path / "run.duckdb", level="stats", scored_every=0)
    with (
        open_run(known.path) as run,
        pytest.raises(RouterError, match="--level scores"),
    ):
        recorded_inputs(run, 1)


def test_splits_need_prompts_on_both_sides(mixtral):
    _, tokens = recorded_inputs(mixtral[1], 1)
    one = tokens[tokens["prompt_id"] == 0]
    with pytest.raises(RouterError, match="more prompts"):
        fit_split(one)
    with pytest.raises(RouterError, match="share"):
        fit_split(tokens, share=1.0)
