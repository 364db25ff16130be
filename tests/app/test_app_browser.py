"""The app in a real headless Chromium, with real mouse and keyboard events."""

import gzip
import io
import re
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from browser import (
    OVER,
    SIZE,
    click_cell,
    faint,
    has_run_nothing,
    point_at,
    serve,
    settle,
    token,
    visit,
)
from pyarrow import parquet
from synthetic import NASTY

pytestmark = [pytest.mark.browser, pytest.mark.slow]


PINS = ",".join(f"1.0.{expert}" for expert in range(4))
# links of somebody else; the other pages are opened from there
LINKS = (
    "compare-runs?run=known&against=other&ids=same&layer=1.0",
    f"tokens?run=known&layer=1.0&color=pinned_weight&pins={PINS}",
)
PAGES = ("", "experts", "load-balance", "attention", "flow", "compare", "trends", "capture")
PAGES += ("learn", "share")
# where every text is read on its ground
READ = ("tokens", "load-balance", "compare")


@pytest.mark.usefixtures("compared")
def test_every_page_draws_in_both_themes_and_asks_no_other_server(address, new_page, theme):
    page = new_page(theme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for link in (*LINKS, *PAGES):
        path = link.partition("?")[0]
        if path == link:
            page.locator(f"[data-testid=stSidebarNav] a[href$='/{path}']").click()
            page.wait_for_url(re.compile(rf"^[^?]*/{path}\?.*run=known"))
            settle(page)
        else:
            visit(page, f"{address}/{link}")
        assert urlsplit(page.url).path == f"/{path}" and "run=known" in page.url
        has_run_nothing(page)
        ground = page.evaluate(
            "getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"
        )
        assert (ground == "rgb(255, 255, 255)") == (theme == "light"), path
        papers = page.evaluate(
            "[...document.querySelectorAll('.js-plotly-plot')]"
            ".map(p => p._fullLayout.paper_bgcolor)"
        )
        assert all((paper.lower() == "#ffffff") == (theme == "light") for paper in papers), path
        assert bool(papers) == (path not in ("capture", "share")), path
        assert path not in READ or faint(page) == [], path
    page.wait_for_load_state("networkidle")
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert len(asked) > 20 and hosts == {urlsplit(address).netloc}


def test_the_overview_fits_a_narrow_screen_and_the_question_mark_of_a_figure_leads_to_its_term(
    address, page
):
    page.set_viewport_size({"width": 400, "height": 900})
    visit(page, f"{address}/?run=known")
    # figures are moved aside, the page is not
    wide, shown, whole = page.evaluate("""() => {
        const plot = document.querySelector('[data-testid=stPlotlyChart] .main-svg');
        const box = plot.closest('[data-testid=stElementContainer]');
        box.scrollLeft = 1000;
        const main = document.querySelector('[data-testid=stMain]');
        return [plot.clientWidth, box.scrollLeft + box.clientWidth, main.scrollWidth];
    }""")
    assert wide >= 590 and abs(shown - wide) <= 12 and whole <= 400
    page.set_viewport_size(SIZE)
    page.get_by_role("link", name="?", exact=True).first.click()
    page.wait_for_url(re.compile("/learn.*term=load"))
    settle(page)
    page.get_by_text("Load", exact=True).first.wait_for()
    # the tour goes on
    page.get_by_role("button", name="Next").click()
    page.wait_for_url(re.compile("step="))
    settle(page)
    assert not page.locator("[data-testid=stException]").count() and not page.troubles


def test_a_placement_on_more_gpus_is_drawn_and_linked(address, page):
    visit(page, f"{address}/load-balance?run=large&layer=3")
    page.get_by_role("radio", name="Serving: GPUs and batches").click()
    page.wait_for_url(re.compile("topic=serving"))
    settle(page)
    page.wait_for_selector(".js-plotly-plot .plot-container")
    bars = "document.querySelector('.js-plotly-plot')._fullData[0].x.length"
    assert page.evaluate(bars) == 8
    page.get_by_test_id("stSelectbox").filter(has_text="GPUs").locator("input").click()
    page.get_by_role("option", name="16", exact=True).click()
    page.wait_for_url(re.compile("gpus=16"))
    settle(page)
    page.wait_for_function(f"{bars} === 16")


def test_a_click_on_a_cell_of_the_overview_leads_to_that_expert_and_on_to_a_prompt(address, page):
    visit(page, f"{address}/?run=known")
    click_cell(page, 3, 1)
    page.wait_for_url(re.compile("/experts.*id=3"))
    settle(page)
    assert "layer=3.0" in page.url
    page.get_by_role("heading", name="Tokens of L3.0.E3").wait_for()
    page.go_back()
    page.get_by_role("heading", name="Overview").wait_for()
    settle(page)
    assert "/experts" not in page.url
    click_cell(page, 3, 1)
    page.get_by_role("heading", name="Tokens of L3.0.E3").wait_for()
    settle(page)
    page.locator(".rows .row").first.click()
    page.wait_for_url(re.compile("/tokens.*token="))
    settle(page)
    page.locator(".token[aria-pressed=true]:focus").wait_for()


def test_a_click_on_a_cell_of_many_leads_to_that_expert(address, page):
    visit(page, f"{address}/?run=large")
    drawn = page.evaluate("document.querySelectorAll('.js-plotly-plot .point').length")
    assert drawn == 1
    click_cell(page, 41, 17)
    page.wait_for_url(re.compile("/experts.*id=41"))
    settle(page)
    page.get_by_role("heading", name="Tokens of L17.E41").wait_for()


def test_a_line_of_an_experts_tokens_leads_to_its_prompt(address, page):
    visit(page, f"{address}/tokens?run=known&layer=3.0&expert=3")
    page.set_viewport_size({"width": 1400, "height": 500})
    page.locator(".rows .row").nth(1).click()
    page.wait_for_url(re.compile("token="))
    assert "prompt=" in page.url
    settle(page)
    page.locator(".token[aria-pressed=true]:focus").wait_for()
    box = page.locator(".token[aria-pressed=true]").bounding_box()
    assert 0 <= box["y"] < 400


def test_a_click_on_a_cell_by_domain_leads_to_that_expert_in_that_domain(address, page):
    visit(page, f"{address}/load-balance?run=known&layer=1.0")
    page.get_by_text("Table", exact=True).nth(2).click()
    settle(page)
    page.get_by_test_id("stDataFrame").first.wait_for()
    click_cell(page, 2, 1, which=2)
    page.wait_for_url(re.compile("/experts.*domain=law"))
    assert "id=2" in page.url


def test_a_token_is_chosen_by_click_key_and_map_and_a_link_reopens_the_view(
    address, page, new_page
):
    visit(page, f"{address}/tokens?run=known&layer=1.0&prompt=0")
    token(page, " not").click()
    page.get_by_role("heading", name="Token 3: “ not”").wait_for()
    page.wait_for_url(re.compile("token=3"))
    settle(page)
    sentence = page.get_by_text(re.compile("^In layer 1.0 the router")).inner_text()
    other = new_page("dark")
    visit(other, page.url)
    assert other.get_by_text(re.compile("^In layer 1.0 the router")).inner_text() == sentence
    assert token(other, " not").get_attribute("aria-pressed") == "true"
    # with the keyboard
    assert page.locator(".strip .token[tabindex='0']").count() == 1
    token(page, " court").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name="Token 2: “ shall”").wait_for()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Token 0: “The”").wait_for()
    assert page.evaluate("document.activeElement !== document.body")
    # on the map
    click_cell(page, 4, 1)
    page.get_by_role("heading", name="Token 4:").wait_for()
    assert "layer=3.0" in page.url
    # each expert of the text has a colour, and its number below the token where it changes
    settle(page)
    assert re.fullmatch(r"\d+", page.locator(".strip .token").first.get_attribute("data-mark"))
    # the bar of an expert leads to it
    click_cell(page, 0, 0.1, which=1)
    page.wait_for_url(re.compile("/experts.*id="))


def test_a_change_of_page_keeps_filters_and_token_and_brings_back_the_prompt(address, page):
    visit(page, f"{address}/tokens?run=known&layer=3.0&prompt=4&token=20&domain=code")
    page.get_by_role("link", name="Attention").click()
    page.get_by_role("heading", name="Token 4: “ a”").wait_for()
    page.wait_for_url(re.compile("prompt=4"))
    page.get_by_role("link", name="This token on the Tokens page").click()
    page.wait_for_url(re.compile("/tokens.*token=20"))
    settle(page)
    page.get_by_role("link", name="Load balance").click()
    page.get_by_role("heading", name="Layer 3.0", exact=True).wait_for()
    assert "domain=code" in page.url
    page.get_by_role("link", name="Tokens").click()
    page.wait_for_url(re.compile("prompt=4"))
    assert "layer=3.0" in page.url


def hover(page, x, y, which):
    """Return what the hover over a cell says."""
    point_at(page, x, y, which)
    said = page.locator(".js-plotly-plot").nth(which).locator(".hoverlayer .hovertext").first
    said.wait_for()
    return said.text_content()


def test_heads_maps_and_heaviest_keys_are_shown_and_clicked_with_hostile_prompts(address, page):
    visit(page, f"{address}/attention?run=known&layer=1.0&prompt=4")
    page.get_by_role("heading", name="L1.H0, token by token").wait_for()
    for which in (1, 2):
        said = hover(page, 0.5, 0.5, which)
        assert "token 0" in said
        assert which == 1 or NASTY[:6] in said
        assert not page.locator(".hoverlayer script").count()
    assert token(page, NASTY).is_visible()
    click_cell(page, 1, 3)
    page.get_by_role("heading", name="L3.H1, token by token").wait_for()
    page.wait_for_url(re.compile("head=3.1"))
    settle(page)
    assert "layer=3.0" in page.url
    assert page.get_by_text("L3.H1 on the whole prompt").count()
    page.get_by_text("Heaviest keys", exact=True).click()
    page.wait_for_url(re.compile("show=keys"))
    settle(page)
    said = hover(page, 0, 0, 2)
    assert NASTY[:6] in said and "of its attention" in said
    assert not page.locator(".hoverlayer script, .hoverlayer b").count()
    assert not page.troubles


def test_a_click_on_a_map_or_on_a_bar_of_the_routing_strip_chooses_the_token(address, page):
    visit(page, f"{address}/attention?run=known&layer=1.0&head=1.2&prompt=0&token=1")
    # blocks of two tokens: the third row begins with token 4
    click_cell(page, 2.5, 4.5, which=1)
    page.get_by_role("heading", name="Token 4: “ rule”").wait_for()
    page.wait_for_url(re.compile("token=4"))
    token(page, " not").click()
    page.get_by_role("heading", name="Token 3: “ not”").wait_for()
    click_cell(page, 0.5, 2.5, which=2)
    page.get_by_role("heading", name="Token 2: “ shall”").wait_for()
    bar = page.locator(".js-plotly-plot").nth(2).locator(".barlayer .point path").nth(2)
    settle(page)
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    assert box["height"] > 10
    at = box["x"] + box["width"] / 2, box["y"] + box["height"] - 4
    page.mouse.move(*at)
    page.wait_for_function(OVER, arg=2)
    page.mouse.click(*at)
    page.get_by_role("heading", name="Token 3: “ not”").wait_for()


def test_a_click_on_a_cell_of_pairs_or_of_the_flow_shows_its_tokens_and_leads_to_one(address, page):
    visit(page, f"{address}/flow?run=known&layer=1.0")
    click_cell(page, 0, 1, which=2)
    page.get_by_role("heading", name="Tokens of L1.0.E1 with L1.0.E0").wait_for()
    settle(page)
    page.get_by_role("button", name="Close").click()
    page.wait_for_function("() => !location.search.includes('pair=')")
    click_cell(page, 1, 2, which=1)
    page.get_by_role("heading", name="Tokens of L1.0.E2 → L3.1.E1").wait_for()
    page.wait_for_url(re.compile("pair=flow.1.0.2.1"))
    settle(page)
    line = page.locator(".rows .row").first
    text = line.locator(".token").inner_text()
    line.click()
    page.wait_for_url(re.compile("/tokens.*token="))
    settle(page)
    assert page.locator(".token[aria-pressed=true]").inner_text().strip() == text.strip()


def test_hostile_prompts_are_text(address, page):
    visit(page, f"{address}/tokens?run=known&layer=1.0&prompt=4&expert=0")
    assert token(page, NASTY).is_visible()
    assert token(page, "⟦U+202E⟧").is_visible()
    assert not page.locator(".strip b, .strip script, .rows b, .rows script").count()
    token(page, NASTY).click()
    page.get_by_role("heading", name=f"Token 0: “{NASTY}”").wait_for()
    settle(page)
    assert not page.troubles


def test_typed_prompts_become_a_run_that_can_be_read(address, page, served_runs):
    lines = ["<script>alert(1)</script> <b>bold</b>", "שלום עולם, זה מבחן", "Emoji 🙂👩‍💻 end"]
    visit(page, f"{address}/capture")
    area = page.get_by_role("textbox", name=re.compile("^Prompts"))
    area.fill("\n".join(lines))
    area.press("Control+Enter")
    page.get_by_text("3 prompts").wait_for()
    start = page.get_by_role("button", name="Start capture")
    page.wait_for_function("() => !document.querySelector('.st-key-start button').disabled")
    start.click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Open the run").click(timeout=180_000)
    page.wait_for_url(re.compile("run=mine"))
    settle(page)
    for number, line in enumerate(lines):
        visit(page, f"{address}/tokens?run=mine&prompt={number}&layer=0")
        shown = page.locator(".strip").inner_text().replace("·", "")
        shown = shown.replace("⟦U+200D⟧", "\u200d")  # a token by itself, which would have no width
        assert shown == line
        assert page.locator(".strip").get_attribute("dir") == "auto"
        direction = page.locator(".strip").evaluate("strip => getComputedStyle(strip).direction")
        assert direction == ("rtl" if number == 1 else "ltr")
    assert not page.troubles
    assert (served_runs / "mine.duckdb").is_file()


def test_uploads_are_read_or_refused_and_a_capture_can_be_stopped(address, page):
    table = io.BytesIO()
    parquet.write_table(pa.table({"text": ["a", "b"], "domain": ["x", "x"]}), table)
    visit(page, f"{address}/capture")
    page.get_by_text("Upload a file").click()
    # each answer differs from the one before it
    for name, data, said in (
        ("two.txt", b"one\ntwo", "2 prompts"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', "3 prompts"),
        ("bad.jsonl", b'{"txt": 1}', "bad.jsonl"),
        ("chat.json.gz", gzip.compress(b'[{"role": "user", "content": "a"}]'), "chat.json.gz"),
        ("talk.json.gz", gzip.compress(b'{"messages": [{"role": "user", "content": "a"}]}'), "1 p"),
        (
            "table.csv",
            "text,domain\n<b>x</b>,law\n\u05e9\u05dc,code\n".encode(),
            "2 prompts of 2 domains",
        ),
        ("fake.parquet", b"not parquet", "fake.parquet"),
        ("rows.parquet", table.getvalue(), "2 prompts of 1 domain."),
    ):
        page.locator("input[type=file]").set_input_files(
            {"name": name, "mimeType": "application/octet-stream", "buffer": data}
        )
        message = "stAlert" if said == name else "stCaptionContainer"
        page.locator(f"[data-testid={message}]", has_text=said).first.wait_for()
        assert not page.locator("[data-testid=stException]").count()
    page.get_by_text("Demo prompts").click()
    page.wait_for_function("() => !document.querySelector('.st-key-start button').disabled")
    page.get_by_role("button", name="Start capture").click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_test_id("stMain").get_by_role("button", name="Stop").click()
    page.get_by_text("was stopped").wait_for(timeout=60_000)


def test_without_runs_a_sample_is_shown_until_the_demo_is_recorded(chromium, tmp_path):
    with serve(tmp_path / "empty") as url:
        page = chromium.new_page(viewport=SIZE)
        page.set_default_timeout(60_000)
        page.goto(f"{url}/Overview")  # as a person may type it
        page.locator(".js-plotly-plot").first.wait_for(timeout=60_000)
        assert "/?run=demo-sample" in page.url
        page.get_by_role("progressbar").wait_for(timeout=30_000)
        page.wait_for_url(re.compile(r"run=demo$"), timeout=240_000)
        page.get_by_text("Busiest expert").wait_for()
        settle(page)
        page.goto(f"{url}/LEARN/?run=demo&step=yours")
        assert page.url.startswith(f"{url}/learn?run=demo")
        page.frame_locator("iframe").locator(".token").first.wait_for()
        page.close()
