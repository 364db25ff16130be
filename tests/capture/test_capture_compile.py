"""Models that run through torch.compile are recorded as they are without it."""

import shutil

import duckdb
import numpy as np
import pytest
import tiny_models
import torch

import capture
from capture.errors import ConfigError
from capture.model.hooks import tap
from capture.model.selftest import attach

pytestmark = pytest.mark.slow

PROMPTS = [{"ids": [*range(5, 5 + n)], "domain": "ab"[n % 2]} for n in (9, 7, 9, 3)]
ROUTES = "SELECT token_id, layer, site, slot, expert_id FROM assignments ORDER BY ALL"
NUMBERS = (
    "SELECT weight, entropy, margin, logsumexp, topk_mass FROM assignments"
    " JOIN gates USING (token_id, layer, site) ORDER BY token_id, layer, site, slot"
)
HIDDEN = "SELECT hidden FROM hidden ORDER BY token_id, layer, site"
LOSSES = "SELECT loss FROM tokens WHERE loss IS NOT NULL ORDER BY token_id"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def record(model, folder, name, **options):
    out = folder / name
    options = {"sample_tokens": 8, "batch_tokens": 20, **options}
    return capture.record(model, PROMPTS, out, progress=False, **options)


def ask(run, sql):
    with duckdb.connect(str(run), read_only=True) as connection:
        return connection.sql(sql).fetchall()


def numbers(run, sql):
    return np.array(ask(run, sql), np.float64)


def assert_same_run(run, expected):
    assert len(ask(run, ROUTES)) > 0
    assert ask(run, ROUTES) == ask(expected, ROUTES)
    for sql in (NUMBERS, LOSSES):
        # half precision in the file
        np.testing.assert_allclose(numbers(run, sql), numbers(expected, sql), rtol=2e-3, atol=1e-4)
    hidden = [np.array([row for (row,) in ask(path, HIDDEN)]) for path in (run, expected)]
    assert len(hidden[0]) > 0
    np.testing.assert_allclose(*hidden, atol=1e-4)


def small(name="mixtral", layers=1):
    """Every layer is traced on its own, which takes a second."""
    return tiny_models.build(name, num_hidden_layers=layers)


class Counting:
    """A backend that runs the traced graph as it is, and keeps the code of the graphs."""

    def __init__(self):
        self.traced = []

    @property
    def graphs(self):
        return len(self.traced)

    def __call__(self, graph, inputs):
        self.traced.append(graph.code)
        return graph


@pytest.mark.slow(seconds=5)
def test_a_compiled_model_is_recorded_like_the_model(tmp_path):
    model = small("qwen3_moe", layers=2)  # begins with a layer without experts
    expected = record(model, tmp_path, "plain")
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    run = record(compiled, tmp_path, "compiled")
    assert backend.graphs > 0, "the recorded passes did not run compiled"
    assert_same_run(run, expected)


@pytest.mark.slow(seconds=5)
def test_a_model_that_was_compiled_before_is_traced_again_and_keeps_no_hook(tmp_path):
    """Code compiled without hooks would record nothing, and code with hooks would go on to."""
    model = small()
    expected = record(model, tmp_path, "plain", generate=3)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = tiny_models.tokens()
    with torch.no_grad():
        before = compiled(input_ids=ids, use_cache=False).logits
        graphs = backend.graphs
        run = record(compiled, tmp_path, "compiled", generate=3)
        assert backend.graphs > graphs, "the recorded passes did not run compiled"
        assert all(module._compiled_call_impl is None for module in model.modules())
        graphs = backend.graphs
        after = compiled(input_ids=ids, use_cache=False).logits
        assert backend.graphs > graphs, "the code that was traced with hooks is still used"
        assert backend.traced and "routescope" not in backend.traced[-1]
        assert any("routescope" in code for code in backend.traced)
    assert torch.equal(before, after)
    assert_same_run(run, expected)


def test_a_model_compiled_in_place_is_traced_again_and_gets_its_compilation_back(
    tmp_path, monkeypatch
):
    """Its own code, which has run, fits the decoder as well as the code that is to hear it."""
    monkeypatch.setattr("capture.recorder.session.default_compiler", torch.compile(backend="eager"))
    model, seen = small(), []
    keep = model.model.register_forward_pre_hook(
        lambda _, args, options: seen.append((args, options)), with_kwargs=True
    )
    expected = record(model, tmp_path, "plain")
    keep.remove()
    modules = [model.model, model.model.layers[0]]
    for module in modules:
        module.compile(backend="eager")
    calls = [module._compiled_call_impl for module in modules]
    with torch.inference_mode():
        args, options = seen[-1]
        model.model(*args, **options)
    assert_same_run(record(model, tmp_path, "compiled"), expected)
    assert [module._compiled_call_impl for module in modules] == calls


def test_the_op_copies_what_it_is_given():
    """Compiled code writes into its buffers again."""
    model = small()
    sites = attach(model)[:1]
    with torch.no_grad(), tap(sites) as taps:
        channel = taps._channels[0]
        ids, weights = torch.ones(4, 3, dtype=torch.int64), torch.rand(4, 3)
        expected = weights.clone()

        @torch.compile(backend="eager", fullgraph=True)
        def step(ids, weights, scores):
            channel.put_choice(ids, weights)
            channel.put_scores(scores, None)

        step(ids, weights, torch.zeros(4, 8))
        weights.zero_()
        (seen,) = taps.take()
    assert torch.equal(seen.weights, expected)


def test_level_attention_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Leave out compile, or choose level 'scores'"):
        record("demo", tmp_path, "run", level="attention", compile=True)


@pytest.mark.slow(seconds=5)
@needs_compiler
# PyTorch's own import of inductor
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_records_what_the_plain_model_does(tmp_path):
    model = tiny_models.build("mixtral", num_hidden_layers=1)
    prompts = [{"ids": [*range(5, 17)]} for _ in range(2)]
    options = {"progress": False, "sample_tokens": 8}
    expected = capture.record(model, prompts, tmp_path / "plain", **options)
    run = capture.record(model, prompts, tmp_path / "run", compile=True, **options)
    assert_same_run(run, expected)
