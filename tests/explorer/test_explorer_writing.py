"""Writing goes through one place, which refuses it where it is not allowed."""

import ast
import inspect
import io
import shutil
import sys
import tempfile
from pathlib import Path

import duckdb
import pytest
from synthetic import NASTY, PROMPTS, write_run

from capture.errors import StoreError
from explorer import run_files, saved_views, slices, writing
from explorer.errors import ExplorerError, NotAllowedError
from explorer.run import open_run
from explorer.ui.access import viewer_of
from explorer.worker import CaptureRequest, CosinesRequest, RecoverRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _writing_again():
    yield
    writing.configure(writing.Policy())


@pytest.fixture(params=["read-only", "viewer"])
def refusing(request):
    if request.param == "read-only":
        writing.configure(writing.Policy(read_only=True))
        return "--read-only"
    writing.configure(writing.Policy(role=lambda: "viewer"))
    return "role editor"


RUN = Path(tempfile.mkdtemp()) / "known.duckdb"


@pytest.fixture(scope="module", autouse=True)
def _run():
    write_run(RUN)
    yield
    shutil.rmtree(RUN.parent)


CALLS = {
    "submit": lambda folder: writing.submit(CaptureRequest(str(folder / "new.duckdb"))),
    "cancel": lambda folder: writing.cancel(1),
    "write_new": lambda folder: writing.write_new(folder / "new", b"1", what="Writing"),
    "write_json": lambda folder: writing.write_json(folder / "new", {"a": 1}, what="Writing"),
    "rewrite_json": lambda folder: writing.rewrite_json(folder / "new", {"a": 1}, what="Writing"),
    "move": lambda folder: writing.move(
        Path(shutil.copy(RUN, f"{RUN}.copy")), folder / "new", what="Renaming"
    ),
    "keep_upload": lambda folder: writing.keep_upload(folder, "up", io.BytesIO(RUN.read_bytes())),
    "read_trace": lambda folder: writing.read_trace(
        folder, "t", [("t.csv", io.BytesIO(b"layer,expert,count\n0,0,5\n0,1,7\n"))], top_k=1
    ),
    "export_counts": lambda folder: writing.export_counts(RUN, folder / "counts.duckdb"),
    "remove": lambda folder: writing.remove(folder / "kept", what="Removing"),
}
PATHS = {"run_path", "in_folder", "run_file", "own_files"}
ASKING = {"configure", "is_read_only", "may_write", "refuse_if_read_only"} | PATHS


def test_every_service_that_writes_is_tried_below():
    functions = {
        name
        for name, value in vars(writing).items()
        if inspect.isfunction(value)
        and value.__module__ == "explorer.writing"
        and not name.startswith("_")
    }
    assert functions == set(CALLS) | ASKING


@pytest.mark.parametrize("name", CALLS)
def test_a_write_service_called_directly_is_refused(refusing, worker, tmp_path, name):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(NotAllowedError, match=refusing):
        CALLS[name](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not worker.jobs()
    assert not writing.may_write()


def full_folder(folder):
    """Write a run with everything that lies beside it, and a stranger of nearly its name."""
    path = write_run(folder / "a.duckdb").path
    write_run(folder / "a.b.duckdb")
    for name in ("a.0011223344.comparison", "a.0011223344.atlas", "a.b.0011223344.comparison"):
        (folder / name).write_text(name)
    rows = folder / "a.parquet" / "token" / "part=00000"  # as of a partitioned run
    rows.mkdir(parents=True)
    (rows / "rows.parquet").write_text("rows")
    with open_run(path) as run:
        slices.save_slice(run, "rare", [0, 1])
    params = {"run": "a", "slice": "rare", "comparison": "a.0011223344.comparison"}
    view = saved_views.save_view(folder, "V", page="compare", params=params, runs={"a": path})
    both = {"source": "chosen", "runs": "a,a.b"}
    saved_views.save_view(folder, "T", page="trends", params=both, runs={"a": path})
    return view


def names_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.parent.name != "views"}


def test_a_run_is_renamed_and_deleted_with_what_lies_beside_it(tmp_path, worker):
    view = full_folder(tmp_path)
    before = names_in(tmp_path)
    for refused in ({"read_only": True}, {"role": lambda: "viewer"}):
        writing.configure(writing.Policy(**refused))
        for act in (run_files.delete_run, lambda *a: run_files.rename_run(*a, "new")):
            with pytest.raises(NotAllowedError):
                act(tmp_path, "a")
    writing.configure(writing.Policy())
    # what has the new name stays, and so does everything else
    (tmp_path / "new.0011223344.atlas").write_text("other")
    for taken in ("a.b", "new"):
        with pytest.raises(ExplorerError, match=r"There is a run|could not be renamed"):
            run_files.rename_run(tmp_path, "a", taken)
        assert names_in(tmp_path) == before | {"new.0011223344.atlas"}
    (tmp_path / "new.0011223344.atlas").unlink()
    run_files.rename_run(tmp_path, "a", "new")
    renamed = {name for name in before if name[:2] == "a." and name[:4] != "a.b."}
    assert names_in(tmp_path) == (before - renamed) | {"new" + name[1:] for name in renamed}
    followed = saved_views.load_view(tmp_path, view.view_id)
    assert followed.params["comparison"] == "new.0011223344.comparison"
    views, _ = saved_views.list_views(tmp_path)
    assert all(not saved_views.changed(view, tmp_path) for view in views)
    assert {view.params.get("runs") for view in views} == {None, "new,a.b"}
    writing.submit(CosinesRequest("x", str(tmp_path / "new.duckdb"), "m"))
    with pytest.raises(ExplorerError, match="A job works on new"):
        run_files.delete_run(tmp_path, "new")
    worker.cancel(1)
    run_files.delete_run(tmp_path, "new")
    assert names_in(tmp_path) == before - renamed
    assert len(saved_views.list_views(tmp_path)[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_an_editor_may_do_all_of_it(worker, tmp_path, name):
    (tmp_path / "kept").write_text("kept")
    CALLS[name](tmp_path)
    done = bool(worker.jobs()) or {path.name for path in tmp_path.iterdir()} != {"kept"}
    assert done or name == "cancel"


def test_a_recovery_is_a_write_too(refusing, worker, tmp_path):
    with pytest.raises(NotAllowedError):
        writing.submit(RecoverRequest(str(tmp_path / "a.duckdb.partial")))


def test_a_file_is_written_whole_and_never_over_another(tmp_path):
    path = writing.write_new(tmp_path / "sub" / "a", b"one", what="Writing")
    with pytest.raises(ExplorerError, match="not overwritten"):
        writing.write_new(path, b"two", what="Writing")
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_the_role_is_asked_for_every_write(tmp_path):
    roles = iter(["editor", "viewer"])
    writing.configure(writing.Policy(role=lambda: next(roles)))
    writing.write_new(tmp_path / "a", b"", what="Writing")
    with pytest.raises(NotAllowedError):
        writing.write_new(tmp_path / "b", b"", what="Writing")


WRITING = {"write_text", "write_bytes", "mkdir", "unlink", "rename", "rmdir"}
OF_THE_WORKER = {"submit", "cancel"}
# where the server remembers which logins ended: everybody may end their own
OF_THE_SERVER = {"access.py": ["self._path.parent.mkdir"]}


PAGES = [*(ROOT / "explorer" / "pages").rglob("*.py"), *(ROOT / "explorer" / "ui").rglob("*.py")]


@pytest.mark.parametrize("path", sorted(PAGES), ids=str)
def test_a_page_writes_through_one_module_only(path):
    calls = [
        node.func
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        # a path is renamed to a place, a table by the names of its columns
        and (node.func.attr != "rename" or not any(k.arg == "columns" for k in node.keywords))
    ]
    wrong = [
        ast.unparse(call)
        for call in calls
        if call.attr in WRITING
        or (call.attr in OF_THE_WORKER and "worker" in ast.unparse(call.value))
    ]
    assert wrong == OF_THE_SERVER.get(path.name, [])


@pytest.mark.parametrize(
    ("claims", "settings", "role"),
    [
        ({"email": "Ann@Example.org"}, {"editors": ["ann@example.org"]}, "editor"),
        ({"email": "bob@example.org"}, {"editors": ["ann@example.org"]}, "viewer"),
        ({"email": "bob@example.org"}, {"editors": ["@example.org"]}, "editor"),
        ({"email": "bob@example.org"}, {"editors": "bob@example.org"}, "editor"),
        ({"email": "bob@evil.org"}, {"viewers": ["@example.org"]}, None),
        ({"email": "bob@example.org.evil.org"}, {"viewers": ["@example.org"]}, None),
        ({"email": "bob@example.org"}, {"viewers": ["@example.org"]}, "viewer"),
        (
            {"email": "ann@example.org", "email_verified": False},
            {"editors": ["ann@example.org"]},
            "viewer",
        ),
        ({}, {"editors": [""], "viewers": ["@"]}, None),
        ({"email": "bob@example.org"}, {"viewers": []}, None),
    ],
)
def test_roles_come_from_the_configuration(claims, settings, role):
    assert viewer_of({"email_verified": True} | claims, settings).role == role


def test_an_upload_is_kept_as_it_is(tmp_path):
    path = writing.keep_upload(tmp_path, "theirs", io.BytesIO(RUN.read_bytes()))
    assert path.read_bytes() == RUN.read_bytes()
    with pytest.raises(ExplorerError, match="never overwritten"):
        writing.keep_upload(tmp_path, "theirs", io.BytesIO(b"other"))
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.duckdb"]


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "a" * 61, "up.duckdb/..", "<b>"])
def test_an_upload_cannot_choose_its_place(tmp_path, name):
    with pytest.raises(ExplorerError, match="name of a run"):
        writing.keep_upload(tmp_path, name, io.BytesIO(b""))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (None, "it is not one"),
        ("DELETE FROM packed.prompt WHERE prompt_id = 2", "tokens of no prompt"),
        ("UPDATE packed.run SET config = 'x'", "config is not a JSON"),
        ("UPDATE packed.run SET level = '<b>'", "its level"),
        ("UPDATE packed.token SET token_id = 0", "twice"),
        ("UPDATE packed.token SET phase = 'dreamt'", "phases"),
        ("UPDATE packed.batch SET tokens = 1000000000", "batches"),
        ("UPDATE packed.site SET n_experts = 60000 WHERE layer = 1", "sums of a router"),
        ("UPDATE packed.score SET scores = [1.0]", "another number of experts"),
        ("UPDATE packed.coactivation SET tokens = [1]", "counts of pairs"),
        (
            "UPDATE packed.rollup SET assignments = list_transform(assignments, lambda x: -1)",
            "negative",
        ),
        ("UPDATE packed.run SET schema_version = 99", "Update RouteScope"),
        ("DROP VIEW tokens; ALTER TABLE packed.token ADD COLUMN more VARCHAR", "packed.token"),
    ],
)
def test_an_upload_that_is_no_sound_run_is_not_kept(tmp_path, statement, said):
    bad = tmp_path / "bad"
    shutil.copyfile(RUN, bad)
    if statement is None:
        bad.write_bytes(b"not a database" * 1000)
    else:
        with duckdb.connect(str(bad)) as connection:
            connection.execute(statement)
    folder = tmp_path / "runs"
    with pytest.raises(ExplorerError, match=said) as caught:
        writing.keep_upload(folder, "theirs", io.BytesIO(bad.read_bytes()))
    assert ".upload-" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "name", ["../secret/private", "/etc/private", "sub/run", "..", ".", "", "a\0b", "x" * 300]
)
def test_a_name_never_leads_out_of_the_runs_folder(tmp_path, name):
    folder = tmp_path / "runs"
    for other in (folder / "sub", tmp_path / "secret"):
        other.mkdir(parents=True)
        (other / "private.duckdb").write_bytes(b"x")
    (folder / "sub" / "run.duckdb").write_bytes(b"x")
    with pytest.raises(ExplorerError, match="leads out of it"):
        writing.in_folder(folder, name)
    with pytest.raises(ExplorerError, match=r"leads out of it|was removed"):
        writing.run_file(folder, name)


def test_a_run_of_the_folder_is_found_whatever_its_name(tmp_path):
    for name in ("known", "a, b % c", "..more", "Größe\nמילה"):
        path = tmp_path / f"{name}.duckdb"
        path.write_bytes(b"x")
        assert writing.run_file(tmp_path, name) == path
    with pytest.raises(ExplorerError, match="was removed"):
        writing.run_file(tmp_path, "gone")


def test_an_upload_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_UPLOAD", 0.01)
    with pytest.raises(ExplorerError, match=r"at most 0\.01 MB"):
        writing.keep_upload(tmp_path, "theirs", io.BytesIO(RUN.read_bytes()))
    assert not list(tmp_path.iterdir())


def test_a_counts_only_export_holds_no_text_and_the_same_counts(tmp_path, monkeypatch):
    # what is left out of small runs has tests of its own: tests/capture/test_capture_counts_only.py
    for least in ("MIN_TOKENS", "MIN_PROMPTS"):
        monkeypatch.setattr(sys.modules["capture.store.rewrite"], least, 1)
    deep = write_run(tmp_path / "deep.duckdb", level="attention")
    out = writing.export_counts(deep.path, tmp_path / "counts.duckdb")
    with open_run(deep.path) as run, open_run(out) as counts:
        assert counts.counts_only and not run.counts_only
        for view in ("expert_load_by", "coactivation", "transitions", "sites", "prompt_sizes"):
            sql = f"SELECT * FROM {view} ORDER BY ALL"
            assert counts.table(sql) == run.table(sql)
        left = counts.query("SELECT count(text) + count(token) + count(loss) AS n FROM tokens")
        assert left["n"].tolist() == [0]
        assert counts.query("SELECT count(*) AS n FROM tokens")["n"].tolist() == [33]
        assert counts.query("SELECT count(text) + count(source) AS n FROM prompts")["n"][0] == 0
        for view in ("assignments", "scores", "hidden", "attention_maps", "attention_top_keys"):
            assert counts.query(f"SELECT * FROM {view}").empty, view
    content = out.read_bytes()
    words = {NASTY, *(text for _, pieces in PROMPTS for text in pieces if len(text.strip()) > 3)}
    assert len(words) > 4
    assert not [word for word in words if word.strip().encode() in content]
    with pytest.raises(StoreError, match="never overwritten"):
        writing.export_counts(deep.path, out)
    # tokens have ids again wherever they were not left out
    with duckdb.connect(str(out), read_only=True) as connection:
        assert connection.sql("SELECT DISTINCT token FROM tokens").fetchall() == [(None,)]
