"""Parts of a run, by a text in the prompt and by a slice, against plain Python over the rows."""

from collections import Counter

import numpy as np
import pytest
from synthetic import PROMPTS, SITES, WITHOUT_ATTENTION, write_run

from explorer.errors import RunError
from explorer.pages.attention import data as attention
from explorer.pages.attention.data import routing_together
from explorer.pages.flow import data as pairs
from explorer.queries import experts, load, overview
from explorer.queries.where import Part
from explorer.run import open_run

IDS = np.array([0, 2, 5, 6, 8, 16, 20, 21, 29])
PARTS = [
    Part(search="A"),
    Part(search="%"),
    Part(search="größe"),
    Part(search="no such text"),
    Part(slice="s", token_ids=IDS),
    Part(slice="none", token_ids=IDS[:0]),
    Part(search="court", slice="s", token_ids=IDS),
    Part(search="a", step=3),
    Part(slice="s", step=2, token_ids=IDS),
]
FILTERS = [{}, {"domain": "code"}, {"phase": "prompt"}, {"domain": "law", "phase": "generated"}]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "known.duckdb", level="attention")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


def prompt_matches(number, part):
    text = "".join(PROMPTS[number][1])
    return not part.search or part.search.lower() in text.lower()


def in_part(token, part):
    return (
        prompt_matches(token["prompt_id"], part)
        and (part.token_ids is None or token["token_id"] in part.token_ids)
        and token["token_id"] % part.step == 0
    )


def matching(known, part, domain=None, phase=None):
    return {
        token["token_id"]
        for token in known.tokens
        if in_part(token, part)
        and domain in (None, token["domain"] or "")
        and phase in (None, token["phase"])
    }


def routed(known, part, layer, site, **filters):
    """Return (token, expert) of every assignment of the part."""
    ids = matching(known, part, **filters)
    return [
        (token, expert)
        for token, _, expert, _ in known.assignments(layer, site)
        if token["token_id"] in ids
    ]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_counts_and_loads_of_a_part(run, known, part, filters):
    ids = matching(known, part, **filters)
    assert overview.token_count(run, part=part, **filters) == len(ids)
    frame = load.expert_load(run, part=part, **filters)
    assert len(frame) == sum(site.n_experts for site in SITES)
    for site in SITES:
        counts = Counter(e for _, e in routed(known, part, site.layer, site.site, **filters))
        here = frame[(frame["layer"] == site.layer) & (frame["site"] == site.site)]
        assert here["assignments"].tolist() == [counts[e] for e in range(site.n_experts)]
        assert here["prob_sum"].isna().all()
        assert experts.expert_token_count(
            run, site.layer, 1, site=site.site, part=part, **filters
        ) == counts[1]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_one_layer_of_a_part_is_that_layer_of_all(run, part):
    every = load.expert_load(run, part=part)
    one = load.expert_load(run, layer=3, site=1, part=part)
    rows = every[(every["layer"] == 3) & (every["site"] == 1)].reset_index(drop=True)
    assert one.drop(columns="prob_sum").equals(rows.drop(columns="prob_sum"))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_loads_by_domain_and_phase_of_a_part(run, known, part):
    rows = routed(known, part, 1, 0)
    for column, frame in (
        ("domain", load.expert_load_by_domain(run, 1, part=part)),
        ("phase", load.expert_load_by_phase(run, 1, part=part)),
    ):
        counts = Counter((token[column] or "", expert) for token, expert in rows)
        found = {
            (row[column], row["expert_id"]): row["assignments"]
            for row in frame.to_dict("records")
            if row["assignments"]
        }
        assert found == counts
        assert len(frame) == 6 * len({key for key, _ in counts})


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_gate_means_of_a_part(run, known, part):
    frame = overview.gate_means(run, part=part)
    for row in frame.to_dict("records"):
        values = [
            known.routes[token_id, row["layer"], row["site"]]["entropy"]
            for token_id in matching(known, part)
        ]
        values = [value for value in values if value is not None]
        assert row["tokens"] == len(values)
        assert np.isnan(row["entropy"]) if not values else row["entropy"] == np.mean(values)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_tokens_of_an_expert_in_a_part(run, known, part):
    expected = {token["token_id"] for token, expert in routed(known, part, 3, 0) if expert == 2}
    found = experts.expert_tokens(run, 3, 2, part=part, limit=100)
    assert set(found["token_id"]) == expected
    words = experts.expert_vocabulary(run, 3, 2, part=part, min_count=1, limit=100)
    seen = Counter(t["token"] for t in known.tokens if t["token_id"] in matching(known, part))
    used = Counter(token["token"] for token, expert in routed(known, part, 3, 0) if expert == 2)
    assert {
        row.token: (row.occurrences, row.assignments) for row in words.itertuples()
    } == {token: (seen[token], used[token]) for token in used}  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_prompts_of_a_part_have_a_token_of_it(run, known, part):
    expected = sorted({
        token["prompt_id"] for token in known.tokens if in_part(token, part.whole())
    })  # fmt: skip
    assert overview.prompts(run, part=part)["prompt_id"].tolist() == expected
    assert overview.prompt_count(run, part=part) == len(expected)
    law = [number for number in expected if PROMPTS[number][0] == "law"]
    assert overview.prompts(run, domain="law", part=part)["prompt_id"].tolist() == law
    attended = [number for number in expected if number != WITHOUT_ATTENTION]
    assert attention.attention_prompts(run, part=part)["prompt_id"].tolist() == attended
    stats = attention.head_stats(run, part=part)
    assert set(stats["prompts"]) == ({len(attended)} if attended else set())


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_pairs_of_a_part_are_counted_from_all_its_tokens(run, known, part):
    ids = matching(known, part.whole())
    counts = np.zeros((6, 6), int)
    for token_id in ids:
        chosen = [expert for expert, _ in known.routes[token_id, 1, 0]["experts"]]
        for first in chosen:
            for second in chosen:
                counts[first, second] += 1
    found = pairs.coactivation(run, 1, part=part)
    assert found.tokens.tolist() == counts.tolist()
    assert found.n_tokens == found.n_all == len(ids)
    both = pairs.both_count(run, (1, 0, 0), (1, 0, 1), part=part)
    assert both == counts[0, 1]
    listed = pairs.tokens_of_both(run, (1, 0, 0), (1, 0, 1), part=part, limit=100)
    assert len(listed) == both


def test_attention_and_routing_of_the_prompts_of_a_part(run):
    part = Part(search="court")
    found = routing_together(run, attention_layer=1, layer=1, site=0, part=part)
    assert (found.n_prompts, found.n_tokens) == (1, 6)
    with pytest.raises(RunError, match="no attention of these prompts"):
        routing_together(run, attention_layer=1, layer=1, site=0, part=Part(search="no such text"))


def test_tokens_of_prompts(run, known):
    expected = [t["token_id"] for t in known.tokens if t["prompt_id"] in (0, 4)]
    assert overview.prompt_tokens(run, [4, 0]).tolist() == sorted(expected)
    assert overview.prompt_tokens(run, []).tolist() == []


def test_a_run_without_ids_has_no_load_of_a_part(tmp_path):
    write_run(tmp_path / "stats.duckdb", level="stats")
    with (
        open_run(tmp_path / "stats.duckdb") as counted,
        pytest.raises(RunError, match="--level ids"),
    ):
        load.expert_load(counted, part=Part(search="a"))


def test_what_makes_parts_the_same():
    assert Part(slice="s", token_ids=IDS).key == Part(slice="s", token_ids=IDS[:1]).key
    assert Part(search="a", step=3).whole() == Part(search="a")
    assert Part(search="a").key != Part(search="b").key
