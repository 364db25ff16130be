"""Writing goes through one place, which refuses it where it is not allowed."""

import ast
import inspect
from pathlib import Path

import pytest

from explorer import service
from explorer.errors import ExplorerError, NotAllowedError
from explorer.pages.access import viewer_of
from explorer.worker import CaptureRequest, RecoverRequest, WorkerClient

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _writing_again():
    yield
    service.configure(service.Policy())


@pytest.fixture(params=["read-only", "viewer"])
def refusing(request):
    if request.param == "read-only":
        service.configure(service.Policy(read_only=True))
        return "--read-only"
    service.configure(service.Policy(role=lambda: "viewer"))
    return "role editor"


@pytest.fixture
def worker(monkeypatch):
    client = WorkerClient(["false"])
    monkeypatch.setattr("explorer.worker.shared_worker", lambda: client)
    monkeypatch.setattr(client, "_start_next", lambda: None)
    return client


CALLS = {
    "submit": lambda folder: service.submit(CaptureRequest(str(folder / "new.duckdb"))),
    "cancel": lambda folder: service.cancel(1),
    "write_new": lambda folder: service.write_new(folder / "new", b"1", what="Writing"),
    "write_json": lambda folder: service.write_json(folder / "new", {"a": 1}, what="Writing"),
    "remove": lambda folder: service.remove(folder / "kept", what="Removing"),
}
ASKING = {"configure", "is_read_only", "may_write", "refuse_if_read_only"}


def test_every_service_that_writes_is_tried_below():
    functions = {
        name
        for name, value in vars(service).items()
        if inspect.isfunction(value)
        and value.__module__ == "explorer.service"
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
    assert not service.may_write()


@pytest.mark.parametrize("name", CALLS)
def test_an_editor_may_do_all_of_it(worker, tmp_path, name):
    (tmp_path / "kept").write_text("kept")
    CALLS[name](tmp_path)
    done = bool(worker.jobs()) or {path.name for path in tmp_path.iterdir()} != {"kept"}
    assert done or name == "cancel"


def test_a_recovery_is_a_write_too(refusing, worker, tmp_path):
    with pytest.raises(NotAllowedError):
        service.submit(RecoverRequest(str(tmp_path / "a.duckdb.partial")))


def test_a_file_is_written_whole_and_never_over_another(tmp_path):
    path = service.write_new(tmp_path / "sub" / "a", b"one", what="Writing")
    with pytest.raises(ExplorerError, match="not overwritten"):
        service.write_new(path, b"two", what="Writing")
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_the_role_is_asked_for_every_write(tmp_path):
    roles = iter(["editor", "viewer"])
    service.configure(service.Policy(role=lambda: next(roles)))
    service.write_new(tmp_path / "a", b"", what="Writing")
    with pytest.raises(NotAllowedError):
        service.write_new(tmp_path / "b", b"", what="Writing")


WRITING = {"write_text", "write_bytes", "mkdir", "unlink", "rename", "rmdir"}
OF_THE_WORKER = {"submit", "cancel"}


@pytest.mark.parametrize("path", sorted((ROOT / "explorer" / "pages").rglob("*.py")), ids=str)
def test_a_page_writes_through_the_service_only(path):
    calls = [
        node.func
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    wrong = [
        ast.unparse(call)
        for call in calls
        if call.attr in WRITING
        or (call.attr in OF_THE_WORKER and "worker" in ast.unparse(call.value))
    ]
    assert not wrong


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
    assert viewer_of(claims, settings).role == role
