"""An option of a capture is written down once: everything that takes options is made from it."""

import inspect
from dataclasses import asdict, fields

import pytest

from capture import CaptureConfig, record
from capture.__main__ import _capture_parser
from capture.recorder.config import RecordingOptions, described
from explorer.pages.capture.form import OPTIONS
from explorer.worker import CaptureRequest

DEFAULTS = asdict(CaptureConfig())


def test_every_field_is_described():
    assert [one.name for one in described(CaptureConfig)] == [f.name for f in fields(CaptureConfig)]
    for one in described(CaptureConfig):
        assert one.option.help and f"{one.name} : " in CaptureConfig.__doc__


def test_record_takes_every_option_and_no_other(tmp_path):
    parameters = inspect.signature(record).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    with pytest.raises(TypeError, match="'levle'"):
        record("demo", ["x"], tmp_path / "run.duckdb", levle="ids")


def test_the_command_line_takes_every_option():
    given = vars(_capture_parser().parse_args(["demo"]))
    assert {name: given[name] for name in DEFAULTS} == DEFAULTS
    help = " ".join(_capture_parser().format_help().split())
    for one in described(CaptureConfig):
        assert " ".join((one.option.help % {"default": one.default}).split()) in help
    text = "demo --level attention --attention-layers 3 0 --compile --seed 7 --dtype float32"
    given = vars(_capture_parser().parse_args(text.split()))
    assert (given["attention_layers"], given["compile"], given["seed"]) == ([3, 0], True, 7)


def test_a_request_and_the_form_take_what_is_recorded():
    names = {f.name for f in fields(RecordingOptions)}
    assert {f.name for f in fields(CaptureRequest)} == names | {"out", "model", "prompts"}
    request = CaptureRequest("/a.duckdb", level="attention", attention_layers=[0, 5])
    assert CaptureConfig(**request.recorded()).attention_layers == (0, 5)
    assert set(OPTIONS) == names
    assert {name for name, one in OPTIONS.items() if one.option.form is None} == {"level"}
