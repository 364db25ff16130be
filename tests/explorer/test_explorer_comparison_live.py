"""Routers live in a model: losses, costs, controls, badges, splits and what is found again."""

import numpy as np
import pytest
import tiny_models
import torch

import capture
from capture.model.flops import counted_flops
from capture.model.load import load_model
from capture.model.selftest import attach
from capture.prompts import read_prompts
from capture.swap.routers import swap
from explorer import compare, open_comparison, open_run
from explorer.comparison import live as lab_module
from explorer.comparison.causality import Badges, badges
from explorer.comparison.compare import pick
from explorer.comparison.fit import FitData, Fitted
from explorer.comparison.live import LiveModel
from explorer.comparison.live_results import RowSubject, live_rows
from explorer.comparison.matched_controls import controls_of
from explorer.comparison.results_file import empty_rows
from explorer.comparison.text_split import FitAndReport, TokenTexts, split_texts
from explorer.errors import ComparisonCancelled, ComparisonError, RouterError
from explorer.metrics.load import max_violation
from explorer.router_cards import parse_router
from explorer.routers import PartMask, RouterInfo
from explorer.routers.contract import PartRouter
from explorer.routers.live_rule import LiveRule
from explorer.routers.native import TopKRouter

pytestmark = pytest.mark.slow

NAMES = ["native", "top_k(k=1)", "top_p(p=0.4)", "expert_choice", "cluster_linear"]
TOP_K = 3


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("mixtral")


@pytest.fixture(scope="module")
def run_path(model, tmp_path_factory):
    random = np.random.default_rng(0)
    prompts = [
        {"ids": random.integers(3, 60, int(n)).tolist(), "domain": "ab"[i % 2]}
        for i, n in enumerate(random.integers(10, 40, 24))
    ]
    prompts[23] = {**prompts[22], "domain": "b"}  # a copy in another domain
    path = tmp_path_factory.mktemp("runs") / "tiny.duckdb"
    capture.record(model, prompts, path, sample_tokens=1000, progress=False)
    return path


@pytest.fixture(scope="module")
def comparison(run_path, model):
    """Compare once for many tests; it takes over five seconds, so that each of them is slow."""
    with compare(
        run_path, NAMES, live=True, layers=True, model=model, latency=False, progress=False
    ) as found:
        yield found


def whole(comparison, mode="live"):
    table = comparison.table
    return table[table["layer"].isna() & (table["mode"] == mode)].set_index("router")


@pytest.fixture(scope="module")
def lab(model):
    """Two texts of one length, so that what is timed is what is reported."""
    ids = np.random.default_rng(1).integers(3, 60, (4, 16)).astype(np.int32)
    texts = [TokenTexts([*part], ["", ""], [None, None], "given") for part in (ids[:2], ids[2:4])]
    return LiveModel(load_model(model), attach(model), FitAndReport(*texts))


@pytest.mark.slow(seconds=5)
def test_the_model_itself_changes_nothing(comparison, run_path):
    native = whole(comparison).loc["native"]
    assert native["loss_change"] == 0 and native["loss_se"] == 0
    for name in ("perplexity_ratio", "agreement", "jaccard", "flops_ratio", "bytes_ratio"):
        assert native[name] == pytest.approx(1), name
    layers = comparison.table.query("router == 'native' and mode == 'live-layer'")
    # some processors round a product of fewer rows otherwise
    assert len(layers) == 3 and (layers["loss_change"].abs() < 1e-7).all()
    # what was recorded by the capture is what the unchanged model did here
    seen = comparison.query(
        "SELECT position, layer, expert_ids, text FROM choices JOIN texts USING (text_id, position)"
        " WHERE router = 'native' AND text_id = 0 ORDER BY layer, position"
    )
    tokens = comparison.rows("texts").query("text_id == 0")["token"].tolist()
    with open_run(run_path) as run:
        recorded = run.query(
            "SELECT prompt_id, layer, position, list(expert_id ORDER BY weight DESC) AS ids, "
            "any_value(token) AS token FROM assignments JOIN tokens USING (token_id) GROUP BY ALL"
        )
    prompts = recorded.query("layer == 0").sort_values("position").groupby("prompt_id")
    mine = next(n for n, one in prompts if one["token"].tolist() == tokens)
    expected = recorded.query(f"prompt_id == {mine}").sort_values(["layer", "position"])
    assert [set(ids) for ids in seen["expert_ids"]] == [set(ids) for ids in expected["ids"]]


@pytest.mark.slow(seconds=5)
def test_rows_say_what_ran(comparison):
    table = whole(comparison)
    assert table.loc["top_k(k=1)", "experts_per_token"] == 1
    assert table.loc["top_k(k=1)", "expert_flops_ratio"] == pytest.approx(1 / TOP_K)
    assert table.loc["top_k(k=1)", "loss_change"] != 0 and table.loc["top_k(k=1)", "loss_se"] > 0
    assert table.loc["top_k(k=1)", "flops_ratio"] < 1 > table.loc["top_k(k=1)", "energy_ratio"]
    change = table["loss_change"].to_numpy(float)
    assert table["perplexity_ratio"].to_numpy(float) == pytest.approx(np.exp(change))
    assert table.loc["cluster_linear", "fit_tokens"] > 0 == table.loc["native", "fit_tokens"]
    assert table.loc["expert_choice", "max_violation"] < table.loc["native", "max_violation"]
    assert not table["simulated"].any() and table["latency_ratio"].isna().all()
    # what is left when one of three experts runs: all but two thirds of the experts' share
    experts = comparison.info["expert_flops_share"]
    assert table.loc["top_k(k=1)", "flops_ratio"] == pytest.approx(1 - experts * 2 / 3, abs=0.01)
    assert 0 < comparison.info["head_flops_share"] < 1 - experts


@pytest.mark.slow(seconds=5)
def test_sequences_and_domains_add_up(comparison):
    sequences = comparison.rows("sequences").query("router == 'top_k(k=1)' and mode == 'live'")
    tokens = sequences["tokens"].to_numpy(float)
    mean = (sequences["loss_change"].to_numpy(float) * tokens).sum() / tokens.sum()
    assert mean == pytest.approx(whole(comparison).loc["top_k(k=1)", "loss_change"])
    both = comparison.domains.query("router == 'top_k(k=1)'")
    modes = both.groupby("mode")["domain"].agg(set).to_dict()
    row = whole(comparison).loc["top_k(k=1)"]
    of_domain = sequences.assign(nats=sequences["loss_change"] * sequences["tokens"])
    of_domain = of_domain.groupby("domain")[["nats", "tokens"]].sum().to_numpy(float)
    share = of_domain[:, 1] / of_domain[:, 1].sum()
    apart = np.diff(of_domain[:, 0] / of_domain[:, 1])[0]
    assert row["loss_se_domain"] == pytest.approx(np.sqrt((share**2).sum() / 2) * abs(apart))
    assert modes == {"live": {"a", "b"}, "replay": {"a", "b"}}
    domains = both.query("mode == 'live'").set_index("domain")
    one = sequences[sequences["domain"] == "a"]
    weight = one["tokens"].to_numpy(float)
    assert domains.loc["a", "loss_change"] == pytest.approx(
        (one["loss_change"].to_numpy(float) * weight).sum() / weight.sum()
    )
    losses = comparison.rows("token_losses").query("router == 'top_k(k=1)' and text_id == 0")
    text = comparison.rows("texts").query("text_id == 0")
    assert losses["position"].tolist() == list(range(1, len(text)))


@pytest.mark.slow(seconds=5)
def test_layers_are_swapped_one_at_a_time(comparison):
    rows = comparison.table.query("router == 'top_k(k=1)' and mode == 'live-layer'")
    assert rows["layer"].tolist() == [0, 1, 2]
    assert rows["experts_per_token"].tolist() == [1, 1, 1]  # of the layer in question
    for flops in rows["expert_flops_ratio"]:
        assert flops == pytest.approx((1 + 2 * TOP_K) / (3 * TOP_K))
    assert (rows["counted_flops_ratio"] < 1).all()


@pytest.mark.slow(seconds=5)
def test_one_layer_has_its_own_control(comparison):
    table = comparison.table.query("mode == 'live-layer'")
    for name, control, kind in (
        ("top_k(k=1)", "random for top_k(k=1)", "equal_compute"),
        ("top_p(p=0.4)", "random matched per layer for top_p(p=0.4)", "matched_per_layer"),
    ):
        beside = table[table["control_of"] == name]
        assert set(beside["router"]) == {control} and set(beside["control"]) == {kind}
        own = table[table["router"] == name]
        assert beside["layer"].tolist() == own["layer"].tolist() == [0, 1, 2]
        gap = own["experts_per_token"].to_numpy(float) - beside["experts_per_token"].to_numpy(float)
        assert np.abs(gap).max() < 0.15
        assert not set(beside["loss_change"]) & set(own["loss_change"])
    cards = comparison.rows("routers")
    assert cards["router"].is_unique and set(table["router"]) <= set(cards["router"])


def test_one_layer_is_timed(run_path, model, tmp_path):
    with compare(
        run_path, ["top_k(k=1)"], live=True, layers=True, controls=False, model=model,
        folder=tmp_path, tokens=60, fit_tokens=60, progress=False,
    ) as found:  # fmt: skip
        rows = found.table[found.table["mode"] != "replay"]
    timed = rows[rows["flops_ratio"].notna()]
    assert timed["layer"].isna().sum() == 1 and timed["layer"].dropna().tolist() == [0, 1, 2]
    assert (timed["latency_low"] <= timed["latency_ratio"]).all()
    assert (timed["latency_ratio"] <= timed["latency_high"]).all()
    assert timed["counted_flops_ratio"].between(0.5, 0.99).all()


@pytest.mark.slow(seconds=5)
def test_what_is_not_causal_is_not_in_one_layer_either(comparison):
    layers = comparison.table.query("mode == 'live-layer'").groupby("router")["causal"].agg(set)
    assert layers["expert_choice"] == {False} and layers["top_k(k=1)"] == {True}


@pytest.mark.slow(seconds=5)
def test_controls_compute_as_much(comparison):
    table = whole(comparison)
    own = table.loc["top_p(p=0.4)"]
    equal, matched = (
        table.loc[f"{n} for top_p(p=0.4)"] for n in ("random", "random matched per layer")
    )
    assert equal["control"] == "equal_compute" and matched["control"] == "matched_per_layer"
    for control in (equal, matched):
        assert control["control_of"] == "top_p(p=0.4)" and control["family"] == "control"
        assert control["experts_per_token"] == pytest.approx(own["experts_per_token"], abs=0.1)
    layers = comparison.table.query("mode == 'live' and layer.notna()").set_index("router")
    ours = layers.loc["top_p(p=0.4)", "experts_per_token"].to_numpy(float)
    theirs = layers.loc["random matched per layer for top_p(p=0.4)", "experts_per_token"]
    assert np.abs(ours - theirs.to_numpy(float)).max() < 0.15
    # one number for all tokens: chance decides which experts, and there is one such control
    assert table.loc["random for top_k(k=1)", "agreement"] < 0.5 < 1
    assert "random matched per layer for top_k(k=1)" not in table.index
    # as much as the model itself: plain chance stands beside it
    assert "random for cluster_linear" not in table.index and "random" in table.index


@pytest.mark.slow(seconds=5)
def test_badges_are_found_out(comparison, lab):
    table = whole(comparison)
    assert (
        not table.loc["expert_choice", "causal"] and table.loc["expert_choice", "batch_dependent"]
    )
    assert table.loc["top_k(k=1)", "causal"] and not table.loc["top_k(k=1)", "batch_dependent"]

    class Liar(TopKRouter):
        """Claims to be causal, and takes one expert where the next token is an even one."""

        def _route(self, inputs):
            routing = super()._route(inputs)
            after = torch.cat([inputs.token_ids[1:], inputs.token_ids[:1]])
            ids = routing.expert_ids.clone()
            ids[after % 2 == 0, 1:] = -1
            weights = routing.weights.masked_fill(ids < 0, 0.0)
            return routing._replace(expert_ids=ids, weights=weights)

    fitted = lab.data.fit(parse_router("top_k"), None)
    honest = badges(lab.model, lab.sites, fitted, lab.rules(fitted))
    assert honest == (True, False)
    lying = fitted._replace(routers=dict.fromkeys(fitted.routers, Liar()))
    assert not badges(lab.model, lab.sites, lying, lab.rules(lying)).causal


@pytest.mark.parametrize("only", [None, [(1, 0)]])
@pytest.mark.parametrize("name", ["native", "top_k(k=1)", "top_p(p=0.4)"])
def test_operations_on_paper_are_those_that_torch_runs(lab, name, only):
    fitted = lab.data.fit(parse_router(name), None)
    outcome = lab.run(fitted, only=only)
    tokens = lab.report.n_tokens
    assert lab.cost(outcome, fitted, only).flops * tokens == pytest.approx(
        lab.count(fitted, only) * lab.native_count, rel=1e-6
    )
    assert lab.cost(lab.native, None).flops * tokens == pytest.approx(lab.native_count, rel=1e-6)


class EveryOther(PartRouter):
    """Skips the part for tokens at odd positions."""

    part = "layer"
    info = RouterInfo("every_other", "gating", "", "", "", "", frozenset({"positions"}))

    def _route(self, inputs):
        return PartMask("layer", (inputs.positions % 2 == 0).float()[:, None])

    def flops(self, n_experts, d, top_k):
        return 0.0


class WhileShort(EveryOther):
    """Runs the part for texts of fewer than ten tokens: no token of a text has a part in it."""

    def _route(self, inputs):
        few = inputs.starts.cumsum(0).bincount()[inputs.starts.cumsum(0)] < 10
        return PartMask("layer", few.float()[:, None])


def test_a_gate_that_reads_how_long_a_text_is_is_not_causal(lab):
    fitted = Fitted(dict.fromkeys(lab.data.places, WhileShort()), "block", False, 0, 0.0, [])
    assert badges(lab.model, lab.sites, fitted, {}) == (False, False)


@pytest.mark.parametrize("part", ["block", "layer"])
def test_skipped_parts_do_not_run(lab, part):
    places = {place: EveryOther() for place in lab.data.places}
    fitted = Fitted(places, part, False, 0, 0.0, [])
    outcome = lab.run(fitted)
    assert outcome.shares == dict.fromkeys([0, 1, 2], 0.5)
    cost = lab.cost(outcome, fitted)
    assert cost.expert_flops == pytest.approx(lab.cost(lab.native, None).expert_flops / 2)
    counted = lab.count(fitted) * lab.native_count
    assert cost.flops * lab.report.n_tokens == pytest.approx(counted, rel=1e-6)
    worn = badges(lab.model, lab.sites, fitted, {})
    assert worn == (True, False)
    one = lab.run(fitted, only=[(1, 0)])
    assert lab.cost(one, fitted, [(1, 0)]).flops * lab.report.n_tokens == pytest.approx(
        lab.count(fitted, [(1, 0)]) * lab.native_count, rel=1e-6
    )
    assert lab.time(fitted, [(1, 0)]).ratio > 0
    (control,) = controls_of("x", fitted, one, lab, seed=0, only=(1, 0))
    assert control.kind == "matched_per_layer" and set(control.fitted.routers) == {(1, 0)}
    controls = controls_of("x", fitted, outcome, lab, seed=0)
    assert [control.kind for control in controls] == ["equal_compute", "matched_per_layer"]
    for control in controls:
        assert 0.2 < lab.run(control.fitted).shares[1] < 0.8


@pytest.mark.parametrize(("part", "reached"), [("block", 16), ("head", 32)])
def test_balance_behind_gates_is_counted(lab, model, part, reached):
    """Against what the experts were told in the one pass with the gates in."""
    told, rows = [], empty_rows()

    class Half(EveryOther):
        """Skips blocks as above, or closes half of the heads."""

        def _route(self, inputs):
            gate = (inputs.positions % 2 == 0).float()[:, None]
            return PartMask(self.part, gate if part == "block" else gate.expand(-1, 4))

    Half.part = "head" if part == "head" else "layer"
    fitted = Fitted(dict.fromkeys(lab.data.places, Half()), part, False, 0, 0.0, [])
    _ = lab.native
    experts = lab.sites[1].experts
    handle = experts.register_forward_pre_hook(lambda _, args: told.append(args[1]))
    outcome = lab.run(fitted)
    handle.remove()
    expected = told[-1].flatten().bincount(minlength=lab.sites[1].info.n_experts)
    assert outcome.reached == dict.fromkeys(lab.native.load, reached)
    live_rows(rows, lab, RowSubject("half", None, fitted, Badges(True, False)), outcome)
    row = next(row for row in rows["results"] if row["layer"] == 1)
    assert row["max_violation"] == max_violation(outcome.load[1, 0])
    assert outcome.load[1, 0].tolist() == expected.tolist()
    assert row["experts_per_token"] == TOP_K * reached / lab.report.n_tokens
    whole = next(row for row in rows["results"] if row["layer"] is None)
    assert whole["gini"] == pytest.approx(
        np.mean([row["gini"] for row in rows["results"] if row["layer"] is not None])
    )


def test_experts_that_are_not_chosen_do_not_run(lab, model):
    fitted = lab.data.fit(parse_router("top_k(k=1)"), None)
    site = lab.sites[0]
    name = next(n for n, m in model.named_modules() if m is site.experts)
    seen = {}
    for label, rules in (("own", lab.rules(lab.data.fit(parse_router("native"), None))),
                         ("one", lab.rules(fitted))):  # fmt: skip
        with torch.no_grad(), swap(model, lab.sites, rules) as swapped, counted_flops(model) as ops:
            model(input_ids=lab.timed_ids, use_cache=False)
        seen[label] = ops.of(name), int(swapped.counts[0, 0].rows.sum())
    tokens = lab.timed_ids.numel()
    assert seen["one"][1] == tokens and seen["own"][1] == TOP_K * tokens
    assert seen["one"][0] * TOP_K == seen["own"][0]


@pytest.mark.parametrize("name", ["layer_gate", "head_attention", "expert_gate", "gru_recurrent"])
def test_parts_and_states_are_fitted_on_what_the_model_does(lab, name):
    fitted = lab.data.fit(parse_router(f"{name}(steps=20)"), 0)
    assert fitted.fit_tokens == lab.data.texts.n_tokens
    outcome = lab.run(fitted)
    assert np.isfinite(outcome.per_sequence.mean)
    only = lab.run(fitted, only=[(1, 0)])
    assert np.isfinite(only.per_sequence.mean)
    if fitted.part in ("block", "head"):
        assert set(outcome.shares) == {0, 1, 2} and set(only.shares) == {1}
        inputs, targets = lab.data.parts(fitted.part)
        for place, target in targets.items():
            assert len(target.gate) == inputs[place].n_tokens == lab.data.texts.n_tokens
            assert float(target.gate.min()) >= 0 and float(target.gate.max()) <= 1
    if name == "head_attention":
        # the heaviest head of a token counts 1
        assert torch.allclose(targets[0, 0].gate.amax(-1), torch.ones(len(targets[0, 0].gate)))


def test_importance_of_a_block_is_its_share_of_the_stream(lab, model):
    inputs, targets = lab.data.parts("block")
    layer, block = model.model.layers[1], lab.sites[1].parent
    found, handles = {}, []
    for label, module in (("layer", layer), ("block", block)):

        def keep(_, args, output, label=label):
            found[label] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        text = torch.from_numpy(lab.data.texts.sequences[0].astype(np.int64))[None]
        model(input_ids=text, use_cache=False)
    for handle in handles:
        handle.remove()
    share = found["block"].reshape(16, -1).norm(dim=-1) / found["layer"].reshape(16, -1).norm(
        dim=-1
    )
    rows = [n for n in range(32) if torch.equal(inputs[1, 0].token_ids[n : n + 16], text[0])]
    measured = targets[1, 0].gate[rows[0] : rows[0] + 16, 0]
    assert measured.numpy() == pytest.approx(share.clamp(0, 1).numpy(), abs=1e-5)


def test_fit_and_report_never_meet(run_path, model):
    with open_run(run_path) as run:
        fit, report = split_texts(run, load_model(model), fit_tokens=10_000, tokens=10_000)
        few = split_texts(run, load_model(model), fit_tokens=60, tokens=60)
    known = {one.tobytes() for one in fit.sequences}
    assert known and report.sequences
    assert not known & {one.tobytes() for one in report.sequences}
    assert len(fit.sequences) + len(report.sequences) == 24
    assert few.report.n_tokens <= 60 and set(few.report.domains) == {"a", "b"}


def test_the_demo_models_texts_to_fit_on_are_not_those_to_report_on():
    texts = {
        name: {prompt.text for prompt in read_prompts(name)}
        for name in ("demo", "demo-fit", "demo-heldout")
    }
    assert texts["demo-fit"] and texts["demo-heldout"]
    assert not texts["demo-fit"] & (texts["demo-heldout"] | texts["demo"])


@pytest.mark.slow(seconds=5)
def test_what_is_there_is_not_computed_again(run_path, model, comparison, monkeypatch):
    ran = []
    run = lab_module.LiveModel.run
    monkeypatch.setattr(
        lab_module.LiveModel,
        "run",
        lambda self, fitted, **k: (ran.append(fitted), run(self, fitted, **k))[1],
    )
    options = dict(live=True, model=model, latency=False, progress=False)
    again = compare(run_path, NAMES, layers=True, **options)
    assert not ran and again.path == comparison.path
    assert again.table.equals(comparison.table)
    more = compare(run_path, [*NAMES, "top_k(k=2)"], **options)
    labels = {fitted.router.info.name for fitted in ran}
    assert labels == {"top_k", "random"} and len(ran) == 2  # the new one and its control
    assert more.path == comparison.path and "top_k(k=2)" in set(more.table["router"])
    other = compare(run_path, ["native"], tokens=100, **options)
    assert other.path != comparison.path
    other.path.unlink()


def test_cancelling_keeps_what_is_finished(run_path, model, tmp_path):
    reports = []
    with pytest.raises(ComparisonCancelled, match="finished is in") as stop:
        compare(
            run_path,
            ["top_k(k=1)", "top_k(k=2)"],
            folder=tmp_path,
            controls=False,
            progress=reports.append,
            cancelled=lambda: any(report.done == 1 for report in reports),
        )
    assert reports[-1].stage == "done" and max(report.total for report in reports) == 2
    found = open_comparison(stop.value.path)
    assert set(found.table["router"]) == {"top_k(k=1)"} and not found.info["complete"]
    rest = compare(run_path, ["top_k(k=1)", "top_k(k=2)"], folder=tmp_path, progress=False)
    assert rest.path == found.path and rest.info["complete"]
    assert set(rest.table["router"]) == {"top_k(k=1)", "top_k(k=2)"}


def test_what_one_router_cannot_do_does_not_stop_the_others(run_path, model, tmp_path):
    with compare(run_path, ["top_k(k=99)", "native"], folder=tmp_path, progress=False) as found:
        assert set(found.table["router"]) == {"native"}
        failed = found.rows("units").query("error.notna()")
        assert (
            failed["router"].tolist() == ["top_k(k=99)"]
            and "1 <= k <= 8" in failed["error"].iloc[0]
        )


def test_without_texts_to_fit_on_a_router_says_so(model):
    texts = TokenTexts([np.arange(3, 20, dtype=np.int32)], [""], [None], "one prompt")
    lab = LiveModel(load_model(model), attach(model), FitAndReport(texts.take([]), texts))
    assert lab.run(lab.data.fit(parse_router("top_k(k=1)"), None)).experts == dict.fromkeys(
        lab.data.places, 1.0
    )
    with pytest.raises(RouterError, match="Record more prompts"):
        lab.data.fit(parse_router("kmeans"), 0)


def test_a_router_that_learns_on_the_loss_brings_its_curve(run_path, model, tmp_path):
    router = "policy_gradient(steps=20, tokens=300)"
    with compare(
        run_path, [router], folder=tmp_path, live=True, replay=False, seeds=[0, 1], model=model,
        latency=False, controls=False, progress=False,
    ) as found:  # fmt: skip
        assert not found.rows("units")["error"].notna().any(), found.rows("units")["error"].tolist()
        curves = found.curves
        assert set(curves["router"]) == {router} and set(curves["seed"]) == {0, 1}
        assert curves["gate_rate"].between(0, 1).all()
        assert set(whole(found)["seed"]) == {0, 1}


def test_gates_that_learned_to_close_blocks_close_blocks(model, lab):
    split = FitAndReport(lab.data.texts, lab.report)
    whole_layers = LiveModel(load_model(model), lab.sites, split, skip="layer")
    parts = {
        name: whole_layers.data.fit(parse_router(f"{name}(steps=1)"), 0).part
        for name in ("layer_gate", "layer_gate_trained")
    }
    assert parts == {"layer_gate": "layer", "layer_gate_trained": "block"}
    # a layer that is left out has no attention of its own to decide by; the one before it has
    with pytest.raises(
        RouterError, match=r"attention_received reads .* Take --skip block, or a_mod"
    ):
        whole_layers.data.fit(parse_router("attention_received"), 0)
    assert whole_layers.data.fit(parse_router("a_mod"), 0).part == "layer"


def test_the_loss_of_tokens_between_clusters_is_told_apart(run_path, model, tmp_path):
    name = "kmeans(n_clusters=3)"
    options = dict(live=True, layers=True, model=model, latency=False, progress=False)
    names = [name, "top_k(k=1)"]
    found = compare(run_path, names, controls=False, folder=tmp_path, **options)
    rows = found.rows("spanning")
    loaded, sites = load_model(model), attach(model)
    with open_run(run_path) as run:
        split = split_texts(run, loaded, fit_tokens=20_000, tokens=10_000)
    lab = LiveModel(loaded, sites, split)
    fitted = lab.data.fit(parse_router(name), 0)
    texts = [split.report.take([n]) for n in range(len(split.report.sequences))]
    alone = [FitData(loaded.model, sites, text).inputs() for text in texts]
    whole = found.table.query("mode == 'live-layer' and router == @name")
    whole = whole.set_index("layer")["loss_change"]
    for place, router in fitted.routers.items():
        here = rows[rows["layer"] == place[0]].set_index("spanning")
        between = np.concatenate([router.spanning(one[place])[:-1].numpy() for one in alone])
        swapped = lab.losses({place: LiveRule(router, lab.conventions[place])}, only=[place])
        change = np.concatenate(swapped) - np.concatenate(lab.native.losses)
        assert 0 < between.sum() < len(between)
        for side in (True, False):
            assert here.loc[side, "tokens"] == (between == side).sum()
            assert here.loc[side, "loss_change"] == pytest.approx(
                change[between == side].mean(), abs=1e-6
            )
            assert here.loc[side, "loss_se"] > 0
        shares = here["tokens"] / here["tokens"].sum()
        mean = (here["loss_change"].astype(float) * shares).sum()
        assert mean == pytest.approx(whole[place[0]], abs=1e-6)
    # routers without clusters have no such rows
    assert set(rows["router"]) == {name}


@pytest.mark.parametrize(
    ("name", "columns"),
    [("layer_gate(mode='modulate', steps=40)", 1), ("expert_gate(steps=40)", 8)],
)
def test_the_gates_of_every_layer_are_counted_by_value(run_path, model, tmp_path, name, columns):
    options = dict(live=True, model=model, latency=False, progress=False, controls=False)
    with compare(run_path, [name, "top_k(k=1)"], folder=tmp_path, **options) as found:
        rows, info = found.rows("gate_values"), found.info
    loaded, sites = load_model(model), attach(model)
    with open_run(run_path) as run:
        split = split_texts(run, loaded, fit_tokens=20_000, tokens=10_000)
    fitted = LiveModel(loaded, sites, split).data.fit(parse_router(name), 0)
    seen = FitData(loaded.model, sites, split.report).inputs()
    assert set(rows["router"]) == {parse_router(name).label}
    counts = rows.groupby("layer")["gates"].sum()
    assert (counts == info["report_tokens"] * columns).all() and len(counts) == len(sites)
    # the first layer of the swapped model sees what the unchanged model's does
    first = min(fitted.routers)
    gate = fitted.routers[first].route(seen[first]).gate.numpy()
    expected, _ = np.histogram(gate, bins=20, range=(0, 1))
    assert rows[rows["layer"] == first[0]]["gates"].tolist() == expected.tolist()


def test_settings_are_chosen_on_texts_that_are_not_reported(run_path, model, monkeypatch):
    loaded = load_model(model)
    options = dict(fit_tokens=200, tokens=10_000)
    with open_run(run_path) as run:
        fit, report = split_texts(run, loaded, **options)
        inner, validation = split_texts(run, loaded, validation=True, **options)
        few = {**options, "fit_tokens": 2}
        with pytest.raises(ComparisonError, match="too few texts to choose settings"):
            split_texts(run, loaded, validation=True, **few)
    held_out, used, chosen_on, fitted_on = (
        {one.tobytes() for one in texts.sequences} for texts in (report, fit, validation, inner)
    )
    assert fitted_on and chosen_on and not fitted_on & chosen_on
    assert fitted_on | chosen_on == used and not used & held_out
    assert "the rest of the half of the prompts" in validation.source

    reported = []
    run_texts = lab_module.LiveModel._losses
    monkeypatch.setattr(
        lab_module.LiveModel,
        "_losses",
        lambda self, *a: (
            reported.append({one.tobytes() for one in self.report.sequences}), run_texts(self, *a)
        )[1],
    )  # fmt: skip
    settings = ["top_p(p=0.2)", "native", "top_p(p=0.3)", "top_p(p=0.9)"]
    same = dict(model=model, progress=False, tokens=10_000, fit_tokens=200)
    routers, (picked,) = pick(run_path, settings, budget=0.7, **same)
    assert reported and not any(texts & held_out for texts in reported)
    with compare(
        run_path, settings, live=True, replay=False, controls=False, latency=False,
        validation=True, **same,
    ) as comparison:  # fmt: skip
        table = whole(comparison)
        assert comparison.info["settings"]["validation"]
    within = table[(table["expert_flops_ratio"] <= 0.7) & (table.index != "native")]
    assert 0 < len(within) < 3
    assert picked.chosen == within["loss_change"].idxmin() and routers == [picked.chosen, "native"]
    assert picked.among == ("top_p(p=0.2)", "top_p(p=0.3)", "top_p(p=0.9)")
    assert "70% of the experts' operations" in str(picked)
    with pytest.raises(ComparisonError, match="at most 10% of the experts' operations, got"):
        pick(run_path, settings, budget=0.1, **same)
    with pytest.raises(ComparisonError, match="several settings of one rule"):
        pick(run_path, ["native", "top_p"], budget=0.7, **same)
