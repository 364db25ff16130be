"""What errors quote of their input: at most a line."""

import pytest

from capture.errors import CaptureError, cut, first_line, quoted
from capture.recorder.config import CaptureConfig
from explorer.errors import ExplorerError
from explorer.registry import Registry
from explorer.router_cards import parse_router, split_routers

LONG = "word\n" * 100_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("short", "'short'"),
        (7, "7"),
        ([1, 2], "[1, 2]"),
        ("a\nb", "'a\\nb'"),
        (10**5000, "a number with too many digits to write"),
    ],
    ids=["text", "number", "list", "lines", "digits"],
)
def test_short_values_are_written_as_they_are(value, shown):
    assert quoted(value) == shown


@pytest.mark.parametrize(
    "value", [LONG, [LONG] * 9, {LONG: LONG}, LONG.encode(), [[[[LONG]]]]], ids=list("abcde")
)
def test_long_values_are_cut_to_a_line(value):
    assert len(quoted(value)) <= 80 and "\n" not in quoted(value)
    assert len(quoted(value, 20)) <= 20


def test_lines_are_cut():
    assert cut("a\nb") == "a b" and len(cut(LONG)) <= 200
    assert first_line(ValueError("")) == "ValueError"
    assert first_line("one\ntwo") == "one" and len(first_line("x" * 10_000)) == 200


@pytest.mark.parametrize(
    "act",
    [
        lambda: CaptureConfig(level=LONG),
        lambda: CaptureConfig(dtype=LONG),
        lambda: CaptureConfig(generate=LONG),
        lambda: CaptureConfig(attention_layers=LONG),
        lambda: parse_router(f"top_k(k='{LONG}'"),
        lambda: parse_router(f"top_k({'x' * 100_000})"),
        lambda: parse_router(split_routers("9" * 100_000)[0]),
        lambda: Registry("thing")["x" * 100_000],
    ],
)
def test_errors_about_long_input_are_short(act):
    with pytest.raises((CaptureError, ExplorerError)) as caught:
        act()
    assert len(str(caught.value)) < 600
