"""Text is text: no page makes a link or a sign of what a run, a note or a comparison says."""

import io
import json
import re
import shutil
import sys
import unicodedata
from functools import partial
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from app_pages import opened
from browser import serve, visit
from synthetic import write_run
from test_app_compare import write_results

from explorer import saved_views, slices
from explorer.report.document import rich
from explorer.run import open_run
from explorer.text import one_line, plain, visible
from explorer.ui.chart import csv

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
of_figures, of_pages = visible, partial(visible, running=True)
# what Streamlit's Markdown makes something of, each beside the name that gives it away
PAYLOADS = (
    "http://evil.example/a",
    "HTTPS://evil.example",
    "www.evil.example",
    "eve@evil.example",
    "[l](http://evil.example)",
    "![i](http://evil.example/i.png)",
    "<http://evil.example>",
    "<b>evil</b>",
    ":material/skull:",
    ":skull:",
    ":streamlit:",
    ":red[evil]",
    ":red-badge[evil]",
    "a -> b",
    "a <- b",
    "a <-> b",
    "a -- b",
    "a >= b",
    "a ~= b",
    "$evil^2$",
    "**evil**",
    "_evil_",
    "~~evil~~",
    "`evil`",
)
EVIL = " ".join(PAYLOADS)
PAGES = sorted(path.parent.name for path in (ROOT / "explorer" / "pages").glob("*/page.py"))
PAGES = [page for page in PAGES if f'"{page}": (' in (ROOT / "app.py").read_text()]
LIVE = (
    *("http://", "HTTPS://", "www.", "eve@", "](", "<b>", ":material/skull", ":material_skull"),
    *(":skull:", ":streamlit:", ":red[", ":red-badge[", " -> ", " <- ", " <-> ", " -- ", " >= "),
    *(" ~= ", "$evil", "**evil", "_evil", "~~evil", "`evil"),
)
# not Markdown: code, figures, tables, and what a reader types
NOT_MARKDOWN = {
    *("code", "plotly_chart", "arrow_data_frame", "bidi_component", "text_input", "text_area"),
    *("dataframe", "selectbox", "multiselect", "html"),
}


def write_evil(folder):
    """Write two runs, a slice, a view and a comparison whose every text is a payload."""
    path = write_run(folder / "known.duckdb", level="attention").path
    with duckdb.connect(str(path)) as con:
        con.execute(
            "UPDATE packed.run SET model = $1, architecture = $1, dtype = $1, device = $1", [EVIL]
        )
        con.execute("UPDATE packed.prompt SET text = $1, source = $1", [EVIL])
        for table in ("prompt", "rollup", "gate_sum"):
            con.execute(f"UPDATE packed.{table} SET domain = $1 WHERE domain = 'law'", [EVIL])
        con.execute("UPDATE packed.token SET text = $1 WHERE text <> ''", [EVIL])
        con.execute("UPDATE packed.attention_layer SET kind = $1, reason = $1", [EVIL])
    shutil.copyfile(path, folder / "other.duckdb")
    with open_run(path) as run:
        slices.save_slice(
            run, "evil slice", [0, 2, 5, 20, 24], note=EVIL, author="eve@evil.example"
        )
    view = saved_views.save_view(
        folder,
        "a -> b :skull: www.evil.example",
        page="overview",
        params={"run": "known", "slice": "evil slice"},
        runs={"known": path},
        note=EVIL,
        author="eve@evil.example",
    )
    (folder / "views" / ":skull: www.evil.example.json").write_text("{")
    compared = write_results(folder)
    with duckdb.connect(str(compared)) as con:
        con.execute(
            "UPDATE comparison SET model = $1, dtype = $1, device = $1, fit_source = $1, "
            "report_source = $1, created_at = $1",
            [EVIL],
        )
        con.execute("UPDATE routers SET title = $1, summary = $1, paper = $1, fits = $1", [EVIL])
        for table in ("results", "routers"):
            con.execute(f"UPDATE {table} SET family = $1 WHERE family = 'literature'", [EVIL])
    return view


def markdown(message):
    """Yield every text of an element of a page, and of what is inside it."""
    for field, value in message.ListFields():
        if field.name in ("id", "element_id", "key", "form_id", "url_pathname", "query_string"):
            continue
        values = value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
        for one in values:
            if isinstance(one, str):
                yield one
            elif hasattr(one, "ListFields"):
                yield from markdown(one)


def texts(block):
    for child in block.children.values():
        if hasattr(child, "children"):
            yield from markdown(child.proto) if child.proto is not None else ()
            yield from texts(child)
        elif child.type not in NOT_MARKDOWN:
            yield from markdown(child.proto)


def shown_of_strangers(app, page):
    """Count the texts of strangers on a page; fail where Markdown or a figure reads one."""
    seen = 0
    for text in (text for block in (app.main, app.sidebar) for text in texts(block)):
        live = re.sub(r"\\.", "", text)  # a backslash takes the meaning of a sign away
        if "evil" in live or "skull" in live:
            assert not [sign for sign in LIVE if sign in live], (page, text)
            seen += 1
    for chart in app.get("plotly_chart"):
        # plotly reads some HTML, links among it; what it is told beside the figure it does not draw
        spec = json.loads(chart.proto.spec)
        spec["layout"].pop("meta", None)
        said = json.dumps(spec, ensure_ascii=False)
        assert "<b>evil" not in said and "<http" not in said, page
    return seen


def test_no_page_hands_a_text_of_a_stranger_to_markdown(runs):
    view = write_evil(runs)
    app = opened("overview", view=view.view_id)
    seen = {"banner": shown_of_strangers(app, "banner")}
    app.query_params["slice"] = "evil slice"
    for page in PAGES:
        app.switch_page(f"explorer/pages/{page}/page.py").run()
        assert not app.exception, page
        seen[page] = shown_of_strangers(app, page)
    assert all(seen[page] for page in ("banner", "overview", "attention", "compare", "share")), seen
    assert sum(seen.values()) > 20
    # what a link says is text too
    for name, value in (("run", EVIL), ("search", f"no {EVIL}")):
        assert shown_of_strangers(opened("overview", **{"run": "known", name: value}), name), name


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_escaped_text_is_itself_in_a_report(payload):
    html = rich(f"**{plain(payload)}** and {plain(payload, lines=True)}")
    shown = re.sub(r"<[^>]+>", "", html).replace("&lt;", "<").replace("&gt;", ">")
    assert shown.strip() == f"{payload} and {payload}"
    assert set(re.findall(r"<(\w+)", html)) == {"p", "strong"}


def test_lines_of_a_note_stay_lines():
    assert plain("a\n    b\nc", lines=True) == "a  \n&#32;   b  \nc"
    assert "\n" not in plain("a\n# b")
    assert plain("x\u202ey\u00ad") == "x⟦U\\+202E⟧y⟦U\\+00AD⟧"


def hidden_characters():
    """Return what Unicode calls a control, a format, a separator, private or not a character."""
    found = [
        code
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs") and code != 0x20
    ]
    # of other categories, yet without ink: Default_Ignorable_Code_Point, and blank symbols
    found += [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2065, 0x2800]
    found += [0x3164, *range(0xFE00, 0xFE10), 0xFFA0, *range(0xFFF0, 0xFFF9), 0x1D159]
    return [chr(code) for code in (*found, 0xE000, 0xE0001, 0xE01EF, 0xFFFE, 0x10FFFF)]


@pytest.mark.parametrize("visible", [of_pages, of_figures], ids=["pages", "figures"])
def test_no_character_without_ink_is_shown_as_it_is(visible):
    bare = [c for c in hidden_characters() if visible(c).replace("\n", "").replace("\t", "") == c]
    between = [c for c in hidden_characters() if c in visible(f"a{c}b") and c not in "\n\t"]
    assert not bare and not between


def test_pages_and_figures_mark_the_same_characters():
    codes = [
        *range(0x3000),
        *range(0xFE00, 0x10000),
        *range(0x1F300, 0x1F700),
        *range(0xE0000, 0xE0200),
    ]
    for code in codes:
        text = f"a{chr(code)}b"
        assert (of_pages(text) == text) == (of_figures(text) == text), f"U+{code:04X}"


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d💻",
        "☺\ufe0f",
        "3\ufe0f\u20e3",
        "👍\U0001f3fd",
        "\u0645\u06cc\u200c\u062e",
        "क्\u200dष",
        "e\u0301",
    ],
)
def test_what_shapes_its_neighbours_stays(text):
    assert of_pages(text) == of_figures(text) == text


def test_hidden_instructions_show_in_a_list():
    tags = "".join(chr(0xE0000 + ord(letter)) for letter in " Or not.")
    assert one_line("Be kind." + tags, 90).startswith("Be kind.⟦U+E0020⟧⟦U+E004F⟧")
    assert of_pages("\u0301") == "\u25cc\u0301"


def test_no_cell_of_a_csv_file_is_a_formula_or_ends_a_row():
    wild = [
        "=1+1",
        "+1+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        " =1",
        "＝1",
        "a\rb",
        "x\x00y",
        None,
    ]
    table = pd.DataFrame({"=name": wild, "change": [-1.5, *range(10)], "text": ["-5"] * 11})
    data = csv(table)
    assert b"\r" not in data and b"\x00" not in data
    read = pd.read_csv(io.BytesIO(data))
    assert read.columns.tolist() == ["'=name", "change", "text"]
    assert read["change"].tolist() == [-1.5, *range(10)] and read["text"].tolist() == [-5] * 11
    assert read["'=name"].tolist()[:5] == ["'=1+1", "'+1+1", "'-1+1", "'@SUM(A1)", "'\t=1"]
    assert read["'=name"].tolist()[5:10] == ["␍=1", "' =1", "'＝1", "a␍b", "x␀y"]
    # a category of texts is text too
    assert csv(pd.DataFrame({"a": pd.Categorical(["=x"])})) == b"a\n'=x\n"


SEEN = """() => {
  const all = (what) => Array.from(document.querySelectorAll(what), (element) => element.outerHTML);
  return {
    made: [
      ...all("a[href*='evil.example'], img[src*='evil.example'], .katex, [alt='Streamlit logo']"),
      ...all("[aria-label='skull icon']"),
      // a browser writes formulas of strangers into its own CSV files
      ...Array.from(document.querySelectorAll("[aria-label^='Download as CSV']"))
        .filter((button) => button.offsetParent).map((button) => button.ariaLabel),
    ],
    text: document.body.innerText,
  };
}"""
DRAWN = ("a → b", "a ← b", "a ↔ b", "a — b", "a ≥ b", "a ≈ b", "💀")


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_a_browser_makes_no_link_and_no_sign_of_a_text(tmp_path, page):
    """Compare what is drawn of each payload with the payload, where most texts are."""
    view = write_evil(tmp_path)
    places = [
        f"/?view={view.view_id}",
        *(f"/{page}?run=known&slice=evil+slice" for page in ("tokens", "compare", "share")),
    ]
    drawn = ""
    with serve(tmp_path) as url:
        for place in places:
            visit(page, url + place)
            seen = page.evaluate(SEEN)
            assert not seen["made"], place
            assert not [sign for sign in DRAWN if sign in seen["text"]], place
            drawn += seen["text"]
    for payload in PAYLOADS:
        assert payload in drawn, payload
