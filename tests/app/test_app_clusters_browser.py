"""The Clusters page in a real Chromium: boxes and lines drawn with the mouse, and a saved slice."""

import re
import time

import numpy as np
import pytest
from browser import click_cell, place, visit
from store_runs import make_forward, make_site, start, with_site
from test_app_clusters import keep

from capture.store import PromptInfo
from explorer import open_run
from explorer.maps import point_table
from explorer.maps.data import Source
from explorer.maps.point_table import inside
from explorer.slices import load_slice

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# more than are drawn one by one
MANY = 30_400


@pytest.fixture(scope="module")
def made(address, served_runs, served_cache):
    """The app, a run that it shows, and where the points are on its map and on one of many."""
    known = served_runs / "known.duckdb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(served_cache))
        _, places = keep(known)
        return address, known, places, write_many(served_runs / "many.duckdb")


def write_many(path):
    """Write a run of many tokens with scores, and put a map of them into the cache."""
    random = np.random.default_rng(0)
    sites = [make_site(0, 8, 2)]
    writer = start(path, sites, "scores", [PromptInfo("A", "a", None, MANY, 0)])
    forward = make_forward(0, MANY, sites, random, empty=0, domains=("a",))
    scores = random.normal(size=(MANY, 8)).astype(np.float32)
    writer.append(with_site(forward, scores=(np.arange(MANY), scores)))
    writer.finish(seconds=1.0, complete=True)
    return keep(path, Source("tokens", "scores", 0))[1]


def drag(tab, *corners):
    """Press at the first corner, pass the others, let go; return the corners on the map.

    With the box, unless the lasso was chosen.
    """
    mode = "document.querySelector('.js-plotly-plot')._fullLayout.dragmode"
    if tab.evaluate(mode) == "pan":
        tab.locator(".modebar-btn[data-title='Box Select']").click()
    found = [place(tab, *corner, of="plot") for corner in corners]
    tab.mouse.move(found[0][0], found[0][1])
    tab.mouse.down()
    for x, y, *_ in found[1:]:
        tab.mouse.move(x, y, steps=8)
    tab.mouse.up()
    return [corner[2:] for corner in found]


def selected(tab, places, corners):
    """Check what the page says of a box or line that was drawn, and return how many it took.

    The region of the address is what was drawn, to the pixel; heading and table are its points.
    """
    tab.get_by_role("heading", name=re.compile("Selected:")).wait_for(timeout=60_000)
    x, y = np.array(corners).T
    deadline = time.monotonic() + 60
    while not near(region_of(tab), (x.min(), x.max(), y.min(), y.max()), places):
        assert time.monotonic() < deadline, f"{tab.url} is not a region around {corners}"
        tab.wait_for_timeout(50)
    return listed(tab, places)


def listed(tab, places):
    """Check that heading and table say what is in the region of the address; return how many."""
    from playwright.sync_api import expect

    n = int(inside(places[:, 0], places[:, 1], region_of(tab)).sum())
    heading = f"Selected: {n:,} of {len(places):,} tokens"
    tab.get_by_role("heading", name=heading).wait_for(timeout=60_000)
    rows = tab.locator("[data-testid=stDataFrame] [role=grid]").first
    # the header is a row too
    expect(rows).to_have_attribute("aria-rowcount", str(-(-n // -(-n // 1_000)) + 1))
    return n


def region_of(tab):
    found = re.search(r"region=\w+(?::|%3A)([^&]+)", tab.url)
    return point_table.read_region(found.group(1)) if found else None


def near(region, bounds, places):
    """Whether a region's bounds are these, to half a per cent of the map."""
    size = np.ptp(places, axis=0).max()
    return region is not None and np.abs(np.subtract(region.bounds, bounds)).max() < size / 200


@pytest.mark.slow
def test_a_box_on_points_lists_them_and_is_saved_as_a_slice(made, page, new_page):
    url, path, places, _ = made
    visit(page, f"{url}/clusters?run=known&layer=1.0")
    first = selected(page, places, drag(page, (0.1, 0.05), (0.8, 0.95)))
    second = selected(page, places, drag(page, (0.05, 0.05), (0.4, 0.95)))
    assert 0 < second < first < len(places)
    page.get_by_label("Save as slice").fill("left <b>part</b>")
    page.get_by_role("button", name="Save slice").click()
    page.get_by_text("is saved: choose it at the side").wait_for()
    with open_run(path) as run:
        assert len(load_slice(run, "left <b>part</b>").token_ids) == second
    assert not page.troubles
    # the link opens the same selection for somebody else
    other = new_page("dark")
    visit(other, page.url)
    assert listed(other, places) == second
    other.get_by_role("button", name="Clear", exact=True).click()
    other.get_by_text("click a point to go to it").wait_for()
    assert "region" not in other.url
    # a click on a point leads to it
    other.locator(".modebar-btn[data-title='Pan']").click()
    click_cell(other, *map(float, places[len(places) // 2]))
    other.wait_for_url(re.compile("/tokens.*token="))


def test_a_line_drawn_by_hand_selects_what_it_goes_around(made, page):
    url, _, places, _ = made
    visit(page, f"{url}/clusters?run=known&layer=1.0")
    page.locator(".js-plotly-plot").first.hover()
    page.locator(".modebar-btn[data-title='Lasso Select']").click()
    # around the lower right half
    n = selected(page, places, drag(page, (0.98, 0.05), (0.98, 0.95), (0.02, 0.95), (0.98, 0.05)))
    assert 0 < n < len(places) and not region_of(page).is_box


def test_a_box_on_a_density_map_selects_by_geometry(made, page):
    url, _, _, places = made
    visit(page, f"{url}/clusters?run=many&layer=0")
    assert page.evaluate("document.querySelector('.js-plotly-plot').data[0].type") == "heatmap"
    first = selected(page, places, drag(page, (0.2, 0.05), (0.7, 0.95)))
    second = selected(page, places, drag(page, (0.75, 0.05), (0.8, 0.95)))
    assert 0 < second < first < MANY
    assert not page.troubles
