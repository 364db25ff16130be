"""What a page shows is kept in its address, so that a link reopens the same view.

The address is the only truth: widgets are set from it before they are drawn, and write to it
when they change. Leaving a page and coming back within a session restores what it showed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

from explorer import saved_views
from explorer.text import plain
from explorer.ui import token_strip
from explorer.ui.state import View
from explorer.ui.wording import distinct

GLOBAL_NAMES = ("run", "phase", "domain", "search", "slice", "from", "to", "layer")
PAGE_NAMES: dict[str, tuple[str, ...]] = {
    "overview": ("order",),
    "experts": ("id", "about", "find", "among", "way"),
    "tokens": (*("prompt", "token", "color", "scope", "pins", "expert", "mode", "edits", "rule"),),
    "load-balance": (
        "topic",
        "metric",
        "batches",
        "factor",
        "hot",
        "gpus",
        "nodes",
        "expert_groups",
        "replicas",
        "by_windows",
        "windows",
        "policy",
        "requests",
        "loaded",
        "budget",
        "at_least",
    ),
    "attention": ("measure", "head", "prompt", "token", "window", "show"),
    "flow": ("steps", "flows", "pair"),
    "clusters": ("map", "vectors", "layout", "hue", "method", "groups", "other", "value", "region"),
    "compare": (
        *("comparison", "families", "controls", "axis", "router", "beside", "curve", "learner"),
        *("told", "a", "b", "text", "swapped", "at", "job"),
    ),
    "compare-runs": ("against", "ids", "by", "read", "shared", "spot", "quantity"),
    "trends": ("source", "runs", "trend"),
    "capture": ("job",),
    "share": (),
    "learn": ("step", "term"),
}
# what means nothing in another run
OF_A_RUN = (
    *GLOBAL_NAMES[1:],
    *("prompt", "token", "pins", "expert", "id", "head", "pair", "value", "region", "comparison"),
    *("families", "router", "beside", "told", "a", "b", "text", "at", "shared", "spot", "learner"),
    *("edits", "among"),
)
_NO_DOMAIN = "(none)"
_MEMORY, _PAGE, _NOTES = "address memory", "address page", "address notes"
_LEFT = "addresses that jumps left"


def begin(page: str) -> None:
    """Start a script run: after a change of page, put back what the session knows of it."""
    state = st.session_state
    memory: dict[str, str] = state.setdefault(_MEMORY, {})
    # a jump leaves a step in the browser's history with this page and the values of the next one
    of_jumps = {*PAGE_NAMES["experts"], *PAGE_NAMES["tokens"]}
    foreign = of_jumps.intersection(st.query_params).difference(names_of(page))
    if foreign and page in state.get(_LEFT, {}):
        st.query_params.from_dict(state[_LEFT][page])
    if _PAGE in state and state[_PAGE] != page:
        for name in (*GLOBAL_NAMES, *PAGE_NAMES[page]):
            if name not in st.query_params and memory.get(name):
                st.query_params[name] = memory[name]
    state[_PAGE] = page


def page() -> str:
    """Return the page that is open, as its address calls it."""
    return str(st.session_state[_PAGE])


def names_of(page: str) -> tuple[str, ...]:
    """Return what the address of a page may hold."""
    return (*GLOBAL_NAMES, *PAGE_NAMES.get(page, ()))


def restart(params: Mapping[str, str]) -> None:
    """Forget what the session showed, and remember this address instead."""
    st.session_state[_MEMORY] = dict(params)


def place_notes() -> None:
    """Reserve the place where notes are drawn, whichever part of the page makes them."""
    st.session_state[_NOTES] = st.container()


def read(name: str) -> str:
    """Return a value of the address, "" when it is not there."""
    value = str(st.query_params.get(name, ""))
    st.session_state.setdefault(_MEMORY, {})[name] = value
    return value


def write(name: str, value: str) -> None:
    """Change a value of the address; "" takes it out."""
    st.session_state.setdefault(_MEMORY, {})[name] = value
    if value:
        st.query_params[name] = value
    elif name in st.query_params:
        del st.query_params[name]


def domain_key(domain: str) -> str:
    """Return a domain as an address has it, where "" means all domains.

    Prompts without a domain are ``(none)``; a domain that is called so has a sign before it.
    """
    if not domain:
        return _NO_DOMAIN
    return f"={domain}" if domain.lstrip("=") == _NO_DOMAIN else domain


def kept(*left_out: str) -> dict[str, str]:
    """Return the filters that a link to another page takes with it."""
    values = {name: read(name) for name in GLOBAL_NAMES if name not in left_out}
    return {name: value for name, value in values.items() if value}


def write_run(name: str) -> None:
    """Change the run, and forget what was chosen in the one before."""
    for other in OF_A_RUN:
        write(other, "")
    write("run", name)


def pick(name: str, choices: Sequence[str], *, default: str, what: str) -> str:
    """Return a value of the address if it is among the choices, else the default with a note."""
    value = read(name)
    if not value or value in choices:
        return value or default
    _not_here(name, value, what)
    return default


def _not_here(name: str, value: str, what: str) -> None:
    """Say that a value of the address means nothing here, and take it out."""
    note(f"The link asks at “{what}” for “{value[:60]}”, which is not here; showing the default.")
    write(name, "")


def number(name: str, allowed: range, *, default: int | None, what: str) -> int | None:
    """Return a whole number of the address if it is allowed, else the default with a note."""
    value = read(name)
    if not value:
        return default
    if value.isascii() and value.isdecimal() and len(value) < 12 and int(value) in allowed:
        return int(value)
    _not_here(name, value, what)
    return default


def choose(
    widget: Callable[..., Any],
    name: str,
    label: str,
    choices: Sequence[str] | Mapping[str, str],
    *,
    default: str | None = None,
    show: Callable[[str], str] | None = None,
    resets: Sequence[str] = (),
    on_write: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """Draw a widget of one choice that reads from the address and writes to it.

    Parameters
    ----------
    widget : callable
        ``st.selectbox``, ``st.segmented_control``, ``st.radio`` or the like.
    choices : sequence or mapping of str
        Of a mapping, the values are what is shown.
    default : str, optional
        By default the first choice.
    show : callable, optional
        Returns what is shown of a choice; by default the choice itself.
    resets : sequence of str
        Names that go back to their defaults when this one changes.
    on_write : callable, optional
        Called with the new value instead of writing it under ``name``.
    """
    names = list(choices)
    first = names[0] if default is None else default
    if show is None:
        show = choices.__getitem__ if isinstance(choices, Mapping) else str
    value = pick(name, names, default=first, what=label)
    key = f"address:{name}"
    st.session_state[key] = value
    # a widget finds a choice by what it shows: no two may look alike
    shown = dict(zip(names, distinct([show(choice) for choice in names]), strict=True))

    def changed() -> None:
        new = st.session_state[key]
        # a segmented control lets go of its choice when it is clicked again
        new = first if new is None else new
        if on_write is not None:
            on_write(new)
            return
        for other in resets:
            write(other, "")
        write(name, "" if new == first else new)

    widget(
        label,
        names,
        key=key,
        format_func=lambda choice: shown.get(choice, choice),
        on_change=changed,
        **options,
    )
    return value


def several(name: str, choices: Sequence[str], *, default: Sequence[str], what: str) -> list[str]:
    """Return values of the address that are among the choices, with a note about the others."""
    value = read(name)
    if not value:
        return list(default)
    asked = saved_views.split(value)
    found = [one for one in asked if one in choices]
    for one in asked:
        if one not in choices:
            note(f"The link asks at “{what}” for “{one[:60]}”, which is not here; it is left out.")
    if asked and not found:
        found = list(default)
    if found != asked:
        write(name, saved_views.join(found))
    return found


def choose_several(
    widget: Callable[..., Any],
    name: str,
    label: str,
    choices: Sequence[str],
    *,
    default: Sequence[str],
    **options: Any,
) -> list[str]:
    """Draw a widget of several choices that reads from the address and writes to it.

    Parameters
    ----------
    widget : callable
        ``st.multiselect``, ``st.pills`` or the like.
    """
    value = several(name, choices, default=default, what=label)
    key = f"address:{name}"
    st.session_state[key] = value

    def changed() -> None:
        new = list(st.session_state[key])
        write(name, "" if set(new) == set(default) else saved_views.join(new))

    widget(label, choices, key=key, on_change=changed, **options)
    return value


def typed(name: str, label: str, longest: int, **options: Any) -> str:
    """Draw a field for text that reads from the address and writes to it."""
    key = f"address:{name}"
    st.session_state[key] = read(name)[:longest]
    st.text_input(
        label,
        key=key,
        max_chars=longest,
        on_change=lambda: write(name, st.session_state[key]),
        **options,
    )
    return str(st.session_state[key])


def closing(title: str, name: str, *, label: str = "Close") -> None:
    """Draw the heading of a box and a button that takes ``name`` out of the address, and so it."""
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.subheader(title, anchor=False)
    right.button(label, key=f"close {name}", on_click=lambda: write(name, ""), width="stretch")


def note(text: str) -> None:
    """Say something at the top of the page, such as that the link could not be followed."""
    st.session_state[_NOTES].info(plain(text), icon=":material/info:")


_TARGET = "jump to"
_EXPERTS, _TOKENS = "explorer/pages/experts/page.py", "explorer/pages/tokens/page.py"


def jump_to_expert(view: View, data: list[float]) -> None:
    """Remember the expert that was clicked; ``data`` starts with layer, site, expert.

    A callback cannot change the page, so ``follow_jump`` does it in the run that comes after.
    """
    layer, site, expert = (int(value) for value in data[:3])
    there = {
        "run": view.name,
        "layer": view.named(layer, site),
        "id": str(expert),
        "about": "expert",
    }
    st.session_state[_TARGET] = (_EXPERTS, there)


def jump_to_token(prompt_id: int, token_id: int) -> None:
    """Remember a token that was picked, as ``jump_to_expert`` does."""
    st.session_state[_TARGET] = (_TOKENS, {"prompt": str(prompt_id), "token": str(token_id)})


def follow_jump() -> None:
    """Go to what was clicked, if something was."""
    target = st.session_state.pop(_TARGET, None)
    if target is None:
        return
    page, there = target
    st.session_state.setdefault(_LEFT, {})[st.session_state[_PAGE]] = dict(st.query_params)
    forgotten: tuple[str, ...] = ()
    if there.get("run", read("run")) != read("run"):
        # filters and choices of the run before mean nothing there; the page that is left keeps
        # them in its address, for whoever goes back
        forgotten = OF_A_RUN
        st.session_state[_MEMORY].update(dict.fromkeys(forgotten, ""))
    if page == _TOKENS:
        token_strip.reveal()
    st.switch_page(page, query_params=kept(*forgotten) | there)
