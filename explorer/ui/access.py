"""Who is looking: the options of the command line, the login where there is one, and the role."""

import argparse
import ipaddress
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import streamlit as st
from streamlit.errors import StreamlitAuthError, StreamlitSecretNotFoundError

from explorer import service
from explorer.ui import printing, trust
from explorer.ui.address import plain

ENDED = trust.EndedLogins(trust.ended_logins_path())
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
    role: service.Role | None


def begin() -> None:
    """Set what may be written, and let nobody in who may not look."""
    service.configure(service.Policy(read_only_option(), _role_of_caller))
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


def _headers() -> trust.Headers:
    """Return the headers that the tab's connection began with."""
    headers = st.context.headers
    return [(name, value) for name in headers for value in headers.get_all(name)]


def viewer_at(headers: trust.Headers, claims: Mapping[str, Any]) -> Viewer:
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
    own = trust.reached_by_own_name(headers, [hosts] if isinstance(hosts, str) else hosts)
    trusted = is_local() and (own if headers else not _serving)
    return Viewer("", "", "editor" if trusted else "viewer")


def has_ended(claims: Mapping[str, Any]) -> bool:
    """Return whether a login was ended, or its token has expired."""
    return trust.is_expired(claims) or trust.login_key(claims) in ENDED


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
    email = trust.address_of(claims)
    name = str(claims.get("name") or email)
    if trust.is_listed(email, settings.get("editors", ())):
        return Viewer(email, name, "editor")
    if "viewers" not in settings or trust.is_listed(email, settings["viewers"]):
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
    elif is_local() and not service.is_read_only() and not service.may_write():
        who_sees = "This server has no login, and you reached it by a name that it does not know"
    elif is_local():
        who_sees = "This server has no login and listens on this machine only"
    else:
        who_sees = "This server has no login and can be reached from other machines"
    if service.is_read_only():
        return f"{who_sees}; it was started read-only: nobody can change anything here."
    if service.may_write():
        return f"{who_sees}; you may record, upload, save and delete."
    return f"{who_sees}; you may look, not change anything."


def _role_of_caller() -> service.Role:
    return "editor" if who().role == "editor" else "viewer"


def _secrets(section: str) -> Mapping[str, Any]:
    try:
        return dict(st.secrets.get(section, {}))
    except StreamlitSecretNotFoundError:
        return {}
