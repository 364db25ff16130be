"""Each query against plain Python over the same rows."""

from collections import Counter
from math import log

import numpy as np
import pandas as pd
import pytest
from synthetic import BATCHES, IDLE, PROMPTS, SITES, write_run

from explorer.errors import RunError, UnknownNameError
from explorer.pages.tokens import data as tokens
from explorer.queries import experts, load, overview
from explorer.queries.where import Part
from explorer.run import open_run

FILTERS = [
    {},
    {"domain": "law"},
    {"domain": ""},
    {"phase": "generated"},
    {"domain": "code", "phase": "prompt"},
    {"domain": "text", "phase": "generated"},
]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "known.duckdb")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A run at level stats: totals, but nothing per token and site."""
    written = write_run(tmp_path_factory.mktemp("run") / "stats.duckdb", level="stats")
    with open_run(written.path) as opened:
        yield opened


def matching(known, domain=None, phase=None):
    return [
        token
        for token in known.tokens
        if (domain is None or (token["domain"] or "") == domain)
        and (phase is None or token["phase"] == phase)
    ]


def missing_is_none(frame, column):
    return [None if pd.isna(value) else value for value in frame[column]]


# ---- overview


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_token_count(run, known, filters):
    assert overview.token_count(run, **filters) == len(matching(known, **filters))


def test_domain_counts(run, known):
    frame = overview.domain_counts(run).set_index("domain")
    assert list(frame.index) == ["code", "law", "text", ""]
    for domain, row in frame.iterrows():
        rows = matching(known, domain=domain)
        losses = [token["loss"] for token in rows if token["loss"] is not None]
        assert row["prompts"] == sum((name or "") == domain for name, _ in PROMPTS)
        assert row["tokens"] == len(rows)
        assert row["generated"] == sum(token["phase"] == "generated" for token in rows)
        assert row["mean_loss"] == pytest.approx(np.mean(losses))
        assert row["truncated"] == (1 if domain == "law" else 0)


def test_gate_means_of_some_statistics_are_those_of_all(run):
    frame = overview.gate_means(run, statistics=("entropy",))
    assert list(frame) == ["layer", "site", "tokens", "entropy", "normalized_entropy"]
    pd.testing.assert_frame_equal(frame, overview.gate_means(run)[list(frame)])
    with pytest.raises(RunError, match="entropy first"):
        overview.gate_means(run, statistics=("margin",))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_gate_means(run, known, filters):
    frame = overview.gate_means(run, **filters)
    chosen = {token["token_id"] for token in matching(known, **filters)}
    assert list(zip(frame["layer"], frame["site"], strict=True)) == [(1, 0), (3, 0), (3, 1)]
    for row in frame.to_dict("records"):
        for name in ("entropy", "margin", "logsumexp", "topk_mass"):
            values = [
                route[name]
                for (token_id, layer, site), route in known.routes.items()
                if (layer, site) == (row["layer"], row["site"])
                and token_id in chosen
                and route[name] is not None
            ]
            if values:
                assert row[name] == pytest.approx(np.mean(values))
            else:
                assert np.isnan(row[name])
        if not np.isnan(row["entropy"]):
            assert row["normalized_entropy"] == pytest.approx(row["entropy"] / log(6))


# ---- load


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_expert_load_is_dense_and_counts_the_assignments(run, known, filters):
    frame = load.expert_load(run, **filters)
    places = [(s.layer, s.site, e) for s in SITES for e in range(s.n_experts)]
    assert list(zip(frame["layer"], frame["site"], frame["expert_id"], strict=True)) == places
    for site in SITES:
        rows = known.assignments(site.layer, site.site, **filters)
        counts, weights = Counter(), Counter()
        for _, _, expert, weight in rows:
            counts[expert] += 1
            weights[expert] += weight
        part = frame[(frame["layer"] == site.layer) & (frame["site"] == site.site)]
        assert part["assignments"].tolist() == [counts[e] for e in range(site.n_experts)]
        assert part["weight_sum"].tolist() == [weights[e] for e in range(site.n_experts)]
        assert set(part["n_experts"]) == {site.n_experts} and set(part["top_k"]) == {site.top_k}
        if rows:
            shares = [counts[e] / len(rows) for e in range(site.n_experts)]
            assert part["share"].tolist() == pytest.approx(shares)
            assert part["ratio"].tolist() == pytest.approx([s * site.n_experts for s in shares])
        else:
            assert part["share"].isna().all() and part["ratio"].isna().all()
        if site.score_function == "other":
            assert part["prob_sum"].isna().all()
        elif rows:
            assert part["prob_sum"].tolist() == [counts[e] / 2 for e in range(site.n_experts)]


def test_weights_of_a_part_are_missing_where_they_are_not_asked_for(run):
    for filters in ({"domain": "law"}, {"part": Part(search="COURT")}):
        whole = load.expert_load(run, **filters)
        found = load.expert_load(run, weights=False, **filters)
        assert found["weight_sum"].isna().all() == ("part" in filters)
        pd.testing.assert_frame_equal(
            found.drop(columns="weight_sum"), whole.drop(columns="weight_sum")
        )


def test_an_idle_expert_has_no_load_but_a_row(run):
    layer, site, expert = IDLE
    frame = load.expert_load(run, layer=layer, site=site)
    assert frame["assignments"].tolist()[expert] == 0
    assert len(frame) == 6


@pytest.mark.parametrize("phase", [None, "prompt", "generated"])
def test_expert_load_by_domain(run, known, phase):
    frame = load.expert_load_by_domain(run, 3, site=0, phase=phase)
    occurring = {(token["domain"] or "") for token in matching(known, phase=phase)}
    assert set(frame["domain"]) == occurring
    for domain, part in frame.groupby("domain"):
        rows = known.assignments(3, 0, domain=domain, phase=phase)
        counts = Counter(expert for _, _, expert, _ in rows)
        assert part["expert_id"].tolist() == list(range(6))
        assert part["assignments"].tolist() == [counts[e] for e in range(6)]
        assert part["share"].sum() == pytest.approx(1)
        assert part["ratio"].tolist() == pytest.approx([6 * s for s in part["share"]])


def test_expert_load_by_phase(run, known):
    frame = load.expert_load_by_phase(run, 1, domain="law")
    assert list(dict.fromkeys(frame["phase"])) == ["prompt", "generated"]
    for phase, part in frame.groupby("phase"):
        rows = known.assignments(1, 0, domain="law", phase=phase)
        counts = Counter(expert for _, _, expert, _ in rows)
        assert part["assignments"].tolist() == [counts[e] for e in range(6)]


@pytest.mark.parametrize("phase", [None, "prompt", "generated"])
def test_routing_is_in_the_order_of_the_forward_passes(run, known, phase):
    chosen = load.routing(run, 3, site=0, phase=phase)
    expected = []
    order = [n for batch in BATCHES for n in batch]
    if phase != "generated":
        expected += [
            token["token_id"]
            for number in order
            for token in known.tokens
            if token["prompt_id"] == number and token["phase"] == "prompt"
        ]
    if phase != "prompt":
        expected += [t["token_id"] for t in known.tokens if t["phase"] == "generated"]
    assert chosen.token_id.tolist() == expected
    assert chosen.n_tokens == len(expected)
    by_id = {token["token_id"]: token for token in known.tokens}
    assert chosen.batch.tolist() == [by_id[t]["batch"] for t in expected]
    for row, token_id in enumerate(expected):
        used = known.routes[token_id, 3, 0]["experts"]
        pad = 2 - len(used)
        assert chosen.expert_ids[row].tolist() == [expert for expert, _ in used] + [-1] * pad
        assert chosen.weights[row].tolist() == [weight for _, weight in used] + [0] * pad


def test_routing_of_a_part_keeps_batches_whole(run):
    chosen = load.routing(run, 1, max_tokens=9)
    # the first batch has 8 tokens, so the second one is begun and taken whole
    assert sorted(set(chosen.batch.tolist())) == [0, 1]
    assert len(chosen.token_id) == 8 + 13 and chosen.n_tokens == 33
    assert len(load.routing(run, 1, max_tokens=1).token_id) == 8


def test_routing_of_filters_is_the_rows_of_their_tokens(run, known):
    part = Part(search="COURT")
    whole = load.routing(run, 1)
    for filters in ({"domain": "law"}, {"part": part}, {"domain": "law", "part": part}):
        prompts = {0} if "part" in filters else {0, 3}
        mine = {t["token_id"] for t in known.tokens if t["prompt_id"] in prompts}
        kept = np.isin(whole.token_id, list(mine))
        found = load.routing(run, 1, **filters)
        assert found.token_id.tolist() == whole.token_id[kept].tolist()
        assert found.batch.tolist() == whole.batch[kept].tolist()
        assert (found.expert_ids == whole.expert_ids[kept]).all()
        assert found.n_tokens == len(mine)
        # one batch at least, and all of its tokens that the filters leave
        few = load.routing(run, 1, max_tokens=1, **filters)
        assert few.token_id.tolist() == found.token_id[found.batch == found.batch[0]].tolist()
        assert few.n_tokens == len(mine)
    some = np.array([1, 9])
    found = load.routing(run, 1, part=Part(slice="x", token_ids=some), phase="prompt")
    assert sorted(found.token_id.tolist()) == some.tolist()


def test_routing_needs_ids_and_a_router(run, counted):
    with pytest.raises(RunError, match="level stats"):
        load.routing(counted, 1)
    with pytest.raises(RunError, match="Layer 2 has no router"):
        load.routing(run, 2)


# ---- prompts


def test_prompts(run, known):
    frame = overview.prompts(run)
    assert frame["prompt_id"].tolist() == list(range(len(PROMPTS)))
    assert frame["text"].tolist() == ["".join(pieces) for _, pieces in PROMPTS]
    assert frame["domain"].tolist() == [domain or "" for domain, _ in PROMPTS]
    assert frame["source"].tolist() == [f"test:{n + 1}" for n in range(len(PROMPTS))]
    for row in frame.to_dict("records"):
        rows = [t for t in known.tokens if t["prompt_id"] == row["prompt_id"]]
        losses = [t["loss"] for t in rows if t["loss"] is not None]
        assert row["tokens"] == len(rows)
        assert row["generated"] == sum(t["phase"] == "generated" for t in rows)
        assert row["truncated"] == (7 if row["prompt_id"] == 3 else 0)
        assert row["mean_loss"] == pytest.approx(np.mean(losses) if losses else np.nan, nan_ok=True)


def test_prompts_by_page_domain_and_text(run):
    assert overview.prompts(run, limit=2, offset=1)["prompt_id"].tolist() == [1, 2]
    assert overview.prompts(run, domain="law")["prompt_id"].tolist() == [0, 3]
    assert overview.prompts(run, domain="")["prompt_id"].tolist() == [2]
    assert overview.prompts(run, search="COURT")["prompt_id"].tolist() == [0]
    # no wildcards, no way out of the statement
    assert overview.prompts(run, search="100%_")["prompt_id"].tolist() == [5]
    assert overview.prompts(run, search="%")["prompt_id"].tolist() == [1, 5]
    assert overview.prompts(run, search="' OR true --").empty
    assert overview.prompt_count(run) == len(PROMPTS)
    assert overview.prompt_count(run, domain="code", search="<") == 2
    assert overview.prompt(run, 3)["text"].tolist() == ["No"]
    assert overview.prompt(run, 99).empty


# ---- tokens


@pytest.mark.parametrize("prompt_id", range(len(PROMPTS)))
def test_tokens_rejoin_to_the_prompt(run, known, prompt_id):
    frame = tokens.tokens(run, prompt_id)
    rows = [t for t in known.tokens if t["prompt_id"] == prompt_id]
    for column in ("token_id", "position", "phase", "token", "text"):
        assert frame[column].tolist() == [row[column] for row in rows]
    assert missing_is_none(frame, "loss") == [row["loss"] for row in rows]
    text = "".join(frame["text"][frame["phase"] == "prompt"])
    assert text == overview.prompt(run, prompt_id)["text"].iloc[0]


def expected_value(route, n_experts, quantity, pinned_here):
    weights = [weight for _, weight in route["experts"]]
    if quantity == "entropy":
        return None if route["entropy"] is None else route["entropy"] / log(n_experts)
    if quantity == "top1_weight":
        return max(weights, default=None)
    if quantity == "pinned_weight":
        if not pinned_here:
            return None
        return sum(weight for expert, weight in route["experts"] if expert in pinned_here)
    if quantity == "expert":
        return route["experts"][0][0] if route["experts"] else None
    return route[quantity]


@pytest.mark.parametrize("quantity", list(tokens.QUANTITIES))
@pytest.mark.parametrize("prompt_id", [0, 4])
def test_token_quantity(run, known, quantity, prompt_id):
    pins = [(1, 0, 3), (1, 0, 2), (3, 1, 0)]
    frame = tokens.token_quantity(run, prompt_id, quantity, pinned=pins)
    rows = [t for t in known.tokens if t["prompt_id"] == prompt_id]
    places = [(s, t) for s in SITES for t in rows]
    assert len(frame) == len(places)
    for got, (site, token) in zip(frame.to_dict("records"), places, strict=True):
        where = (got["token_id"], got["layer"], got["site"])
        assert where == (token["token_id"], site.layer, site.site)
        assert (got["position"], got["text"]) == (token["position"], token["text"])
        here = {expert for layer, at, expert in pins if (layer, at) == where[1:]}
        value = expected_value(known.routes[where], site.n_experts, quantity, here)
        if value is None:
            assert np.isnan(got["value"])
        else:
            assert got["value"] == pytest.approx(value)


def test_pins_tell_layers_apart(run):
    # layer 1 site 0, not layer 10 or layer 3
    frame = tokens.token_quantity(run, 0, "pinned_weight", pinned=[(1, 0, 1)])
    known_places = frame.dropna(subset="value")[["layer", "site"]].drop_duplicates()
    assert known_places.to_numpy().tolist() == [[1, 0]]


def test_quantities_that_cannot_be_asked_for(run):
    with pytest.raises(UnknownNameError, match="Did you mean 'entropy'"):
        tokens.token_quantity(run, 0, "entropi")
    with pytest.raises(RunError, match="pin"):
        tokens.token_quantity(run, 0, "pinned_weight")


@pytest.mark.parametrize("token_id", [0, 16, 24, 30])
def test_experts_and_gates_of_a_token(run, known, token_id):
    frame = tokens.token_experts(run, token_id)
    expected = [
        (site.layer, site.site, slot, expert, weight)
        for site in SITES
        for slot, (expert, weight) in enumerate(
            known.routes[token_id, site.layer, site.site]["experts"]
        )
    ]
    columns = ["layer", "site", "slot", "expert_id", "weight"]
    assert list(frame[columns].itertuples(index=False, name=None)) == expected
    sums = frame.groupby(["layer", "site"])["weight_share"].sum()
    assert sums.tolist() == pytest.approx([1] * len(sums))

    gates = tokens.token_gates(run, token_id)
    assert gates["score_function"].tolist() == [site.score_function for site in SITES]
    for name in ("entropy", "margin", "logsumexp", "topk_mass"):
        expected = [known.routes[token_id, s.layer, s.site][name] for s in SITES]
        assert missing_is_none(gates, name) == expected


@pytest.mark.parametrize("site", SITES, ids=lambda s: f"{s.layer}.{s.site}")
@pytest.mark.parametrize("token_id", [3, 4])
def test_scores_of_a_token(run, known, site, token_id):
    frame = tokens.token_scores(run, token_id, site.layer, site=site.site)
    route = known.routes[token_id, site.layer, site.site]
    assert frame["expert_id"].tolist() == list(range(site.n_experts))
    used = {expert: (slot, weight) for slot, (expert, weight) in enumerate(route["experts"])}
    assert missing_is_none(frame, "slot") == [
        used.get(e, (None,))[0] for e in range(site.n_experts)
    ]
    assert missing_is_none(frame, "weight") == [
        used.get(e, (None, None))[1] for e in range(site.n_experts)
    ]
    # every third token has scores; the others are missing, not 0
    if token_id % 3 == 0:
        assert frame["recorded"].all() and frame["score"].tolist() == route["scores"]
    else:
        assert not frame["recorded"].any() and frame["score"].isna().all()


# ---- experts


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_of_an_expert(run, known, filters):
    rows = [row for row in known.assignments(3, 0, **filters) if row[2] == 2]
    rows.sort(key=lambda row: (-row[3], row[0]["token_id"]))
    frame = experts.expert_tokens(run, 3, 2, limit=4, context=2, **filters)
    assert frame["token_id"].tolist() == [row[0]["token_id"] for row in rows[:4]]
    assert frame["weight"].tolist() == [row[3] for row in rows[:4]]
    assert frame["slot"].tolist() == [row[1] for row in rows[:4]]
    for got, (token, *_) in zip(frame.to_dict("records"), rows, strict=False):
        near = {
            t["position"] - token["position"]: t["text"]
            for t in known.tokens
            if t["prompt_id"] == token["prompt_id"]
        }
        assert got["text"] == token["text"]
        assert got["before"] == near.get(-2, "") + near.get(-1, "")
        assert got["after"] == near.get(1, "") + near.get(2, "")
        assert got["domain"] == (token["domain"] or "")
    assert experts.expert_token_count(run, 3, 2, **filters) == len(rows)


def test_vocabulary_of_an_expert(run, known):
    frame = experts.expert_vocabulary(run, 1, 0, min_count=2)
    seen = Counter(token["token"] for token in known.tokens)
    used = Counter(row[0]["token"] for row in known.assignments(1, 0) if row[2] == 0)
    expected = {token: used[token] for token in used if seen[token] >= 2}
    assert dict(zip(frame["token"], frame["assignments"], strict=True)) == expected
    assert frame["share"].tolist() == [used[t] / seen[t] for t in frame["token"]]
    assert frame["share"].is_monotonic_decreasing


# ---- a run without ids


def test_a_run_of_totals_answers_with_missing_values(counted):
    assert load.expert_load(counted)["assignments"].sum() > 0
    values = tokens.token_quantity(counted, 0, "entropy")
    assert len(values) == 8 * len(SITES) and values["value"].isna().all()
    pinned = tokens.token_quantity(counted, 0, "pinned_weight", pinned=[(1, 0, 0)])
    assert len(pinned) == 8 * len(SITES) and pinned["value"].isna().all()
    assert tokens.token_experts(counted, 0).empty
    assert len(tokens.token_gates(counted, 0)) == len(SITES)
    assert experts.expert_tokens(counted, 1, 0).empty
    assert overview.gate_means(counted)["entropy"].isna().all()
