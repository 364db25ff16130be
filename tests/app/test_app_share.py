"""Sharing, in a real headless Chromium and through AppTest: views, reports, read-only, logins."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st
from app_pages import opened as opened_here
from app_pages import query
from browser import settle, visit
from synthetic import NASTY, PROMPTS, write_run
from test_app_compare import write_results

from explorer import saved_views, slices, writing
from explorer.run import open_run
from explorer.ui import access
from explorer.ui.chart import parquet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _writing_again():
    yield
    writing.configure(writing.Policy())


@pytest.fixture(scope="module", autouse=True)
def _close_runs():
    yield
    st.cache_resource.clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "known.duckdb", level="attention")
    return folder


def listing(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def opened(monkeypatch, folder, *options, page="overview", **query):
    """Open a page of a folder with options of the app."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder), *options])
    return opened_here(page, **query)


def said(elements):
    return " ".join(element.value.replace("\\", "") for element in elements)


# --- saved views -------------------------------------------------------------------------------


def test_a_saved_view_opens_by_its_link_and_warns_when_the_data_changed(monkeypatch, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    path = write_run(folder / "known.duckdb").path
    params = {"run": "known", "layer": "3.1", "order": "load"}
    view = saved_views.save_view(
        folder,
        "Half [a](b) *x*",
        page="overview",
        params=params | {"evil": "1"},
        runs={"known": path},
        note=NASTY,
    )
    app = opened(monkeypatch, folder, view=view.view_id)
    assert {name: query(app, name) for name in params} == params
    assert "evil" not in app.query_params
    assert app.selectbox(key="address:layer").value == "3.1"
    assert "Half [a](b) *x*" in said(app.markdown) and NASTY in said(app.markdown)
    assert not app.warning
    path.unlink()
    write_run(path, seed=1)
    app = opened(monkeypatch, folder, view=view.view_id)
    assert "The data changed since this view was saved: known" in said(app.warning)


def saved_on(app, name):
    """Save what a page shows, with its form."""
    app.text_input(key="view name").set_value(name)
    next(button for button in app.button if button.label == "Save").click().run()
    assert not app.exception and not app.error
    folder = Path(sys.argv[sys.argv.index("--runs") + 1])
    (view,) = [view for view in saved_views.list_views(folder)[0] if view.name == name]
    return view


def test_a_view_warns_when_its_slice_holds_other_tokens_or_is_gone(monkeypatch, tmp_path):
    path = write_run(tmp_path / "known.duckdb").path
    with open_run(path) as run:
        slices.save_slice(run, "s *x*", [0, 1, 2])
    view = saved_on(opened(monkeypatch, tmp_path, run="known", slice="s *x*"), "Sliced")
    # saved again with the same tokens, it is the same
    for token_ids, said_of in (
        ([0, 1, 2], None),
        ([5, 6, 7], "the slice s *x*."),
        ([], "the slice s *x* (gone)"),
    ):
        with open_run(path) as run:
            slices.delete_slice(run, "s *x*")
            if token_ids:
                slices.save_slice(run, "s *x*", token_ids, note="again")
        app = opened(monkeypatch, tmp_path, view=view.view_id)
        warned = said(app.warning)
        assert (f"since this view was saved: {said_of}" in warned) if said_of else not warned


def test_a_view_of_a_comparison_warns_when_its_file_changed(monkeypatch, tmp_path):
    write_run(tmp_path / "known.duckdb")
    path = write_results(tmp_path)
    app = opened(monkeypatch, tmp_path, page="compare", run="known")
    assert query(app, "comparison") == path.name
    view = saved_on(app, "Compared")
    assert view.params["comparison"] == path.name
    assert not opened(monkeypatch, tmp_path, view=view.view_id).warning
    newer = path.with_name("known.00000000.comparison")
    shutil.copyfile(path, newer)
    os.utime(newer, ns=(path.stat().st_mtime_ns + 10**10,) * 2)
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert app.selectbox(key="address:comparison").value == path.name
    assert not app.warning
    with path.open("ab") as file:
        file.write(b"more")
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert f"saved: the comparison {path.name}." in said(app.warning)
    path.unlink()
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert f"the comparison {path.name} (gone)" in said(app.warning)


def test_a_view_of_trends_keeps_its_runs_and_warns_of_each(monkeypatch, tmp_path):
    names = ("step_10", "odd, step_20%", "step_30")
    for seed, name in enumerate(names):
        write_run(tmp_path / f"{name}.duckdb", seed=seed)
    app = opened(monkeypatch, tmp_path, page="trends", run="step_30")
    app.button_group(key="address:source").set_value("folder").run()
    app.multiselect(key="address:runs").set_value(list(names[:2])).run()
    view = saved_on(app, "Trend")
    assert sorted(view.fingerprints) == sorted(names)
    path = tmp_path / "odd, step_20%.duckdb"
    path.unlink()
    write_run(path, seed=9)
    write_run(tmp_path / "step_40.duckdb", seed=4)
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert sorted(app.multiselect(key="address:runs").value) == sorted(names[:2])
    assert "saved: odd, step_20%." in said(app.warning)


def test_a_view_of_two_runs_opens_the_same_two_when_another_appears(monkeypatch, tmp_path):
    for seed, name in enumerate(("known", "other")):
        write_run(tmp_path / f"{name}.duckdb", seed=seed)
    app = opened(monkeypatch, tmp_path, page="compare_runs", run="known")
    view = saved_on(app, "Two")
    assert view.params["against"] == "other" and sorted(view.fingerprints) == ["known", "other"]
    write_run(tmp_path / "new.duckdb", seed=5)
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert app.selectbox(key="address:against").options[0] == "new"
    assert app.selectbox(key="address:against").value == "other"
    assert not app.warning


def test_a_foreign_view_never_leads_out_of_the_runs_folder(monkeypatch, tmp_path):
    folder, secret = tmp_path / "runs", tmp_path / "secret"
    for made, name in ((folder, "known"), (secret, "private")):
        made.mkdir()
        write_run(made / f"{name}.duckdb")
    view = saved_views.save_view(folder, "x", page="overview", params={"run": "known"}, runs={})
    evil = asdict(view) | {"params": {"run": "../secret/private"}}
    (folder / "views" / "0123456789.json").write_text(json.dumps(evil))
    app = opened(monkeypatch, folder, page="share", run="known")
    assert "The saved view 0123456789 cannot be read" in said(app.warning)
    keys = {button.key for button in app.button}
    assert f"report of {view.view_id}" in keys and "report of 0123456789" not in keys
    # even if the check of the file were passed by, the page makes no path of such a name
    outside = replace(view, view_id="0123456789", params={"run": "../secret/private"})
    monkeypatch.setattr(saved_views, "list_views", lambda folder: ([outside], []))
    app = opened(monkeypatch, folder, page="share", run="known")
    assert "report of 0123456789" not in {button.key for button in app.button}


@pytest.mark.parametrize("view_id", ["0123456789", "../../x", "<b>"])
def test_a_link_to_a_view_that_is_gone_says_so(monkeypatch, runs, view_id):
    app = opened(monkeypatch, runs, view=view_id)
    assert "There is no saved view" in said(app.info)
    assert "view" not in app.query_params
    assert app.metric


def test_a_view_is_saved_listed_and_deleted(monkeypatch, tmp_path):
    write_run(tmp_path / "known.duckdb")
    app = opened(monkeypatch, tmp_path, run="known", layer="3.0")
    app.text_input(key="view name").set_value("Mine")
    app.text_area(key="view note").set_value("why")
    next(button for button in app.button if button.label == "Save").click().run()
    ((view,), _) = saved_views.list_views(tmp_path)
    assert (view.name, view.note, view.page) == ("Mine", "why", "overview")
    assert view.params == {"run": "known", "layer": "3.0"}
    assert view.view_id in said(app.code)
    app = opened(monkeypatch, tmp_path, page="share")
    assert "Mine" in said(app.markdown)
    app.button(key=f"delete {view.view_id}").click().run()
    assert saved_views.list_views(tmp_path) == ([], [])


def test_a_run_is_renamed_copied_and_deleted_on_the_page(monkeypatch, tmp_path):
    write_run(tmp_path / "known.duckdb")
    results = write_results(tmp_path)
    app = opened(monkeypatch, tmp_path, page="share", run="known", layer="3.0")
    next(b for b in app.button if b.label == "Make the copy").click().run()
    (copied,) = app.get("download_button")
    assert copied.proto.label.startswith("Download known-counts.duckdb · ")
    app.text_input(key="new name of known").set_value("known-counts")
    next(b for b in app.button if b.label == "Rename the run").click().run()
    assert "There is a run named known-counts already" in said(app.error)
    app.text_input(key="new name of known").set_value("new")
    next(b for b in app.button if b.label == "Rename the run").click().run()
    assert not app.exception and not app.error
    assert (query(app, "run"), query(app, "layer")) == ("new", "3.0")
    beside = tmp_path / results.name.replace("known.", "new.")
    assert beside.exists() and not results.exists()
    assert "the run **new**" in said(app.markdown) and "- 1 comparison" in said(app.markdown)
    next(b for b in app.button if b.label == "Delete for good").click().run()
    assert not app.exception and not app.error
    assert not beside.exists() and not (tmp_path / "new.duckdb").exists()
    # who may only look may take the copy that holds no text, and change nothing
    app = opened(monkeypatch, tmp_path, "--read-only", page="share", run="known-counts")
    (copied,) = app.get("download_button")
    assert not {"Rename the run", "Delete for good"} & {button.label for button in app.button}


def test_a_report_that_fails_says_why_on_the_page(monkeypatch, tmp_path):
    write_run(tmp_path / "known.duckdb")
    bad = tmp_path / "bad.duckdb"
    bad.write_bytes(b"no run" * 1000)
    view = saved_views.save_view(
        tmp_path, "Bad", page="overview", params={"run": "bad"}, runs={"bad": bad}, note=""
    )
    app = opened(monkeypatch, tmp_path, page="share", run="known")
    assert not app.error
    app.button(key=f"report of {view.view_id}").click().run()
    assert not app.exception
    assert "bad.duckdb" in said(app.error)
    assert not app.get("download_button")


# --- team mode ---------------------------------------------------------------------------------


PAGES = sorted(set(re.findall(r"^    \"(\w+)\": \(", (ROOT / "app.py").read_text(), re.MULTILINE)))


def test_nothing_is_written_read_only(monkeypatch, runs):
    before = listing(runs)
    app = opened(monkeypatch, runs, "--read-only", run="known")
    for page in PAGES:
        if page != "capture":
            app.switch_page(f"explorer/pages/{page}/page.py").run()
            assert not app.exception and not app.error, page
            buttons = [b.label for b in app.button if b.label in ("Save", "Keep the run")]
            assert not buttons and not app.get("file_uploader"), page
    assert listing(runs) == before


def test_there_is_no_capture_page_read_only(monkeypatch, runs):
    app = opened(monkeypatch, runs, "--read-only")
    with pytest.raises(ValueError, match="capture"):
        app.switch_page("explorer/pages/capture/page.py")


def test_an_empty_folder_is_not_recorded_into_read_only(monkeypatch, tmp_path):
    app = opened(monkeypatch, tmp_path, "--read-only")
    assert "none can be recorded here" in said(app.info)
    assert not list(tmp_path.iterdir())


def test_without_a_login_a_server_that_others_reach_lets_nobody_write(monkeypatch, runs):
    asked = st.get_option
    monkeypatch.setattr(
        st, "get_option", lambda name: "0.0.0.0" if name == "server.address" else asked(name)
    )
    app = opened(monkeypatch, runs, page="share")
    assert "can be reached from other machines; you may look" in said(app.caption)
    assert not writing.may_write()


def test_the_server_listens_on_this_machine_only():
    assert access.is_local()
    assert st.get_option("server.address") == "127.0.0.1"


class User:
    """Whoever logged in, as Streamlit hands it over."""

    def __init__(self, claims):
        self.claims = claims
        self.is_logged_in = claims is not None

    def to_dict(self):
        return self.claims


@pytest.mark.parametrize(
    ("claims", "sees", "writes"),
    [
        (None, False, False),
        ({"email": "eve@evil.org"}, False, False),
        ({"email": "bob@example.org", "email_verified": True}, True, False),
        ({"email": "ann@example.org", "email_verified": True, "name": "Ann"}, True, True),
    ],
)
def test_a_login_decides_who_looks_and_who_writes(monkeypatch, runs, claims, sees, writes):
    secrets = {
        "auth": {"client_id": "x"},
        "routescope": {"viewers": ["@example.org"], "editors": ["ann@example.org"]},
    }
    monkeypatch.setattr(access, "_secrets", lambda section: secrets.get(section, {}))
    monkeypatch.setattr(st, "user", User(claims))
    app = opened(monkeypatch, runs)
    assert bool(app.metric) == sees
    assert writing.may_write() == writes
    if claims is None:
        assert [button.label for button in app.button] == ["Log in"]


# --- exports -----------------------------------------------------------------------------------


def test_a_counts_only_run_shows_that_its_text_was_left_out(monkeypatch, runs, tmp_path):
    writing.export_counts(runs / "known.duckdb", tmp_path / "counts.duckdb")
    app = opened(monkeypatch, tmp_path, run="counts")
    for page in PAGES:
        if page != "capture":
            app.switch_page(f"explorer/pages/{page}/page.py").run()
            assert not app.exception and not app.error, page
            assert "its text was left out" in said(app.info), page


def test_a_table_with_numbered_columns_becomes_parquet(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_bytes(parquet(pd.DataFrame([[0.5, None], [1.0, "<b>"]])))
    read = pd.read_parquet(path)
    assert read.columns.tolist() == ["0", "1"] and read["1"].isna().tolist() == [True, False]


# --- in the browser ----------------------------------------------------------------------------


def figure(page, which=0):
    """Return the numbers of a figure on the page."""
    page.wait_for_selector(".js-plotly-plot .plot-container")
    return page.evaluate(
        "which => { const plot = document.querySelectorAll('.js-plotly-plot')[which];"
        " const shown = plot._fullData[0];"
        " return [plot._fullLayout.title.text, Array.from(shown.z ?? shown.y, row =>"
        " Array.from(row.length === undefined ? [row] : row))]; }",
        which,
    )


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_a_view_saved_in_one_session_is_the_same_in_another(address, new_page):
    page = new_page()
    visit(page, f"{address}/load-balance?run=known&layer=3.1&domain=law")
    page.get_by_text("Save this view").click()
    page.get_by_label("Name", exact=True).fill("<b>Law</b> מילה 🙂")
    page.get_by_label("Note").fill(NASTY)
    page.get_by_role("button", name="Save", exact=True).click()
    link = page.locator("[data-testid=stPopoverBody] code", has_text="?view=").inner_text().strip()
    assert link.startswith(f"{address}/?view=")
    shown = figure(page)
    other = new_page("dark")
    visit(other, link)
    other.wait_for_url(re.compile("/load-balance.*view="))
    settle(other)
    assert "layer=3.1" in other.url and "domain=law" in other.url
    assert figure(other) == shown
    other.get_by_text("<b>Law</b> מילה 🙂").wait_for()
    assert not page.troubles + other.troubles


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_a_report_from_the_share_page_works_from_disk_without_a_network(
    address, new_page, tmp_path
):
    page = new_page()
    visit(page, f"{address}/share?run=known")
    page.get_by_role("button", name="Report of this run").click()
    page.get_by_text("Making the report").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("^.*Download · ")).click(timeout=120_000)
    path = tmp_path / "report.html"
    download.value.save_as(path)
    for theme in ("light", "dark"):
        reader = new_page(theme, offline=True)
        asked = []
        reader.on("request", lambda request, asked=asked: asked.append(request.url))
        reader.goto(path.as_uri())
        ground = reader.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (theme == "light")
        title, numbers = figure(reader)
        assert title.startswith("Load of every expert") and len(numbers) == 3
        reader.get_by_role("button", name="Dark" if theme == "light" else "Light").click()
        assert ground != reader.evaluate("getComputedStyle(document.body).backgroundColor")
        reader.locator(".strip").first.scroll_into_view_if_needed()
        text = reader.locator(".strip").first.inner_text()
        assert text.replace("\n", "").startswith("".join(PROMPTS[0][1]).replace(" ", "")[:3])
        last = reader.locator(".plot").last
        last.scroll_into_view_if_needed()
        last.locator(".main-svg").first.wait_for()
        assert all(url.startswith(("file:", "blob:", "data:")) for url in asked)
        assert not reader.troubles


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_the_data_of_a_figure_downloads(address, new_page, tmp_path):
    page = new_page()
    visit(page, f"{address}/?run=known")
    page.locator(".st-key-downloads-of-load-map button").first.click()
    for kind, read in (("CSV", pd.read_csv), ("Parquet", pd.read_parquet)):
        with page.expect_download() as download:
            page.get_by_role("button", name=kind, exact=True).click()
        path = tmp_path / download.value.suggested_filename
        assert path.name == f"known-load-map.{kind.lower()}"
        download.value.save_as(path)
        assert read(path)["assignments"].sum() > 0
    page.get_by_text("SVG", exact=True).click()
    settle(page)
    page.keyboard.press("Escape")
    page.locator(".js-plotly-plot").first.hover()
    with page.expect_download() as download:
        page.locator(".modebar-btn[data-title^='Download plot']").first.click()
    assert download.value.suggested_filename == "known-load-map.svg"


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_a_read_only_server_refuses_and_shows_strange_texts(read_only, page):
    url, folder = read_only
    before = listing(folder)
    for prompt in (4, 5):
        visit(page, f"{url}/tokens?run=known&prompt={prompt}&layer=1.0")
        strip = page.locator(".strip")
        text = strip.inner_text()
        assert (NASTY if prompt == 4 else "מילה") in text
        assert strip.get_attribute("dir") == "auto"
    page.locator("[data-testid=stSidebarNav] a[href$='/share']").click()
    page.get_by_text("it was started read-only").wait_for()
    settle(page)
    assert not page.get_by_text("Save this view").count()
    assert not page.locator("input[type=file]").count()
    assert not page.get_by_role("link", name="Capture").count()
    page.goto(f"{url}/capture")
    page.get_by_text("Page not found").wait_for()
    assert not page.troubles
    assert listing(folder) == before


@pytest.mark.browser
@pytest.mark.slow(seconds=5)
def test_a_run_is_uploaded_in_the_browser(address, page, runs, tmp_path):
    from playwright.sync_api import expect

    visit(page, f"{address}/share?run=known")
    page.locator("input[type=file]").set_input_files(
        {"name": "bad.duckdb", "mimeType": "application/octet-stream", "buffer": b"x" * 5000}
    )
    page.get_by_role("button", name="Keep the run").click()
    page.locator("[data-testid=stAlert]", has_text="bad was not kept").wait_for()
    shutil.copyfile(runs / "known.duckdb", tmp_path / "theirs.duckdb")
    page.locator("input[type=file]").set_input_files(str(tmp_path / "theirs.duckdb"))
    expect(page.get_by_label("Its name here")).to_have_value("theirs")
    page.get_by_role("button", name="Keep the run").click()
    page.get_by_text("was checked and kept").wait_for()
    visit(page, f"{address}/?run=theirs")
    assert "run=theirs" in page.url
    assert not page.troubles


def test_a_saved_view_whose_choices_were_changed_says_so_and_drops_its_name(monkeypatch, tmp_path):
    path = write_run(tmp_path / "known.duckdb").path
    params = {"run": "known", "domain": "law", "order": "load"}
    view = saved_views.save_view(
        tmp_path, "My view", page="overview", params=params, runs={"known": path}, note="Law only"
    )
    app = opened(monkeypatch, tmp_path, view=view.view_id)
    assert "My view" in said(app.markdown) and "Law only" in said(app.markdown)
    app.selectbox(key="address:domain").set_value("code").run()
    assert not app.exception
    assert "no longer the saved view that was opened: `domain` was changed" in said(app.markdown)
    assert "My view" not in said(app.markdown) and "Law only" not in said(app.markdown)
    app.selectbox(key="address:layer").set_value("3.1").run()
    assert "`domain`, `layer` were changed" in said(app.markdown)
    # put back as they were, the choices are those of the view again
    app.selectbox(key="address:domain").set_value("law").run()
    app.selectbox(key="address:layer").set_value("1.0").run()
    assert "My view" in said(app.markdown)


@pytest.mark.parametrize("page", ["compare", "clusters"])
def test_a_link_to_a_comparison_or_region_that_is_not_here_says_so(monkeypatch, tmp_path, page):
    write_run(tmp_path / "known.duckdb", level="scores")
    links = {
        "compare": {"comparison": "gone.comparison"},
        "clusters": {"region": "00000000u:0_0~1_1", "map": "prompts"},
    }
    named = {"compare": "“Comparison” for “gone.comparison”", "clusters": "a region that is not of"}
    app = opened(monkeypatch, tmp_path, page=page, run="known", **links[page])
    assert named[page] in said(app.info)
