"""Who may write: every way in, every role, against a server that runs."""

import contextlib
import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from browser import serve
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.web.server.starlette.starlette_app_utils import create_signed_value
from synthetic import write_run
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from explorer import writing
from explorer.errors import NotAllowedError
from explorer.ui import access

SECRET = "of a test only: long enough"
ORIGIN = "https://routes.example.org"
LOGIN = f"""
[auth]
redirect_uri = "{ORIGIN}/oauth2callback"
cookie_secret = "{SECRET}"
client_id = "x"
client_secret = "x"
server_metadata_url = "http://127.0.0.1:9/none"
[routescope]
editors = ["ann@example.org"]
viewers = ["@example.org"]
"""
ANN = {"email": "ann@example.org", "email_verified": True, "iat": 1}
BOB = ANN | {"email": "bob@example.org"}
LONG = 10**6  # seconds


# --- hosts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "trusted"),
    [
        ([("Host", "localhost:8501")], True),
        ([("Host", "LOCALHOST.")], True),
        ([("Host", "127.0.0.1:8501")], True),
        ([("Host", "127.9.9.9")], True),
        ([("Host", "[::1]:8501")], True),
        ([("Host", "localhost:8501"), ("Origin", "http://localhost:8501")], True),
        ([("Host", "[::1]"), ("Origin", "http://[::1]")], True),
        ([("Host", "localhost"), ("Origin", "http://LOCALHOST:80")], True),
        # a page of a stranger, by a name of its own
        ([("Host", "evil.example"), ("Origin", "http://evil.example")], False),
        ([("Host", "localhost.evil.example")], False),
        ([("Host", "127.0.0.1.evil.example")], False),
        ([("Host", "localhost@evil.example")], False),
        ([("Host", "evil.example:80,localhost")], False),
        ([("Host", "0.0.0.0:8501")], False),
        ([("Host", "192.168.0.7")], False),
        ([("Host", "")], False),
        ([], False),
        ([("Host", "localhost"), ("Host", "localhost")], False),
        ([("Host", "localhost"), ("host", "evil.example")], False),
        # a page of another program on this machine
        ([("Host", "localhost:8501"), ("Origin", "http://localhost:3000")], False),
        ([("Host", "localhost:8501"), ("Origin", "http://evil.example")], False),
        ([("Host", "localhost:8501"), ("Origin", "null")], False),
        ([("Host", "localhost:8501"), ("Origin", "http://x:y")], False),
        ([("Host", "l"), ("Origin", "http://l"), ("Origin", "http://l")], False),
        # a proxy on this machine
        ([("Host", "localhost"), ("X-Forwarded-For", "10.0.0.7")], False),
        ([("Host", "localhost"), ("Forwarded", "for=10.0.0.7")], False),
        ([("Host", "127.0.0.1:8501"), ("x-real-ip", "127.0.0.1")], False),
        ([("Host", "localhost"), ("Via", "1.1 proxy")], False),
        ([("Host", "routes.example.org"), ("X-Forwarded-For", "10.0.0.7")], False),
    ],
)
def test_only_names_of_this_machine_are_trusted(headers, trusted):
    assert access.reached_by_own_name(headers) is trusted


@pytest.mark.parametrize(
    ("headers", "trusted"),
    [
        ([("Host", "routes.example.org"), ("Origin", "https://routes.example.org")], True),
        ([("Host", "Routes.Example.org:443"), ("Origin", "https://routes.example.org")], True),
        ([("Host", "routes.example.org"), ("X-Forwarded-For", "10.0.0.7")], True),
        ([("Host", "routes.example.org"), ("X-Forwarded-Host", "routes.example.org")], True),
        ([("Host", "routes.example.org"), ("X-Forwarded-Host", "a, routes.example.org")], False),
        ([("Host", "routes.example.org"), ("Origin", "https://evil.example")], False),
        ([("Host", "evil.example")], False),
        ([("Host", "other.example:8000")], True),
        ([("Host", "other.example")], False),
        ([("Host", "localhost")], True),
        ([("Host", "localhost"), ("X-Forwarded-For", "10.0.0.7")], False),
    ],
)
def test_a_host_that_is_configured_is_trusted(headers, trusted):
    known = ["routes.example.org", "other.example:8000"]
    assert access.reached_by_own_name(headers, known) is trusted


# --- logins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verified", [False, None, "true", "True", 1, "false", [True], "missing"])
def test_an_address_counts_only_when_it_is_verified(verified):
    claims = {"email": "ann@example.org", "email_verified": verified}
    if verified == "missing":
        del claims["email_verified"]
    settings = {"editors": ["ann@example.org"], "viewers": ["@example.org"]}
    assert access.viewer_of(claims, settings).role is None
    assert access.viewer_of(claims | {"email_verified": True}, settings).role == "editor"


@pytest.mark.parametrize(
    "email",
    [
        "@example.org",
        "x@evil.example@example.org",
        "example.org",
        "x@",
        "",
        " x@example.org",
        "x@example.org\n",
        "x y@example.org",
        "x@example.org,y",
        "x@sub.example.org",
        "x@example.org.evil.example",
        "x@EXAMPLE.ORG@",
        None,
        7,
        ["x@example.org"],
    ],
)
def test_an_address_is_one_name_at_one_domain(email):
    settings = {"editors": ["@editors.example"], "viewers": ["@example.org"]}
    assert access.viewer_of(ANN | {"email": email}, settings).role is None


def test_letters_of_other_alphabets_are_not_folded_into_an_address():
    settings = {"editors": ["kim@example.org"], "viewers": ["@example.org"]}
    assert access.viewer_of(ANN | {"email": "\u212aim@example.org"}, settings).role == "viewer"
    assert access.viewer_of(ANN | {"email": "KIM@Example.org"}, settings).role == "editor"


@pytest.mark.parametrize(
    ("exp", "expired"),
    [(1000.5, False), (1000, True), (999, True), ("2000", True), (True, True), ([], True)],
)
def test_a_token_expires(exp, expired):
    assert access.is_expired({"exp": exp}, now=1000) is expired
    assert access.is_expired({"exp": float("nan")}, now=1000)


def test_a_login_that_ended_stays_ended_in_other_processes(tmp_path):
    path = tmp_path / "state" / "ended"
    first, second = access.EndedLogins(path), access.EndedLogins(path)
    key = access.login_key(ANN | {"origin": "a", "is_logged_in": True})
    assert key == access.login_key(ANN | {"tokens": {}}) and key not in second
    first.add(key)
    assert key in first and key in second and key in access.EndedLogins(path)
    assert access.login_key(ANN | {"iat": 2}) not in second
    assert path.stat().st_mode & 0o777 == 0o600
    # cookies do not live as long as this
    path.write_text(f"{key} {time.time() - 40 * 86_400:.0f}\nbroken\n")
    assert key not in access.EndedLogins(path)


def test_without_a_place_to_write_a_login_ends_in_this_process(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ended = access.EndedLogins(tmp_path / "file" / "ended")
    ended.add("key")
    assert "key" in ended and "count again after a restart" in caplog.text


# --- every role, every write -------------------------------------------------------------------


def signed(claims):
    """Return a login cookie as Streamlit writes it."""
    value = json.dumps(claims | {"origin": ORIGIN, "is_logged_in": True, "provider": "default"})
    return "_streamlit_user=" + create_signed_value(SECRET, "_streamlit_user", value).decode()


LOCAL = [("Host", "localhost:1"), ("Origin", "http://localhost:1")]
ROLES = {
    # options, secrets, headers, claims: role
    "at this machine": ([], {}, LOCAL, {}, "editor"),
    "by rebinding": ([], {}, [("Host", "evil.example")], {}, "viewer"),
    "behind a proxy": ([], {}, [*LOCAL, ("X-Forwarded-For", "10.0.0.7")], {}, "viewer"),
    "by a configured host": (
        [], {"routescope": {"hosts": "r.example"}}, [("Host", "r.example")], {}, "editor",
    ),
    "read-only": (["--read-only"], {}, LOCAL, {}, "viewer"),
    "before login": ([], "login", LOCAL, {}, None),
    "editor": ([], "login", LOCAL, ANN, "editor"),
    "editor, read-only": (["--read-only"], "login", LOCAL, ANN, "viewer"),
    "viewer": ([], "login", LOCAL, BOB, "viewer"),
    "stranger": ([], "login", LOCAL, ANN | {"email": "x@evil.example"}, None),
    "not verified": ([], "login", LOCAL, ANN | {"email_verified": "true"}, None),
    "expired": ([], "login", LOCAL, ANN | {"exp": 1}, None),
    "logged out": ([], "login", LOCAL, ANN | {"iat": 2}, None),
}  # fmt: skip
SECRETS = {
    "auth": {"client_id": "x", "redirect_uri": f"{ORIGIN}/x"},
    "routescope": {"editors": ["ann@example.org"], "viewers": ["@example.org"]},
}


@pytest.fixture
def ended(monkeypatch, tmp_path):
    logins = access.EndedLogins(tmp_path / "ended")
    logins.add(access.login_key(ROLES["logged out"][3]))
    monkeypatch.setattr(access, "ENDED", logins)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "given.duckdb").path


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_every_role_at_every_write(monkeypatch, tmp_path, ended, run, name):
    from test_explorer_writing import CALLS

    options, secrets, headers, claims, role = ROLES[name]
    secrets = SECRETS if secrets == "login" else secrets
    monkeypatch.setattr(access, "_secrets", lambda section: secrets.get(section, {}))
    monkeypatch.setattr("sys.argv", ["app.py", *options])
    found = access.viewer_at(headers, claims).role
    assert found == role or "read-only" in name
    policy = writing.Policy(access.read_only_option(), lambda: found or "viewer")
    monkeypatch.setattr(writing, "_policy", policy)
    monkeypatch.setattr("test_explorer_writing.RUN", run)
    monkeypatch.setattr(writing, "submit", _asks)
    monkeypatch.setattr(writing, "cancel", _asks)
    for name, call in CALLS.items():
        folder = tmp_path / name
        folder.mkdir()
        if role == "editor":
            call(folder)
        else:
            with pytest.raises(NotAllowedError):
                call(folder)
        written = role == "editor" and name not in ("submit", "cancel", "remove")
        assert bool(list(folder.iterdir())) == written, name


def _asks(request):
    writing.refuse_if_read_only("Recording")


def test_whoever_left_may_not_write(monkeypatch):
    """A script that goes on after its tab was closed has no request to be judged by."""
    monkeypatch.setattr(access, "_secrets", lambda section: {})
    assert access.viewer_at([], {}).role == "editor"  # a program that runs the pages itself
    monkeypatch.setattr(access, "_serving", True)
    assert access.viewer_at([], {}).role == "viewer"


# --- against a server --------------------------------------------------------------------------


class Tab:
    """A page that is open, over the protocol of Streamlit's browser code."""

    def __init__(self, url, host=None, headers=(), origin=None, cookies=()):
        place = urlsplit(url)
        _, answer = ask(url, "GET", "/_stcore/health")
        token = next(v for k, v in answer if k.lower() == "set-cookie").split(";")[0]
        jar = "; ".join([token, *cookies])
        name = host or place.netloc
        self._open = contextlib.ExitStack()
        connection = connect(
            f"ws://{name}/_stcore/stream",
            sock=socket.create_connection((place.hostname, place.port)),
            subprotocols=["streamlit", token.partition("=")[2]],
            additional_headers=[("Cookie", jar), *headers],
            origin=origin or f"http://{name}",
            max_size=None,
            proxy=None,
        )
        self._socket = self._open.enter_context(connection)

    def visit(self, page=""):
        """Run a page; return what of it tells the role."""
        message = BackMsg()
        message.rerun_script.page_name = page
        self._socket.send(message.SerializeToString())
        said = b""
        session = None
        while True:
            answer = ForwardMsg()
            data = self._socket.recv(timeout=60)
            answer.ParseFromString(data)
            said += data
            kind = answer.WhichOneof("type")
            if kind == "new_session":
                session = answer.new_session.initialize.session_id
            if kind == "script_finished" and answer.script_finished in (0, 1):
                break
        self.session = session
        return {
            "capture": b"radio_button_checked" in said,
            "asked": b"to those who log in" in said,
            "said": said,
        }

    def is_closed(self):
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._socket.recv(timeout=20)
        return True

    def close(self):
        self._open.close()


def ask(url, method, path, headers=(), body=None):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.putrequest(method, path, skip_host=any(n == "Host" for n, _ in headers))
    for name, value in headers:
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if body is not None:
            connection.send(body)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.getheaders()


def put(url, tab, headers=()):
    """Send a file as the page's uploader does."""
    _, given = ask(url, "GET", "/_stcore/health")
    token = next(v for k, v in given if k.lower() == "set-cookie").split(";")[0]
    cookies = "; ".join([token, *(v for k, v in headers if k == "Cookie")])
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        + b"a" * 200_000
        + b"\r\n--x--\r\n"
    )
    sent = [
        ("Cookie", cookies),
        ("X-Xsrftoken", token.partition("=")[2]),
        ("Content-Type", "multipart/form-data; boundary=x"),
        *((k, v) for k, v in headers if k != "Cookie"),
    ]
    path = f"/_stcore/upload_file/{tab.session}/1"
    return [ask(url, method, path, sent, body)[0] for method in ("PUT", "DELETE")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "known.duckdb")
    return folder


def test_a_page_of_a_stranger_may_look_and_not_write(address):
    tab = Tab(address)
    assert tab.visit()["capture"]
    assert put(address, tab) == [204, 204]
    port = urlsplit(address).port
    for host, headers in (
        (f"evil.example:{port}", []),
        (f"localhost:{port}", [("X-Forwarded-For", "10.0.0.7")]),
        (f"localhost:{port}", [("Forwarded", "for=10.0.0.7;host=localhost")]),
    ):
        other = Tab(address, host=host, headers=headers)
        found = other.visit()
        assert not found["capture"] and b"known" in found["said"]
        assert put(address, other, [("Host", host), *headers]) == [403, 403]
        other.close()
    tab.close()


def test_the_app_is_framed_by_nobody_else(address):
    for path in ("/", "/tokens", "/_stcore/health", "/nothing"):
        _, headers = ask(address, "GET", path)
        found = {name.lower(): value for name, value in headers}
        assert found["content-security-policy"] == "frame-ancestors 'self'", path
        assert found["x-frame-options"] == "SAMEORIGIN"


def test_cookies_are_secure_behind_tls_only(address):
    def cookie(*headers):
        _, given = ask(address, "GET", "/_stcore/health", headers)
        return next(v for k, v in given if k.lower() == "set-cookie")

    assert "secure" not in cookie().lower()
    assert cookie(("X-Forwarded-Proto", "https")).endswith("; Secure")


def test_a_read_only_server_takes_no_file(read_only):
    url, _ = read_only
    tab = Tab(url)
    assert not tab.visit()["capture"]
    assert put(url, tab) == [403, 403]
    tab.close()
    # what is sent all the same is not read
    place, sent = urlsplit(url), 0
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = "PUT /_stcore/upload_file/a/b HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(f"{head}Content-Length: {10**9}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                sent += connection.send(bytes(2**16))
    assert sent < 10**8


@pytest.mark.slow
def test_a_login_counts_until_it_ends(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    secrets = tmp_path / "secrets.toml"
    secrets.write_text(LOGIN)
    now = time.time()
    ann, bob = ANN | {"exp": now + LONG}, BOB | {"exp": now + LONG}
    flags = ["--secrets.files", str(secrets)]
    with serve(folder, flags=flags) as url:

        def tab(claims=None):
            cookies = [signed(claims)] if claims else []
            return Tab(url, host="routes.example.org", origin=ORIGIN, cookies=cookies)

        nobody = tab()
        assert nobody.visit()["asked"]
        assert put(url, nobody) == [403, 403]
        first, copy, other = tab(ann), tab(ann), tab(bob)
        assert first.visit()["capture"] and copy.visit()["capture"]
        assert not other.visit()["capture"]
        cookie = [("Cookie", signed(ann))]
        assert put(url, first, cookie) == [204, 204]
        assert put(url, other, [("Cookie", signed(bob))]) == [403, 403]
        assert put(url, first) == [403, 403]
        for claims in (
            ann | {"email_verified": "true"},
            ann | {"exp": now - 1},
            ann | {"exp": "x"},
        ):
            stranger = tab(claims)
            found = stranger.visit()
            assert not found["capture"] and b"known" not in found["said"]
            assert put(url, first, [("Cookie", signed(claims))]) == [403, 403]
            stranger.close()
        status, headers = ask(url, "GET", "/auth/logout", cookie)
        assert status == 302
        gone = [value for name, value in headers if name.lower() == "set-cookie"]
        assert gone and all(value.endswith("; Secure") for value in gone)
        # its tabs, a copy of its cookie and files sent with it
        assert first.is_closed() and copy.is_closed()
        again = tab(ann)
        found = again.visit()
        assert found["asked"] and not found["capture"]
        assert put(url, again, cookie) == [403, 403]
        # others stay, and so does a new login of the same person
        assert not other.visit()["asked"]
        newer = tab(ann | {"iat": 4})
        assert newer.visit()["capture"]
        soon = time.time() + 2
        short = tab(ann | {"exp": soon, "iat": 3})
        time.sleep(max(0.0, soon - time.time()))
        assert short.visit()["asked"]
        for one in (nobody, other, short, again, newer):
            one.close()
    assert access.login_key(ann | {"provider": "default"}) in access.EndedLogins(
        tmp_path / "routescope" / "ended-logins"
    )
