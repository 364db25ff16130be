"""What a configuration asks a forward pass to give besides changes nothing that capture does."""

import copy

import duckdb
import numpy as np
import pytest
import tiny_models
import torch

import capture
from capture.errors import CaptureError
from capture.model.inputs import plain_forward
from capture.model.load import load_model
from capture.model.selftest import attach
from capture.swap.measure import sequence_losses
from capture.swap.part_gates import gate_parts
from capture.swap.routers import swap
from capture.swap.rules import Choice

pytestmark = pytest.mark.slow

SWITCHES = {
    "output_router_logits": True,
    "_output_attentions": True,  # behind a setter that refuses it beside fast attention
    "output_hidden_states": True,
    "use_cache": False,
    "return_dict": False,
}
PROMPTS = [[5, 9, 12, 7], [7, 8]]
FAMILIES = ["mixtral", "gpt_oss", "granitemoe", "jetmoe", "qwen3_next", "llama4_text"]


def switched(model, switches):
    """Set switches in every configuration of a model, without its setters, and return it."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    configs[0] = model.generation_config
    for config in configs.values():
        vars(config).update(switches)
    return model


def configs_of(model):
    return [copy.copy(vars(m.config)) for m in model.modules() if "config" in vars(m)]


def content(path):
    """Return every table of a run but its own description and the times of its batches."""
    with duckdb.connect(str(path), read_only=True) as run:
        tables = run.execute("select schema_name, table_name from duckdb_tables()").fetchall()
        return {
            name: run.execute(f'select * from "{schema}"."{name}" order by all').fetchall()
            for schema, name in tables
            if name not in ("run", "batch")
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_with_all_switches_on_equals_one_without(family, tmp_path):
    def recorded(model, name):
        return content(capture.record(model, PROMPTS, tmp_path / name, generate=2, progress=False))

    plain = recorded(tiny_models.build(family), "plain.duckdb")
    model = switched(tiny_models.build(family), SWITCHES)
    before = configs_of(model)
    assert recorded(model, "switched.duckdb") == plain
    assert len(plain["token"]) == sum(map(len, PROMPTS)) + 4
    assert configs_of(model) == before


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run.duckdb"
    model = tiny_models.build("mixtral")
    capture.record(model, PROMPTS, out, level="attention", generate=1, progress=False)
    return content(out)


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_by_itself(name, plain_run, tmp_path):
    model, out = (
        switched(tiny_models.build("mixtral"), {name: SWITCHES[name]}),
        tmp_path / "r.duckdb",
    )
    capture.record(model, PROMPTS, out, level="attention", generate=1, progress=False)
    assert content(out) == plain_run


def test_switches_of_a_saved_model(tmp_path):
    model = tiny_models.build("mixtral")
    model.config.output_router_logits, model.config.return_dict = True, False
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu").model
    assert loaded.config.output_router_logits
    capture.record(tmp_path / "model", PROMPTS, tmp_path / "run.duckdb", generate=1, progress=False)
    assert len(content(tmp_path / "run.duckdb")["token"]) == sum(map(len, PROMPTS)) + 2


def test_live_losses_swaps_and_gates_are_the_same():
    plain = tiny_models.build("mixtral")
    model = switched(tiny_models.build("mixtral"), SWITCHES)

    class First:
        def route(self, inputs):
            weights, ids = inputs.logits.softmax(-1).topk(1)
            return Choice(ids, weights)

    class Half:
        part, gate = "layer", None

        def route(self, inputs):
            self.gate = torch.full((len(inputs.hidden), 1), 0.5)
            return self

    def losses(subject):
        sites = attach(subject)
        rules = {
            "native": None,
            "swap": lambda: swap(subject, sites, First()),
            "gate": lambda: gate_parts(subject, sites, Half(), part="layer"),
        }
        return [
            sequence_losses(subject, PROMPTS, **({"swapped": rule} if rule else {})).sums
            for rule in rules.values()
        ]

    before = configs_of(model)
    np.testing.assert_array_equal(losses(model), losses(plain))
    assert configs_of(model) == before


def test_the_configuration_is_as_before_after_an_exception(tmp_path):
    model = switched(tiny_models.build("mixtral"), SWITCHES)
    before = configs_of(model)

    def fail(*_):
        raise RuntimeError("in the middle")

    model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises((RuntimeError, CaptureError), match="in the middle"):
        capture.record(model, PROMPTS, tmp_path / "run.duckdb", progress=False)
    assert configs_of(model) == before
    with pytest.raises(ZeroDivisionError), plain_forward(model):
        assert not model.config.output_router_logits
        assert model.config.return_dict
        raise ZeroDivisionError
    assert configs_of(model) == before


def test_nested_configurations_and_modules_are_reached():
    class Nested(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.output_hidden_states = config, True

    outer = tiny_models.config_of("mixtral")
    outer.text_config = tiny_models.config_of("olmoe", output_router_logits=True)
    model = Nested(outer)
    with plain_forward(model), plain_forward(model):
        assert not outer.text_config.output_router_logits
        assert not model.output_hidden_states
    assert outer.text_config.output_router_logits
    assert model.output_hidden_states
