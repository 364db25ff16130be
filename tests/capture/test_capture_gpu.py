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
from capture.recorder.attention.calls import listen
from capture.recorder.attention.layers import attach_attention
from capture.recorder.attention.parcel import DOUBTS, FLOATS, IDS, pack_attention
from capture.recorder.attention.summary import (
    AttentionOptions,
    PromptRow,
    mask_differs,
    rule_of,
    summarise,
)
from capture.recorder.observe import Rows, group_sites, observe
from capture.recorder.pairs import PairCounter
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
    return Rows(
        rows=to_device(REAL, device),
        domain=to_device(np.array([0, 0, 0, 0, 0, 1, 1, 1]), device),
        n_domains=2,
        sampled=to_device(np.array([1, 6]), device),
    )


def observed(model, device, staging, before=lambda: None):
    """One forward pass, observed and sent; returns its arrays."""
    sites = attach(model)
    groups = group_sites(sites)
    rows, counter = rows_on(device), PairCounter(sites, groups)
    wanted = to_device(REAL[[1, 6]], device)
    with torch.inference_mode(), tap(sites, hidden_rows=lambda: wanted) as taps:
        model(input_ids=tiny_models.tokens().to(device), use_cache=False)
        before()
        seen = taps.take()
        tensors, ids = {}, []
        for number, group in enumerate(groups):
            found = observe(group, seen, rows, "scores")
            ids.append(found.expert_ids)
            tensors |= {f"{number}.{name}": value for name, value in found.tensors.items()}
        counter.add(ids)
        parcel = staging.send(tensors | counter.take(), stop=threading.Event())
    torch.cuda.set_sync_debug_mode("default")
    return parcel.open()


def test_observing_and_sending_never_wait_for_the_device(no_waiting):
    model = tiny_models.build("mixtral").to(CUDA)
    observed(model, CUDA, Staging())  # compiles the kernels, which may wait
    on_device = observed(model, CUDA, Staging(), no_waiting)
    on_host = observed(model.cpu(), torch.device("cpu"), Staging())
    for name in ("0.expert_ids", "0.assignments", "pairs.0", "transitions.0"):
        np.testing.assert_array_equal(on_device[name], on_host[name])
    for name in ("0.entropy", "0.margin", "0.logsumexp", "0.topk_mass", "0.prob_sum"):
        np.testing.assert_allclose(on_device[name], on_host[name], rtol=2e-3, atol=1e-3)
    for place in range(3):
        np.testing.assert_allclose(
            on_device["0.scores"][place], on_host[f"0.scores.{place}"], rtol=1e-3, atol=1e-3
        )


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
    return {name: tensor.cpu().numpy() for name, tensor in packed.items()}


def test_attention_never_waits_for_the_device(no_waiting):
    summarised(CUDA)  # compiles the kernels, which may wait
    on_device, on_host = summarised(CUDA, no_waiting), summarised("cpu")
    assert not on_device[DOUBTS].any() and len(on_device[DOUBTS]) == 3 * 2
    np.testing.assert_allclose(on_device[FLOATS], on_host[FLOATS], atol=2e-3)
    assert (on_device[IDS] == on_host[IDS]).mean() > 0.9


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
