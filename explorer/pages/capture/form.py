"""The fields of the form for what a capture records, drawn as the options are described."""

from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from capture.recorder.config import Described, Form, RecordingOptions, described

OPTIONS = {one.name: one for one in described(RecordingOptions)}
LEVELS = OPTIONS["level"].option.choices or {}
# numbers come before lists, and these before what is chosen among a few
_NUMBER, _LIST, _CHOICE = range(3)


def ask_level() -> str:
    """Draw the choice of the level and return it."""
    default = str(OPTIONS["level"].default)
    level = st.segmented_control(
        "Level",
        list(LEVELS),
        default=default,
        required=True,
        help="  \n".join(f"**{name}**: {text}" for name, text in LEVELS.items()),
        key="level choice",
    )
    st.caption(LEVELS[level or default])
    return level or default


def ask(columns: Sequence[DeltaGenerator], *, attention: bool) -> tuple[dict[str, Any], str]:
    """Draw the options of level attention, or those of every level, over some columns.

    Returns
    -------
    options : dict
        Fields of ``worker.CaptureRequest``.
    problem : str
        What is wrong with them, "" where nothing is.
    """
    found: dict[str, Any] = {}
    problem = ""
    asked = [
        (one, one.option.form)
        for one in OPTIONS.values()
        if one.option.form is not None and one.name.startswith("attention_") == attention
    ]
    for number, (one, form) in enumerate(sorted(asked, key=lambda pair: _kind(*pair))):
        found[one.name] = _ask(columns[number % len(columns)], one, form)
        if found[one.name] == []:
            problem = (
                f"Write {form.label.lower()} as whole numbers with commas, such as 0, 5, or leave "
                "it out."
            )
    return found, problem


def _kind(one: Described, form: Form) -> int:
    if form.values:
        return _CHOICE
    return _NUMBER if one.kind is int else _LIST


def _ask(column: DeltaGenerator, one: Described, form: Form) -> Any:
    key = one.name.replace("_", " ")
    if form.values:
        at = form.values.index(one.default)
        return column.selectbox(form.label, form.values, index=at, help=form.hint, key=key)
    if one.kind is int:
        number = column.number_input(
            form.label,
            min_value=one.option.least,
            max_value=form.most or None,
            value=one.default,
            step=form.step,
            help=form.hint,
            key=key,
        )
        return int(number)
    return _numbers(column.text_input(form.label, placeholder=form.hint, key=key))


def _numbers(text: str) -> list[int] | None:
    """Return the numbers of a list, None for an empty one, and [] for what is none."""
    parts = [part.strip() for part in text.replace(",", " ").split()]
    if not parts or parts == ["all"]:
        return None
    if all(part.isascii() and part.isdecimal() and len(part) < 5 for part in parts):
        return sorted({int(part) for part in parts})
    return []
