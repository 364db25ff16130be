"""Pairs and transitions of a capture, against counts from its own assignments in plain Python."""

from collections import Counter
from itertools import pairwise, product

import duckdb
import pytest
import tiny_models
import torch

import capture
from capture.model.selftest import attach
from capture.recorder import observe as pair_counts
from capture.recorder.observe import group_sites
from capture.store import next_sites
from capture.store.records import SiteInfo

pytestmark = pytest.mark.slow

PROMPTS = [{"ids": [*range(5, 5 + n)], "domain": "ab"[n % 2]} for n in (9, 7, 12, 3, 1)]


def ask(run, sql):
    with duckdb.connect(str(run), read_only=True) as connection:
        return connection.sql(sql).fetchall()


def chosen(run):
    """The experts of every token and router."""
    found = {}
    for token, layer, site, expert in ask(
        run, "SELECT token_id, layer, site, expert_id FROM assignments"
    ):
        found.setdefault((token, layer, site), set()).add(expert)
    return found


def expected_pairs(run):
    pairs = Counter()
    for (_, layer, site), experts in chosen(run).items():
        pairs.update((layer, site, a, b) for a, b in product(experts, experts))
    return pairs


def expected_transitions(run):
    routes = chosen(run)
    layers = sorted({layer for _, layer, _ in routes})
    last = {layer: max(s for _, at, s in routes if at == layer) for layer in layers}
    counts = Counter()
    for token in {token for token, _, _ in routes}:
        for layer, after in pairwise(layers):
            here = routes.get((token, layer, last[layer]), ())
            there = routes.get((token, after, last[after]), ())
            counts.update((layer, after, a, b) for a, b in product(here, there))
    return counts


def stored(run, view):
    return Counter({tuple(row[:-1]): row[-1] for row in ask(run, f"SELECT * FROM {view}")})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {}),
        ("mixtral", {"generate": 4}),
        ("deepseek_v3", {"batch_tokens": 12}),
        ("jetmoe", {}),  # two routers a layer
        ("zaya", {}),  # some layers without a router
    ],
)
def test_recorded_pairs_are_those_of_the_assignments(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(pair_counts, "COUNT_TOKENS", 5)
    monkeypatch.setattr(pair_counts, "SEND_TOKENS", 11)
    model = tiny_models.build(name)
    run = capture.record(
        model, PROMPTS, tmp_path / "run", sample_tokens=0, progress=False, **options
    )
    assert stored(run, "coactivation") == expected_pairs(run)
    transitions = stored(run, "transitions")
    assert transitions == expected_transitions(run)
    assert sum(transitions.values()) > 0


def test_level_stats_has_the_same_pairs(tmp_path):
    model = tiny_models.build("mixtral")
    deep, flat = (
        capture.record(
            model, PROMPTS, tmp_path / level, level=level, sample_tokens=0, progress=False
        )
        for level in ("ids", "stats")
    )
    for view in ("coactivation", "transitions"):
        assert stored(flat, view) == stored(deep, view)


def test_a_cancelled_capture_has_the_pairs_of_what_it_recorded(tmp_path):
    asked = []

    def cancel():
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(capture.errors.CaptureCancelled):
        capture.record(
            tiny_models.build("mixtral"), PROMPTS, tmp_path / "run", batch_tokens=12,
            sample_tokens=0, progress=False, cancel=cancel,
        )  # fmt: skip
    run = tmp_path / "run"
    assert 0 < ask(run, "SELECT count(*) FROM tokens")[0][0] < sum(len(p["ids"]) for p in PROMPTS)
    assert stored(run, "coactivation") == expected_pairs(run)
    assert stored(run, "transitions") == expected_transitions(run)


def test_sites_of_different_shapes_lead_to_each_other():
    model = tiny_models.build("mixtral")
    sites = attach(model)
    wider = sites[1]
    object.__setattr__(wider, "info", wider.info._replace(n_experts=9))
    groups = group_sites(sites)
    assert [group.members for group in groups] == [(0, 2), (1,)]
    counter = pair_counts.PairCounter(sites, groups)
    counter.add(
        [
            torch.tensor([[[0, 7]], [[2, 255]]], dtype=torch.uint8),
            torch.tensor([[[8, 1]]], dtype=torch.uint8),
        ]
    )
    sums = counter.take()
    found = {}
    for one in sums:
        for row, site, following in one.by_site():
            if following is not None:
                where = one.transitions[row].nonzero().tolist()
                found[site, following] = sorted(map(tuple, where))
    assert found == {(0, 1): [(0, 1), (0, 8), (7, 1), (7, 8)], (1, 2): [(1, 2), (8, 2)]}
    assert counter.take() == []


def test_transitions_follow_the_last_router_of_a_layer():
    def site(layer, number):
        return SiteInfo(layer, number, "m", 4, 1, 0, "softmax")

    places = [site(0, 0), site(0, 1), site(3, 0), site(5, 0), site(5, 1)]
    assert next_sites(places) == [None, 2, 4, None, None]
    assert next_sites(places[::-1]) == [None, None, 0, 2, None]
    assert next_sites([]) == []
