"""Capture on a CUDA device: nothing waits on the model's stream, one launch and one copy a pass."""

import json
import threading

import duckdb
import numpy as np
import pytest
import tiny_models
import torch

import capture
from capture.model.forward import to_device
from capture.model.hooks import tap
from capture.model.selftest import attach
from capture.recorder.attention.layers import attach_attention
from capture.recorder.attention.summary import (
    AttentionOptions,
    PackedAttention,
    PromptRow,
    listen,
    mask_differs,
    pack_attention,
    rule_of,
    summarise,
)
from capture.recorder.observe import PairCounter, RealRows, group_sites, observe
from capture.recorder.transfer import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
REAL = np.array([0, 1, 2, 3, 4, 7, 8, 9])  # of two rows of seven
ROUTES = "SELECT token_id, layer, slot, expert_id FROM assignments ORDER BY ALL"


@pytest.fixture
def no_waiting():
    """A function after which any wait of the host for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def rows_on(device):
    return RealRows(
        rows=to_device(REAL, device),
        domain=to_device(np.array([0, 0, 0, 0, 0, 1, 1, 1]), device),
        n_domains=2,
        sampled=np.array([1, 6]),
        sampled_here=to_device(np.array([1, 6]), device),
    )


def observed(model, device, staging, before=lambda: None):
    """One forward pass, observed and sent; returns its blocks and its pairs."""
    sites = attach(model)
    groups = group_sites(sites)
    rows, counter = rows_on(device), PairCounter(sites, groups)
    wanted = to_device(REAL[[1, 6]], device)
    with torch.inference_mode(), tap(sites, hidden_rows=lambda: wanted) as taps:
        model(input_ids=tiny_models.tokens().to(device), use_cache=False)
        before()
        seen = taps.take()
        found = [observe(group, seen, rows, "scores") for group in groups]
        counter.add([ids for _, ids in found])
        record = ([block for block, _ in found], counter.take())
        parcel = staging.send(record, stop=threading.Event())
    torch.cuda.set_sync_debug_mode("default")
    return parcel.open()


def test_observing_and_sending_never_wait_for_the_device(no_waiting):
    model = tiny_models.build("mixtral").to(CUDA)
    observed(model, CUDA, Staging())  # compiles the kernels, which may wait
    on_device, device_pairs = observed(model, CUDA, Staging(), no_waiting)
    on_host, host_pairs = observed(model.cpu(), torch.device("cpu"), Staging())
    for name in ("expert_ids", "assignments"):
        np.testing.assert_array_equal(getattr(on_device[0], name), getattr(on_host[0], name))
    for name in ("pairs", "transitions"):
        np.testing.assert_array_equal(getattr(device_pairs[0], name), getattr(host_pairs[0], name))
    for name in ("entropy", "margin", "logsumexp", "topk_mass", "prob_sum"):
        values, expected = getattr(on_device[0], name), getattr(on_host[0], name)
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-3)
    for place in range(3):
        values, expected = on_device[0].scores[1][place], on_host[0].scores[1][place]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_a_forward_pass_takes_one_gate_launch_and_one_copy():
    model, staging = tiny_models.build("mixtral").to(CUDA), Staging()
    observed(model, CUDA, staging)
    started = threading.Event()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start():
        torch.cuda.synchronize()
        profiler.start()
        started.set()

    observed(model, CUDA, staging, start)
    torch.cuda.synchronize()
    profiler.stop()
    names = [event.name.lower() for event in profiler.events()]
    assert started.is_set()
    assert sum("gate" in name for name in names) == 1, names
    assert sum("memcpy dtoh" in name for name in names) == 1, names


def summarised(device, before=lambda: None):
    """The attention of two prompts in every layer and of two heads, packed."""
    model = tiny_models.build("mixtral", sliding_window=9).to(device)
    sites = attach_attention(model, attach(model), longest=14, heads=[1, 3]).sites
    calls = []
    ids = tiny_models.tokens(2, 14).to(device)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    rows = [PromptRow(0, 0, 0, 14), PromptRow(1, 1, 0, 11)]
    options = AttentionOptions(bins=8, every=1, top_keys=3)
    with torch.inference_mode():
        with listen({site.module: calls.append for site in sites}):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        before()
        found, doubts = [], []
        for site, call in zip(sites, calls, strict=True):
            rule = rule_of(site.module, call, site.layer_window)
            found.append([summarise(call, row, rule, site.heads, options) for row in rows])
            doubts += [mask_differs(call.mask, row, rule.window, "sdpa") for row in rows]
        packed = pack_attention(found, doubts)
    torch.cuda.set_sync_debug_mode("default")
    return PackedAttention(*(tensor.cpu().numpy() for tensor in packed))


def test_attention_never_waits_for_the_device(no_waiting):
    summarised(CUDA)  # compiles the kernels, which may wait
    on_device, on_host = summarised(CUDA, no_waiting), summarised("cpu")
    assert not on_device.doubts.any() and len(on_device.doubts) == 3 * 2
    np.testing.assert_allclose(on_device.floats, on_host.floats, atol=2e-3)
    assert (on_device.ids == on_host.ids).mean() > 0.9


@pytest.mark.parametrize(
    "options", [{}, {"generate": 3}, {"level": "scores"}, {"level": "attention"}]
)
def test_a_run_says_that_the_kernels_ran_and_equals_one_made_on_the_cpu(tmp_path, options):
    prompts = [{"ids": [*range(5, 5 + n)]} for n in (9, 7, 12, 3)]
    runs = {}
    for device in ("cpu", "cuda"):
        model = tiny_models.build("qwen3_moe").to(device)
        runs[device] = capture.record(
            model, prompts, tmp_path / device, sample_tokens=4, progress=False, **options
        )
    answers = {}
    for device, run in runs.items():
        with duckdb.connect(str(run), read_only=True) as connection:
            backends = json.loads(connection.sql("SELECT backends FROM run").fetchall()[0][0])
            routes = connection.sql(ROUTES).fetchall()
        answers[device] = routes
        if device == "cuda":
            assert set(backends.values()) == {"triton"}
    same = sum(a == b for a, b in zip(answers["cpu"], answers["cuda"], strict=True))
    # tokens between two experts fall either way
    assert same >= 0.98 * len(answers["cpu"])
