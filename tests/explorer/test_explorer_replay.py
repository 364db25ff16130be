"""Replay of recorded router inputs: against the routers themselves, and what it refuses."""

import numpy as np
import pytest
import tiny_models
import torch

import capture
from explorer import open_run
from explorer.comparison.replay import replay
from explorer.errors import RouterError, UnknownNameError
from explorer.routers import ROUTERS
from explorer.routers.recorded import choice_told

pytestmark = pytest.mark.slow

NAMES = ("native", "top_k", "random", "static_best", "cluster_linear", "expert_choice")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = tiny_models.build("mixtral")
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 60, int(n)).tolist() for n in random.integers(10, 40, 20)]
    path = tmp_path_factory.mktemp("runs") / "mixtral.duckdb"
    capture.record(model, prompts, path, sample_tokens=1000, progress=False)
    with open_run(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def table(run):
    return replay(run, NAMES)


def test_there_is_a_row_for_every_router_and_layer_and_for_all(run, table):
    assert len(table) == len(NAMES) * (len(run.sites) + 1)
    assert set(table["mode"]) == {"replay"} and not table["simulated"].any()
    for name in NAMES:
        own = table[table["router"] == name]
        total = own[own["layer"].isna()].iloc[0]
        assert own["layer"].dropna().tolist() == run.layers
        layers = own.dropna(subset="layer")
        for column in ("agreement", "max_violation", "experts_per_token", "js"):
            assert total[column] == pytest.approx(layers[column].mean())
        assert total["family"] == ROUTERS[name]().info.family


def test_the_model_agrees_with_itself_and_chance_with_chance(table):
    whole = table[table["layer"].isna()].set_index("router")
    for name in ("native", "top_k"):
        assert whole.loc[name, ["agreement", "jaccard", "exact_set", "top_1"]].tolist() == [1] * 4
        assert whole.loc[name, "weighted_overlap"] == pytest.approx(1, abs=2e-3)
        assert whole.loc[name, "js"] == pytest.approx(0, abs=1e-6)
    assert whole.loc["random", "agreement"] == pytest.approx(3 / 8, abs=0.06)
    assert whole.loc["cluster_linear", "agreement"] > whole.loc["static_best", "agreement"] + 0.2
    assert whole.loc["static_best", "max_violation"] == pytest.approx(8 / 3 - 1)
    assert whole.loc["static_best", "dead_experts"] == 5
    assert whole.loc["expert_choice", "gini"] == pytest.approx(0, abs=1e-9)
    assert not whole.loc["expert_choice", "causal"] and whole.loc["top_k", "causal"]
    assert (whole["max_violation_floor"] > 0).all()


def test_layers_and_labels_can_be_chosen(run):
    routers = {"k=1": ROUTERS["top_k"](k=1), "all": ROUTERS["top_k"](k=8)}
    table = replay(run, routers, layers=[run.layers[-1]])
    per_layer = table.dropna(subset="layer").set_index("router")
    assert per_layer["layer"].unique().tolist() == [run.layers[-1]]
    assert per_layer.loc["k=1", "agreement"] == pytest.approx(1 / 3)
    assert per_layer.loc["all", ["agreement", "jaccard"]].tolist() == [1, pytest.approx(3 / 8)]
    assert per_layer["experts_per_token"].tolist() == [1, 8]


def test_tokens_and_domains_add_up_to_layers(run, table):
    tokens = replay(run, ["top_k", "cluster_linear"], by="token")
    measures = ["agreement", "jaccard", "exact_set", "top_1", "weighted_overlap"]
    for layer, rows in tokens[tokens["router"] == "cluster_linear"].groupby("layer"):
        own = table[(table["router"] == "cluster_linear") & (table["layer"] == layer)].iloc[0]
        assert len(rows) == own["tokens"] and rows["token_id"].is_unique
        for name in (*measures, "experts_per_token"):
            assert rows[name].mean() == pytest.approx(own[name])
    itself = tokens[tokens["router"] == "top_k"]
    assert (itself[measures].round(2) == 1).all(axis=None)
    # the tokens are those of the run, in the prompts that nothing was fitted on
    known = run.query("SELECT token_id, prompt_id, position FROM tokens").set_index("token_id")
    found = itself.drop_duplicates("token_id").set_index("token_id")
    assert found[["prompt_id", "position"]].equals(
        known.loc[found.index].astype(found[["prompt_id", "position"]].dtypes.to_dict())
    )
    assert 0 < found["prompt_id"].nunique() < 20
    domains = replay(run, ["cluster_linear"], by="domain")
    clusters = tokens[tokens["router"] == "cluster_linear"]
    assert domains["agreement"].tolist() == [pytest.approx(clusters["agreement"].mean())]
    assert domains["tokens"].tolist() == [len(found)]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "mistral4"])
def test_rules_of_a_run_choose_by_the_bias_and_the_groups_of_its_model(family, tmp_path):
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 60, 20).tolist() for _ in range(8)]
    path = tmp_path / "run.duckdb"
    capture.record(tiny_models.build(family), prompts, path, sample_tokens=200, progress=False)
    rules = {
        "top_k": ROUTERS["top_k"](),
        "random": ROUTERS["random"](choose="best"),
        "noisy": ROUTERS["noisy_top_k"](noise=0.0),
        "matched": ROUTERS["random_matched"](),
        "capacity": ROUTERS["capacity_probs"](capacity_factor=100.0),
    }
    with open_run(path) as recorded:
        assert {"layer", "site", "n_groups", "top_groups"} <= set(recorded.notes["choice"][0])
        table = replay(recorded, rules)
        assert table["exact_set"].tolist() == [1.0] * len(table)


def test_a_choice_that_does_not_fit_its_router_is_left_out(run):
    info = run.sites[0]
    known = {"layer": info.layer, "site": info.site, "n_groups": 4, "top_groups": 2}
    told = {"choice": [known | {"selection_bias": [0.5] * info.n_experts}]}
    found = choice_told(told, info.layer, info.site, info.n_experts)
    assert found["selection_bias"].tolist() == [0.5] * 8 and found["n_groups"] == 4
    for wrong in (
        *("choice", [1], [{"layer": 99}]),
        *([known | {"n_groups": n, "selection_bias": "x"}] for n in (3, 0, "4", None, 10**30)),
        [known | {"top_groups": 5, "selection_bias": [0.5] * 7}],
        [known | {"top_groups": 0, "selection_bias": [None] * 8}],
        [known | {"top_groups": None, "selection_bias": [float("nan")] * 8}],
    ):
        told = {"choice": wrong}
        assert choice_told(told, info.layer, info.site, info.n_experts) == {}, wrong


class Ahead(ROUTERS["top_k"]):
    """Claims to be causal, and gives one expert to tokens before an even one, or in a crowd."""

    alone = False

    def _route(self, inputs):
        routing = super()._route(inputs)
        even = inputs.token_ids.roll(-1) % 2 == 0
        last = inputs.positions.roll(-1) <= inputs.positions  # the next one is another text's
        few = even & ~last
        if self.alone:  # looks at other sequences, not ahead
            few = torch.full_like(few, int(last.sum()) > 1)
        ids = routing.expert_ids.masked_fill(few.reshape(-1, 1) & (torch.arange(3) > 0), -1)
        return routing._replace(expert_ids=ids, weights=routing.weights.masked_fill(ids < 0, 0.0))


class Crowd(Ahead):
    alone = True


class Length(ROUTERS["top_k"]):
    """Claims to be causal, and gives one expert to all tokens of a text of odd length."""

    def _route(self, inputs):
        routing = super()._route(inputs)
        text = (inputs.positions.diff(prepend=inputs.positions[:1]) < 0).cumsum(0)
        odd = text.bincount()[text] % 2 == 1 if len(text) else text.bool()
        ids = routing.expert_ids.masked_fill(odd[:, None] & (torch.arange(3) > 0), -1)
        return routing._replace(expert_ids=ids, weights=routing.weights.masked_fill(ids < 0, 0.0))


def test_what_a_router_looks_at_is_found_out_on_recorded_inputs(run):
    routers = {"honest": ROUTERS["top_k"](), "ahead": Ahead(), "crowd": Crowd()}
    routers["full"] = ROUTERS["capacity_position"](capacity_factor=0.5)
    routers["length"] = Length()
    table = replay(run, routers).dropna(subset="layer").set_index("router")
    found = table[["causal", "batch_dependent"]].groupby(level=0).agg(lambda s: bool(s.iloc[0]))
    assert found.loc["honest"].tolist() == [True, False]
    assert not found.loc["ahead", "causal"]
    assert found.loc["crowd"].tolist() == [True, True]
    assert found.loc["length"].tolist() == [False, False]
    assert found.loc["full"].tolist() == [False, True], "how many places there are says the length"


def test_what_replay_refuses(run):
    with pytest.raises(RouterError, match="live"):
        replay(run, ["layer_gate"])
    with pytest.raises(UnknownNameError, match="Did you mean"):
        replay(run, ["top_kk"])
    with pytest.raises(RouterError, match="at least one"):
        replay(run, [])
    with pytest.raises(RouterError, match="no layer"):
        replay(run, ["native"], layers=[99])
    with pytest.raises(RouterError, match="gate_weight"):
        replay(run, ["gate_row_attention"])
