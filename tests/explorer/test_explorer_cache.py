"""Hit rates of expert caches against plain implementations, laws, and numbers by hand."""

import json
import re
import subprocess

import numpy as np
import pytest
from synthetic import SITES, write_run

from explorer.__main__ import main
from explorer.errors import MetricError
from explorer.metrics.cache import (
    POLICIES,
    hit_rate,
    likely_next,
    pinned_hit_rate,
    pins,
    prefetched,
)
from explorer.queries.lookups import cache_lookups, trace
from explorer.run import open_run


def plain(ids, slots, policy):
    """The same rules over Python's dictionaries."""
    lookups = [int(expert) for token in ids for expert in token if expert >= 0]
    cache, counts, hits = {}, {}, 0  # expert -> when it was looked up last
    for at, expert in enumerate(lookups):
        hits += expert in cache
        if expert not in cache and len(cache) == slots:
            if policy == "belady":
                rest = lookups[at + 1 :]
                away = {e: rest.index(e) if e in rest else len(rest) for e in cache}
                del cache[max(cache, key=away.get)]
            elif policy == "lfu":
                del cache[min(cache, key=lambda e: (counts[e], cache[e]))]
            else:
                del cache[min(cache, key=cache.get)]
        cache[expert] = at
        counts[expert] = counts.get(expert, 0) + 1
    return hits / len(lookups)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 3, 8, 40])
def test_hits_are_those_of_a_plain_implementation(policy, slots):
    random = np.random.default_rng(slots)
    for skew in (0.3, 2.0):
        shares = random.dirichlet(np.full(16, skew))
        ids = np.array([random.choice(16, 3, replace=False, p=shares) for _ in range(150)])
        ids[::7, 2] = -1
        assert hit_rate(ids, slots=slots, policy=policy) == plain(ids, slots, policy)


def test_numbers_by_hand():
    ids = [[0], [1], [2], [0], [1], [2]]
    assert hit_rate(ids, slots=2, policy="lru") == 0.0  # each was evicted just before
    assert hit_rate(ids, slots=2, policy="belady") == pytest.approx(2 / 6)
    # 0 has two lookups and stays, although 1 came later
    assert hit_rate([[0], [0], [1], [2], [0]], slots=2, policy="lfu") == pytest.approx(2 / 5)
    # counts are those since the start: 0 was evicted and is loaded again with its old count
    ids = [[0], [0], [0], [1], [1], [1], [1], [2], [2], [2], [2], [0], [3], [0]]
    assert hit_rate(ids, slots=2, policy="lfu") == plain(ids, 2, "lfu")


def test_belady_is_a_bound_and_more_slots_hit_more():
    ids = np.random.default_rng(0).integers(0, 32, (400, 4))
    for slots in (2, 8, 20):
        bound = hit_rate(ids, slots=slots, policy="belady")
        assert all(hit_rate(ids, slots=slots, policy=policy) <= bound for policy in POLICIES)
    for policy in ("lru", "belady"):  # both are stack algorithms
        rates = [hit_rate(ids, slots=slots, policy=policy) for slots in range(1, 33)]
        assert rates == sorted(rates)
    # with room for all, only the first lookup of each misses
    assert hit_rate(ids, slots=32) == pytest.approx(1 - 32 / ids.size)


def test_nothing_to_look_up_is_not_a_rate():
    assert np.isnan(hit_rate(np.empty((0, 2), np.int64), slots=4))
    assert np.isnan(hit_rate([[-1, -1]], slots=4))


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[0]], {"slots": 1, "policy": "fifo"}, "one of lru, lfu, belady, got 'fifo'"),
        ([[0]], {"slots": 0}, "at least 1, got 0"),
        ([[0]], {"slots": 1.5}, "at least 1, got 1.5"),
        ([0, 1], {"slots": 1}, r"shape \(2,\)"),
        ([[0.5]], {"slots": 1}, "float64"),
        ([[-2]], {"slots": 1}, "got -2"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(ids, options, words):
    with pytest.raises(MetricError, match=words):
        hit_rate(ids, **options)


# --- pins and prefetching ------------------------------------------------------------------------


def test_the_busiest_experts_are_pinned():
    load = np.array([[5, 1, 3], [9, 2, 3]])
    assert pins(load[0], 2).tolist() == [True, False, True]
    assert pins(load, 3).tolist() == [[True, False, True], [True, False, False]]
    assert pins(load, 0).sum() == 0 and pins(load, 99).all()
    assert pinned_hit_rate([[0, 1], [2, -1]], [True, False, True]) == pytest.approx(2 / 3)
    assert np.isnan(pinned_hit_rate(np.empty((0, 1), int), [True]))
    for wrong in ([-1.0], [np.nan]):
        with pytest.raises(MetricError, match="0 or more"):
            pins(wrong, 1)


def test_the_next_layer_is_predicted_from_transitions():
    counts = [[8, 2, 0], [0, 0, 5], [0, 0, 0]]
    assert likely_next([[0, -1], [1, -1], [0, 1]], counts, 2).tolist() == [[0, 1], [2, 0], [2, 0]]


def plain_prefetched(ids, predicted, slots):
    order, hits, loads = [], 0, 0
    for token, before in zip(ids, predicted, strict=True):
        asked = [(e, True) for e in before[::-1]] + [(e, False) for e in token if e >= 0]
        for expert, fetch in asked:
            if expert in order:
                hits += not fetch
                order.remove(expert)
            else:
                loads += 1
                del order[: max(0, len(order) - slots + 1)]
            order.append(expert)
    return hits / sum(e >= 0 for token in ids for e in token), loads / len(ids)


@pytest.mark.parametrize("slots", [1, 4, 9])
def test_prefetching_is_that_of_a_plain_implementation(slots):
    random = np.random.default_rng(slots)
    ids = np.array([random.choice(12, 3, replace=False) for _ in range(200)])
    ids[::5, 1] = -1
    predicted = np.array([random.choice(12, 2, replace=False) for _ in range(200)])
    assert prefetched(ids, predicted, slots=slots) == plain_prefetched(
        ids.tolist(), predicted.tolist(), slots
    )
    nothing = prefetched(ids, np.empty((200, 0), int), slots=slots)
    assert nothing.hit_rate == hit_rate(ids, slots=slots, policy="lru")
    # who knows what comes always hits
    assert prefetched(ids[:, :1], ids[:, :1], slots=slots).hit_rate == 1
    with pytest.raises(MetricError, match="a prediction for each"):
        prefetched(ids, predicted[1:], slots=2)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "known.duckdb", sites=SITES[:2])


def test_a_trace_is_the_rows_in_the_order_of_requests_or_of_passes(known):
    by_id = {token["token_id"]: token for token in known.tokens}
    rank = {prompt: i for i, prompt in enumerate(sorted({t["prompt_id"] for t in known.tokens}))}

    def turn(one):
        token = by_id[one]
        return rank[token["prompt_id"]] // 2, token["position"], token["prompt_id"]

    with open_run(known.path) as run:
        found = trace(run, 3, together=2)
    rows = [
        [e for e, _ in known.routes[token, 3, 0]["experts"]] for token in sorted(by_id, key=turn)
    ]
    assert [[e for e in ids if e >= 0] for ids in found.expert_ids.tolist()] == rows
    for interleaved in (False, True):
        with open_run(known.path) as run:
            found = trace(run, 3, interleaved=interleaved)
            passes = run.query(
                "SELECT token_id FROM token_batches ORDER BY batch_id, row_in_batch"
            )["token_id"]
        order = (
            passes.tolist()
            if interleaved
            else sorted(by_id, key=lambda one: (by_id[one]["prompt_id"], by_id[one]["position"]))
        )
        rows = [[e for e, _ in known.routes[token, 3, 0]["experts"]] for token in order]
        assert [[e for e in ids if e >= 0] for ids in found.expert_ids.tolist()] == rows
        assert found.prompt_id.tolist() == [by_id[token]["prompt_id"] for token in order]


def test_the_command_judges_on_every_other_prompt_and_writes_pins(known, tmp_path, capsys):
    out = tmp_path / "pins.json"
    given = ["cache", str(known.path), "--slots", "2,4", "--expert-mb", "2"]
    assert main([*given, "--budget", "5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    # prefill and decode stand apart; pins are of both
    assert said.index(" prompt tokens") < said.index(" generated tokens")
    with open_run(known.path) as run:
        parts = [cache_lookups(run, phase=phase) for phase in ("prompt", "generated")]
    judged = [one.judged for one in parts[0]]
    for policy, title in (("lru", "LRU"), ("belady", "Belady (bound)")):
        rates = [np.mean([hit_rate(ids, slots=n, policy=policy) for ids in judged]) for n in (2, 4)]
        assert re.search(rf"^{re.escape(title)} +{rates[0]:.3f} +{rates[1]:.3f}$", said, re.M)
    assert "MB of experts loaded a token" in said
    loads = np.sum([[one.load for one in layers] for layers in parts], axis=0)
    expected = {str(layer): np.flatnonzero(row).tolist()
                for layer, row in zip((1, 3), pins(loads, 5), strict=True)}  # fmt: skip
    assert json.loads(out.read_text()) == {"budget": 5, "n_experts": 6, "pins": expected}


def decided(overrides, tensor):
    """Return the device of a tensor as llama.cpp finds it: the first pattern that occurs in it."""
    for pattern, device in re.findall(r'^-ot "(.*)=(\w+)"$', overrides, re.M):
        if re.search(pattern, tensor):
            return device
    return None


def test_overrides_decide_as_llama_cpp_reads_them(known, tmp_path):
    for kind, tensors in (("llama-cpp", "ffn_{}_exps"), ("llama-cpp-split", "ffn_{}.{}")):
        out = tmp_path / kind
        assert main(["cache", str(known.path), "--budget", "7", "--format", kind,
                     "--out", str(out)]) == 0  # fmt: skip
        on_gpu = {
            (layer, expert)
            for layer in (1, 3)
            for expert in range(6)
            for part in ("gate", "up", "down")
            if decided(out.read_text(), f"blk.{layer}.{tensors.format(part, expert)}.weight")
            == "CUDA0"
        }
        assert len(on_gpu) == (6 if kind == "llama-cpp" else 7)
        assert decided(out.read_text(), "blk.1.attn_q.weight") is None
        # as the page and the paper say it is given to llama-server
        given = subprocess.run(["xargs", "-a", str(out), "printf", "%s\\n"], capture_output=True,
                               text=True, check=True).stdout.splitlines()  # fmt: skip
        assert given == [part for line in out.read_text().splitlines()
                         for part in re.fullmatch(r'(-ot) "(.*)"', line).groups()]  # fmt: skip
        assert decided(out.read_text(), "blk.11.ffn_up_exps.weight") in ("CPU", None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--slots", "0"], "--slots must be numbers of experts from 1 to 6"),
        (["--budget", "3"], "--budget and --out go together"),
        (["--budget", "3", "--out", "x", "--format", "llama-cpp"], "keeps whole layers of 6"),
        (["--domain", "text"], "there are not two prompts"),
    ],
)
def test_what_cannot_be_simulated_is_refused(known, capsys, given, said):
    assert main(["cache", str(known.path), *given]) == 2
    assert said in capsys.readouterr().err
