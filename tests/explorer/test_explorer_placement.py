"""Placement of experts: the published example, and what any placement must keep."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from published_counts import COUNTS
from synthetic import SITES, write_run

from explorer.__main__ import main
from explorer.engine_files import PLACEMENT_FORMATS
from explorer.errors import MetricError, RunError
from explorer.metrics import placement, traffic
from explorer.queries.load import routing, window_loads
from explorer.run import open_run

# README of github.com/deepseek-ai/EPLB
PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example():
    found = placement.rebalance(PUBLISHED, 16, 4, 2, 8)
    assert found.phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found.logcnt.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    loads = placement.gpu_load(PUBLISHED, found, 8)
    assert loads[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    np.testing.assert_allclose(placement.balancedness(loads), [0.8277, 0.8050], atol=5e-5)


def test_the_global_policy_and_placements_without_replicas():
    # 4 groups do not divide by 3 nodes
    spread = placement.rebalance(PUBLISHED, 16, 4, 3, 8)
    even = placement.balancedness(placement.gpu_load(PUBLISHED, spread, 8))
    np.testing.assert_allclose(even, [0.9323, 0.8401], atol=5e-5)
    for gpus, expected in ((4, [0.7826, 0.5601]), (12, [0.4704, 0.4890])):
        plain = placement.in_order(2, 12, gpus)
        even = placement.balancedness(placement.gpu_load(PUBLISHED, plain, gpus))
        np.testing.assert_allclose(even, expected, atol=5e-5)


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    nodes = draw(st.sampled_from([n for n in (1, 2, 4) if groups % n == 0]))
    gpus = nodes * draw(st.sampled_from([1, 2, 3]))
    experts = groups * draw(st.integers(1, 6))
    replicas = gpus * draw(st.integers(-(-experts // gpus), -(-experts // gpus) + 4))
    layers = draw(st.integers(1, 3))
    load = st.lists(st.integers(0, 500), min_size=experts, max_size=experts)
    weight = draw(st.lists(load, min_size=layers, max_size=layers))
    return np.array(weight), replicas, groups, nodes, gpus


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_placement_keeps_every_expert_and_all_load(problem):
    weight, replicas, groups, nodes, gpus = problem
    layers, experts = weight.shape
    found = placement.rebalance(*problem)
    assert found.phy2log.shape == (layers, replicas)
    for layer in range(layers):
        counted = np.bincount(found.phy2log[layer], minlength=experts)
        assert counted.tolist() == found.logcnt[layer].tolist() and counted.min() >= 1
        for expert in range(experts):
            copies = found.log2phy[layer, expert]
            assert (copies[counted[expert] :] == -1).all()
            assert (found.phy2log[layer, copies[: counted[expert]]] == expert).all()
        # a group stays on one node
        node = np.repeat(np.arange(nodes), replicas // nodes)
        for group in range(groups):
            inside = found.phy2log[layer] // (experts // groups) == group
            assert len(set(node[inside])) == 1
    loads = placement.gpu_load(weight, found, gpus)
    np.testing.assert_allclose(loads.sum(1), weight.sum(1))
    # the copy that would be made next is never lighter than one that was made
    if nodes == 1:
        share = weight / found.logcnt
        before = weight / np.maximum(found.logcnt - 1, 1)
        made = np.where(found.logcnt > 1, before, np.inf).min(1)
        assert (share.max(1) <= made * (1 + 1e-6)).all()


def test_balancedness_of_one_expert_a_rank_is_that_of_the_largest_load():
    loads = np.array([[1.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert placement.balancedness(loads)[0] == 2 / 4
    assert np.isnan(placement.balancedness(loads)[1])
    assert placement.overall_balancedness([[1, 3], [5, 1]]) == (2 + 3) / (3 + 5)
    assert np.isnan(placement.overall_balancedness(loads[1:]))


def test_distinct_experts_of_batches():
    ids = [[0, 1], [1, 2], [3, -1], [3, -1], [0, 5]]
    assert placement.distinct_experts(ids, 2).tolist() == [3, 1]
    assert placement.distinct_experts(ids, 1).tolist() == [2, 2, 1, 1, 2]
    assert placement.distinct_experts(ids, 6).tolist() == []
    # E = 64, k = 8, published in many accounts of decode traffic
    expected = placement.expected_distinct(64, 8, [1, 4, 16, 32])
    np.testing.assert_allclose(expected, [8, 26.5, 56.4, 63.1], atol=0.06)


def test_coverage_counts_tokens_until_each_further_expert():
    assert placement.coverage([[0, 1], [1, 0], [-1, 2], [2, 4]], 6).tolist() == [1, 1, 3, 4]
    assert placement.coverage(np.empty((0, 2), int), 4).tolist() == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 5, 1, 8), "groups that divide 12 experts"),
        ((16, 4, 2, 5), "divides by 2 nodes"),
        ((15, 4, 2, 8), "replicas that divides by 8 GPUs"),
        ((8, 4, 2, 8), "at least 12 replicas"),
        ((16, 0, 2, 8), "sizes of at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, expected):
    with pytest.raises(MetricError, match=expected):
        placement.rebalance(PUBLISHED, *sizes)


def test_loads_that_are_none_are_refused():
    with pytest.raises(MetricError, match="loads of 0 or more"):
        placement.rebalance([[1.0, -1.0]], 2, 1, 1, 2)
    with pytest.raises(MetricError, match="divides 12 experts"):
        placement.in_order(1, 12, 5)


# --- traffic that a placement was not made from ------------------------------------------------


def windows_of(seed, n_windows=6, layers=2, experts=12):
    """Loads in which pairs of experts are hot at the same time."""
    random = np.random.default_rng(seed)
    topics = random.gamma(0.3, 1.0, (n_windows, layers, experts // 2))
    return np.repeat(topics, 2, axis=-1) + random.gamma(1.0, 0.05, (n_windows, layers, experts))


def test_sizes_decide_which_placements_there_are():
    of = placement.policies
    assert of(12, gpus=5, nodes=1, groups=1) == ["EPLB, global", "across windows"]
    assert of(12, gpus=4, nodes=2, groups=3) == ["in order", "EPLB, global", "across windows"]
    assert of(12, gpus=4, nodes=2, groups=4)[1] == "EPLB, by node"


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_are_hot_together_lie_apart(seed):
    loads = windows_of(seed)
    found = placement.across_windows(loads, 16, 4)
    for layer, copies in enumerate(found.phy2log):
        assert sorted(set(copies)) == list(range(12))
        for expert in range(12):
            places = found.log2phy[layer, expert]
            assert sorted(places[places >= 0]) == np.flatnonzero(copies == expert).tolist()
            assert (places >= 0).sum() == found.logcnt[layer, expert]
    shares = loads / loads.sum(-1, keepdims=True)
    usual = placement.rebalance(shares.mean(0), 16, 1, 1, 4)

    def fullest(one):
        return np.mean([placement.gpu_load(share, one, 4).max(-1) for share in shares])

    assert fullest(found) < fullest(usual) - 0.01
    ours, eplb = (traffic.held_out(windows_of(seed, 24), policy, gpus=4, nodes=1, groups=1,
                                     replicas=16).held_out.mean()
                  for policy in ("across windows", "EPLB, global"))  # fmt: skip
    assert ours > eplb


def test_no_swap_of_two_experts_is_left_that_helps():
    loads = windows_of(7, experts=8, layers=1)
    found = placement.across_windows(loads, 8, 2).phy2log[0]
    shares = (loads / loads.sum(-1, keepdims=True))[:, 0]

    def fullest(experts):
        return shares[:, experts].reshape(len(shares), 2, -1).sum(-1).max(-1).mean()

    for one, other in itertools.product(range(4), range(4, 8)):
        swapped = found.copy()
        swapped[[one, other]] = found[[other, one]]
        assert fullest(swapped) >= fullest(found) - 1e-12
    halves = [list(h) + [e for e in range(8) if e not in h]
              for h in itertools.combinations(range(8), 4)]  # fmt: skip
    assert fullest(found) <= np.sort([fullest(np.array(h)) for h in halves])[len(halves) // 10]


def test_a_window_is_judged_by_a_placement_that_never_saw_it():
    c4 = np.array([COUNTS["olmoe", "c4", layer] for layer in (0, 7, 15)], float)
    layer = np.array(COUNTS["olmoe", "github", 7], float)
    github = np.stack([layer, layer, layer])
    sizes = {"gpus": 8, "nodes": 1, "groups": 1, "replicas": 72}
    found = traffic.held_out(np.stack([c4, github]), "EPLB, global", **sizes)
    made = placement.rebalance(github, 72, 1, 1, 8)
    expected = placement.overall_balancedness(placement.gpu_load(c4, made, 8))
    assert found.held_out[0] == pytest.approx(expected)
    own = placement.rebalance(c4, 72, 1, 1, 8)
    assert placement.overall_balancedness(placement.gpu_load(c4, own, 8)) > expected + 0.05
    later = traffic.rebalanced_later(np.stack([github, c4]), "EPLB, global", **sizes)
    assert later[0, 1] == pytest.approx(expected) and np.isnan(later[1, 0])
    with pytest.raises(MetricError, match="two or more windows"):
        traffic.held_out(c4[None], "EPLB, global", **sizes)
    with pytest.raises(MetricError, match="in order, EPLB"):
        placement.place(c4[None], "best", **sizes)


def test_copies_that_move_and_gpus_that_a_token_visits():
    before = placement.in_order(1, 4, 2)
    after = before._replace(phy2log=np.array([[1, 2, 0, 3]]))
    assert traffic.moved(before, before, 2).tolist() == [[0, 0]]
    assert traffic.moved(before, after, 2).tolist() == [[1, 1]]
    gpus, nodes = placement.visited([[0, 1], [0, 2], [3, -1]], before, 0, gpus=4, nodes=2)
    assert gpus.tolist() == [2, 2, 1] and nodes.tolist() == [1, 2, 1]
    # one expert with a copy on each GPU: tokens take them in turn
    copies = placement.Placement(
        np.array([[0, 1, 0, 2]]), np.array([[[0, 2], [1, -1], [3, -1]]]), np.array([[2, 1, 1]])
    )
    gpus, _ = placement.visited([[0, 1], [0, 1]], copies, 0, gpus=2)
    assert gpus.tolist() == [1, 2]
    # two experts on one GPU are sent to once; what stays is on the diagonal
    sent = placement.dispatch([[0, 1], [0, 2], [3, -1]], [0, 0, 1], before, 0, gpus=2,
                              token_bytes=10)  # fmt: skip
    assert sent.tolist() == [[20, 10], [0, 10]]


def test_the_interval_of_a_mean():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = traffic.mean_interval(random.normal(1, 1, 20), in_time=False, n_draws=400)
        covered += low <= 1 <= high
    assert 0.87 < covered / 200 < 0.98
    # neighbours that are alike say less
    walk = np.repeat(random.normal(0, 1, 9), 3)
    plain = np.ptp(traffic.mean_interval(walk, in_time=False))
    assert np.ptp(traffic.mean_interval(walk, in_time=True)) > 1.2 * plain


def test_a_policy_is_chosen_on_windows_that_it_is_not_reported_on():
    loads = windows_of(3, 5)
    sizes = {"gpus": 4, "nodes": 1, "groups": 1, "replicas": 16}
    names = ["EPLB, global", "across windows"]
    judged = {name: traffic.held_out(loads, name, **sizes) for name in names}
    found = traffic.choose(judged)

    def balance(window, made):
        return placement.overall_balancedness(placement.gpu_load(loads[window], made, 4))

    # by hand: window 0 is left out of everything, the other four are folds of one window each
    for name in names:
        rest = {j: loads[[i for i in range(1, 5) if i != j]] for j in range(1, 5)}
        inner = [balance(j, placement.place(rest[j], name, **sizes)) for j in rest]
        assert judged[name].validation[0] == pytest.approx(np.mean(inner))
    best = max(names, key=lambda name: judged[name].validation[0])
    assert found.policies[0] == best
    assert found.held_out[0] == judged[best].held_out[0]
    # the window itself has no say: another window 0 changes the report, never the choice there
    loads = np.concatenate([windows_of(99, 1), loads[1:]])
    other = {name: traffic.held_out(loads, name, **sizes) for name in names}
    assert traffic.choose(other).policies[0] == best
    made = [placement.place(np.delete(loads, i, 0), names[0], **sizes) for i in range(5)]
    ranks = [placement.gpu_load(*pair, 4) for pair in zip(loads, made, strict=True)]
    expected = np.mean([r.max(1) / r.mean(1) for r in ranks], axis=0)
    np.testing.assert_allclose(other[names[0]].stragglers, expected)
    assert traffic.choose({n: traffic.held_out(loads[:2], n, **sizes) for n in names}) is None


def test_when_a_placement_is_made_again():
    a, b = ([8.0, 1, 1, 1], [1.0, 1, 1, 8])
    loads = np.array([a, a, b, b, b])[:, None]
    sizes = {"gpus": 2, "nodes": 1, "groups": 1, "replicas": 6}
    rows = {row.every: row for row in traffic.renewals(loads, "EPLB, global", **sizes)}
    assert list(rows) == [1, 2, None]
    of = [placement.place(np.array([x])[None], "EPLB, global", **sizes) for x in (a, b)]

    def balance(load, made):
        return placement.overall_balancedness(placement.gpu_load([load], made, 2))

    right, wrong = balance(a, of[0]), balance(b, of[0])
    assert rows[None].held_out.tolist() == [right, wrong, wrong, wrong] and rows[None].copies == 0
    assert rows[1].held_out.tolist() == [right, wrong, balance(b, of[1]), balance(b, of[1])]
    assert rows[1].copies == traffic.moved(of[0], of[1], 2).sum() / 3  # one of three renewals
    saved = np.mean(1 / rows[None].held_out) - np.mean(1 / rows[1].held_out)
    assert rows[1].pays_from(rows[None], 0.5) == pytest.approx(rows[1].most * 0.5 / saved)
    assert rows[1].pays_from(rows[1]._replace(held_out=np.ones(4)), 0.5) == np.inf


def test_the_gap_between_own_and_other_traffic_on_published_tables():
    """Loads of DeepSeek-R1 that the SGLang team published (github.com/sgl-project/sglang#6017):
    58 layers of 256 experts, decode and prefill of two lengths each, as shares in 1e-5."""
    loads = np.load(Path(__file__).parent.parent / "data" / "published_loads.npz")["shares"]
    sizes = {"gpus": 32, "nodes": 4, "groups": 8, "replicas": 288}
    found = {}
    for policy in ("in order", "EPLB, by node", "EPLB, global"):
        made = [placement.place(one[None], policy, **sizes) for one in loads.astype(float)]
        table = np.array([[placement.balancedness(placement.gpu_load(one, by, 32)).mean()
                           for one in loads] for by in made])  # fmt: skip
        other = table[~np.eye(4, dtype=bool)]
        found[policy] = [table.diagonal().min(), table.diagonal().max(), other.min(), other.max()]
    np.testing.assert_allclose(found["in order"][:2], [0.38, 0.46], atol=0.005)
    np.testing.assert_allclose(found["EPLB, by node"], [0.78, 0.87, 0.61, 0.78], atol=0.006)
    # experts anywhere: nearly even on their own table, and still far from it on another one
    assert found["EPLB, global"][0] > 0.99 and 0.68 < found["EPLB, global"][2] < 0.7
    judged = {policy: traffic.held_out(loads, policy, **sizes)
              for policy in ("EPLB, by node", "EPLB, global")}  # fmt: skip
    assert traffic.choose(judged).policies == ["EPLB, global"] * 4


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "known.duckdb")


def test_loads_of_windows_are_counts_of_the_rows(known):
    with open_run(known.path) as run:
        by_domain = window_loads(run, n_experts=6)
        by_prompt = window_loads(run, "prompts", 2, n_experts=6, phase="prompt")
        by_time = window_loads(run, "time", 2, n_experts=6)
        with pytest.raises(RunError, match="4, 6 experts"):
            window_loads(run)
        with pytest.raises(RunError, match="Windows are of prompts, time"):
            window_loads(run, "weeks", n_experts=6)
    assert by_domain.names == ["", "code", "law", "text"] and not by_domain.in_time
    assert by_domain.sites == [(1, 0), (3, 0)]
    for number, domain in enumerate(by_domain.names):
        for at, (layer, site) in enumerate(by_domain.sites):
            rows = known.assignments(layer, site, domain=domain)
            counts = np.bincount([expert for _, _, expert, _ in rows], minlength=6)
            assert by_domain.loads[number, at].tolist() == counts.tolist()
    # 15 and 15 of 30 tokens
    halves = [
        sum(token["prompt_id"] in part for token, *_ in known.assignments(1, 0, phase="prompt"))
        for part in ({0, 1, 2}, {3, 4, 5})
    ]
    assert by_prompt.loads[:, 0].sum(1).tolist() == halves
    assert by_prompt.names == ["1", "2"] and by_prompt.in_time
    # whole forward passes: the prompts of the first pass have 13 of 33 tokens, of the second 12
    with open_run(known.path) as run:
        passes = run.query("SELECT batch_id, count(*) AS n FROM token_batches GROUP BY ALL"
                           " ORDER BY batch_id")["n"].to_numpy()  # fmt: skip
        part = np.floor(2 * (passes.cumsum() - passes / 2) / passes.sum()).astype(int)
        expected = [
            run.query(
                "SELECT count(*) AS n FROM assignments JOIN token_batches USING (token_id)"
                " WHERE layer = 1 AND list_contains($b::INTEGER[], batch_id)",
                {"b": np.flatnonzero(part == window).tolist()},
            )["n"].iloc[0]
            for window in (0, 1)
        ]
    assert by_time.loads[:, 0].sum(1).tolist() == expected and by_time.in_time


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run whose routers are all of one size."""
    path = tmp_path_factory.mktemp("runs") / "served.duckdb"
    write_run(path, sites=SITES[:2])
    return path


def sglang_loads(path, *, layers, experts, redundant, ep_size):
    """Read a placement by the rules of SGLang 0.5: srt/eplb/expert_location.py.

    Only a name in .json is a file; keys other than these two are refused; the map is one tensor of
    all hidden layers and all physical experts; every logical expert has at least one of them.
    """
    assert str(path).endswith(".json")
    data = json.loads(path.read_text())
    assert list(data) == ["physical_to_logical_map"]
    found = torch.tensor(data["physical_to_logical_map"])
    assert not found.is_floating_point() and found.shape == (layers, experts + redundant)
    assert (experts + redundant) % ep_size == 0
    for row in found.tolist():
        physical = {expert: [i for i, e in enumerate(row) if e == expert] for expert in row}
        assert set(physical) == set(range(experts)) and all(physical.values())
    return found.tolist()


def tensorrt_llm_loads(path, *, experts, ep_size, moe_layers):
    """Read a placement by the rules of MoeLoadBalancerConfig of TensorRT-LLM.

    A strict model: no other fields, layers and experts as whole numbers, a list of ``num_slots``
    for every MoE layer that names every expert; ranks take equal parts.
    """
    data = yaml.safe_load(path.read_text())
    known = {"num_slots": int, "initial_global_assignments": dict, "layer_updates_per_iter": int}
    assert {name: type(value) for name, value in data.items()} == known
    assert data["num_slots"] >= experts and data["num_slots"] % ep_size == 0
    for layer in moe_layers:
        row = data["initial_global_assignments"][layer]
        assert len(row) == data["num_slots"] and set(row) == set(range(experts))
        assert all(type(expert) is int for expert in row)
    assert data["layer_updates_per_iter"] == 0  # a static placement, for which no weights move
    return data["initial_global_assignments"]


@pytest.mark.slow
def test_files_follow_the_rules_of_the_engines_that_load_them(served, tmp_path, capsys):
    sizes = ["place", str(served), "--gpus", "2", "--slots", "8", "--windows", "domain"]
    files = {kind: tmp_path / f"{kind}{of.ending}" for kind, of in PLACEMENT_FORMATS.items()}
    for kind, out in files.items():
        more = ["--format", kind, "--out", str(out), "--policy", "EPLB, global"]
        assert main([*sizes, *more, *(["--model-layers", "5"] if kind == "sglang" else [])]) == 0
        said = capsys.readouterr().out
        assert "4 windows of a domain each" in said and said.endswith(f"{out}\n")
    table = sglang_loads(files["sglang"], layers=5, experts=6, redundant=2, ep_size=2)
    rows = tensorrt_llm_loads(files["tensorrt-llm"], experts=6, ep_size=2, moe_layers=(1, 3))
    assert {layer: table[layer] for layer in (1, 3)} == rows
    plain = json.loads(files["eplb-json"].read_text())
    assert plain["layers"] == [1, 3] and plain["phy2log"] == [rows[1], rows[3]]
    for layer, copies in enumerate(plain["log2phy"]):
        for expert, places in enumerate(copies):
            assert {plain["phy2log"][layer][p] for p in places if p >= 0} == {expert}
    with open_run(served) as run:
        loads = window_loads(run).loads
    expected = placement.rebalance(loads.sum(0), 8, 1, 1, 2)
    assert plain["phy2log"] == expected.phy2log.tolist()


def test_the_command_says_what_ages_and_what_a_token_visits(served, capsys):
    given = ["place", str(served), "--gpus", "2", "--windows", "2", "--policy", "EPLB, global"]
    assert main(given) == 0
    said = capsys.readouterr().out
    with open_run(served) as run:
        loads = window_loads(run, "prompts", 2).loads
        tokens = [routing(run, layer) for layer in (1, 3)]
        width = run.info["hidden_size"]
    ids = [one.expert_ids for one in tokens]
    sizes = {"gpus": 2, "nodes": 1, "groups": 1, "replicas": 6}
    made = placement.place(loads, "EPLB, global", **sizes)
    visits = [placement.visited(one, made, at, gpus=2)[0].mean() for at, one in enumerate(ids)]
    assert f"A token visits {np.mean(visits):.2f} of 2 GPUs a layer." in said
    one, two = (placement.place(w[None], "EPLB, global", **sizes) for w in loads)
    own = [placement.overall_balancedness(placement.gpu_load(w, p, 2))
           for w, p in zip(loads, (one, two), strict=True)]  # fmt: skip
    later = placement.overall_balancedness(placement.gpu_load(loads[1], one, 2))
    assert f"predicted {np.mean(own):.3f}, realised in the windows after it {later:.3f}." in said
    more = {"gpus": 2, "token_bytes": 2 * width}
    sent = sum(
        placement.dispatch(one.expert_ids, one.prompt_id % 2, made, at, **more)
        for at, one in enumerate(tokens)
    )
    away = (sent.sum() - np.trace(sent)) / len(tokens[0].expert_ids) / 1e3
    assert f"{away:,.2f} kB a token leave" in said
    assert "With two windows no policy can be chosen" in said
    assert re.search(rf"^never +{later:.3f} .* 0 +0.0$", said, re.M)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "2", "--windows", "1"], "--windows must be domain or a number of 2 or more"),
        (["--gpus", "0"], "--gpus must be 1 or more, got 0"),
        (["--gpus", "5", "--policy", "in order"], "there are EPLB, global, across windows"),
        (["--gpus", "4", "--slots", "9"], "a number of replicas that divides by 4 GPUs"),
        (["--gpus", "2", "--model-layers", "2"], "The model has at least 4 decoder layers, got 2"),
        (["--gpus", "2", "--out", "placement.txt"], "a file whose name ends in .json"),
    ],
)
def test_sizes_that_cannot_be_are_refused(served, capsys, given, said):
    assert main(["place", str(served), *given]) == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_an_existing_placement_is_kept(served, tmp_path, capsys):
    out = tmp_path / "placement.json"
    out.write_text("mine")
    assert main(["place", str(served), "--gpus", "2", "--out", str(out)]) == 2
    assert "not overwritten" in capsys.readouterr().err and out.read_text() == "mine"
