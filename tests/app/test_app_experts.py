"""The Experts page: its numbers, its search, and the weights that a run does not hold."""

import json

import numpy as np
import pytest
from app_pages import charts, notes, opened, query
from synthetic import IDLE, write_run

from capture.progress import Progress
from explorer import writing
from explorer.comparison.atlas_file import write_atlas
from explorer.maps import map_cache
from explorer.pages.experts.figures import _PLACES
from explorer.pages.tokens import what_if
from explorer.run import open_run
from explorer.slices import load_slice
from explorer.worker import CosinesRequest, WhatIfRequest
from explorer.worker.interventions import answer_path, write_answer
from explorer.worker.requests import AtlasRequest, JobOutcome

pytestmark = pytest.mark.slow


@pytest.fixture
def known(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_run(runs / "known.duckdb")


def titles(app):
    return [json.loads(chart.spec)["layout"]["title"]["text"] for chart in charts(app)]


def tile(app, name):
    return next(metric for metric in app.metric if metric.label == name)


def test_the_busiest_expert_of_the_layer_comes_first(known):
    app = opened("experts", layer="1.0")
    loads = [0] * 6
    for _, _, expert, _ in known.assignments(1, 0):
        loads[expert] += 1
    assert app.selectbox(key="address:id").value == str(int(np.argmax(loads)))
    assert tile(app, "Tokens that chose it").value == str(max(loads))
    assert tile(app, "Share of the tokens").value == f"{max(loads) / len(known.tokens):.2%}"
    assert tile(app, "Load").value == f"{max(loads) / (sum(loads) / 6):.2f}× fair share"


def test_numbers_are_those_of_the_filters(known):
    app = opened("experts", layer="3.0", id="2", search="court")
    rows = [r for r in known.assignments(3, 0) if r[0]["prompt_id"] == 0 and r[2] == 2]
    assert tile(app, "Tokens that chose it").value == str(len(rows))
    weights = sum(weight for *_, weight in rows) / len(rows)
    assert tile(app, "Mean combine weight").value == f"{weights:.3f}"


def test_domains_and_phases_are_compared_unless_one_is_chosen(known):
    assert {"Domain specialisation (share of the domain's tokens)"} <= set(
        titles(opened("experts", layer="1.0"))
    )
    chosen = titles(opened("experts", layer="1.0", domain="law", phase="prompt"))
    assert not [title for title in chosen if title.startswith(("Domain", "Phase"))]


def test_an_expert_that_nobody_visited(known):
    app = opened("experts", layer="1.0", id=str(IDLE[2]))
    assert "None of these tokens went to L1.0.E5" in notes(app)
    assert tile(app, "Mean combine weight").value == "–"


@pytest.mark.parametrize("layer", ["1.0", "3.1"])
def test_all_experts_and_layers(known, layer):
    app = opened("experts", about="all", layer=layer)
    shown = titles(app)
    assert shown[0].startswith("Domain specialisation of every expert")
    assert shown[-1].startswith("Domain and expert")


def test_all_experts_at_one_domain_say_why_there_is_no_map(known):
    assert "take the domain filter off" in notes(opened("experts", about="all", domain="law"))


def test_the_experts_of_a_text(known, monkeypatch):
    monkeypatch.setattr("explorer.pages.experts.data.MIN_HITS", 1)
    app = opened("experts", about="text")
    assert "Type a word" in notes(app)
    app.text_input(key="address:find").set_value("a a").run()
    assert query(app, "find") == "a a"
    assert any("**, made of **" in block.value for block in app.markdown)
    assert titles(app) == ["Experts of the text (share of its tokens / share of all tokens)"]
    app.text_input(key="address:find").set_value("<script>").run()
    assert all("<script" not in chart.spec for chart in charts(app))
    app.text_input(key="address:find").set_value("no such text").run()
    assert "does not occur" in notes(app)


def test_the_experts_of_several_domains_lead_on(known, monkeypatch):
    monkeypatch.setattr("explorer.metrics.specialization.MIN_WHOLE", 1)
    app = opened("experts", about="domain", among="law,(none),maths")
    assert titles(app) == ["Experts of law + (no domain) (share of the domains / share of all)"]
    assert "“maths”, which is not here" in notes(app)
    (listed,) = app.dataframe
    assert listed.value["low"].is_monotonic_decreasing
    first = listed.value["name"].iloc[0]
    app.session_state["experts of domains listed"] = {"selection": {"rows": [0], "columns": []}}
    app.pills(key="address:among").set_value(["law", "code", "text", "(none)"]).run()
    assert "These are all domains" in notes(app)
    assert first.startswith("L") and query(app, "among") == "law,code,text,(none)"


def test_weights_are_compared_in_the_background_and_then_shown(known, worker):
    app = opened("experts", layer="1.0", id="0")
    (button,) = (b for b in app.button if b.label == "Compare the weights")
    button.click().run()
    (job,) = worker.jobs()
    assert isinstance(job.request, CosinesRequest) and job.request.model == "synthetic"
    with open_run(known.path) as run:
        path = map_cache.cosines_path(run)
    assert job.request.out == str(path)
    a, b = (part.ravel().astype(np.int32) for part in np.indices((6, 6)))
    columns = {
        "layer": np.ones(36, np.int32),
        "site": np.zeros(36, np.int32),
        "kind": np.full(36, "router", dtype=object),
        "a": a,
        "b": b,
        "cosine": np.where(a == b, 1, 1 / (1 + np.abs(a - b))).astype(np.float32),
    }
    map_cache.write(path, columns, {})
    app = opened("experts", layer="1.0", id="0")
    chart = next(c for c in charts(app) if "Router rows alike" in c.spec)
    labels = json.loads(chart.spec)["layout"]["yaxis"]["ticktext"]
    assert labels == [f"L1.0.E{expert}" for expert in range(1, 6)]
    assert "cannot be compared" in notes(app)


def save(app, name):
    next(box for box in app.text_input if box.label == "Save as slice").set_value(name)
    next(button for button in app.button if button.label == "Save slice").click()
    app.run()
    assert not app.exception
    return " ".join(box.value for box in (*app.success, *app.error))


def test_the_tokens_of_an_expert_and_of_a_text_are_saved_as_slices(known):
    hits = [r[0]["token_id"] for r in known.assignments(3, 0, domain="code") if r[2] == 2]
    for page, where in (("experts", {"id": "2"}), ("tokens", {"expert": "2"})):
        app = opened(page, layer="3.0", domain="code", **where)
        assert f"{page} of 2" in save(app, f"{page} of 2")
        assert "is a slice" in save(app, f"{page} of 2")
        with open_run(known.path) as run:
            assert load_slice(run, f"{page} of 2").token_ids.tolist() == sorted(hits)
    app = opened("experts", about="text", find="court")
    save(app, "courts")
    with open_run(known.path) as run:
        (token,) = load_slice(run, "courts").token_ids
    assert [one["text"] for one in known.tokens if one["token_id"] == token] == [" court"]
    # it is offered at the side at once, and limits the page
    app = opened("experts", layer="3.0", id="2", slice="experts of 2")
    assert tile(app, "Share of the tokens").value == "100.00%"


def test_viewers_do_not_load_models(known, monkeypatch):
    from explorer.ui import access

    monkeypatch.setattr(access, "read_only_option", lambda: True)
    try:
        app = opened("experts", layer="1.0")
        assert "Not available: a run holds no weights" in notes(app)
        buttons = ("Compare the weights", "Save slice")
        assert not [b for b in app.button if b.label in buttons]
    finally:
        writing.configure(writing.Policy())


def test_a_run_of_totals_says_what_it_lacks(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_run(runs / "stats.duckdb", level="stats")
    for about in ("expert", "all", "text"):
        app = opened("experts", about=about, layer="1.0")
        assert not app.error and "--level ids" in notes(app)


def test_an_atlas_is_offered_and_then_shown(known, runs, worker):
    app = opened("experts", about="all", layer="1.0")
    assert "Counts say how busy an expert is" in notes(app)
    (button,) = [one for one in app.button if one.label == "Make an atlas"]
    assert button.disabled  # until somebody says that the model may be loaded
    job = worker._jobs[worker.submit(AtlasRequest(str(runs / "known.duckdb"))).job_id]
    job.state = "running"
    worker._handle(job.job_id, Progress("mapping", part=0.25, seconds_left=200.0))
    (bar,) = opened("experts", about="all", layer="1.0").get("progress")
    assert (bar.proto.value, bar.proto.text) == (25, "about 3 minutes left")
    worker._end(job, JobOutcome("done"))
    with open_run(runs / "known.duckdb") as run:
        sites, fingerprint = [(s.layer, s.site, s.n_experts) for s in run.sites], run.fingerprint
    facts = {
        **{"format_version": 1, "created_at": "2026-12-01", "run_name": "known", "seed": 0},
        **{"run_fingerprint": fingerprint, "model": "m", "model_fingerprint": "g", "texts": "t"},
        **{"n_texts": 4, "n_tokens": 40, "native_loss": 2.0, "complete": False},
    }
    rows = [
        {
            **{"layer": layer, "site": site, "expert_id": expert, "way": "rerouted"},
            **{"domain": domain, "tokens": 40, "texts": 4, "load": (expert + 1) / 10},
            **{"loss_change": 1 / (expert + 1), "loss_margin": 0.01, "half_a": expert * 0.1},
            **{"half_b": expert * 0.2, "control_id": 0, "control_load": 0.1},
            **{"control_change": 0.5, "over_control": 0.1, "over_margin": 0.2},
        }
        for layer, site, n_experts in sites
        for expert in range(n_experts)
        for domain in (None, "law")
    ]
    write_atlas(runs / "known.0.atlas", facts, rows)
    app = opened("experts", about="all", layer="1.0")
    assert any(title.startswith("Need and use of every expert") for title in titles(app))
    assert app.dataframe[0].value["news"].isin(["rare but needed", "busy but idle"]).all()
    steps = 2 * len(sites)  # of which the file holds one way
    assert any(f"{steps // 2} of {steps} steps" in one.value for one in app.caption)
    assert [one for one in app.button if one.label == "Go on with the atlas"]
    named = next(json.loads(one.spec) for one in charts(app) if "Need and use" in one.spec)
    places = [place for trace in named["data"][1:] for place in trace["textposition"]]
    assert len(places) > 1 and set(places) <= set(_PLACES)
    assert any(t.startswith("Loss without the expert") for t in titles(opened("experts")))


def test_what_if_shows_answers_and_runs_nothing_for_viewers(known, runs, worker, monkeypatch):
    link = {"mode": "what-if", "layer": "1.0", "prompt": "0", "edits": "forbid/1.0/2/all"}
    app = opened("tokens", **link)
    assert "Forbid L1.0.E2 for all tokens" in " ".join(
        one.value.replace("\\", "") for one in app.markdown
    )
    with open_run(runs / "known.duckdb") as run:
        rows = run.query("SELECT token_id, position, token FROM tokens WHERE prompt_id = 0 "
                         "ORDER BY position")  # fmt: skip
        chosen = rows.iloc[min(len(rows) - 1, 5)]
        path = answer_path(run, 0, int(chosen["position"]), link["edits"], "")
        model = str(run.info["model"])
    n = len(rows)
    answer = {
        "tokens": rows["token"].tolist(), "position": int(chosen["position"]),
        "losses": {"before": [1.0] * (n - 1), "after": [2.0] * (n - 1)},
        "next": [{"text": "<b>a", "before": 0.5, "after": 0.25}],
        "written": {"before": "one", "after": "*two*"}, "seconds": 0.5, "cpu_seconds": 0.25,
        "routing": [{"layer": 1, "site": 0, "before": [[2, 1]] * n, "after": [[3, 1]] * n}],
    }  # fmt: skip
    place = 0, int(chosen["position"]), link["edits"], ""
    job = worker.submit(WhatIfRequest(str(path), str(runs / "known.duckdb"), *place, model))
    worker._jobs[job.job_id].state = "running"
    look = worker.job

    def ends_when_looked_at(number):
        seen = look(number)
        write_answer(path, answer)
        worker._end(worker._jobs[number], JobOutcome("done", str(path)))
        return seen

    # an answer that comes in a moment is waited for, and no progress is drawn before it
    with monkeypatch.context() as moment:
        moment.setattr(worker, "job", ends_when_looked_at)
        moment.setattr(what_if, "follow", lambda *_, **__: pytest.fail("progress was drawn"))
        assert tile(opened("tokens", **link), "Loss, after").value == "2.000"
    # where the model may be loaded, it is at once, and changes are answered at any token
    monkeypatch.setattr(what_if, "DEMO_MODEL", model)
    monkeypatch.setattr(what_if, "_MOMENT", 0.0)
    opened("tokens", **link | {"prompt": "1"})
    ready = worker.jobs()[0].request
    assert (ready.prompt_id, ready.edits, ready.model) == (1, "", model)
    worker._end(worker._jobs[2], JobOutcome("done"))
    again = worker.submit(job.request)
    worker._end(worker._jobs[again.job_id], JobOutcome("done", str(path)))
    opened("tokens", **link, token=str(rows["token_id"].iloc[3]))
    elsewhere = worker.jobs()[0].request
    assert (elsewhere.position, elsewhere.edits) == (3, link["edits"])
    asked = len(worker.jobs())
    monkeypatch.setattr("sys.argv", ["app.py", "--read-only", "--runs", str(runs)])
    app = opened("tokens", **link)
    assert tile(app, "Loss, after").value == "2.000"
    assert tile(app, "Tokens rerouted").value == str(n)
    assert "Which routing changed (share of a token's experts)" in titles(app)
    other = opened("tokens", **{**link, "edits": "forbid/1.0/3/all"})
    assert "Not available" in notes(other)
    assert len(worker.jobs()) == asked  # nothing else was asked for
    broken = opened("tokens", **{**link, "edits": "boil/1.0/2/all", "rule": "<b>"})
    assert "could not be followed" in notes(broken)
