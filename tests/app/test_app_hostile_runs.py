"""Run files with the right columns and wrong values: refused in a sentence, or all pages show it.

Refused ones are checked alone, in one file whose changes are taken back; what passes is put
together into a few files, and every page opens each of them.
"""

import random
import shutil
from pathlib import Path

import duckdb
import pytest
import streamlit as st
from app_pages import APP
from hostile_runs import REFUSED, SHOWN
from streamlit.testing.v1 import AppTest
from synthetic import write_run

from capture.errors import CaptureError, StoreError
from capture.store import RunReader, check, check_run
from capture.store.reader import in_file, open_sandbox
from explorer import pages
from explorer.errors import ExplorerError
from explorer.run import open_run
from explorer.text import plain
from explorer.ui import state

pytestmark = pytest.mark.slow

PAGES = sorted(page.parent.name for page in Path(pages.__path__[0]).glob("*/page.py"))
# a router's input for each stored score; the writer of the tests stores none
HIDDEN = (
    "INSERT INTO packed.hidden SELECT token_id, layer, site,"
    " [token_id % 7, layer, token_id % 3, 1]::FLOAT[] FROM packed.score;"
    " DELETE FROM packed.sample; INSERT INTO packed.sample SELECT token_id FROM packed.token"
)
# these cannot be in one file with what others change
GROUPS = (
    [name for name in SHOWN if not name.startswith("no tokens")][::2],
    [name for name in SHOWN if not name.startswith("no tokens")][1::2],
    ["no tokens"],
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.duckdb"
    write_run(path, level="attention")
    with duckdb.connect(str(path)) as connection:
        connection.execute(HIDDEN)
    check_run(path)
    return path


@pytest.fixture(scope="module")
def inside(sound, tmp_path_factory):
    """Open a copy in which tests change values and take them back."""
    path = tmp_path_factory.mktemp("inside") / "inside.duckdb"
    shutil.copyfile(sound, path)
    connection = open_sandbox(path, read_only=False)
    yield path, connection
    connection.close()


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_contradict_each_other_are_refused(inside, name):
    path, connection = inside
    connection.execute("BEGIN")
    try:
        for statement in REFUSED[name].split("; "):
            connection.execute(in_file(statement))
        found = check.contradiction(path, connection)
    finally:
        connection.execute("ROLLBACK")
    assert found is not None
    said = str(found)
    assert "it is not one (" in said and len(said) < 400 and "Error" not in said


def test_taken_back_the_changes_leave_a_sound_file(inside):
    assert check.contradiction(*inside) is None


def changed(sound, path, statements):
    shutil.copyfile(sound, path)
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


@pytest.mark.parametrize("names", GROUPS, ids=["first", "second", "no tokens"])
def test_what_passes_breaks_no_page(sound, runs, names):
    changed(sound, runs / "odd.duckdb", [SHOWN[name] for name in names])
    app = AppTest.from_file(APP, default_timeout=60).run()
    for page in PAGES:
        app.switch_page(f"explorer/pages/{page}/page.py").run()
        assert not app.exception, (page, app.exception[0].stack_trace)
        assert not app.error, (page, app.error[0].value)
    assert len(PAGES) >= 13


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "UPDATE packed.prompt SET text = repeat('x', 16000001) WHERE prompt_id = 0",
            "a prompt that is too long",
        ),
        (
            "INSERT INTO packed.site SELECT i + 9, 0, 'm', 4, 1, 0, 'x' FROM range(99999) t(i)",
            "100,002 routers",
        ),
        ("UPDATE packed.run SET config = repeat('[', 100000)", "config is not a JSON"),
        (
            "INSERT INTO packed.prompt SELECT i + 9, 'x', 'd' || i, 's', 0, 0"
            " FROM range(20000) t(i)",
            "too many domains",
        ),
    ],
)
def test_large_values_are_refused_too(sound, tmp_path, statement, said):
    path = changed(sound, tmp_path / "large.duckdb", [statement])
    with pytest.raises(StoreError, match=said):
        open_run(path)


def test_a_file_is_checked_once_until_it_changes(sound, tmp_path, monkeypatch):
    path = changed(sound, tmp_path / "run.duckdb", [])
    asked = []
    real = check.contradiction
    monkeypatch.setattr(
        check, "contradiction", lambda *args, **more: asked.append(1) or real(*args, **more)
    )
    for _ in range(3):
        open_run(path).close()
    assert len(asked) == 1
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE packed.site SET top_k = 2000000000")
    for _ in range(2):
        with pytest.raises(StoreError, match="top_k outside"):
            open_run(path)
    assert len(asked) == 2


def test_a_check_and_a_query_take_so_long_and_no_more(sound, monkeypatch):
    forever = "SELECT count(*) FROM range(1000000000) AS a, range(1000000000) AS b"
    with open_sandbox(sound) as connection:
        monkeypatch.setattr(
            check, "_check", lambda path, connection: connection.sql(forever).fetchall()
        )
        found = check.contradiction(sound, connection, seconds=0.2)
    assert "could not be checked within 0.2 s" in str(found)
    monkeypatch.setattr("capture.store.reader.SECONDS", 0.2)
    with RunReader.open(sound) as run:
        with pytest.raises(StoreError, match=r"took over 0\.2 s and was stopped"):
            run.query(forever)
        assert run.query("SELECT count(*) AS n FROM tokens")["n"][0].as_py() > 0


def test_a_query_takes_so_much_memory_and_no_more(sound, monkeypatch):
    monkeypatch.setattr("capture.store.reader.MEMORY", "100MB")
    with RunReader.open(sound) as run, pytest.raises(StoreError, match="Out of Memory"):
        run.query("SELECT list(i) AS all FROM range(100000000) AS t(i)")


def test_a_damaged_file_gives_known_errors_only(sound, tmp_path):
    data = sound.read_bytes()
    draw = random.Random(0)
    refused = 0
    for number in range(30):
        path = tmp_path / f"flipped{number}.duckdb"
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 8, 64])):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            with open_run(path) as run:
                for view in ("tokens", "expert_load", "assignments", "attention_maps", "gates"):
                    run.query(f"SELECT * FROM {view}")
        except (CaptureError, ExplorerError) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_a_bad_file_is_listed_and_nobodys_first_page(sound, runs):
    changed(sound, runs / "good.duckdb", [])
    changed(sound, runs / "bad.duckdb", ["UPDATE packed.site SET top_k = 2000000000"])
    app = AppTest.from_file(APP, default_timeout=60).run()
    assert not app.exception and not app.error
    assert app.query_params["run"] in ("good", ["good"])
    listed = [caption.value.replace("\\", "") for caption in app.sidebar.caption]
    assert any("bad" in said and "top_k outside of 1" in said for said in listed)
    assert str(runs) not in "".join(listed)
    app.selectbox(key="address:run").set_value("bad").run()
    assert not app.exception and "top_k outside" in app.error[0].value.replace("\\", "")


def test_known_errors_are_messages_on_every_page(sound, runs, monkeypatch):
    changed(sound, runs / "good.duckdb", [])

    def fail(*args, **more):
        raise StoreError("The disk said *no*.")

    app = AppTest.from_file(APP, default_timeout=60).run()
    monkeypatch.setattr("explorer.ui.filters.select_view", fail)
    monkeypatch.setattr("explorer.ui.state.run_names", fail)
    for page in PAGES:
        app.switch_page(f"explorer/pages/{page}/page.py").run()
        assert not app.exception, page
        said = [error.value for error in app.error]
        assert said == [plain("The disk said *no*.")], page


def test_a_callback_that_fails_is_a_message(runs, sound):
    changed(sound, runs / "good.duckdb", [])

    def script():
        import streamlit as st

        from explorer.errors import ExplorerError
        from explorer.ui import problems

        @problems.in_callback
        def press():
            raise ExplorerError("It is gone.")

        with problems.shown():
            st.button("Press", on_click=press)

    app = AppTest.from_function(script).run()
    app.button[0].click().run()
    assert not app.exception and "It is gone" in app.error[0].value
    assert not app.run().error


def test_the_newest_file_that_another_writes_is_asked_again(sound, runs):
    state._problem.clear()
    assert state.problem_of("nothing") == "it was removed"
    st.cache_resource.clear()
