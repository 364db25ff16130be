"""Reports: whole, self-contained, escaped, in both themes; and saved views."""

import html
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from synthetic import NASTY, write_run
from test_app_clusters import keep

from explorer import saved_views, writing
from explorer.__main__ import main
from explorer.commands import run_file
from explorer.errors import ExplorerError, NotAllowedError
from explorer.maps.data import Source
from explorer.report import build, build_report, write_report
from explorer.report.build import RUN_PAGES
from explorer.report.document import rich, section
from explorer.run import open_run
from explorer.ui import printing, theme

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "known.duckdb", level="attention")
    return folder


@pytest.fixture(scope="module")
def view(runs):
    return saved_views.save_view(
        runs,
        f"{NASTY} view",
        page="tokens",
        params={"run": "known", "prompt": "4", "layer": "1.0", "color": "pinned_weight"}
        | {"pins": ",".join(f"1.0.{expert}" for expert in range(6))},
        runs={"known": runs / "known.duckdb"},
        note=f"A note with {NASTY}",
        author="Ann <ann@example.org>",
    )


class Reader(HTMLParser):
    """Collects the tags of a file, and the texts of its scripts and its words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.words, self.inside = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = (tag, dict(attrs).get("type", ""))
            self.scripts += [[dict(attrs).get("type", ""), ""]] if tag == "script" else []

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.words += data
        elif self.inside[0] == "script":
            self.scripts[-1][1] += data


@pytest.fixture(scope="module")
def report(runs, view):
    return build_report(runs / "known.duckdb", view)


def test_a_report_loads_nothing_and_runs_only_its_own_scripts(report):
    read = Reader(report)
    loading = [(tag, at) for tag, at in read.tags if at.get("src") or tag in ("link", "iframe")]
    assert not loading
    run = [text for kind, text in read.scripts if kind == ""]
    assert len(run) == 2 and "plotly.js" in run[0][:200]
    (policy,) = (at["content"] for tag, at in read.tags if "http-equiv" in at)
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_texts_are_escaped_and_there(report):
    read = Reader(report)
    assert NASTY not in report
    assert f"{NASTY} view" in read.words and f"A note with {NASTY}" in read.words
    assert "Ann <ann@example.org>" in read.words
    # the prompt itself, token by token
    strip = report.split('<div class="strip"')[1].split("</div>")[0]
    assert html.escape(NASTY) in strip and 'dir="auto"' in strip
    assert len(re.findall('class="token[^"]* chosen"', strip)) == 1


def drawn(text):
    """Return the figures of a report as (light, dark)."""
    pairs = []
    for figure in (json.loads(text) for kind, text in Reader(text).scripts if kind):
        dark = json.loads(json.dumps(figure["light"]))
        for path, value in figure["changes"]:
            place = dark
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        pairs.append((figure["light"], dark))
    return pairs


def test_figures_are_there_in_both_themes_with_their_numbers(report):
    figures = drawn(report)
    assert figures
    for pair in figures:
        assert [len(figure["data"]) for figure in pair] == [len(pair[0]["data"])] * 2
        grounds = [figure["layout"]["template"]["layout"]["paper_bgcolor"] for figure in pair]
        assert grounds == ["#ffffff", "#0e1117"]
    assert "<summary>Table</summary>" in report


def test_a_figure_on_dark_ground_is_the_one_that_was_printed_there():
    light = {"data": [{"x": [1, 2], "marker": {"color": "a"}}, {"y": 1}], "layout": {"p": [1]}}
    dark = {"data": [{"x": [1, 2], "marker": {"color": "b"}}, {"y": 2, "z": 3}]}
    dark["layout"] = {"p": [1, 2]}
    block = {"kind": "figure", "alt": "", "light": json.dumps(light), "dark": json.dumps(dark)}
    text = section([block])
    assert drawn(text) == [(light, dark)]
    # numbers that are the same on both grounds are there once
    assert text.count("[1,2]") == 2


def test_coloured_tokens_are_there_in_both_themes(report):
    pairs = set(re.findall(r"--light:(#\w{6});--dark:(#\w{6})", report))
    hues = list(zip(theme.hues(False), theme.hues(True), strict=True))
    # one for each of the pinned experts
    assert pairs == set(hues[:6])
    assert re.search(r'class="token hued" style="--level:[^;]*;--light', report)


def test_a_report_says_where_it_is_from(report, runs, view):
    words = Reader(report).words
    with open_run(runs / "known.duckdb") as run:
        assert run.fingerprint in words
    assert "NoSuchForCausalLM" in words and "prompt = 4" in words
    assert view.created[:10] in words
    assert "Changed since" not in words


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The file that the command writes of a run without maps in the cache."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert main(["report", str(runs / "known.duckdb"), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def whole(written):
    return written.read_text(encoding="utf-8")


def test_a_report_of_a_run_has_the_topics_of_load_balance(whole):
    words = Reader(whole).words
    assert "Capacity limit" in words and "Balancedness over all layers" in words
    assert "Calibration coverage" in words


def test_a_report_begins_with_what_is_worth_knowing(whole):
    words = Reader(whole).words
    assert "each half needs 8" in words  # the same list as on the Overview, here of six prompts
    assert words.index("Worth knowing") < words.index("Dead experts")


def test_a_report_of_a_run_has_its_maps_and_says_which(whole):
    words = Reader(whole).words
    titles = [light["layout"]["title"]["text"] for light, _ in drawn(whole)]
    for unit in ("tokens", "prompts", "experts"):
        assert f"Clusters: {unit}" in words
        assert any(title.startswith(f"PCA of {unit}") for title in titles)
    assert (
        "Not worked out when this was printed: UMAP and clusters. The picture is the PCA" in words
    )
    assert not any(title.startswith("UMAP") for title in titles)


def test_a_report_has_the_map_that_somebody_had_made(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "RUN_PAGES", [page for page in RUN_PAGES if page[2] == "tokens"])
    path = runs / "known.duckdb"
    with open_run(path) as run:
        source = Source("tokens", "scores", run.sites[0].layer, run.sites[0].site)
    _, places = keep(path, source)
    text = build_report(path)
    ((light, _),) = drawn(text)
    assert light["layout"]["title"]["text"].startswith("UMAP of tokens")
    assert "Not worked out" not in Reader(text).words
    assert sum(len(trace["text"]) for trace in light["data"]) == len(places)


def test_a_report_says_what_changed_since_its_view_and_what_the_page_could_not_show(tmp_path):
    path = write_run(tmp_path / "known.duckdb", level="attention").path
    params = {"run": "known", "domain": "gone", "layer": "3.1"}
    view = saved_views.save_view(
        tmp_path, "z", page="overview", params=params, runs={"known": path}
    )
    path.unlink()
    write_run(path, level="attention", seed=1)
    words = Reader(build_report(path, view)).words
    assert "WarningChanged since the view was saved: known" in words
    assert "The page could not show domain = gone." in words
    assert "run = known, layer = 3.1" in words and "domain = gone, layer" not in words


def test_the_command_writes_a_whole_run_and_nothing_twice(runs, written, whole, capsys):
    for title in ("Overview", "Load balance", "Tokens", "Attention", "Flow", "Where this is from"):
        assert f"<h2>{title}</h2>" in whole
    assert main(["report", str(runs / "known.duckdb"), "--out", str(written)]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert written.read_text(encoding="utf-8") == whole
    assert {p.name for p in runs.iterdir()} <= {"known.duckdb", "views"}


def test_the_command_exports_counts(runs, tmp_path, capsys):
    out = tmp_path / "counts.duckdb"
    assert main(["export", str(runs / "known.duckdb"), "--out", str(out)]) == 2
    assert main(["export", str(runs / "known.duckdb"), "--out", str(out), "--counts-only"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with open_run(out) as run:
        assert run.counts_only


def test_a_run_is_meant_by_its_name_where_runs_lie(runs, tmp_path, monkeypatch):
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    assert run_file(Path("known")) == Path("runs/known.duckdb")
    for other in ("gone", "known.duckdb", "runs/known.duckdb", "../known"):
        assert run_file(Path(other)) == Path(other)
    Path("known").touch()
    assert run_file(Path("known")) == Path("known")


def test_a_report_is_refused_read_only(runs, tmp_path):
    writing.configure(writing.Policy(read_only=True))
    try:
        with pytest.raises(NotAllowedError):
            write_report(runs / "known.duckdb", tmp_path / "report.html")
        with pytest.raises(NotAllowedError):
            saved_views.save_view(runs, "x", page="tokens", params={}, runs={})
        with pytest.raises(NotAllowedError):
            saved_views.delete_view(runs, "0123456789")
    finally:
        writing.configure(writing.Policy())
    assert not list(tmp_path.iterdir()) and len(list((runs / "views").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**bold** and `code`", "<strong>bold</strong> and <code>code</code>"),
        (r"\*\*not\*\* \<b\>", "**not** &lt;b&gt;"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[a](javascript:alert(1))", "[a](javascript:alert(1))"),
        (":material/info: word", "word"),
    ],
)
def test_markdown_of_a_page_becomes_safe_html(text, shown):
    assert rich(text, inline=True) == shown


def test_what_is_missing_is_said_and_never_0():
    table = {
        **{"kind": "table", "columns": ["<a>"], "rows": [[None], [float("nan")], [0.0], ["<b>"]]},
        **{"total": 9, "alt": '"', "folded": True},
    }
    text = section([table])
    assert text.count('<td class="absent">–</td>') == 2 and ">0</td>" in text
    assert "&lt;a&gt;" in text and "&lt;b&gt;" in text and "first 4 of 9 rows" in text
    assert text.count("– = not recorded, or not defined there") == 1


def test_numbers_of_a_table_are_written_as_on_the_page():
    def page():
        import pandas as pd
        import streamlit as st

        number = st.column_config.NumberColumn
        st.dataframe(
            pd.DataFrame({"a": [12.345, None], "b": [1234, 5], "c": [0.5, 0.25], "d": [7, 8]}),
            column_config={
                "a": number("Share", format="%.1f%%"),
                "b": number("Count", format="localized"),
                "c": None,
            },
        )

    (found,) = printing._blocks(AppTest.from_function(page).run().main)
    block = {name: found[name] for name in ("columns", "numbers", "rows")}
    assert block == {
        "columns": ["Share", "Count", "d"],
        "numbers": [True, True, False],
        "rows": [["12.3%", "1,234", 7], [None, "5", 8]],
    }
    text = section([{"kind": "table", "total": 2, "alt": "", "folded": False, **block}])
    assert text.count('<th scope="col" class="number">') == 3
    assert '<td dir="auto" class="number">12.3%</td>' in text and "–" in text


def test_columns_keep_their_widths_and_fill_a_line_alone():
    blocks = [[{"kind": "text", "text": "a"}], [], [{"kind": "text", "text": "b"}]]
    text = section([{"kind": "row", "blocks": blocks, "weights": [0.8, 0.1, 0.2]}])
    assert re.findall(r"--weight:([\d.]+);--part:([\d.]+)", text) == [
        ("8.000", "1.000"),
        ("2.000", "0.250"),
    ]


def test_a_colour_that_is_none_stays_out():
    strip = {
        "kind": "strip",
        "texts": ["a"],
        "levels": [1],
        "hues": ['red"><script>'],
        "hints": [""],
    }
    assert "script" not in section([strip])
    assert 'class="token found' in section([strip | {"found": [True]}])


def test_a_view_comes_back_as_it_was_saved(runs, view):
    assert saved_views.load_view(runs, view.view_id) == view
    found, damaged = saved_views.list_views(runs)
    assert found == [view] and not damaged
    assert not saved_views.changed(view, runs)
    assert saved_views.changed(view, runs / "views") == ["known (gone)"]


def test_a_view_saved_before_contents_were_kept_still_opens(tmp_path, runs, view):
    known = json.loads((runs / "views" / f"{view.view_id}.json").read_text(encoding="utf-8"))
    del known["contents"]
    known["params"] |= {"slice": "gone", "comparison": "gone.1.comparison"}
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "0123456789.json").write_text(json.dumps(known))
    read = saved_views.load_view(tmp_path, "0123456789")
    assert read.contents == {} and saved_views.changed(read, runs) == []


def test_a_view_that_could_not_be_read_again_is_not_saved(tmp_path):
    for params in ({"run": "../known"}, {"run": "known", "runs": "x" * 20_000}):
        with pytest.raises(ExplorerError, match=r"cannot be kept|leads out"):
            saved_views.save_view(tmp_path, "x", page="trends", params=params, runs={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "names", [[], ["a"], ["a, b", "50%", "50%2C", "Größe <b>", ""]], ids=["none", "one", "odd"]
)
def test_names_come_back_from_one_value_of_an_address(names):
    value = saved_views.join(names)
    assert value and saved_views.split(value) == [name for name in names if name]


def test_a_fingerprint_sees_a_change_anywhere(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3_000_000))
    before = saved_views.fingerprint(path)
    for place in (0, 100_000, 1_500_000, 2_999_999):
        content = bytearray(3_000_000)
        content[place] = 1
        path.write_bytes(content)
        assert saved_views.fingerprint(path) != before


@pytest.mark.parametrize("view_id", ["", "../../etc", "0123456789", "0123456789.json", "Z" * 10])
def test_a_view_that_is_not_there_is_named(tmp_path, view_id):
    with pytest.raises(ExplorerError, match="There is no saved view"):
        saved_views.load_view(tmp_path, view_id)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 7},
        {"name": "x" * 81},
        {"params": {"run": 3}},
        {"params": ["run"]},
        {"fingerprints": {"../up": "0"}},
        {"params": {"run": "../secret/private"}},
        {"params": {"run": "known", "against": "/etc/private"}},
        {"params": {"run": "known", "runs": "known,..%2Fprivate"}},
        {"params": {"run": "known", "comparison": "../known.1.comparison"}},
        {"page": "../app"},
        {"contents": {"slice": 3}},
        {"contents": None},
        {"schema_version": 2},
        {"note": None},
        None,
    ],
)
def test_a_view_file_from_a_stranger_is_not_believed(tmp_path, runs, view, change):
    known = json.loads((runs / "views" / f"{view.view_id}.json").read_text(encoding="utf-8"))
    (tmp_path / "views").mkdir()
    path = tmp_path / "views" / "0123456789.json"
    path.write_text("[" * 5000 if change is None else json.dumps(known | change))
    with pytest.raises(ExplorerError, match="cannot be read"):
        saved_views.load_view(tmp_path, "0123456789")
    assert saved_views.list_views(tmp_path) == ([], ["0123456789"])


# ---- one part that fails, and the run that a view is of

BREAK = """
import explorer.pages.load_balance.figures as figures
def broken(*_, layer="", **__):
    raise {error}
figures.lorenz = broken
from explorer.ui.printing import main
main()
"""
# of one layer an error of the code, which may name places, of another one a message for readers
ERRORS = """{
    "1.0": ZeroDivisionError("of /home/ann/secret/x.duckdb"),
    "3.0": __import__("explorer").errors.RunError("No <b> here."),
}[layer]"""
SAID = {
    "Load balance": "Lorenz curve: this part could not be drawn (ZeroDivisionError: of x.duckdb).",
    "Load balance: layer 3.0": "Lorenz curve: No <b> here.",
}


def test_a_section_that_fails_is_named_and_the_others_are_there(
    runs, tmp_path, monkeypatch, capsys
):
    pages = [page for page in RUN_PAGES if page[0] in ("overview", "load-balance")]
    pages.append(("load-balance", {"layer": "3.0"}, "layer 3.0"))
    monkeypatch.setattr(build, "RUN_PAGES", pages)
    command = (sys.executable, "-c", BREAK.format(error=ERRORS))
    monkeypatch.setattr(build, "_PRINT", command)
    out = tmp_path / "report.html"
    assert main(["report", str(runs / "known.duckdb"), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    words = Reader(text).words
    warned = capsys.readouterr().err
    for title, said in SAID.items():
        assert f"{title}: {said}" in words  # at the top
        assert f"This section could not be made whole. {said}" in words
        assert f"warning: {title} could not be made whole: {said}" in warned
    assert warned.count("could not be made whole") == 2
    for title in ("Overview", "Load balance", "Load balance: serving", "Load balance: layer 3.0"):
        assert f"<h2>{title}</h2>" in text
    titles = [light["layout"]["title"]["text"] for light, _ in drawn(text)]
    # the other figures of the pages, before and after, and those of the other pages
    layers = [f"Load of the experts of layer {layer}" for layer in (1, 3)]
    for figure in (*layers, "Load by domain", "Load of every expert"):
        assert any(figure in title for title in titles)
    assert not any("Lorenz" in title for title in titles)
    assert "/home/ann" not in text and str(runs) not in text


def test_a_page_that_fails_as_a_whole_takes_no_other_one_down(runs, monkeypatch):
    pages = [page for page in RUN_PAGES if page[0] in ("overview", "load-balance")]
    monkeypatch.setattr(build, "RUN_PAGES", pages)
    breaks = BREAK.replace("pages.load_balance.figures as", "ui.state as")
    breaks = breaks.replace("lorenz", "balance_of")
    breaks = breaks.format(error="KeyError('gone')")
    monkeypatch.setattr(build, "_PRINT", (sys.executable, "-c", breaks))
    made = build.make_report(runs / "known.duckdb")
    assert made.failed == {
        "Overview": "Key figures: this part could not be drawn (KeyError: 'gone').",
        "Load balance": "KeyError: 'gone'",
    }
    titles = [light["layout"]["title"]["text"] for light, _ in drawn(made.text)]
    assert any("Load of every expert" in title for title in titles)
    assert any("Load of each GPU" in title for title in titles)


ENDS = """
import io, os, sys
asked = sys.stdin.read()
if "load-balance" in asked:
    os._exit(9)
sys.stdin = io.StringIO(asked)
from explorer.ui.printing import main
main()
"""


def test_a_page_that_ends_its_process_takes_no_other_one_down(runs, monkeypatch):
    pages = [page for page in RUN_PAGES if page[0] in ("overview", "load-balance")]
    monkeypatch.setattr(build, "RUN_PAGES", pages[:2])
    monkeypatch.setattr(build, "_PRINT", (sys.executable, "-c", ENDS))
    made = build.make_report(runs / "known.duckdb")
    assert list(made.failed) == ["Load balance"] and "The process that draws it ended" in made.text
    assert drawn(made.text)


def test_a_report_without_any_section_is_refused(runs, view, monkeypatch):
    monkeypatch.setattr(build, "_PRINT", (sys.executable, "-c", "raise SystemExit('no')"))
    with pytest.raises(ExplorerError, match=r"section Tokens failed: The process .* ended: no"):
        build_report(runs / "known.duckdb", view)


@pytest.fixture
def two_runs(runs, tmp_path):
    for name in ("a", "b"):
        shutil.copy(runs / "known.duckdb", tmp_path / f"{name}.duckdb")
    return tmp_path


@pytest.mark.parametrize("there", [True, False])
def test_a_report_of_a_view_is_of_its_run_or_refused(two_runs, there):
    path = {name: two_runs / f"{name}.duckdb" for name in "ab"}
    of_a = saved_views.save_view(
        two_runs, "x", page="overview", params={"run": "a"}, runs={"a": path["a"]}
    )
    against = saved_views.save_view(
        two_runs,
        "y",
        page="compare-runs",
        params={"run": "b", "against": "a"},
        runs=path,
    )
    if not there:
        path["a"].unlink()
        with pytest.raises(ExplorerError, match="shows runs that are gone: a"):
            build_report(path["b"], against)
    with pytest.raises(ExplorerError, match="is of the run a, not of b"):
        build_report(path["b"], of_a)
    if there:
        words = Reader(build_report(path["b"], against)).words
        assert f"a (fingerprint {saved_views.fingerprint(path['a'])})" in words
