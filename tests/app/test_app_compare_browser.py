"""The pages that compare, in a headless Chromium: routers, two runs, checkpoints."""

import re

import pytest
from browser import click_cell, has_run_nothing, settle, token, visit
from synthetic import NASTY, write_run
from test_app_compare import write_results

from explorer.comparison.results_file import open_comparison, write_comparison

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# a file name is text from somebody else, too
EVIL = "step_5 <img src=x onerror=alert(1)> <b>x<"
OURS = "top_k(k=1)"


@pytest.fixture(autouse=True)
def _compared(compared):
    """Let the app show what is compared."""


def write_compared(folder):
    """Write two recordings of one model, two checkpoints, and a comparison of the known run."""
    write_run(folder / "plain.duckdb")
    # with this seed, the first token of prompt 4 is in both
    write_run(folder / "other.duckdb", seed=11)
    for step in (10, 200):
        write_run(folder / f"step_{step}.duckdb", seed=step)
    write_run(folder / f"{EVIL}.duckdb", seed=7)
    path = write_results(folder)
    with open_comparison(path) as found:
        rows = found.records()
    for row in rows["routers"]:
        row |= {"title": f"Title of {row['router']}", "summary": NASTY, "paper": "<b>paper</b>"}
    for number, row in enumerate(rows["results"]):
        row["agreement"] = 0.9 - 0.2 * number
    rows["results"] += [
        row | {"mode": "live-layer", "layer": layer, "loss_change": 0.1 * layer}
        for row in rows["results"][:3]
        for layer in (1, 3)
    ]
    rows["texts"][0]["text"] = NASTY
    write_comparison(path, rows)


def shown(page, which=0):
    """Return the title of a figure's horizontal axis and the numbers of its first trace."""
    return page.evaluate(
        "which => { const plot = document.querySelectorAll('.js-plotly-plot')[which];"
        " return [plot._fullLayout.xaxis.title.text, plot._fullLayout.title.text,"
        " Array.from(plot._fullData[0].x), Array.from(plot._fullData[0].y)]; }",
        which,
    )


def choose(page, label):
    """Press a button of a segmented control."""
    page.get_by_role("radio", name=label, exact=True).click()


# --- routers ------------------------------------------------------------------------------------


def test_a_point_and_the_box_of_a_row_of_the_table_show_the_card_of_their_router(address, page):
    visit(page, f"{address}/compare?run=known&axis=flops_ratio&controls=hidden")
    page.get_by_text(f"Title of {OURS}").wait_for()
    click_cell(page, 0.5, -0.5)
    page.get_by_text("Title of peeks<script>").wait_for()
    page.wait_for_url(re.compile("router=peeks"))
    settle(page)
    assert not page.get_by_text(f"Title of {OURS}").count()
    assert page.get_by_text(NASTY).count() == 2  # the summary, and the text under two routers
    table = page.get_by_test_id("stDataFrame").first
    table.scroll_into_view_if_needed()
    # the first column holds the boxes, 35 pixels a row; the first row is the own router
    table.click(position={"x": 18, "y": 35 + 35 / 2})
    page.wait_for_url(re.compile("router=native"))
    settle(page)
    assert not page.get_by_text(f"Title of {OURS}").count()
    assert not page.get_by_text("Title of peeks<script>").count()
    has_run_nothing(page)


def test_texts_layers_and_the_axis_of_the_front_are_chosen_on_one_page(address, page):
    visit(page, f"{address}/compare?run=known")
    page.get_by_text("Token 1: loss").wait_for()
    assert token(page, NASTY).is_visible()
    token(page, " that").click()
    page.get_by_text("Token 2: loss").wait_for()
    page.wait_for_url(re.compile("at=2"))
    settle(page)
    assert token(page, " that").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Go to the first divergence").click()
    page.get_by_text("Token 1: loss").wait_for()
    page.locator(".token[aria-pressed=true]:focus").wait_for()
    page.get_by_text(f"Title of {OURS}").wait_for()
    # what wears a badge is marked where there is no room for badges
    rows = page.evaluate(
        "document.querySelectorAll('.js-plotly-plot')[1]._fullLayout.yaxis.ticktext"
    )
    assert rows[2].endswith("†") and not rows[0].endswith("†")
    page.get_by_text("† not causal").wait_for()
    click_cell(page, 0, 2, which=1)
    page.get_by_text("Title of peeks<script>").wait_for()
    axis, _, first, _ = shown(page)
    assert axis.startswith("FLOPs a token") and 0.6 in first
    choose(page, "Agreement")
    page.wait_for_url(re.compile("axis=agreement"))
    settle(page)
    axis, _, second, _ = shown(page)
    assert axis.startswith("agreement") and 0.7 in [round(x, 6) for x in second]
    has_run_nothing(page)


def test_typed_prompts_are_recorded_and_compared_by_the_real_model(address, page, compared):
    lines = [
        *("The cat sat on the mat.", "A court shall hear the case.", "In the beginning was light."),
        *("def add(a, b): return a + b", f"{NASTY} is text."),
    ]
    visit(page, f"{address}/compare?run=other")
    choose(page, "Typed prompts")
    area = page.get_by_label("Prompts, one a line")
    area.fill("\n".join(lines))
    area.press("Control+Enter")
    routers = page.get_by_role("textbox", name="With arguments")
    routers.fill(OURS)
    routers.press("Enter")
    page.get_by_text("Measure time").click()
    settle(page)
    # as few tokens to fit on as there can be
    for _ in range(2):
        page.locator(".st-key-compare-tokens").get_by_role("slider").press("ArrowLeft")
        settle(page)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Open compared").click(timeout=240_000)
    page.wait_for_url(re.compile("run=compared"))
    page.get_by_role("heading", name="A router's card").wait_for()
    settle(page)
    (path,) = compared.glob("compared.*.comparison")
    with open_comparison(path) as found:
        live = found.table[(found.table["mode"] == "live") & (found.table["router"] == OURS)]
    change = live["loss_change"].iloc[0]
    changes = page.evaluate(
        "document.querySelector('.js-plotly-plot')._fullData.filter("
        "t => t.mode.includes('markers')).flatMap(t => Array.from(t.y))"
    )
    assert min(abs(y - change) for y in changes) < 1e-9
    has_run_nothing(page)


# --- two runs -----------------------------------------------------------------------------------


def test_cells_of_two_runs_lead_to_the_expert_of_a_run_and_ids_mean_nothing_where_unrelated(
    address, page
):
    visit(page, f"{address}/compare-runs?run=plain&against=other&ids=same")
    click_cell(page, 2, 1)
    page.wait_for_url(re.compile("/experts.*id=2"))
    assert "layer=3.0" in page.url and "run=plain" in page.url
    page.get_by_role("heading", name="Tokens of L3.0.E2").wait_for()
    page.go_back()
    page.wait_for_url(re.compile("/compare-runs"))
    settle(page)
    click_cell(page, 1, 0, which=2)
    page.wait_for_url(re.compile("/experts.*run=other"))
    page.get_by_role("heading", name="Tokens of L1.0.E1").wait_for()
    has_run_nothing(page)
    # the two runs again, not the one that was just opened beside the newest
    page.go_back()
    page.wait_for_url(re.compile("/compare-runs.*run=plain&against=other"))
    settle(page)
    assert "run=plain&against=other" in page.url
    choose(page, "Token by token")
    page.get_by_text("The same tokens in both runs", exact=True).first.wait_for()
    choose(page, "Unrelated")
    page.get_by_text("Do the models route the same stretches").wait_for()
    page.wait_for_url(re.compile("ids=unrelated"))
    settle(page)
    titles = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].map(p => p._fullLayout.title.text)"
    )
    assert not any("Where the load went" in title for title in titles)
    before = shown(page)
    choose(page, "Loss")
    page.wait_for_url(re.compile("quantity=loss"))
    settle(page)
    after = shown(page)
    assert "nats" in after[0] and "nats" not in before[0] and after[2] != before[2]


def test_the_tokens_of_two_runs_are_picked_in_a_prompt_of_both(address, page):
    visit(page, f"{address}/compare-runs?run=plain&against=other&ids=same&shared=4")
    token(page, NASTY).click()
    page.get_by_text(re.compile("^Token 0: Jaccard")).wait_for()
    page.wait_for_url(re.compile("spot=0"))
    settle(page)
    assert token(page, NASTY).get_attribute("aria-pressed") == "true"
    has_run_nothing(page)


# --- checkpoints --------------------------------------------------------------------------------


def test_trends_follow_the_quantity_and_the_source(address, page):
    visit(page, f"{address}/trends?run=known")
    page.wait_for_selector(".js-plotly-plot .plot-container")
    _, title, x, saturation = shown(page)
    assert "saturation" in title.lower() and len(x) == 7 and saturation[-1] == 1
    choose(page, "Busiest expert")
    page.wait_for_url(re.compile("trend=max_violation"))
    settle(page)
    _, title, x, violation = shown(page)
    assert "busiest expert" in title.lower() and len(x) == 7 and violation != saturation
    choose(page, "Runs of this folder")
    page.wait_for_url(re.compile("source=folder"))
    settle(page)
    _, _, x, _ = shown(page)
    assert len(x) == 3
    # the name of a run is shown as it is
    assert page.get_by_text(EVIL).count()
    has_run_nothing(page)
