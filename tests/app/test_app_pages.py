"""Every page through AppTest: with a run, without one, with a broken one, with bad links."""

import gzip
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter

import duckdb
import pytest
from app_pages import APP, charts, notes, opened, query
from synthetic import IDLE, SITES, write_run

from capture.progress import Progress
from explorer.text import one_line, plain, visible
from explorer.ui import wording
from explorer.worker import Job
from explorer.worker.client import ROOT

pytestmark = pytest.mark.slow

PAGES = ("overview", "tokens", "experts", "load_balance", "attention", "flow", "capture")
SHOWN = PAGES[:-1]


@pytest.fixture
def written(runs):
    return write_run(runs / "known.duckdb")


def with_ids(folder):
    return write_run(folder / "known.duckdb")


def with_scores(folder):
    return write_run(folder / "known.duckdb", level="scores")


def with_attention(folder):
    return write_run(folder / "known.duckdb", level="attention")


def with_totals(folder):
    return write_run(folder / "known.duckdb", level="stats")


@pytest.fixture
def known(show):
    return show(with_ids)


@pytest.fixture
def attended(show):
    return show(with_attention)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_with_a_run(attended, page):
    app = opened(page, prompt="4", layer="1.0", expert="0")
    assert not app.error
    assert app.title[0].value
    drawn = charts(app)
    assert bool(drawn) == (page in SHOWN)
    # every figure has a text for those who do not see it, and a table
    assert all(chart.alt for chart in drawn)
    assert sum(e.label == "Table" for e in app.expander) == len(drawn)
    # no untrusted text reaches HTML or a figure unescaped
    assert not any("<script" in str(json.loads(chart.spec)) for chart in drawn)
    assert not [m for m in app.markdown if m.allow_html and "<script" in m.value]


@pytest.mark.parametrize("written", [with_totals, with_scores], ids=["stats", "scores"])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_at_other_levels(show, page, written):
    show(written)
    app = opened(page, expert="1")
    assert not app.error
    if (page, written) == ("tokens", with_totals):
        assert "--level ids" in notes(app)
    if page == "attention":
        assert "holds no attention maps" in notes(app)


@pytest.mark.parametrize("page", SHOWN)
def test_without_a_run_a_sample_is_shown_that_says_what_it_is(runs, worker, page):
    app = opened(page)
    assert query(app, "run") == "demo-sample" and not app.error
    assert "20 of its 162 demo prompts" in notes(app)
    assert not worker.jobs()  # what loads a model waits until the page is drawn


def test_the_demo_is_captured_behind_the_sample_and_takes_its_place(runs, worker):
    app = opened()
    app.run()
    opened()
    app.run()
    (job,) = worker.jobs()
    assert job.request.model == job.request.prompts == "demo"
    assert job.request.generate > 0
    assert job.request.level == "attention"
    assert job.request.out == str(runs / "demo.duckdb")
    worker._jobs[1].state = "running"
    worker._handle(1, Progress("recording", message="about <b>44 MB</b>"))
    worker._handle(1, Progress("recording", done=5, total=10))
    app.run()
    assert "about <b>44 MB</b>" in " ".join(c.value.replace("\\", "") for c in app.caption)
    worker._jobs[1].state, worker._jobs[1].error = "failed", "Memory ran out."
    app.run()
    assert "Memory ran out" in app.error[0].value.replace("\\", "")
    next(button for button in app.button if button.label == "Try again").click().run()
    assert [job.state for job in worker.jobs()] == ["queued", "failed"]
    write_run(runs / "demo.duckdb")
    worker._jobs[2].state, worker._jobs[2].path = "done", str(runs / "demo.duckdb")
    app.run()
    assert query(app, "run") == "demo" and "sample" not in notes(app)
    assert [path.name for path in runs.iterdir()] == ["demo.duckdb"]


def test_a_sample_with_a_slice_stays(runs, worker):
    app = opened()
    app.run()
    app.run()
    (runs / "demo-sample.slices").mkdir()
    write_run(runs / "demo.duckdb")
    worker._jobs[1].state, worker._jobs[1].path = "done", str(runs / "demo.duckdb")
    app.run()
    assert query(app, "run") == "demo"
    app = opened(run="demo-sample")
    assert query(app, "run") == "demo-sample" and "20 of its 162" in notes(app)


def test_a_broken_run_is_a_message_and_another_can_be_chosen(written, runs):
    (runs / "broken.duckdb").write_bytes(b"this is not a database" * 100)
    app = opened(run="broken")
    said = app.error[0].value.replace("\\", "")
    assert "expected at broken.duckdb" in said and str(runs) not in said
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
        (
            "overview",
            {"layer": "99", "domain": "nowhere", "phase": "dreamt", "order": "random()"},
            ["layer", "domain", "phase", "order"],
        ),
        (
            "tokens",
            {"prompt": "77", "token": "9" * 20, "color": "javascript:alert(1)", "expert": "600"},
            ["prompt", "token", "colour", "expert"],
        ),
        (
            "tokens",
            {"prompt": "1e9", "color": "pinned_weight", "pins": "1.0.1,9.9.9"},
            ["prompt", "pinned"],
        ),
        ("load_balance", {"metric": "luck", "factor": "9"}, ["measure", "capacity factor"]),
        (
            "attention",
            {"head": "1.1", "measure": "beauty", "prompt": "3"},
            ["head", "every head", "Attention was not recorded"],
        ),
        (
            "attention",
            {"head": "0.0", "prompt": "x<b>", "window": "100000"},
            ["head", "Attention was not recorded", "tokens shown"],
        ),
        (
            "attention",
            {"head": "<b>", "prompt": "0", "token": "9" * 20, "show": "all"},
            ["head", "token", "show"],
        ),
        ("flow", {"steps": "9", "flows": "100000"}, ["steps", "flows"]),
        ("flow", {"layer": "1.0", "pair": "flow.1.0.6.0"}, ["pair"]),
        ("flow", {"layer": "1.0", "pair": "flow.1.0.1e9.0"}, ["pair"]),
    ],
)
def test_bad_values_of_a_link_fall_back_with_a_note(attended, page, query, named):
    app = opened(page, **query)
    said = (notes(app) + captions(app)).lower()
    assert [word for word in named if word.lower() not in said] == []
    assert not app.error


def test_key_figures_are_those_of_the_run(known):
    app = opened()
    values = {metric.label: metric.value for metric in app.metric}
    assert values["Tokens"] == f"{len(known.tokens):,}"
    idle = {
        (layer, site, e) for layer, site, _, n_experts, *_ in _sites() for e in range(n_experts)
    } - {(layer, site, e) for (_, layer, site), r in known.routes.items() for e, _ in r["experts"]}
    assert values["Dead experts"] == f"{len(idle)} of 16"
    assert {"Load entropy", "Gate entropy"} <= set(values)


def _sites():
    from synthetic import SITES

    return [(s.layer, s.site, s.module, s.n_experts, s.top_k) for s in SITES]


def test_filters_narrow_the_figures_and_are_in_the_link(known):
    app = opened()
    app.selectbox(key="address:domain").set_value("law").run()
    assert query(app, "domain") == "law"
    law = sum(token["domain"] == "law" for token in known.tokens)
    tile = next(m for m in app.metric if m.label == "Tokens")
    assert (tile.value, tile.delta) == (str(law), "of 2 prompts")


def test_serving_is_a_topic_of_load_balance_that_links_to_a_placement_open(known):
    app = opened("load_balance")
    assert "Serving" not in [one.value for one in app.subheader]
    for more in ({"topic": "serving"}, {"gpus": "2"}):
        app = opened("load_balance", **more)
        assert app.subheader[0].value == "Serving"
    listed = app.dataframe[0].value
    assert len(listed) == 16 and listed["ratio"].is_monotonic_decreasing
    assert set(app.get("download_button")) == set()  # layers have several routers: no engine
    busiest = listed.iloc[0]
    loads = Counter(
        (layer, site, expert)
        for (_, layer, site), route in known.routes.items()
        for expert, _ in route["experts"]
    )
    place = (busiest["layer"], busiest["site"], busiest["expert_id"])
    assert busiest["assignments"] == loads[place]
    total = sum(n for at, n in loads.items() if at[:2] == place[:2])
    assert busiest["share"] == pytest.approx(100 * loads[place] / total)


def test_dead_experts_are_listed_and_the_busiest_one_is_named(known):
    app = opened("load_balance", topic="serving", hot="dead")
    dead = app.dataframe[0].value
    assert [tuple(row) for row in dead[["layer", "site", "expert_id"]].to_numpy()] == [IDLE]
    loads = Counter(
        (layer, site, expert)
        for (_, layer, site), route in known.routes.items()
        for expert, _ in route["experts"]
    )
    tile = next(one for one in opened().metric if one.label == "Busiest expert")
    layer, expert = re.fullmatch(r"L([\d.]+)\.E(\d+)", tile.delta.partition(";")[0]).groups()
    place = tuple(int(n) for n in layer.split("."))
    of_layer = {at[2]: n for at, n in loads.items() if at[:2] == place}
    assert of_layer[int(expert)] == max(of_layer.values())


def test_a_limit_ends_where_its_text_says(known):
    app = opened("load_balance", batches="generated")
    said = next(one.value for one in app.markdown if "nothing is dropped" in one.value)
    end = re.search(r"factor ([\d.]+) on nothing", said)[1]
    slider = app.select_slider(key="address:factor")
    assert slider.options[-1] == end and query(app, "batches") == "generated"
    curve = next(json.loads(c.spec) for c in charts(app) if "capacity limit" in c.spec)
    assert curve["layout"]["meta"]["filters"]["phase"] == "generated"


def test_memory_is_a_topic_with_caches_drafts_and_calibration(known):
    app = opened("load_balance", topic="memory")
    assert "several routers" in " ".join(one.value for one in app.info)
    (table,) = (one.value for one in app.dataframe if "more_texts" in one.value)
    load = Counter(
        (layer, site, expert)
        for (_, layer, site), route in known.routes.items()
        for expert, _ in route["experts"]
    )
    assert table["tokens"].tolist() == sorted(
        load.get((s.layer, s.site, e), 0) for s in SITES for e in range(s.n_experts)
    )


def test_a_number_of_clusters_is_no_choice_of_a_placement(known):
    app = opened("clusters", groups="6")
    app.switch_page("explorer/pages/load_balance/page.py").run()
    assert "Serving" not in [one.value for one in app.subheader]


def test_other_gpus_put_what_depends_on_them_back(known):
    app = opened("load_balance", topic="serving", layer="1.0")
    slider = app.select_slider(key="address:replicas")
    slider.set_value(slider.options[0].split(" ")[0]).run()
    assert query(app, "replicas")
    app.selectbox(key="address:gpus").select("2").run()
    assert query(app, "gpus") == "2" and "replicas" not in app.query_params
    assert "The link asks" not in notes(app)


def test_a_jump_to_another_run_leaves_the_choices_of_the_first(written, runs):
    write_run(runs / "other.duckdb", seed=5)
    app = opened("tokens", run="known", prompt="1", domain="law")
    app.switch_page("explorer/pages/compare_runs/page.py").run()
    there = {"run": "other", "layer": "1.0", "id": "2", "about": "expert"}
    app.session_state["jump to"] = ("explorer/pages/experts/page.py", there)
    app.run()
    assert query(app, "run") == "other" and query(app, "id") == "2"
    assert "domain" not in app.query_params
    app.switch_page("explorer/pages/tokens/page.py").run()
    assert query(app, "run") == "other" and "prompt" not in app.query_params


def test_a_link_reopens_the_same_view(known):
    first = opened("tokens", run="known", layer="3.1", prompt="4", color="margin")
    again = opened("tokens", **{name: query(first, name) for name in first.query_params})
    assert again.selectbox(key="address:prompt").value == "4"
    assert again.selectbox(key="address:layer").value == "3.1"
    assert [m.value for m in again.markdown] == [m.value for m in first.markdown]


def test_what_a_page_showed_is_there_again_after_a_visit_elsewhere(known):
    app = opened("tokens", prompt="4")
    app.switch_page("explorer/pages/load_balance/page.py").run()
    for name in list(app.query_params):
        del app.query_params[name]
    app.switch_page("explorer/pages/tokens/page.py").run()
    assert app.selectbox(key="address:prompt").value == "4"


def test_a_change_of_run_forgets_what_belonged_to_the_other(written, runs):
    write_run(runs / "second.duckdb")
    app = opened("tokens", run="known", prompt="4", layer="3.0")
    app.selectbox(key="address:run").set_value("second").run()
    assert not app.exception
    assert query(app, "run") == "second"
    assert app.selectbox(key="address:prompt").value != "4"


def test_the_sentence_names_the_recorded_experts(known):
    app = opened("tokens", prompt="0", token="2", layer="1.0")
    experts = known.routes[2, 1, 0]["experts"]
    sentence = next(m.value for m in app.markdown if m.value.startswith("In layer 1.0"))
    for expert, _ in experts:
        assert f"expert {expert}" in sentence
    assert "6 experts" in sentence


def test_scores_that_were_not_recorded_are_said_to_be_missing(runs):
    write_run(runs / "bare.duckdb", scored_every=0)
    app = opened("tokens", prompt="0", token="1")
    assert "not recorded for this token" in notes(app)
    assert "--level scores" in notes(app)


def test_tokens_of_an_expert_that_nobody_visited(known):
    app = opened("tokens", layer="1.0", expert="5")
    assert any("None of these tokens went to **L1.0.E5**" in m.value for m in app.markdown)


def captions(app):
    return " ".join(caption.value.replace("\\", "") for caption in app.caption)


def sentence(app, words):
    return next(m.value for m in app.markdown if words in m.value)


def test_a_run_without_attention_says_how_to_record_it_and_leads_to_the_capture_page(known):
    app = opened("attention")
    assert "--level attention" in notes(app)
    assert not charts(app)
    (link,) = app.get("page_link")
    assert link.proto.page == "capture"


def test_layers_without_a_map_are_labelled_with_their_mixer(attended):
    app = opened("attention")
    assert "mixed by MambaMixer: 1 of 4 layers" in captions(app)
    assert "MambaMixer: no attention map" in charts(app)[0].spec
    assert "not an explanation" in captions(app)


def test_the_head_of_a_link_is_the_one_that_is_shown(attended):
    app = opened("attention", head="3.1", prompt="4", token="20", layer="1.0")
    assert "L3.H1 on the whole prompt" in charts(app)[1].spec
    keys = attended.keys[20, 3, 1]
    said = sentence(app, "lets this token look most at")
    assert "**L3.H1**" in said and f"**{keys[0][1]:.0%}**" in said
    assert f"{len(keys)} heaviest keys hold {sum(w for _, w in keys):.0%}" in said


def test_keys_that_share_experts_are_counted_against_chance(attended):
    app = opened("attention", head="1.0", prompt="4", token="23", layer="1.0")
    first = min(t["token_id"] for t in attended.tokens if t["prompt_id"] == 4)
    mine = {expert for expert, _ in attended.routes[23, 1, 0]["experts"]}
    counted = [key for key, _ in attended.keys[23, 1, 0] if key not in (23, first)]
    sharing = [
        key for key in counted if mine & {e for e, _ in attended.routes[key, 1, 0]["experts"]}
    ]
    said = sentence(app, "share an expert with it")
    assert f"**{len(sharing)} of {len(counted)}**" in said and "same distances" in said
    table = next(f.value for f in app.dataframe if "shared" in f.value.columns)
    assert table["position"].tolist() == [key - first for key, _ in attended.keys[23, 1, 0]]


def test_the_filter_of_the_phase_is_said_not_to_apply_to_attention(attended):
    app = opened("attention", phase="generated")
    assert "does not apply" in captions(app)
    assert (
        app.selectbox(key="address:prompt").options
        == opened("attention").selectbox(key="address:prompt").options
    )


def test_the_domain_narrows_the_prompts_with_attention(attended):
    app = opened("attention", domain="code")
    assert [option[0] for option in app.selectbox(key="address:prompt").options] == ["1", "4"]
    assert "mean over 2 prompts" in charts(app)[0].spec


def test_attention_of_a_run_without_expert_ids_is_shown_without_them(runs):
    path = write_run(runs / "bare.duckdb", level="attention").path
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE packed.run SET level = 'stats'")
    app = opened("attention")
    assert "needs the experts of every token" in notes(app)
    assert len(charts(app)) == 3


def test_a_pair_of_a_link_shows_its_tokens(attended):
    both = attended.transitions(1, 0, 3, 1)
    (a, b), count = max(both.items(), key=lambda item: item[1])
    app = opened("flow", layer="1.0", pair=f"flow.1.0.{a}.{b}")
    assert any(f"Tokens of L1.0.E{a} → L3.1.E{b}" in h.value for h in app.subheader)
    assert f"**{count}** of the counted tokens" in sentence(app, "counted tokens")
    assert f"{count:,} of {count:,} tokens, those" in captions(app)
    app.button(key="close pair").click().run()
    assert not any("Tokens of L1.0" in heading.value for heading in app.subheader)


def test_flow_within_a_layer_counts_the_filtered_tokens(attended):
    app = opened("flow", layer="1.0", domain="law", pair="together.1.0.0.1")
    law = {t["token_id"] for t in attended.tokens if t["domain"] == "law"}
    count = sum(
        {0, 1} <= {expert for expert, _ in attended.routes[token, 1, 0]["experts"]} for token in law
    )
    assert f"**{count}** of the counted tokens" in sentence(app, "counted tokens")
    assert all("domain law" in chart.spec for chart in charts(app))


def test_the_last_layer_shows_the_step_that_leads_to_it(attended):
    app = opened("flow", layer="3.1")
    assert "the step that leads to it" in captions(app)
    assert "one expert per token" in notes(app)


def test_flow_without_pairs_and_ids_says_what_to_do(runs):
    write_run(runs / "bare.duckdb", level="stats")
    app = opened("flow")
    assert "--level ids" in notes(app)


def test_a_pair_of_another_layer_is_no_mistake_of_the_link(attended):
    app = opened("flow", layer="1.0", pair="together.3.0.0.1")
    assert not notes(app).count("names a pair")
    assert not any("Tokens of" in heading.value for heading in app.subheader)


def test_level_attention_is_captured_with_its_options(known, worker):
    app = opened("capture")
    app.text_area(key="typed").set_value("One\nTwo").run()
    app.session_state["level choice"] = "attention"
    app.run()
    assert "attention of 2 prompts" in notes(app)
    app.number_input(key="attention prompts").set_value(7)
    app.number_input(key="attention every").set_value(2)
    app.text_input(key="attention layers").set_value("0, x").run()
    assert app.button(key="start").disabled
    app.text_input(key="attention layers").set_value("5, 0 5").run()
    app.button(key="start").click().run()
    (job,) = worker.jobs()
    request = job.request
    assert (request.level, request.attention_prompts, request.attention_every) == (
        "attention",
        7,
        2,
    )
    assert (request.attention_layers, request.attention_heads) == ([0, 5], None)


def test_other_levels_do_not_ask_about_attention(known):
    app = opened("capture")
    app.text_area(key="typed").set_value("One").run()
    assert not [n for n in app.number_input if "attention" in n.label.lower()]
    assert "attention of" not in notes(app)


def test_a_run_of_an_older_schema_says_how_to_convert_it(runs):
    data = ROOT / "tests" / "data" / "run_v1.duckdb.gz"
    (runs / "old.duckdb").write_bytes(gzip.decompress(data.read_bytes()))
    app = opened("attention")
    assert "python -m capture migrate" in app.error[0].value.replace("\\", "")


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
def test_names_that_are_paths_or_taken_are_refused(known, worker, name):
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
    job.progress = Progress("done", 3, 3)
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
        app.switch_page(f"explorer/pages/{{page}}/page.py").run()
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
        ("\u200d", "⟦U+200D⟧"),
        ("\u0645\u200c\u0646", "\u0645\u200c\u0646"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("<b>", "<b>"),
    ],
)
def test_tokens_are_shown_with_marks_for_what_is_invisible(text, shown):
    assert visible(text, running=True) == shown


def test_prompts_in_a_list_are_one_line():
    assert one_line("a\nb   c", 10) == "a b c"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"
    assert one_line("\n" * 500 + "  hello", 10) == "hello"
    assert one_line("a" + " " * 500 + "b", 10) == "a…"


def test_plain_text_has_no_markdown_left():
    assert plain("**[a](b)** :red[x] <b>") == (r"\*\*\[a\]\(b\)\*\* \:red\[x\] \<b\>")


def test_certainty_is_in_words():
    def say(entropy):
        return wording.certainty_sentence(
            normalized_entropy=entropy, margin=0.1, topk_mass=0.5, n_experts=8, top_k=2
        )

    assert "was sure" in say(0.1)
    assert "hesitated" in say(0.8)
    assert "hardly any difference" in say(0.99)
    assert "not known" in say(float("nan"))
