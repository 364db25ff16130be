"""Who is looking: the options of the command line, the login where there is one, and the role."""

import argparse
import hashlib
import ipaddress
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import streamlit as st
from streamlit.errors import StreamlitAuthError, StreamlitSecretNotFoundError

from explorer import writing
from explorer.text import plain
from explorer.ui import printing

Headers = Sequence[tuple[str, str]]

_HOST = re.compile(r"(\[[0-9a-f:.%]+\]|[^:\[\]/@\\\s,]+)(?::(\d{1,5}))?", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
# who set one of these is a proxy, and whoever is behind it is not known
_FORWARDED = re.compile(
    r"forwarded|via|x-forwarded-.+|x-real-ip|x-client-ip|x-cluster-client-ip|x-original-.+"
    r"|true-client-ip|cf-connecting-ip|fastly-client-ip|x-envoy-.+",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# of a login cookie, not of the login itself
_NOT_CLAIMS = ("origin", "is_logged_in", "tokens")
# a cookie is good for 30 days, and Streamlit allows a day more
_KEPT = 32 * 86_400  # seconds


class _Host(NamedTuple):
    name: str
    port: int | None


def _host(text: str) -> _Host | None:
    found = _HOST.fullmatch(text.strip())
    if found is None:
        return None
    name = found[1].strip("[]").lower()
    return _Host(name.removesuffix("."), int(found[2]) if found[2] else None)


def is_loopback(text: str) -> bool:
    """Return whether a Host header, with or without a port, is a name of this machine."""
    host = _host(text)
    if host is None:
        return False
    if host.name == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.name).is_loopback
    except ValueError:
        return False


def reached_by_own_name(headers: Headers, configured: Iterable[str] = ()) -> bool:
    """Return whether a request came to this machine itself, or to a host that is configured.

    Parameters
    ----------
    headers : sequence of (name, value)
        Of the request; a name may be there several times.
    configured : iterable of str
        Names of hosts, each with or without a port, that a proxy in front of the server answers
        to. Whoever reaches the server through one of them counts as one who may write.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    given, origins = values.get("host", []), values.get("origin", [])
    if len(given) != 1 or len(origins) > 1:
        return False
    known = [host for host in map(_host, configured) if host is not None]
    named = _is_configured(given[0], known)
    if any(_FORWARDED.fullmatch(name) for name in values):
        told = [part for text in values.get("x-forwarded-host", []) for part in text.split(",")]
        if not named or not all(_is_configured(host, known) for host in told):
            return False
    elif not named and not is_loopback(given[0]):
        return False
    return not origins or _is_same(origins[0], given[0])


def _is_configured(text: str, known: Sequence[_Host]) -> bool:
    host = _host(text)
    return host is not None and any(
        host.name == one.name and one.port in (None, host.port) for one in known
    )


def _is_same(origin: str, host: str) -> bool:
    """Return whether a page of an origin was loaded from this very host."""
    try:
        page = urlsplit(origin)
        port = page.port
    except ValueError:
        return False
    here, there = _host(host), _host(page.netloc)
    standard = _PORTS.get(page.scheme)
    if here is None or there is None or standard is None:
        return False
    return here.name == there.name and (here.port or standard) == (port or standard)


def address_of(claims: Mapping[str, Any]) -> str:
    """Return the e-mail address of somebody who logged in, "" if it may be anybody's.

    It counts only where the provider says that it was checked, and if it is one address.
    """
    email = claims.get("email")
    if claims.get("email_verified") is not True or not isinstance(email, str):
        return ""
    return _folded(email) if _EMAIL.fullmatch(email) else ""


def is_listed(email: str, entries: Any) -> bool:
    """Return whether an address is among addresses, or of a domain among them ("@example.org")."""
    given = [entries] if isinstance(entries, str) else entries
    names = {_folded(str(entry).strip()) for entry in given}
    return bool(email) and (email in names or "@" + email.partition("@")[2] in names)


def _folded(address: str) -> str:
    # outside ASCII, letters of different addresses may fold to the same one
    return address.lower() if address.isascii() else address


def is_expired(claims: Mapping[str, Any], now: float | None = None) -> bool:
    """Return whether the token behind a login has expired, or has no sound date."""
    until = claims.get("exp")
    if until is None:
        return False
    if isinstance(until, bool) or not isinstance(until, int | float):
        return True
    return not (time.time() if now is None else now) < until


def login_key(claims: Mapping[str, Any]) -> str:
    """Return what names one login: a digest of what the provider said at that time."""
    kept = {name: value for name, value in claims.items() if name not in _NOT_CLAIMS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


class EndedLogins:
    """Logins that were ended, in this process and in a file that outlives it.

    A login is a signed cookie, which the provider cannot take back from whoever copied it.

    Parameters
    ----------
    path : Path
        Made when the first login ends; one line, "KEY SECONDS", for each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._read = (0, 0)

    def add(self, key: str) -> None:
        """End a login, for good."""
        with self._lock:
            self._keys.add(key)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                number = os.open(self._path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
                with os.fdopen(number, "a") as file:
                    file.write(f"{key} {time.time():.0f}\n")
            except OSError as error:
                logging.getLogger(__name__).warning(
                    "%s cannot be written (%s): cookies of logins that ended count again after a "
                    "restart.",
                    self._path,
                    error.strerror,
                )

    def __contains__(self, key: object) -> bool:
        """Return whether a login was ended."""
        with self._lock:
            self._follow()
            return key in self._keys

    def _follow(self) -> None:
        """Read what other servers on this machine wrote since the last time."""
        try:
            status = self._path.stat()
            if (now := (status.st_mtime_ns, status.st_size)) == self._read:
                return
            lines = self._path.read_text().splitlines()
        except OSError:
            return
        self._read = now
        oldest = time.time() - _KEPT
        for line in lines:
            key, _, ended = line.partition(" ")
            if ended.isdecimal() and int(ended) > oldest:
                self._keys.add(key)


def ended_logins_path() -> Path:
    """Return where ended logins are kept, ``$XDG_STATE_HOME`` or ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "routescope" / "ended-logins"


ENDED = EndedLogins(ended_logins_path())
_serving = False


class Viewer(NamedTuple):
    """Whoever is looking.

    Attributes
    ----------
    email : str
        "" without a login.
    name : str
        For the author of a note; "" when it is not known.
    role : {"editor", "viewer"} or None
        None = may not look.
    """

    email: str
    name: str
    role: writing.Role | None


def begin() -> None:
    """Set what may be written, and let nobody in who may not look."""
    writing.configure(writing.Policy(read_only_option(), _role_of_caller))
    viewer = who()
    if viewer.role is not None:
        return
    st.title("RouteScope", anchor=False)
    if not st.user.is_logged_in or has_ended(st.user.to_dict()):
        again = " Your login has ended: log in again." if st.user.is_logged_in else ""
        st.markdown(f"This server shows its runs to those who log in.{again}")
        if st.button("Log in", type="primary"):
            try:
                st.login()
            except StreamlitAuthError as error:
                st.error(plain(str(error)), icon=":material/error:")
    else:
        st.error(
            "You are logged in, but not among those who may look at the runs of this server. Ask "
            "whoever runs it to add you.",
            icon=":material/lock:",
        )
        if st.button("Log out"):
            st.logout()
    st.stop()


def read_only_option() -> bool:
    """Return whether the app was started with ``-- --read-only``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--read-only", action="store_true")
    return bool(parser.parse_known_args(sys.argv[1:])[0].read_only)


def has_login() -> bool:
    """Return whether a login is configured."""
    return bool(_secrets("auth"))


def who() -> Viewer:
    """Return who is looking and what they may do."""
    if printing.theme():
        return Viewer("", "", "viewer")
    claims = st.user.to_dict() if has_login() and st.user.is_logged_in else {}
    return viewer_at(_headers(), claims)


def _headers() -> Headers:
    """Return the headers that the tab's connection began with."""
    headers = st.context.headers
    return [(name, value) for name in headers for value in headers.get_all(name)]


def viewer_at(headers: Headers, claims: Mapping[str, Any]) -> Viewer:
    """Return who sends a request.

    Parameters
    ----------
    headers : sequence of (name, value)
        Of the request. Without any, nobody is connected: in a served app that is somebody who
        left, else a program on this machine that runs the pages itself.
    claims : mapping
        Of the login, {} without one.
    """
    settings = _secrets("routescope")
    if has_login():
        if not claims or has_ended(claims):
            return Viewer("", "", None)
        return viewer_of(claims, settings)
    hosts = settings.get("hosts", ())
    own = reached_by_own_name(headers, [hosts] if isinstance(hosts, str) else hosts)
    trusted = is_local() and (own if headers else not _serving)
    return Viewer("", "", "editor" if trusted else "viewer")


def has_ended(claims: Mapping[str, Any]) -> bool:
    """Return whether a login was ended, or its token has expired."""
    return is_expired(claims) or login_key(claims) in ENDED


def login_address() -> str:
    """Return the address that the provider sends people back to, "" without a login."""
    return str(_secrets("auth").get("redirect_uri", ""))


def serve() -> None:
    """Note that a server runs in this process, so that everybody comes by a connection."""
    global _serving
    _serving = True


def viewer_of(claims: Mapping[str, Any], settings: Mapping[str, Any]) -> Viewer:
    """Return the role of somebody who logged in.

    Parameters
    ----------
    claims : mapping
        What the identity provider says: ``email``, ``email_verified``, and perhaps ``name``.
    settings : mapping
        ``editors`` and ``viewers``: addresses, or ``@example.org`` for all of a domain. Without
        ``viewers``, everybody whom the provider lets log in may look.
    """
    email = address_of(claims)
    name = str(claims.get("name") or email)
    if is_listed(email, settings.get("editors", ())):
        return Viewer(email, name, "editor")
    if "viewers" not in settings or is_listed(email, settings["viewers"]):
        return Viewer(email, name, "viewer")
    return Viewer(email, name, None)


def is_local() -> bool:
    """Return whether only this machine reaches the server."""
    address = str(st.get_option("server.address") or "0.0.0.0")
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def statement() -> str:
    """Say in one sentence who can see this server and what they may do."""
    if has_login():
        who_sees = "Those who log in see this server"
    elif is_local() and not writing.is_read_only() and not writing.may_write():
        who_sees = "This server has no login, and you reached it by a name that it does not know"
    elif is_local():
        who_sees = "This server has no login and listens on this machine only"
    else:
        who_sees = "This server has no login and can be reached from other machines"
    if writing.is_read_only():
        return f"{who_sees}; it was started read-only: nobody can change anything here."
    if writing.may_write():
        return f"{who_sees}; you may record, upload, save and delete."
    return f"{who_sees}; you may look, not change anything."


def _role_of_caller() -> writing.Role:
    return "editor" if who().role == "editor" else "viewer"


def _secrets(section: str) -> Mapping[str, Any]:
    try:
        return dict(st.secrets.get(section, {}))
    except StreamlitSecretNotFoundError:
        return {}
