"""Every page through AppTest: with a run, without one, with a broken one, with bad links."""

import subprocess
import sys
import textwrap

import pytest
import streamlit as st
from synthetic import write_run

from explorer.pages import address, wording
from explorer.pages.components.visible import one_line, visible
from explorer.worker import Job, JobProgress, WorkerClient
from explorer.worker.client import ROOT

APP = str(ROOT / "app.py")
PAGES = ("overview", "tokens", "load_balance", "capture")


@pytest.fixture(scope="module", autouse=True)
def _close_runs():
    yield
    st.cache_resource.clear()


class FakeWorker(WorkerClient):
    """A worker that keeps what it is asked and never starts a process."""

    def __init__(self):
        super().__init__(["false"])

    def _start_next(self):
        """Leave every job in the queue."""


@pytest.fixture
def worker(monkeypatch):
    fake = FakeWorker()
    for module in ("shell", "components.job"):
        monkeypatch.setattr(f"explorer.pages.{module}.shared_worker", lambda: fake)
    monkeypatch.setattr("explorer.worker.shared_worker", lambda: fake)
    return fake


@pytest.fixture
def runs(tmp_path, monkeypatch, worker):
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder)])
    return folder


@pytest.fixture
def written(runs):
    return write_run(runs / "known.duckdb")


def opened(page="overview", **query):
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(APP, default_timeout=60)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    if page != "overview":
        for name, value in query.items():
            app.query_params[name] = value
        app.switch_page(f"explorer/pages/{page}.py").run()
    assert not app.exception, app.exception[0].stack_trace
    return app


def query(app, name):
    value = app.query_params[name]
    return value if isinstance(value, str) else value[0]


def charts(app):
    return [chart.proto for chart in app.get("plotly_chart")]


def notes(app):
    return " ".join(info.value.replace("\\", "") for info in app.info)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_with_a_run(written, page):
    app = opened(page)
    assert not app.error
    assert app.title[0].value


@pytest.mark.parametrize("level", ["stats", "scores"])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_at_other_levels(runs, page, level):
    write_run(runs / "other.duckdb", level=level)
    app = opened(page, expert="1")
    assert not app.error
    if (page, level) == ("tokens", "stats"):
        assert "--level ids" in notes(app)


@pytest.mark.parametrize("page", ["overview", "tokens", "load_balance"])
def test_without_a_run_the_demo_is_captured_once(runs, worker, page):
    opened(page)
    app = opened(page)
    assert "Nothing has been recorded yet" in app.markdown[0].value
    (job,) = worker.jobs()
    assert job.request.model == job.request.prompts == "demo"
    assert job.request.generate > 0
    assert job.request.out == str(runs / "demo.duckdb")


def test_a_failed_first_capture_shows_why_and_can_be_tried_again(runs, worker):
    opened()
    worker._jobs[1].state, worker._jobs[1].error = "failed", "Memory ran out."
    app = opened()
    assert "Memory ran out" in app.error[0].value.replace("\\", "")
    next(button for button in app.button if button.label == "Try again").click().run()
    assert [job.state for job in worker.jobs()] == ["queued", "failed"]


def test_the_progress_says_what_the_capture_says(runs, worker):
    opened()
    worker._jobs[1].state = "running"
    worker._handle(_report(message="about <b>44 MB</b>"))
    worker._handle(_report(tokens_done=5, tokens_total=10))
    app = opened()
    assert "about <b>44 MB</b>" in " ".join(c.value.replace("\\", "") for c in app.caption)


def _report(**values):
    report = JobProgress("recording", **values)
    return {"event": "progress", "job": 1, "progress": report._asdict()}


def test_a_broken_run_is_a_message_and_another_can_be_chosen(written, runs):
    (runs / "broken.duckdb").write_bytes(b"this is not a database" * 100)
    app = opened(run="broken")
    assert "broken" in app.error[0].value
    assert app.selectbox(key="address:run").options == ["broken", "known"]
    app.selectbox(key="address:run").set_value("known").run()
    assert not app.error
    assert app.metric


@pytest.mark.parametrize("name", ["../known", "/etc/passwd", "..%2Fknown", "known.duckdb", "<b>"])
def test_a_link_names_a_run_inside_the_folder_and_never_a_path(written, runs, name):
    write_run(runs.parent / "outside.duckdb")
    app = opened(run=name)
    assert name in notes(app)
    assert query(app, "run") == "known"


@pytest.mark.parametrize(
    ("page", "query", "named"),
    [
        ("overview", {"layer": "99"}, "layer"),
        ("overview", {"domain": "nowhere"}, "domain"),
        ("overview", {"phase": "dreamt"}, "phase"),
        ("overview", {"order": "random()"}, "order"),
        ("tokens", {"prompt": "77"}, "prompt"),
        ("tokens", {"prompt": "1e9"}, "prompt"),
        ("tokens", {"token": "99999999999999999999"}, "token"),
        ("tokens", {"color": "javascript:alert(1)"}, "colour"),
        ("tokens", {"expert": "600"}, "expert"),
        ("tokens", {"color": "pinned_weight", "pins": "1.0.1,9.9.9"}, "pinned"),
        ("load_balance", {"metric": "luck"}, "measure"),
        ("load_balance", {"factor": "9"}, "capacity factor"),
    ],
)
def test_bad_values_of_a_link_fall_back_with_a_note(written, page, query, named):
    app = opened(page, **query)
    assert named in notes(app) + " ".join(c.value for c in app.caption)
    assert not app.error


def test_key_figures_are_those_of_the_run(written):
    app = opened()
    values = {metric.label: metric.value for metric in app.metric}
    assert values["Tokens"] == f"{len(written.tokens):,}"
    idle = {
        (layer, site, e) for layer, site, _, n_experts, *_ in _sites() for e in range(n_experts)
    } - {
        (layer, site, e) for (_, layer, site), r in written.routes.items() for e, _ in r["experts"]
    }
    assert values["Dead experts"] == f"{len(idle)} of 16"
    assert {"Load entropy", "Gate entropy"} <= set(values)


def _sites():
    from synthetic import SITES

    return [(s.layer, s.site, s.module, s.n_experts, s.top_k) for s in SITES]


def test_filters_narrow_the_figures_and_are_in_the_link(written):
    app = opened()
    app.selectbox(key="address:domain").set_value("law").run()
    assert query(app, "domain") == "law"
    law = sum(token["domain"] == "law" for token in written.tokens)
    tile = next(m for m in app.metric if m.label == "Tokens")
    assert (tile.value, tile.delta) == (str(law), "of 2 prompts")


def test_a_link_reopens_the_same_view(written):
    first = opened("tokens", run="known", layer="3.1", prompt="4", color="margin")
    again = opened("tokens", **{name: query(first, name) for name in first.query_params})
    assert again.selectbox(key="address:prompt").value == "4"
    assert again.selectbox(key="address:layer").value == "3.1"
    assert [m.value for m in again.markdown] == [m.value for m in first.markdown]


def test_what_a_page_showed_is_there_again_after_a_visit_elsewhere(written):
    app = opened("tokens", prompt="4")
    app.switch_page("explorer/pages/load_balance.py").run()
    for name in list(app.query_params):
        del app.query_params[name]
    app.switch_page("explorer/pages/tokens.py").run()
    assert app.selectbox(key="address:prompt").value == "4"


def test_a_change_of_run_forgets_what_belonged_to_the_other(written, runs):
    write_run(runs / "second.duckdb")
    app = opened("tokens", run="known", prompt="4", layer="3.0")
    app.selectbox(key="address:run").set_value("second").run()
    assert not app.exception
    assert query(app, "run") == "second"
    assert app.selectbox(key="address:prompt").value != "4"


def test_the_sentence_names_the_recorded_experts(written):
    app = opened("tokens", prompt="0", token="2", layer="1.0")
    experts = written.routes[2, 1, 0]["experts"]
    sentence = next(m.value for m in app.markdown if m.value.startswith("In layer 1.0"))
    for expert, _ in experts:
        assert f"expert {expert}" in sentence
    assert "6 experts" in sentence


def test_scores_that_were_not_recorded_are_said_to_be_missing(runs):
    write_run(runs / "bare.duckdb", scored_every=0)
    app = opened("tokens", prompt="0", token="1")
    assert "not recorded for this token" in notes(app)
    assert "--level scores" in notes(app)


def test_tokens_of_an_expert_that_nobody_visited(written):
    app = opened("tokens", layer="1.0", expert="5")
    assert any("None of these tokens went to **L1.0.E5**" in m.value for m in app.markdown)


@pytest.mark.parametrize("page", ["overview", "tokens", "load_balance"])
def test_every_figure_has_alternative_text_and_a_table(written, page):
    app = opened(page, layer="1.0")
    drawn = charts(app)
    assert drawn
    assert all(chart.alt for chart in drawn)
    assert sum(e.label == "Table" for e in app.expander) == len(drawn)


@pytest.mark.parametrize("page", ["overview", "tokens", "load_balance"])
def test_no_untrusted_text_reaches_html_or_a_figure_unescaped(written, page):
    app = opened(page, prompt="4", layer="1.0", expert="0")
    for chart in charts(app):
        assert "<script" not in chart.spec
    assert not [m for m in app.markdown if m.allow_html and "<script" in m.value]


def test_capture_of_typed_prompts_is_handed_to_the_worker(written, runs, worker):
    app = opened("capture")
    assert app.button(key="start").disabled
    app.text_area(key="typed").set_value("<script>alert(1)</script>\nשלום").run()
    assert "2 prompts" in notes(app)
    app.button(key="start").click().run()
    (job,) = worker.jobs()
    assert [p["text"] for p in job.request.prompts] == ["<script>alert(1)</script>", "שלום"]
    assert job.request.out == str(runs / "mine.duckdb")
    assert query(app, "job") == "1"


@pytest.mark.parametrize("name", ["../up", "a/b", "", "known", "-x", "a b"])
def test_names_that_are_paths_or_taken_are_refused(written, worker, name):
    app = opened("capture")
    app.text_area(key="typed").set_value("Hello there").run()
    next(t for t in app.text_input if t.label == "Name of the run").set_value(name).run()
    assert app.button(key="start").disabled
    assert not worker.jobs()


def test_a_finished_capture_opens_its_run(written, runs, worker):
    app = opened("capture")
    app.text_area(key="typed").set_value("Hello there").run()
    app.button(key="start").click().run()
    write_run(runs / "mine.duckdb")
    job: Job = worker._jobs[1]
    job.state, job.path = "done", str(runs / "mine.duckdb")
    job.progress = JobProgress("done", 3, 3)
    app.run()
    next(b for b in app.button if b.label == "Open the run").click().run()
    assert not app.exception
    assert query(app, "run") == "mine"


def test_unfinished_files_can_be_recovered(written, runs, worker):
    (runs / "killed.duckdb.partial").write_bytes(b"x")
    app = opened("capture")
    app.button(key="recover killed.duckdb.partial").click().run()
    assert worker.jobs()[0].request.partial.endswith("killed.duckdb.partial")


def test_pages_import_neither_torch_nor_transformers(written, runs):
    script = f"""
    import sys
    sys.argv = ["app.py", "--runs", {str(runs)!r}]
    from streamlit.testing.v1 import AppTest
    app = AppTest.from_file({APP!r}, default_timeout=60).run()
    for page in {PAGES!r}:
        app.switch_page(f"explorer/pages/{{page}}.py").run()
        assert not app.exception, app.exception
    print(sorted({{"torch", "transformers"}} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "·"),
        (" a", " a"),
        ("  ", "  "),
        ("\n", "↵\n"),
        ("\u202e", "⟦U+202E⟧"),
        ("\u200d", "\u200d"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("<b>", "<b>"),
    ],
)
def test_tokens_are_shown_with_marks_for_what_is_invisible(text, shown):
    assert visible(text) == shown


def test_prompts_in_a_list_are_one_line():
    assert one_line("a\nb   c", 10) == "a b c"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"


def test_plain_text_has_no_markdown_left():
    assert address.plain("**[a](b)** :red[x] <b>") == (r"\*\*\[a\]\(b\)\*\* \:red\[x\] \<b\>")


def test_certainty_is_in_words():
    def say(entropy):
        return wording.certainty_sentence(
            normalized_entropy=entropy, margin=0.1, topk_mass=0.5, top_k=2
        )

    assert "was sure" in say(0.1)
    assert "hesitated" in say(0.8)
    assert "hardly any difference" in say(0.99)
    assert "not known" in say(float("nan"))
