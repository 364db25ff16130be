"""Pages of a run that another program recorded: what the trace lacks is said, never drawn as 0."""

import json
import sys
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from app_pages import charts, opened

from capture.traces import import_routing
from explorer.__main__ import main
from explorer.pages.compare_runs.two_sides import two_sides
from explorer.run import open_run
from explorer.ui.wording import unnamed

pytestmark = pytest.mark.slow

PAGES = (
    *("overview", "tokens", "experts", "load_balance", "attention", "flow", "clusters"),
    *("compare", "compare_runs", "trends", "share", "learn", "capture"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ids alone: no weights, scores, texts or vocabulary ids, and one gap."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    ids = [np.argsort(random.random((n, 3, 8)), -1)[..., :2].astype(np.int32) for n in (9, 14)]
    ids[0][4, 1] = 0
    import_routing(ids, folder / "traced.duckdb")
    steps = np.random.default_rng(1).integers(1, 90, (12, 3, 8))
    rows = [
        f"{step},{layer},{expert},{count}" for (step, layer, expert), count in np.ndenumerate(steps)
    ]
    table = folder / "counts.csv"
    table.write_text("\n".join(["step,layer,expert,count", *rows]))
    import_routing(table, folder / "counted.duckdb", top_k=2)
    return folder


@pytest.fixture(autouse=True)
def served(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(runs)])


def test_the_overview_says_where_it_is_from_and_what_it_lacks():
    app = opened("overview", run="traced")
    about = next(table.value for table in app.dataframe if "what" in table.value)
    said = about.set_index("what")["value"]
    assert said["Imported"] == (
        "from arrays: no scores, text or loss, no weights, so that slots are in no order, "
        "1 (token, layer) not recorded"
    )


def test_counts_say_what_they_are_and_lack():
    app = opened("overview", run="counted")
    about = next(table.value for table in app.dataframe if "what" in table.value)
    said = about.set_index("what")["value"]
    assert said["Imported"].startswith("from table of counts: sums only: no tokens, weights")
    assert said["Recorded"].endswith("as counts, in 12 steps of time")
    tokens = next(tile for tile in app.metric if tile.label == "Tokens")
    assert tokens.delta == "assignments over top k"
    assert any("imported from counts" in box.value for box in app.info)
    expert = opened("experts", run="counted")
    assert next(t.value for t in expert.metric if t.label == "Mean combine weight") == "–"
    assert any("does not name its model" in box.value for box in expert.info)


def test_counts_show_load_over_their_steps(runs):
    figures = [json.loads(c.spec) for c in charts(opened("load_balance", run="counted"))]
    over_steps = next(f for f in figures if "Load by step" in str(f["layout"]["title"]))
    assert len(b64decode(over_steps["data"][0]["y"]["bdata"])) == 12
    lines = json.loads(charts(opened("trends", run="counted"))[0].spec)
    with open_run(runs / "counted.duckdb") as run:
        for number, line in enumerate(lines["data"]):
            load = run.query(
                "SELECT step, max(assignments) / avg(assignments) AS worst FROM load_windows"
                " WHERE layer = $layer GROUP BY step ORDER BY step",
                {"layer": number},
            )
            assert np.frombuffer(b64decode(line["y"]["bdata"])).tolist() == pytest.approx(
                load["worst"].tolist()
            )


def test_placements_are_judged_on_windows_of_steps(runs, capsys):
    assert main(["place", str(runs / "counted.duckdb"), "--gpus", "2", "--windows", "4"]) == 0
    assert (
        "4 windows of consecutive forward passes, at level counts steps, 3 layers"
        in capsys.readouterr().out
    )


def test_experts_without_weights_are_equal_bars():
    app = opened("tokens", run="traced")
    route = json.loads(next(c.spec for c in charts(app) if "Experts by layer" in c.spec))
    assert "weights were not recorded" in str(route["layout"])
    assert "combine weight not recorded" in route["data"][0]["hovertemplate"]
    lengths = [b64decode(bar["x"]["bdata"]) for bar in route["data"]]
    assert [np.frombuffer(one).tolist() for one in lengths] == [[0.5] * 3] * 2
    assert any("sent this token to expert" in one.value for one in app.markdown)


def test_a_token_without_text_is_called_by_its_id_or_its_position():
    assert unnamed(7, 3) == "⟨7⟩"
    assert unnamed(pd.NA, 3) == unnamed(None, 3) == "⟨#3⟩"


@pytest.mark.parametrize("run", ["traced", "counted"])
@pytest.mark.parametrize("page", PAGES)
def test_no_page_fails_on_a_trace(page, run):
    app = opened(page, run=run)
    assert not app.error
    assert not any("nan" in str(tile.value).lower() for tile in app.metric)


def test_two_sides_of_one_text_are_compared(runs):
    """A trainer's rows of the same rollouts, one token late; only their order matches them."""
    random = np.random.default_rng(3)
    rollout = [np.argsort(random.random((n, 4, 16)), -1)[..., :2] for n in (30, 40)]
    trainer = [np.concatenate([one[:1], one[:-1]]) for one in rollout]
    for name, ids in (("rollout", rollout), ("trainer", trainer)):
        import_routing([one.astype(np.int32) for one in ids], runs / f"{name}.duckdb", n_experts=16)
    with open_run(runs / "rollout.duckdb") as a, open_run(runs / "trainer.duckdb") as b:
        sides = two_sides(a, b)
    assert (sides.matched_by, sides.sequences, sides.tokens) == ("their order", 2, 70)
    assert (sides.found.verdict, sides.found.shift) == ("shifted rows", -1)
    assert (sides.prompt_a, sides.position, sides.found.first) == (0, 1, (1, 0))
    app = opened("compare-runs", run="rollout", against="trainer", by="tokens")
    assert any("Looks like **shifted rows**: by 1 token" in text.value for text in app.markdown)
    tiles = {tile.label: tile for tile in app.metric}
    assert tiles["First difference"].delta == "token 1 of sequence 0"
    assert (tiles["Margin there"].value, tiles["Margin there"].delta) == ("–", "not recorded in A")
    for name in ("rollout", "trainer"):
        (runs / f"{name}.duckdb").unlink()


def test_sequences_are_matched_by_their_token_ids(tmp_path):
    """What one program calls a prompt is prompt and answer in the other."""
    tokens = [np.arange(9), np.arange(20, 32)]
    paths = []
    for order, n_prompt in (([0, 1], 4), ([1, 0], None)):
        outputs = [
            SimpleNamespace(
                prompt=None,
                prompt_token_ids=tokens[n][:n_prompt].tolist(),
                outputs=[
                    SimpleNamespace(
                        index=0,
                        token_ids=[] if n_prompt is None else tokens[n][n_prompt:].tolist(),
                        routed_experts=np.tile([[[n, 5]]], (len(tokens[n]) - 1, 2, 1)),
                    )
                ],
            )
            for n in order
        ]
        paths.append(tmp_path / f"{len(paths)}.duckdb")
        import_routing(outputs, paths[-1], n_experts=6)
    with open_run(paths[0]) as a, open_run(paths[1]) as b:
        sides = two_sides(a, b)
    assert (sides.matched_by, sides.tokens, sides.found.verdict) == ("token ids", 21, "same")


@pytest.mark.slow(seconds=5)
def test_a_trace_is_imported_on_the_page_capture(runs):
    app = opened("capture")
    app.segmented_control(key="what to do").set_value("Import routing").run()
    trace = (runs / "counts.csv").read_bytes()
    app.file_uploader(key="trace upload").set_value(("theirs.csv", trace, "text/csv")).run()
    assert any("**table of counts**: " in text.value for text in app.markdown)
    assert any("**It will not have** tokens and their experts" in t.value for t in app.markdown)
    assert any("Say how many experts a token visits" in box.value for box in app.info)
    app.number_input(key="trace top k").set_value(2).run()
    next(button for button in app.button if button.label == "Import").click().run()
    assert any("12 windows of time" in box.value for box in app.success), app.error
    (runs / "theirs.duckdb").unlink()
