"""The pages that compare: routers on a run, two runs, and checkpoints."""

import json
import os
import shutil
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
from app_pages import charts, notes, opened, query
from synthetic import SITES, write_run

from capture.store import counts_only
from explorer import compare
from explorer.comparison.results_file import (
    FORMAT_VERSION,
    SUFFIX,
    empty_rows,
    open_comparison,
    write_comparison,
)
from explorer.errors import ComparisonError
from explorer.ui import address
from explorer.worker import CompareRequest

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(runs):
    write_run(runs / "known.duckdb")
    return runs


def result(router, family, change, flops, **more):
    return {
        "router": router,
        "family": family,
        "mode": "live",
        "condition": "base",
        "loss": 3.0 + change,
        "loss_change": change,
        "loss_se": 0.01,
        "flops_ratio": flops,
        "experts_per_token": 2 * flops,
        "agreement": 0.5,
        "max_violation": 1.0,
        "causal": True,
        "batch_dependent": False,
        "simulated": False,
        "tokens": 100,
        "sequences": 3,
        **more,
    }


def write_results(folder):
    rows = empty_rows()
    rows["comparison"] = [
        {
            "format_version": FORMAT_VERSION,
            "created_at": "2026-01-01T00:00:00",
            "run_name": "known",
            "model": "<b>tiny</b>",
            "dtype": "float32",
            "device": "cpu",
            "native_loss": 3.0,
            "report_tokens": 100,
            "report_sequences": 3,
            "fit_source": "fit",
            "report_source": "held out",
            "settings": "{}",
            "packages": "{}",
            "complete": True,
        }
    ]
    ours, chance = "top_k(k=1)", "random for top_k(k=1)"
    rows["results"] = [
        result("native", "literature", 0.0, 1.0),
        result(ours, "literature", 0.1, 0.6),
        result("peeks<script>", "literature", -0.5, 0.5, causal=False),
        result(chance, "control", 2.0, 0.6, control="equal_compute", control_of=ours, seed=0),
    ]
    replayed = {"loss": None, "loss_change": None, "spanning_rate": 0.125}
    rows["results"].append(result(ours, "literature", 0.0, 0.6) | {"mode": "replay"} | replayed)
    rows["routers"] = [
        {"router": row["router"], "name": "x", "family": row["family"], "title": "A title",
         "summary": "What it does.", "formula": "top-k", "control": row.get("control")}
        for row in rows["results"]
    ]  # fmt: skip
    rows["sequences"] = [
        {"router": router, "mode": "live", "sequence": n, "domain": "a", "tokens": 30,
         "loss": 3 + change + 0.01 * n, "loss_change": change + 0.01 * n}
        for router, change in (("native", 0.0), (ours, 0.1), (chance, 2.0))
        for n in range(3)
    ]  # fmt: skip
    rows["domains"] = [
        {"router": ours, "mode": "replay", "domain": name, "agreement": share, "tokens": 9}
        for name, share in (("law", 0.25), ("code", 0.5))
    ]
    rows["domains"] += [
        {"router": ours, "mode": "live", "domain": "<i>law</i>", "loss_change": 0.1, "loss_se": 0.1}
    ]
    rows["texts"] = [
        {"text_id": 0, "domain": "law", "position": n, "token": n, "text": text}
        for n, text in enumerate(("<b>", " held", " that"))
    ]
    rows["choices"] = [
        {"router": router, "mode": "live", "text_id": 0, "position": n, "layer": 0, "site": 0,
         "expert_ids": ids, "weights": [0.5] * len(ids)}
        for router, by_token in (("native", [[0, 1]] * 3), (ours, [[0, 1], [2], [3]]))
        for n, ids in enumerate(by_token)
    ]  # fmt: skip
    about = {"layer": 3, "site": 0, "sets": 120, "enumerated": True, "tokens": 100,
             "sequences": 3, "native_best": 0.25, "native_rank": 20.0}  # fmt: skip
    rows["oracle"] = [
        {"kind": kind, "n": n, **about, "loss": loss, "loss_change": loss - 3, "loss_se": 0.1}
        for kind, n, loss in (
            ("model", None, 3.0), ("best", None, 2.0), ("random", None, 3.5),
            ("best of n", 2, 2.75), ("worst", None, 5.0),
        )
    ]  # fmt: skip
    path = folder / f"known.12345678{SUFFIX}"
    write_comparison(path, rows)
    return path


def test_without_a_comparison_the_form_is_open_and_starts_one(runs, worker):
    app = opened("compare")
    offered = app.multiselect(key="compare routers")
    # a rule out of the default set is taken from those who type it
    assert not any(option.startswith("layer_gate ·") for option in offered.options)
    offered.select("kmeans")
    app.text_input(key="compare typed routers").input("top_k(k=1), layer_gate").run()
    next(button for button in app.button if button.label == "Compare").click().run()
    assert not app.exception
    (job,) = worker.jobs()
    assert isinstance(job.request, CompareRequest)
    assert job.request.routers == ["kmeans", "top_k(k=1)", "layer_gate"]
    assert job.request.run == str(runs / "known.duckdb") and job.request.capture is None


def test_the_model_of_a_run_is_loaded_by_those_who_said_so(runs, worker):
    app = opened("compare")
    assert any("synthetic" in box.label for box in app.checkbox)
    next(button for button in app.button if button.label == "Compare").click().run()
    assert not worker.jobs()[0].request.live and not worker.jobs()[0].request.model
    worker._jobs.clear()
    app = opened("compare")
    next(box for box in app.checkbox if "synthetic" in box.label).check().run()
    next(button for button in app.button if button.label == "Compare").click().run()
    assert worker.jobs()[0].request.live and worker.jobs()[0].request.model == "synthetic"


def test_typed_prompts_are_recorded_first(runs, worker):
    app = opened("compare")
    app.button_group(key="compare source").set_value("typed").run()
    text = app.text_area(key="compare typed")
    text.input("one\ntwo").run()
    button = next(button for button in app.button if button.label == "Compare")
    assert button.disabled
    app.text_area(key="compare typed").input("one\ntwo\nthree\nfour").run()
    next(button for button in app.button if button.label == "Compare").click().run()
    (job,) = worker.jobs()
    assert job.request.capture.out == job.request.run == str(runs / "compared.duckdb")
    assert job.request.capture.prompts[0]["text"] == "one"


def test_an_export_without_text_offers_other_prompts_only(runs):
    counts_only(runs / "known.duckdb", runs / "counts.duckdb")
    assert opened("compare", run="known").button_group(key="compare source").value == "run"
    source = opened("compare", run="counts").button_group(key="compare source")
    assert source.value == "typed" and len(source.options) == 2
    with pytest.raises(ComparisonError, match="leaves text and tokens out"):
        compare(runs / "counts.duckdb", ["native"], progress=False)


def test_a_wrong_router_is_said_and_cannot_be_started(runs):
    app = opened("compare")
    app.text_input(key="compare typed routers").input("nonsense(").run()
    button = next(button for button in app.button if button.label == "Compare")
    assert button.disabled
    assert any("nonsense" in caption.value for caption in app.caption)


def test_a_comparison_shows_front_badges_card_and_the_first_divergence(runs):
    write_results(runs)
    app = opened("compare", run="known")
    next(box for box in app.checkbox if "synthetic" in box.label).check().run()
    assert any("Expected: **" in caption.value for caption in app.caption)
    specs = [chart.spec for chart in charts(app)]
    assert "What routers cost" in specs[0]
    assert "peeks&lt;script&gt;" in specs[0] and "peeks<script>" not in specs[0]
    assert any("&lt;i&gt;law&lt;" in spec for spec in specs)
    table = app.dataframe[0].value
    badges = dict(zip(table["router"], table["badges"], strict=True))
    assert badges["peeks<script>"] == "not causal" and badges["native"] == ""
    drawn = [one for one in specs if "Change in loss by domain" in one]
    assert drawn and not any("top_k(k=1) †" in one for one in drawn)
    (replayed,) = [one.value for one in app.dataframe if "law" in one.value.columns]
    assert replayed["router"].tolist() == ["top_k(k=1)"] and replayed["law"].tolist() == [0.25]
    said = " ".join(markdown.value for markdown in app.markdown)
    assert "as much on average, the harder control: this router's loss minus chance's -1.9" in said
    assert "3 texts: ± 0.0000): **better than chance**" in said
    table = table.set_index("router")
    assert table.loc["top_k(k=1)", "harder"] == "on average"
    assert table.loc["top_k(k=1)", "equal_compute"] == 2.0
    assert table.loc["top_k(k=1)", "chance_high"] == pytest.approx(-1.9)
    assert table["better_than_chance"].tolist() == [
        "– the model's own", "yes", "– not causal", "– a control"
    ]  # fmt: skip
    assert "12.5% of the recorded tokens lie between clusters" in said
    assert "gives 2.0000 nats a token in place of 3.0000" in said
    assert "best for 25.0% of the tokens (chance: 0.8%)" in said
    assert any("A bound: experts of layer 3" in spec for spec in specs)
    assert "**First divergence** at token 1, in layer 0" in said
    # one of two, then none of three experts in common
    assert f"Mean Jaccard **{(1 + 0 + 0) / 3:.3f}**" in said
    app.selectbox(key="address:beside").select("native").run()
    said = " ".join(markdown.value for markdown in app.markdown)
    assert "minus that of native, on the same texts: +0.1000 ± 0.0000" in said
    assert app.query_params["beside"] == "native"


def test_a_layer_stands_beside_chance_in_the_same_layer(runs):
    path = write_results(runs)
    with open_comparison(path) as found:
        rows = found.records()
    ours, chance = "top_k(k=1)", "random for top_k(k=1)"
    for layer in (0, 1):
        one = {"mode": "live-layer", "layer": layer, "site": 0, "counted_flops_ratio": 0.9}
        control = {"control": "equal_compute", "control_of": ours}
        rows["results"] += [
            result(ours, "literature", 0.1 + layer, 0.9, latency_ratio=1.5) | one,
            result(chance, "control", 0.3 + layer, 0.9) | one | control,
        ]
    write_comparison(path, rows)
    app = opened("compare", run="known")
    (drawn,) = [one.spec for one in charts(app) if "when one layer is swapped" in one.spec]
    assert "+0.1000 nats (chance +0.3000)" in drawn and "+1.1000 nats (chance +1.3000)" in drawn
    assert drawn.count("nats (chance") == 2 and chance not in drawn


def test_tokens_of_a_replay_are_told_apart_from_those_of_the_model(runs):
    path = write_results(runs)
    with open_comparison(path) as found:
        rows = found.records()
    rows["texts"] += [
        {"text_id": 4, "mode": "replay", "domain": "code", "position": n, "token": n, "text": "x"}
        for n in range(2)
    ]
    rows["choices"] += [
        {"router": router, "mode": "replay", "text_id": 4, "position": n, "layer": 0, "site": 0,
         "expert_ids": ids, "weights": [0.5] * len(ids)}
        for router, ids in (("native", [0, 1]), ("other", [0]))
        for n in range(2)
    ]  # fmt: skip
    write_comparison(path, rows)
    app = opened("compare", run="known")
    assert app.selectbox(key="address:a").options == ["native", "top_k(k=1)"]
    assert app.selectbox(key="address:text").options == ["law 0"]
    app.button_group(key="address:told").set_value("replay").run()
    assert not app.exception
    # a saved view and a change of page keep what the address of the page may hold
    assert "told" in app.query_params
    assert set(app.query_params) <= set(address.names_of("compare"))
    assert app.selectbox(key="address:b").options == ["native", "other"]
    assert app.selectbox(key="address:text").options == ["code 4"]
    said = " ".join(markdown.value for markdown in app.markdown)
    assert "Mean Jaccard **0.500**" in said and "Token 0: replay knows no loss." in said
    # without a live part there is nothing to choose from
    rows["results"] = [row for row in rows["results"] if row["mode"] == "replay"]
    rows["choices"] = [row for row in rows["choices"] if row["mode"] == "replay"]
    write_comparison(path, rows)
    app = opened("compare", run="known", at="1")
    assert "Token 1: replay knows no loss." in " ".join(m.value for m in app.markdown)
    # two routers whose tokens are not the same ones do not agree
    for row in rows["choices"]:
        row["position"] += 2 * (row["router"] == "other")
    write_comparison(path, rows)
    app = opened("compare", run="known")
    assert not app.exception
    said = " ".join(markdown.value for markdown in app.markdown)
    assert "No token of this text was routed by both." in said and "same experts" not in said


def test_learning_is_shown_for_one_router_at_its_prices_those_with_a_reward_first(runs):
    path = write_results(runs)
    with open_comparison(path) as found:
        rows = found.records()
    rows["routers"] += [
        rows["routers"][0] | {"router": name, "family": family}
        for name, family in (("gate", "gating"), ("pays(price=1)", "rl"), ("pays(price=2)", "rl"))
    ]
    rows["curves"] = [
        {"router": name, "seed": 0, "lambda": 0.1, "step": step, "layer": 1, "reward": reward}
        for name, reward in (("gate", 9.0), ("pays(price=1)", 1.0), ("pays(price=2)", 2.0))
        for step in (0, 1)
    ]
    write_comparison(path, rows)
    app = opened("compare", run="known")
    (drawn,) = [chart.spec for chart in charts(app) if "While learning" in chart.spec]
    assert "pays(price=1)" in drawn and "pays(price=2)" in drawn and '"name":"gate' not in drawn
    app.selectbox(key="address:learner").select("gate").run()
    (drawn,) = [chart.spec for chart in charts(app) if "While learning" in chart.spec]
    assert "pays" not in drawn and '"name":"gate' in drawn
    assert "".join(app.query_params["learner"]) == "gate"


def test_a_file_that_is_no_comparison_is_refused_in_words(runs):
    (runs / f"known.12345678{SUFFIX}").write_bytes(b"nothing")
    app = opened("compare", run="known")
    assert any("no comparison file" in error.value for error in app.error)


def test_one_run_alone_cannot_be_compared(runs):
    app = opened("compare_runs")
    assert "one run only" in notes(app)


def test_two_runs_of_one_model(runs):
    write_run(runs / "other.duckdb", seed=5)
    app = opened("compare_runs", run="known", against="other", ids="same")
    titles = [chart.spec for chart in charts(app)]
    assert "Where the load went" in titles[0]
    assert not any("The same tokens in both runs" in title for title in titles)
    app = opened("compare_runs", run="known", against="other", ids="same", by="tokens")
    # where they part, and the tokens
    of_tokens = [chart.spec for chart in charts(app)]
    assert len(of_tokens) == 2
    assert sum("The same tokens in both runs" in spec for spec in of_tokens) == 1
    # a link to a token leads to the tokens
    app = opened("compare_runs", run="known", against="other", ids="same", shared="4")
    assert len(charts(app)) == 2


def test_the_second_run_is_in_the_address_and_may_become_the_first(runs):
    write_run(runs / "other.duckdb", seed=5)
    app = opened("compare_runs", run="known")
    assert query(app, "against") == "other"
    app.selectbox(key="address:run").set_value("other").run()
    assert query(app, "against") == "known" and "not here" not in notes(app)
    app = opened("compare_runs", run="known", against="gone")
    assert "“gone”, which is not here" in notes(app)
    assert query(app, "against") == "other"


def test_models_that_are_unrelated_are_never_compared_by_ids(runs):
    write_run(runs / "other.duckdb", seed=5)
    app = opened("compare_runs", run="known", against="other", ids="unrelated")
    specs = [chart.spec for chart in charts(app)]
    assert not any("Where the load went" in spec for spec in specs)
    assert any("both models on the same stretches" in spec for spec in specs)
    assert any("Do the models route the same stretches" in m.value for m in app.markdown)


# more layers, more experts and another top-k than the known run, and no second router in a layer
OTHER_SHAPE = tuple(
    SITES[0]._replace(layer=layer, n_experts=12, top_k=3) for layer in (0, 1, 2, 3, 4)
)


@pytest.mark.parametrize("topic", ["experts", "tokens"])
@pytest.mark.parametrize("turned", [False, True], ids=["wider B", "wider A"])
def test_models_of_different_shape_are_compared_by_their_text_only(runs, topic, turned):
    write_run(runs / "wide.duckdb", seed=5, sites=OTHER_SHAPE)
    first, second = ("wide", "known") if turned else ("known", "wide")
    # a link may ask for what needs ids: another pair of runs may have been open in it
    app = opened("compare_runs", run=first, against=second, ids="same", by=topic)
    assert not app.error
    assert "expert 3 of one has nothing to do with expert 3 of the other" in notes(app)
    asked = {box.label for box in app.get("button_group")}
    assert "Quantity" in asked and not asked & {"Expert ids", "Compare"}
    specs = [json.loads(chart.spec) for chart in charts(app)]
    titles = [spec["layout"]["title"]["text"] for spec in specs]
    # one dot a stretch, and two figures of lines that need no ids
    assert ["both models on the same stretches" in title for title in titles] == [
        True,
        False,
        False,
    ]
    assert titles[1].startswith("Busiest expert") and titles[2].startswith("Gate entropy")
    for spec in specs[1:]:
        lines = {line["name"]: line["customdata"] for line in spec["data"]}
        wide, known = ("A", "B") if turned else ("B", "A")
        assert lines[wide] == ["0.0", "1.0", "2.0", "3.0", "4.0"]
        assert lines[known] == ["1.0", "3.0", "3.1"]
    assert any("pieces of text that end at a token of both" in c.value for c in app.caption)
    assert any("Do the models route the same stretches" in m.value for m in app.markdown)


def test_trends_of_a_folder(runs):
    for step in (10, 200):
        write_run(runs / f"step_{step}.duckdb", seed=step)
    app = opened("trends", source="folder")
    assert "router saturation" in charts(app)[0].spec.lower()


def test_the_runs_of_trends_are_in_the_address(runs):
    for step in (10, 200):
        write_run(runs / f"step_{step}.duckdb", seed=step)
    app = opened("trends", source="folder")
    assert query(app, "runs") == "step_10,step_200"
    app = opened("trends", source="folder", runs="known,step_10,gone")
    assert app.multiselect(key="address:runs").value == ["known", "step_10"]
    assert "“Runs” for “gone”, which is not here" in notes(app)
    assert query(app, "runs") == "known,step_10"
    app.multiselect(key="address:runs").set_value([]).run()
    assert app.multiselect(key="address:runs").value == []
    assert "at least two runs" in notes(app)


def test_trends_of_the_demo_models_training(runs):
    app = opened("trends", trend="domain_information")
    quantity, experts = (chart.spec.lower() for chart in charts(app))
    assert "information between domain and expert" in quantity
    assert "load by checkpoint in layer 1 " in experts


def test_two_checkpoints_at_least(runs, monkeypatch, tmp_path):
    monkeypatch.setattr("capture.demo.TRENDS", tmp_path / "none")
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    app = opened("trends", source="folder")
    assert "at least two runs" in notes(app)


def test_the_families_chosen_are_in_the_address(runs):
    path = write_results(runs)
    app = opened("compare", run="known")
    assert "families" not in app.query_params
    assert query(app, "comparison") == path.name
    app.button_group(key="address:families").set_value(["control"]).run()
    assert query(app, "families") == "control"
    app = opened("compare", run="known", families="control,<b>")
    assert app.dataframe[0].value["family"].tolist() == ["control"]
    assert "“Families” for “<b>”, which is not here" in notes(app)
    assert query(app, "families") == "control"
    app.button_group(key="address:families").set_value(["control", "literature"]).run()
    assert "families" not in app.query_params


def test_a_comparison_that_ended_is_shown_and_one_of_somebody_else_is_not(runs, worker):
    first = write_results(runs)
    app = opened("compare", run="known")
    next(button for button in app.button if button.label == "Compare").click().run()
    assert query(app, "comparison") == first.name
    second = first.with_name(f"known.00000000{SUFFIX}")
    shutil.copyfile(first, second)
    os.utime(second, ns=(first.stat().st_mtime_ns + 10**10,) * 2)
    app.run()
    assert query(app, "comparison") == first.name
    worker._jobs[worker.jobs()[0].job_id] = replace(
        worker.jobs()[0], state="done", path=str(second)
    )
    app.run()
    assert query(app, "comparison") == second.name
    # once only: what is chosen after that stays
    app.selectbox(key="address:comparison").select(first.name).run()
    assert query(app, "comparison") == first.name


def test_conditions_are_asked_for_and_shown(runs, worker):
    app = opened("compare")
    app.multiselect(key="compare conditions").select("quantised(bits=4)").run()
    next(button for button in app.button if button.label == "Compare").click().run()
    assert worker.jobs()[0].request.conditions == ["quantised(bits=4)"]


def test_a_file_with_conditions_draws_the_two_by_two_and_the_flips(runs):
    path = write_results(runs)
    with open_comparison(path) as found:
        rows = found.records()
    rows["conditions"] = [
        {"condition": "quantised(bits=4)", "weights": weights, "routing": routing,
         "loss_change": change, "loss_se": 0.01, "tokens": 100, "simulated": False}
        for weights, routing, change in (
            ("condition", "condition", 0.3), ("condition", "base", 0.2), ("base", "condition", 0.1)
        )
    ]  # fmt: skip
    rows["flips"] = [
        {"condition": "quantised(bits=4)", "layer": layer, "site": 0, "tokens": 100,
         "set_flips": 0.2, "top1_flips": 0.1, "margin_auc": 0.9}
        for layer in (-1, 0, 1)
    ]  # fmt: skip
    rows["flip_margins"] = [
        {"condition": "quantised(bits=4)", "layer": layer, "site": 0, "bin": place,
         "margin_low": 0.1 * place, "margin_high": 0.1 * (place + 1), "tokens": 10,
         "set_flips": flips}
        for layer in (0, 1)
        for place, flips in enumerate((0.5, 0.1))
    ]  # fmt: skip
    rows["students"] = [{"student": "cosine", "agreement": 0.9, "loss_change": 0.01}]
    # quality against bytes: routers and conditions on one plot, the condition with its own routing
    for row in rows["results"]:
        row |= {"hit_rate": 0.5, "draft_experts": 3.0} if row["mode"] == "live" else {}
    rows["conditions"][0] |= {"hit_rate": 0.75, "draft_experts": 2.5, "max_violation": 0.5}
    write_comparison(path, rows)
    app = opened("compare", run="known", axis="hit_rate")
    specs = [chart.spec for chart in charts(app)]
    front = next(json.loads(spec) for spec in specs if "What routers cost" in spec)
    points = {one["name"]: one for one in front["data"] if one.get("mode") != "lines"}
    at = {name: np.frombuffer(b64decode(points[name]["x"]["bdata"])).tolist()
          for name in ("condition", "literature")}  # fmt: skip
    assert at == {"condition": [0.75], "literature": [0.5, 0.5]}
    assert points["the model's own router"]["x"] == [0.5]
    assert "cache hits 75.0%, experts of a draft 2.50" in points["condition"]["hovertext"][0]
    assert any("What conditions cost" in spec for spec in specs)
    assert any("AUC 0.900" in spec for spec in specs)
    assert any("student" in frame.value.columns for frame in app.dataframe)
