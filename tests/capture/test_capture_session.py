"""A recorded run says what the model did: against the model itself, alone, and by hand."""

import contextlib
import functools
import gc
import signal
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import opened
import pytest
import tiny_models
import torch
from checks import assert_close

import capture
from capture.errors import (
    CaptureCancelled,
    ConfigError,
    ModelError,
    PromptError,
    SiteError,
    StoreError,
)
from capture.model.load import load_model
from capture.recorder.estimate import check_space
from capture.store import RECORDED_LEVELS, RunReader, RunWriter, recover
from capture.store import writer as writer_module

pytestmark = pytest.mark.slow

# batches of other shapes sum in another order; float32 keeps about seven digits
TOLERANCE = 2e-4
# a stored weight is rounded to 2**-11 relative, a stored statistic to half precision
STORED = 2e-3


@functools.cache
def demo():
    return load_model("demo")


@functools.cache
def tiny(model_type):
    return tiny_models.build(model_type)


def unequal(n=7, *, seed=0, longest=23):
    rng = np.random.default_rng(seed)
    lengths = [1, 2, longest, *rng.integers(3, longest, n - 3).tolist()]
    return [rng.integers(3, 60, length).tolist() for length in lengths]


def record(model, prompts, out, **options):
    options = {"sample_tokens": 0, "progress": False, **options}
    return capture.record(model, prompts, out, **options)


def table(path, sql):
    return opened.reader(path).query(sql).to_pydict()


def ids_by_token(path):
    """Expert ids, weights and margins by (token_id, layer, site)."""
    rows = table(
        path,
        "SELECT token_id, layer, site, list(expert_id ORDER BY slot) ids, "
        "list(weight ORDER BY slot) weights FROM assignments GROUP BY ALL",
    )
    keys = zip(rows["token_id"], rows["layer"], rows["site"], strict=True)
    return dict(zip(keys, zip(rows["ids"], rows["weights"], strict=True), strict=True))


def margins(path):
    rows = table(path, "SELECT token_id, layer, site, margin, entropy FROM gates")
    keys = zip(rows["token_id"], rows["layer"], rows["site"], strict=True)
    return dict(zip(keys, zip(rows["margin"], rows["entropy"], strict=True), strict=True))


def assert_same_routing(first, second):
    """Equal up to rounding; ids may differ only where the margin is within it."""
    ids_a, ids_b = ids_by_token(first), ids_by_token(second)
    gates_a, gates_b = margins(first), margins(second)
    assert ids_a.keys() == ids_b.keys() == gates_a.keys() == gates_b.keys()
    for key, (ids, weights) in ids_a.items():
        margin, entropy = gates_a[key]
        if sorted(ids) != sorted(ids_b[key][0]):
            assert margin is not None and abs(margin) < TOLERANCE, f"{key}: other experts"
            continue
        by_expert = dict(zip(*ids_b[key], strict=True))
        for expert, weight in zip(ids, weights, strict=True):
            assert weight == pytest.approx(by_expert[expert], rel=STORED, abs=TOLERANCE), key
        if entropy is not None:
            assert entropy == pytest.approx(gates_b[key][1], rel=STORED, abs=TOLERANCE), key


@pytest.mark.parametrize(
    "model_type", ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"]
)
def test_padded_batches_equal_each_prompt_alone(tmp_path, model_type):
    prompts = unequal()
    together = record(tiny(model_type), prompts, tmp_path / "a.duckdb", batch_tokens=10_000)
    alone = record(tiny(model_type), prompts, tmp_path / "b.duckdb", batch_tokens=1)
    assert table(together, "SELECT count(*) n FROM batches")["n"] == [1]
    assert table(alone, "SELECT count(*) n FROM batches")["n"] == [len(prompts)]
    assert_same_routing(together, alone)
    sql = "SELECT token_id, prompt_id, position, token, loss FROM tokens ORDER BY token_id"
    a, b = table(together, sql), table(alone, sql)
    n_tokens = sum(map(len, prompts))
    assert a["token_id"] == b["token_id"] == list(range(n_tokens))
    assert a["token"] == b["token"] == [token for prompt in prompts for token in prompt]
    assert a["position"] == [i for prompt in prompts for i in range(len(prompt))]
    assert a["loss"] == [None if x is None else pytest.approx(x, abs=TOLERANCE) for x in b["loss"]]


@pytest.mark.parametrize("model_type", sorted(tiny_models.REQUIRED))
def test_losses_are_the_models_own(tmp_path, model_type, monkeypatch):
    monkeypatch.setattr(
        "capture.model.forward.LOGIT_BYTES", {"cpu": 64 * 4 * 5}
    )  # five rows at a time
    model, prompts = tiny(model_type), unequal(4)
    path = record(model, prompts, tmp_path / "a.duckdb", batch_tokens=10_000)
    losses = table(path, "SELECT loss FROM tokens ORDER BY token_id")["loss"]
    start = 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        expected = -log_probs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        found = losses[start : start + len(prompt)]
        assert found.pop() is None, "the last token has no next one"
        assert_close("loss", torch.tensor(found), expected, atol=TOLERANCE)
        start += len(prompt)


def test_a_head_that_does_more_is_left_to_the_model(tmp_path, monkeypatch):
    """Logits that no known last step explains are taken from the model, in smaller batches."""
    model, prompts = tiny_models.build("olmoe"), unequal(4)
    plain = record(model, prompts, tmp_path / "a.duckdb", batch_tokens=1000)
    forward = model.forward

    def doubled(**arguments):
        output = forward(**arguments)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    monkeypatch.setattr("capture.model.forward.ALL_LOGIT_BYTES", 30 * 64 * 4)  # thirty tokens
    path = record(model, prompts, tmp_path / "b.duckdb", batch_tokens=1000)
    assert table(path, "SELECT max(tokens) <= 30 ok FROM batches")["ok"] == [True]
    losses = [table(p, "SELECT loss FROM tokens ORDER BY token_id")["loss"] for p in (plain, path)]
    with torch.inference_mode():
        ids = torch.tensor([prompts[2]])
        log_probs = (forward(input_ids=ids).logits[0].float() * 2).log_softmax(-1)
    expected = -log_probs[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert losses[1][3 : 3 + len(expected)] == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert losses[0] != losses[1]


def test_a_model_without_a_language_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"OlmoeModel puts out no logits.*AutoModelForCausalLM"):
        record(tiny("olmoe").model, [[3, 4]], tmp_path / "a.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_routing_is_the_models_own(tmp_path):
    """OLMoE without renormalisation: weights are the top of the softmax of the router's output."""
    model, prompts = tiny("olmoe"), unequal(4)
    path = record(model, prompts, tmp_path / "a.duckdb", level="scores", batch_tokens=10_000)
    stored = ids_by_token(path)
    gates = margins(path)
    scores = table(path, "SELECT scores FROM scores ORDER BY token_id, layer")["scores"]
    token_id, row = 0, 0
    for prompt in prompts:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([prompt]), output_router_logits=True)
        for position in range(len(prompt)):
            for layer, logits in enumerate(out.router_logits):
                probs = logits[position].softmax(-1)
                weights, ids = probs.topk(3)
                got_ids, got_weights = stored[token_id, layer, 0]
                assert got_ids == ids.tolist()
                assert got_weights == pytest.approx(weights.tolist(), rel=1e-3)
                margin = weights[2] - probs.sort(descending=True).values[3]
                entropy = -(probs * probs.log()).sum()
                assert gates[token_id, layer, 0] == pytest.approx(
                    (margin.item(), entropy.item()), rel=STORED, abs=TOLERANCE
                )
                assert scores[row] == pytest.approx(logits[position].tolist(), abs=TOLERANCE)
                row += 1
            token_id += 1


def test_sums_are_those_of_the_tokens_by_domain(tmp_path):
    prompts = [
        {"ids": ids, "domain": domain}
        for ids, domain in zip(unequal(6), ["law", None, "law", "maths", None, "c"], strict=True)
    ]
    path = record(tiny("olmoe"), prompts, tmp_path / "a.duckdb", level="scores", batch_tokens=40)
    load = table(
        path,
        "SELECT layer, domain, expert_id, assignments, weight_sum, prob_sum FROM expert_load_by "
        "ORDER BY ALL",
    )
    counted = table(
        path,
        "WITH p AS (SELECT layer, domain, list(scores) s FROM scores JOIN tokens USING (token_id) "
        "JOIN prompts USING (prompt_id) GROUP BY ALL) SELECT layer, domain, s FROM p ORDER BY ALL",
    )
    probs = np.concatenate(
        [np.sum([softmax(scores) for scores in s], axis=0) for s in counted["s"]]
    )
    assert np.allclose(load["prob_sum"], probs, atol=1e-3)
    by_hand = table(
        path,
        "SELECT layer, domain, expert_id, count(*) n, sum(weight) w FROM assignments "
        "JOIN tokens USING (token_id) JOIN prompts USING (prompt_id) GROUP BY ALL",
    )
    keys = list(zip(load["layer"], load["domain"], load["expert_id"], strict=True))
    assert len(keys) == 3 * 4 * 8, "layers, domains, experts: idle ones too"
    expected = {
        (layer, domain, expert): (n, pytest.approx(w, rel=STORED))
        for layer, domain, expert, n, w in zip(*by_hand.values(), strict=True)
    }
    found = zip(load["assignments"], load["weight_sum"], strict=True)
    assert dict(zip(keys, found, strict=True)) == {k: expected.get(k, (0, 0.0)) for k in keys}
    assert sum(load["assignments"]) == sum(len(p["ids"]) for p in prompts) * 3 * 3


def softmax(scores):
    values = np.exp(np.array(scores) - max(scores))
    return values / values.sum()


@pytest.mark.parametrize("level", RECORDED_LEVELS)
def test_levels_and_sample(tmp_path, level):
    model = tiny("mixtral")
    prompts = [{"ids": p, "domain": d} for p, d in zip(unequal(5), "aabbb", strict=True)]
    n_tokens = sum(len(p["ids"]) for p in prompts)
    path = record(
        model, prompts, tmp_path / "a.duckdb", level=level, sample_tokens=10, batch_tokens=30
    )
    views = ("assignments", "gates", "scores", "hidden", "sampled_tokens", "tokens")
    maps = table(path, "SELECT count(*) n FROM attention_maps")
    # all prompts but the one of one token, layers, heads
    assert maps == {"n": [4 * 3 * 4 if level == "attention" else 0]}
    count = {view: table(path, f"SELECT count(*) n FROM {view}")["n"][0] for view in views}
    rows = n_tokens * 3
    assert count == {
        "assignments": 0 if level == "stats" else rows * 3,
        "gates": 0 if level == "stats" else rows,
        "scores": rows if level in ("scores", "attention") else 10 * 3,
        "hidden": 10 * 3,
        "sampled_tokens": 10,
        "tokens": n_tokens,
    }
    by_domain = table(
        path, "SELECT domain, count(*) n FROM sampled_tokens GROUP BY ALL ORDER BY ALL"
    )
    assert by_domain == {"domain": ["a", "b"], "n": [3, 7]} or min(by_domain["n"]) == 5
    pairs = table(
        path, "SELECT layer, hidden, scores FROM hidden JOIN scores USING (token_id, layer)"
    )
    for layer, hidden, scores in zip(*pairs.values(), strict=True):
        router = model.model.layers[layer].mlp.gate.weight.detach()
        expected = torch.tensor(hidden) @ router.T
        assert_close("scores", torch.tensor(scores), expected, atol=TOLERANCE)
    with RunReader.open(path) as run:
        assert run.info["complete"] and run.info["level"] == level
        assert run.info["n_tokens"] == n_tokens


def test_the_demo_prompts_join_and_the_run_says_what_it_is(tmp_path):
    texts = ["Hi", "👩‍👩‍👧‍👦 שלום <b>", "word " * 30, "e\u0301"]
    loaded = demo()
    path = record(
        loaded.model, texts, tmp_path / "a.duckdb", tokenizer=loaded.tokenizer, max_length=20
    )
    rows = table(
        path,
        "SELECT string_agg(t.text, '' ORDER BY position) joined, any_value(p.text) whole, "
        "max(truncated) cut FROM tokens t JOIN prompts p USING (prompt_id) "
        "JOIN prompt_sizes USING (prompt_id) GROUP BY prompt_id ORDER BY prompt_id",
    )
    assert rows["whole"] == texts
    for joined, whole, cut in zip(*rows.values(), strict=True):
        assert joined == whole if not cut else whole.startswith(joined)
    assert [cut > 0 for cut in rows["cut"]] == [False, True, True, False]
    with RunReader.open(path) as run:
        info = run.info
        assert info["n_truncated_prompts"] == 2
        assert (info["architecture"], info["dtype"]) == ("OlmoeForCausalLM", "float32")
        assert '"torch"' in info["packages"] and '"gate"' in info["backends"]


def test_two_runs_of_the_same_input_are_equal(tmp_path):
    prompts = unequal()
    runs = [
        record(tiny("deepseek_v3"), prompts, tmp_path / name, sample_tokens=5, batch_tokens=40)
        for name in ("a", "b")
    ]
    for view in ("assignments", "gates", "tokens", "scores", "hidden", "sampled_tokens", "batches"):
        first, second = (table(run, f"SELECT * FROM {view} ORDER BY ALL") for run in runs)
        assert first == second, view


def test_prompts_beyond_the_context_are_cut(tmp_path):
    long = [5] * 300  # the tiny models have a context of 128
    path = record(tiny("olmoe"), [long, [6, 7]], tmp_path / "a.duckdb")
    assert table(path, "SELECT * FROM prompt_sizes ORDER BY prompt_id") == {
        "prompt_id": [0, 1],
        "n_tokens": [128, 2],
        "truncated": [172, 0],
    }


def test_nothing_is_left_on_the_model(tmp_path):
    model = tiny_models.build("qwen3_moe")
    record(model, [[5, 6]], tmp_path / "a.duckdb")
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_existing_run_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "a.duckdb").write_bytes(b"mine")
    with pytest.raises(StoreError, match="already exists"):
        record("no/such/model", [[1]], tmp_path / "a.duckdb")
    assert (tmp_path / "a.duckdb").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "all"}, ConfigError, "level must be one of .*scores, attention, got 'all'"),
        ({"attention_prompts": 0}, ConfigError, "attention_prompts must be a whole number"),
        (
            {"attention_layers": ()},
            ConfigError,
            r"attention_layers must be whole numbers.*got \(\)",
        ),
        ({"attention_heads": [-1]}, ConfigError, "attention_heads must be a whole number of at"),
        ({"sample_tokens": -1}, ConfigError, "sample_tokens must be a whole number"),
        ({"generate": 1.5}, ConfigError, r"generate must be a whole number.*got 1\.5"),
        ({"generate": 128}, ConfigError, "no room for a prompt .* 128 tokens. Choose at most 127"),
        ({"batch_tokens": 0}, ConfigError, "batch_tokens must be a whole number of at least 1"),
        ({"dtype": "int8"}, ConfigError, "dtype must be one of float32"),
        ({"prompts": [[64]]}, PromptError, "token id 64 is not in the model's vocabulary of 64"),
        ({"prompts": ["text"]}, PromptError, "Prompt 1 is text, but the model has no tokenizer"),
        ({"prompts": [[1], ""]}, PromptError, "prompt 2 is empty"),
        ({"model": torch.nn.Linear(1, 1)}, ModelError, "loaded PreTrainedModel was expected"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_file(tmp_path, options, error, message):
    options = {"model": tiny("olmoe"), "prompts": [[3, 4]], "out": tmp_path / "a.duckdb", **options}
    with pytest.raises(error, match=message):
        record(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("capture.recorder.estimate.HEADROOM", 1e12)
    with pytest.raises(ConfigError, match=r"needs about .* has .* free. Choose another place"):
        record(tiny("olmoe"), [[3, 4]], tmp_path / "a.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_the_log_needs_room_on_the_disk_too(monkeypatch):
    cost = SimpleNamespace(total_bytes=1e6)
    for free, enough in ((3.2e6, False), (3.4e6, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        context = nullcontext() if enough else pytest.raises(ConfigError, match=r"about 3\.3 MB")
        with context:
            check_space(cost, Path("a.duckdb"))


def stop_after(n_calls):
    calls = iter(range(n_calls))
    return lambda: next(calls, None) is None


def test_cancel_keeps_what_was_recorded_as_an_incomplete_run(tmp_path):
    prompts = unequal()
    with pytest.raises(CaptureCancelled, match=r"Cancelled: .* incomplete run") as caught:
        record(tiny("olmoe"), prompts, tmp_path / "a.duckdb", batch_tokens=1, cancel=stop_after(4))
    assert caught.value.path == tmp_path / "a.duckdb"
    with RunReader.open(caught.value.path) as run:
        assert not run.info["complete"]
        assert run.query("SELECT count(*) n FROM batches").to_pydict() == {"n": [3]}
        counts = run.query("SELECT layer, count(*) n FROM gates GROUP BY layer").to_pydict()
        assert set(counts["n"]) == {run.info["n_tokens"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.duckdb"]


@pytest.mark.parametrize("calls", [0, 1])
def test_cancel_before_the_first_pass_leaves_nothing(tmp_path, calls):
    with pytest.raises(CaptureCancelled, match="before anything was recorded") as caught:
        record(tiny("olmoe"), [[3, 4]], tmp_path / "a.duckdb", cancel=stop_after(calls))
    assert caught.value.path is None
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_passes_keeps_what_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0)
    reports = []

    def interrupt(report):
        reports.append(report)
        if report.stage == "recording" and report.tokens_done > 20:
            reports.append("interrupt")
            raise KeyboardInterrupt

    with pytest.raises(CaptureCancelled, match=r"Interrupted: .* kept as the incomplete run"):
        record(
            tiny("olmoe"), unequal(40), tmp_path / "a.duckdb", batch_tokens=1, progress=interrupt
        )
    assert reports.count("interrupt") == 1
    with RunReader.open(tmp_path / "a.duckdb") as run:
        assert not run.info["complete"] and run.info["n_tokens"] > 20


def test_ctrl_c_that_a_callback_swallows_still_ends_the_capture(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _swallow_ctrl_c(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def _swallow_ctrl_c(tmp_path):
    model = tiny_models.build("olmoe")
    calls = []

    def swallowing(*_):
        calls.append(1)
        if len(calls) == 6:
            # what Python does with errors in finalizers, and torch in some of its callbacks
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    model.model.register_forward_pre_hook(swallowing)
    with pytest.raises(CaptureCancelled, match=r"Interrupted: .* kept as the incomplete run"):
        record(model, unequal(), tmp_path / "a.duckdb", batch_tokens=1)
    assert len(calls) == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_pass_leaves_nothing(tmp_path):
    def interrupt(report):
        if report.stage == "recording":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tiny("olmoe"), unequal(), tmp_path / "a.duckdb", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_failing_writer_is_reported_and_what_was_committed_is_recoverable(tmp_path, monkeypatch):
    append, calls = RunWriter.append, []

    def failing(self, forward):
        calls.append(forward)
        if len(calls) == 3:
            self.flush()
            raise StoreError("could not be written: No space left on device.")
        append(self, forward)

    monkeypatch.setattr(RunWriter, "append", failing)
    with pytest.raises(StoreError, match="No space left") as caught:
        record(tiny("olmoe"), unequal(), tmp_path / "a.duckdb", batch_tokens=1)
    assert "capture recover" in caught.value.__notes__[0]
    assert len(calls) == 3, "later passes are thrown away"
    path = recover(tmp_path / "a.duckdb.partial")
    assert table(path, "SELECT count(*) n FROM batches") == {"n": [2]}


def test_a_model_that_fails_leaves_a_recoverable_file(tmp_path):
    model = tiny_models.build("olmoe")
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    model.model.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(model, unequal(), tmp_path / "a.duckdb", batch_tokens=1)
    path = recover(tmp_path / "a.duckdb.partial")
    assert table(path, "SELECT count(*) n FROM batches")["n"][0] >= 1


def test_a_site_that_stops_running_ends_the_capture(tmp_path):
    model = tiny_models.build("olmoe")
    mlp = model.model.layers[1].mlp
    forward, calls = mlp.forward, []

    def skipping(hidden):
        calls.append(1)
        return forward(hidden) if len(calls) < 5 else hidden

    mlp.forward = skipping
    with pytest.raises(SiteError, match=r"model\.layers\.1\.mlp should run once"):
        record(model, unequal(), tmp_path / "a.duckdb", batch_tokens=1)


def test_progress_goes_from_loading_to_done(tmp_path):
    reports = []
    prompts = unequal()
    record(tiny("olmoe"), prompts, tmp_path / "a.duckdb", batch_tokens=60, progress=reports.append)
    stages = list(dict.fromkeys(report.stage for report in reports))
    assert stages == ["loading", "self-test", "recording", "writing", "done"]
    done = [report.tokens_done for report in reports]
    total = sum(map(len, prompts))
    assert done == sorted(done) and done[-1] == total == reports[-1].tokens_total
    running = [r for r in reports if r.stage == "recording" and r.tokens_done]
    assert all(r.tokens_per_second > 0 and r.seconds_left >= 0 for r in running)
    estimate = next(r.message for r in reports if r.stage == "recording")
    assert "Bytes per token by level: stats" in estimate and "Level ids" in estimate
