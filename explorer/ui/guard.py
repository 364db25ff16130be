"""What stands before Streamlit's server: requests that no page of the app gets to see.

Streamlit takes uploads, hands out cookies and lets itself be framed before any script has run, so
this is said at the level of requests: who may not write sends no file; a login that ended is no
login, in open tabs and in copied cookies; cookies are ``Secure`` behind TLS; no page of a
stranger frames the app. The address of a page may be written in any case, and the playground is a
file of its own beside the pages.
"""

import importlib
import json
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import streamlit as st
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import cli_util
from streamlit.auth_util import get_cookie_with_chunks
from streamlit.web.server.server_util import get_cookie_secret, get_display_address, get_url
from streamlit.web.server.starlette.starlette_app_utils import decode_signed_value
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from explorer import playground
from explorer.ui import access, address
from explorer.worker import close_shared_worker

_UPLOAD, _LOGOUT = "/_stcore/upload_file/", "/auth/logout"
_READING = ("GET", "HEAD", "OPTIONS")
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"x-content-type-options", b"nosniff"),
)
# what the overview needs and takes long to load
_FIRST = ("explorer.ui.shell", "explorer.pages.load_balance.figures", "explorer.findings")
_GOODBYE = 1008  # code of a closed connection: policy


class Guard:
    """The application around Streamlit's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # the open connections of each login
        self._open: dict[str, set[_Connection]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it to Streamlit."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        login = claims_of(scope) if access.has_login() else {}
        key = access.login_key(login) if login else ""
        if login and access.has_ended(login):
            scope, login = _without_login(scope), {}
        if scope["type"] == "websocket":
            await self._connect(key if login else "", scope, receive, send)
            return
        answer = _Answer(send, secure=_is_secure(scope))
        path = scope["path"].removeprefix(base_path())
        if (page := _page_at(path)) is not None and scope["method"] in _READING:
            query = scope["query_string"].decode("latin-1")
            there = f"{base_path()}/{page}" + (f"?{query}" if query else "")
            await RedirectResponse(there)(scope, receive, answer)
            return
        if path.startswith(_UPLOAD) and scope["method"] not in _READING:
            if why := _refused(scope, login):
                await answer.refuse(why)
                return
        elif path.rstrip("/") == _LOGOUT and login:
            access.ENDED.add(key)
            for connection in list(self._open.get(key, ())):
                await connection.end()
        await self._app(scope, receive, answer)

    async def _connect(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        connection = _Connection(send)
        if key:
            self._open.setdefault(key, set()).add(connection)
        try:
            await self._app(scope, receive, connection)
        finally:
            if key:
                self._open[key].discard(connection)
                if not self._open[key]:
                    del self._open[key]


class _Connection:
    """What is sent to a tab, until its login ends."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._accepted = self._ended = False

    async def __call__(self, message: Message) -> None:
        if self._ended:
            return
        self._accepted |= message["type"] == "websocket.accept"
        self._ended |= message["type"] == "websocket.close"
        await self._send(message)

    async def end(self) -> None:
        """Close the tab's connection; it comes back without a login."""
        if self._accepted:
            await self({"type": "websocket.close", "code": _GOODBYE, "reason": "logged out"})


class _Answer:
    """What is answered to a request, with the headers that every answer has."""

    def __init__(self, send: Send, *, secure: bool) -> None:
        self._send = send
        self._secure = secure

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", []))
            message["headers"] = [*map(self._header, given), *_HEADERS]
        await self._send(message)

    def _header(self, header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        name, value = header
        is_cookie = name.lower() == b"set-cookie"
        if is_cookie and self._secure and b"; secure" not in value.lower():
            return name, value + b"; Secure"
        return name, value

    async def refuse(self, why: str) -> None:
        """Say no without reading what was sent."""
        body = why.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await self({"type": "http.response.start", "status": 403, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _page_at(path: str) -> str | None:
    """Return where the page is that a path means but does not spell as Streamlit does."""
    name = path.strip("/").lower().replace("_", "-")
    if name not in address.PAGE_NAMES:
        return None
    own = "" if name == "overview" else name
    return None if path == f"/{own}" else own


def headers_of(scope: Scope) -> list[tuple[str, str]]:
    """Return the headers of a request as text."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]


def claims_of(scope: Scope) -> dict[str, Any]:
    """Return what the login cookie of a request says, {} without one that is signed by us."""
    cookies: dict[str, str] = {}
    for name, value in headers_of(scope):
        if name.lower() == "cookie":
            cookies |= cookie_parser(value)
    secret = get_cookie_secret()

    def single(name: str) -> bytes | None:
        value = cookies.get(name)
        return decode_signed_value(secret, name, value.encode("latin-1")) if value else None

    try:
        found = json.loads(get_cookie_with_chunks(single, USER_COOKIE_NAME) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.get("is_logged_in") is True else {}


def _without_login(scope: Scope) -> Scope:
    """Return a request without the cookies of its login."""
    headers = []
    for name, value in scope["headers"]:
        if name.lower() == b"cookie":
            parts = [part.strip() for part in value.split(b";")]
            kept = [part for part in parts if not part.startswith(USER_COOKIE_NAME.encode())]
            headers.append((name, b"; ".join(kept)))
        else:
            headers.append((name, value))
    return {**scope, "headers": headers}


def _refused(scope: Scope, login: Mapping[str, Any]) -> str:
    """Return why somebody may send no file, "" if they may."""
    if access.read_only_option():
        return "This server was started with --read-only: it takes no files."
    if access.viewer_at(headers_of(scope), login).role != "editor":
        return "Sending a file needs the role editor."
    return ""


def _is_secure(scope: Scope) -> bool:
    """Return whether the browser speaks TLS, with this server or with a proxy before it."""
    return scope.get("scheme") in ("https", "wss") or access.login_address().startswith("https:")


def base_path() -> str:
    """Return what the addresses of this server begin with, "" by default."""
    base = str(st.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}" if base else ""


def _load() -> None:
    for name in _FIRST:
        importlib.import_module(name)


@asynccontextmanager
async def lifespan(app: object) -> AsyncIterator[None]:
    """Do what Streamlit does for a script: open the browser at a desk, and end in order."""
    access.serve()
    # while the browser loads what Streamlit sends, the first page's own modules are loaded
    threading.Thread(target=_load, daemon=True).start()
    if not st.get_option("server.headless"):
        address = st.get_option("browser.serverAddress") or st.get_option("server.address")
        cli_util.open_browser(get_url(get_display_address(str(address or "localhost"))))
    try:
        yield
    finally:
        # a signal that ends the server leaves no time for what is registered with atexit
        close_shared_worker()


async def _playground(_request: Request) -> Response:
    return Response(await run_in_threadpool(playground.document), media_type="text/html")


MIDDLEWARE = (Middleware(Guard),)
ROUTES = (Route(playground.ADDRESS, _playground),)
