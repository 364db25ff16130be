"""Specialisation from a run against plain Python, the experts of a text, and weights alike."""

from collections import Counter
from math import log

import numpy as np
import pandas as pd
import pytest
from synthetic import PROMPTS, SITES, write_run

from explorer.errors import ExplorerError
from explorer.maps import map_cache
from explorer.metrics import specialization
from explorer.metrics.specialization import wilson
from explorer.pages.experts import data
from explorer.queries.where import Part
from explorer.run import open_run
from explorer.worker import expert_weights

FILTERS = [{}, {"domain": "code"}, {"phase": "prompt"}, {"part": Part(search="a")}]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "known.duckdb")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


def kept(token, domain=None, phase=None, part=None):
    text = "".join(PROMPTS[token["prompt_id"]][1])
    return (
        domain in (None, token["domain"] or "")
        and phase in (None, token["phase"])
        and (part is None or part.search.lower() in text.lower())
    )


def chose(known, token_id, place, expert):
    return expert in [e for e, _ in known.routes[token_id, *place]["experts"]]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_hits_of_an_expert_in_every_prompt(run, known, filters):
    expected = {}
    for token in known.tokens:
        if kept(token, **filters):
            key = token["prompt_id"], token["domain"] or "", token["phase"]
            tokens, hits = expected.get(key, (0, 0))
            hit = chose(known, token["token_id"], (3, 0), 2)
            expected[key] = tokens + 1, hits + hit
    frame = data.expert_hits(run, 3, 2, **filters)
    found = {
        (row.prompt_id, row.domain, row.phase): (row.tokens, row.hits) for row in frame.itertuples()
    }
    assert found == expected


@pytest.mark.parametrize("by", ["domain", "phase"])
def test_shares_add_up_and_have_intervals(run, known, by):
    table = data.shares_of(run, 1, 0, by=by)
    parts, every = table.iloc[:-1], table.iloc[-1]
    assert every["tokens"] == len(known.tokens) == parts["tokens"].sum()
    hits = sum(chose(known, t["token_id"], (1, 0), 0) for t in known.tokens)
    assert every["hits"] == hits == parts["hits"].sum()
    assert every["share"] == hits / len(known.tokens)
    assert parts["share"].is_monotonic_decreasing
    assert (table["low"] <= table["share"]).all() and (table["share"] <= table["high"]).all()
    assert set(table["interval"]) == {"tokens"}
    row = parts[parts[by] == ("law" if by == "domain" else "generated")].iloc[0]
    assert (row["low"], row["high"]) == tuple(wilson(row["hits"], row["tokens"]))


def test_shares_without_ids_come_from_totals(tmp_path, known, run):
    write_run(tmp_path / "stats.duckdb", level="stats")
    with open_run(tmp_path / "stats.duckdb") as counted:
        table = data.shares_of(counted, 1, 0, by="domain")
    assert table["hits"].tolist() == (data.shares_of(run, 1, 0, by="domain")["hits"].tolist())
    assert table["prompts"].isna().all()


def test_vocabulary_of_an_expert_and_its_floor(run, known):
    table, floor = data.vocabulary_of(run, 1, 0, min_count=3)
    often = Counter(token["token"] for token in known.tokens)
    used = Counter(t["token"] for t in known.tokens if chose(known, t["token_id"], (1, 0), 0))
    assert {row.token: row.share for row in table.itertuples()} == {
        token: used[token] / n for token, n in often.items() if n >= 3 and used[token]
    }
    assert (table["low"] < table["share"]).all()
    assert 0 < floor.low <= floor.mean <= floor.high <= 1


@pytest.mark.parametrize("filters", [{}, {"phase": "prompt"}, {"part": Part(search="a")}], ids=str)
def test_divergences_are_those_of_the_counts(run, known, filters):
    frame = data.divergences(run, **filters)
    here = frame[(frame["layer"] == 1) & (frame["site"] == 0)].set_index("expert_id")
    pairs = [
        (token["domain"] or "", expert)
        for token in known.tokens
        if kept(token, **filters)
        for expert, _ in known.routes[token["token_id"], 1, 0]["experts"]
    ]
    counts, domains = Counter(pairs), Counter(domain for domain, _ in pairs)
    for expert in range(6):
        load = sum(counts[domain, expert] for domain in domains)
        assert here.loc[expert, "assignments"] == load
        if not load:
            assert np.isnan(here.loc[expert, "divergence"])
            continue
        terms = {
            domain: (counts[domain, expert] / load, domains[domain] / len(pairs))
            for domain in domains
        }
        expected = sum(p * log(p / q) for p, q in terms.values() if p)
        assert here.loc[expert, "divergence"] == pytest.approx(expected)
        lifts = {domain: p / q for domain, (p, q) in terms.items()}
        assert here.loc[expert, "lift"] == pytest.approx(max(lifts.values()))
        assert lifts[here.loc[expert, "domain"]] == pytest.approx(max(lifts.values()))


def test_divergences_need_two_domains(run):
    assert data.divergences(run, domain="law").empty


def test_a_sample_holds_every_route_of_its_tokens(run, known, monkeypatch):
    per_token = sum(site.top_k for site in SITES)
    monkeypatch.setattr(data, "MAX_ASSIGNMENTS", len(known.tokens) * per_token // 3)
    sample = data.route_sample(run)
    assert sample.step in (3, 4)
    ids = sample.tokens["token_id"].tolist()
    assert ids == [t["token_id"] for t in known.tokens if not t["token_id"] % sample.step]
    found = {
        (ids[row.row], row.layer, row.site, row.expert_id) for row in sample.routes.itertuples()
    }
    assert found == {
        (token, *place, expert)
        for (token, *place), route in known.routes.items()
        if token in ids
        for expert, _ in route["experts"]
    }


def test_layers_have_measures_and_floors(run, known):
    table, step = data.layers_of(run, min_count=3)
    assert step == 1
    assert list(zip(table["layer"], table["site"], strict=True)) == [(1, 0), (3, 0), (3, 1)]
    often = Counter(token["token"] for token in known.tokens)
    favourites = []
    for entry, n in often.items():
        if n >= 3:
            experts = Counter(
                e
                for t in known.tokens
                if t["token"] == entry
                for e, _ in known.routes[t["token_id"], 1, 0]["experts"]
            )
            favourites.append(max(experts.values()) / n)
    assert table["vocabulary"].iloc[0] == pytest.approx(np.mean(favourites))
    frame = data.divergences(run)
    here = frame[(frame["layer"] == 1)]
    weights = here["assignments"] / here["assignments"].sum()
    expected = (weights * here["divergence"].fillna(0)).sum()
    assert table["information"].iloc[0] == pytest.approx(expected)
    # routing was drawn at random, so the floors are as high as what was measured
    assert (table["information"] < 3 * table["information_floor_high"]).all()


def test_layers_of_a_part_without_tokens(run):
    table, _ = data.layers_of(run, part=Part(search="no such text"))
    assert table[["vocabulary", "information"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("text", "pieces", "occurrences"),
    [
        ("court", {" court": 1}, 1),
        ("COURT SHALL", {" court": 1, " shall": 1}, 1),
        ("t s", {" court": 1, " shall": 1}, 1),
        (" a a", {" a": 4}, 2),
        ("größe", {" Größe": 1}, 1),
        (".*", {}, 0),
        ("nothing", {}, 0),
    ],
)
def test_tokens_that_a_text_covers(run, known, text, pieces, occurrences):
    found = data.tokens_of_text(run, text, phase="prompt")
    assert dict(zip(found.pieces["text"], found.pieces["tokens"], strict=True)) == pieces
    assert (found.occurrences, len(found.token_ids)) == (occurrences, sum(pieces.values()))
    texts = {t["token_id"]: t["text"] for t in known.tokens}
    assert Counter(texts[i] for i in found.token_ids.tolist()) == pieces


def test_a_text_is_found_where_the_filters_look_only(run):
    assert data.tokens_of_text(run, "court", domain="code").occurrences == 0
    assert data.tokens_of_text(run, "a", part=Part(search="court")).n_all == 1
    generated = data.tokens_of_text(run, "and", phase="generated")
    assert generated.pieces["text"].tolist() == [" And"]


def test_prompts_beyond_the_limit_are_said(run, monkeypatch):
    monkeypatch.setattr(data, "MAX_PROMPTS", 1)
    found = data.tokens_of_text(run, "o")
    assert (found.n_prompts, found.n_all) == (1, 2)


def test_experts_of_a_text_against_all_tokens(run, known, monkeypatch):
    monkeypatch.setattr(data, "MIN_HITS", 2)
    table, found = data.experts_of_text(run, "a")
    ids = set(found.token_ids.tolist())
    assert table["low"].is_monotonic_decreasing
    for row in table.itertuples():
        place = row.layer, row.site
        hits = sum(chose(known, token, place, row.expert_id) for token in ids)
        every = sum(chose(known, t["token_id"], place, row.expert_id) for t in known.tokens)
        assert (row.hits, row.tokens) == (hits, len(ids))
        assert row.lift == pytest.approx((hits / len(ids)) / (every / len(known.tokens)))
        assert row.low < row.lift < row.high
    assert data.experts_of_text(run, "no such text")[0].empty


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("filters", [{}, {"phase": "prompt"}, {"part": Part(search="a")}], ids=str)
def test_experts_of_domains_together_against_all_tokens(run, known, monkeypatch, filters, few):
    monkeypatch.setattr(specialization, "MIN_WHOLE", 1)
    monkeypatch.setattr(data, "MIN_PROMPTS", 99 if few else 2)
    table, step = data.experts_of_domains(run, ["law", ""], **filters)
    tokens = [token for token in known.tokens if kept(token, **filters)]
    mine = [token for token in tokens if token["domain"] in ("law", None)]
    assert step == 1 and table["low"].is_monotonic_decreasing
    prompts = {token["prompt_id"] for token in mine}
    assert set(table["interval"]) == {"tokens" if few or len(prompts) < 2 else "prompts"}
    for row in table.itertuples():
        place = row.layer, row.site
        here, every = (
            Counter(
                expert
                for token in listed
                for expert, _ in known.routes[token["token_id"], *place]["experts"]
            )
            for listed in (mine, tokens)
        )
        share, base = here[row.expert_id] / here.total(), every[row.expert_id] / every.total()
        assert row.hits == here[row.expert_id]
        assert (row.share, row.base) == pytest.approx((share, base))
        assert row.lift == pytest.approx(share / base)
        assert row.low <= row.lift + 1e-9 and row.lift <= row.high + 1e-9
    ids = {token["token_id"] for token in tokens}
    used = {
        (*place, expert)
        for (token_id, *place), route in known.routes.items()
        if token_id in ids
        for expert, _ in route["experts"]
    }
    assert {(r.layer, r.site, r.expert_id) for r in table.itertuples()} == used


def test_experts_of_domains_from_sums_and_from_a_sample(tmp_path, run, monkeypatch):
    monkeypatch.setattr(specialization, "MIN_WHOLE", 1)
    whole, _ = data.experts_of_domains(run, ["law"])
    write_run(tmp_path / "stats.duckdb", level="stats")
    with open_run(tmp_path / "stats.duckdb") as counted:
        pd.testing.assert_frame_equal(data.experts_of_domains(counted, ["law"])[0], whole)
    monkeypatch.setattr(data, "MAX_ASSIGNMENTS", 20)
    sampled, step = data.experts_of_domains(run, ["law"])
    assert step > 1 and 0 < sampled["hits"].sum() < whole["hits"].sum()


# ---- weights


def test_cosines_by_hand():
    found = expert_weights.cosines([[4, 2, 0], [2, 1, 0], [0, 0, 0]])
    assert found[0, 1] == pytest.approx(1)
    assert np.isnan(found[2]).all()


def test_cosines_of_a_model_are_those_of_its_weights(tmp_path):
    import torch
    from tiny_models import build

    from capture import record

    model = build("olmoe")
    path = record(model, [[1, 2, 3, 4]], tmp_path / "run.duckdb", sample_tokens=0, progress=False)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    messages = []
    out = expert_weights.measure_cosines(
        tmp_path / "cache" / "weights-x.parquet",
        str(path),
        str(folder),
        None,
        lambda message, part: messages.append(part),
    )
    site = open_run(path).sites[0]
    table = map_cache.read_cosines(out, site.layer, site.site)
    assert set(table["kind"]) == set(map_cache.WEIGHT_KINDS)
    block = model.model.layers[site.layer].mlp
    rows = block.gate.weight.detach()
    expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    found = table[table["kind"] == "router"].pivot(index="a", columns="b", values="cosine")
    assert np.allclose(found.to_numpy(), expected.numpy(), atol=1e-5)
    stacked = torch.cat([p.detach().flatten(1) for p in block.experts.parameters()], dim=1)
    expected = torch.nn.functional.cosine_similarity(stacked[:, None], stacked[None], dim=-1)
    found = table[table["kind"] == "experts"].pivot(index="a", columns="b", values="cosine")
    assert np.allclose(found.to_numpy(), expected.numpy(), atol=1e-5)
    assert messages[0] == 0 and max(messages) <= 1


def test_another_model_than_the_recorded_one_is_refused(known, tmp_path):
    from tiny_models import build

    folder = tmp_path / "model"
    build("olmoe").save_pretrained(folder)
    with pytest.raises(ExplorerError, match="not the model that was recorded"):
        expert_weights.measure_cosines(
            tmp_path / "x.parquet", str(known.path), str(folder), None, lambda *_: None
        )


def test_a_damaged_file_of_cosines_is_named(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ExplorerError, match="cannot be read"):
        map_cache.read_cosines(tmp_path / "x.parquet", 0, 0)


def test_cosines_of_changed_weights_are_others(run, tmp_path, monkeypatch):
    first = map_cache.cosines_path(run)
    assert map_cache.cosines_path(run) == first
    monkeypatch.setattr(map_cache, "_changed_at", lambda model: 5)
    assert map_cache.cosines_path(run) != first
