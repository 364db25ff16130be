"""Attention: queries, metrics and figures against plain Python over the same rows."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import BIN_WIDTH, LAYERS, NASTY, PROMPTS, RANKS, WITHOUT_ATTENTION, write_run

from explorer.errors import MetricError, RunError
from explorer.metrics import attention as heads
from explorer.metrics import attention as metrics
from explorer.pages.attention import data, figures
from explorer.pages.attention import data as queries
from explorer.pages.attention.data import prompt_routing, routing_together
from explorer.pages.attention.figures import together_figure, token_window
from explorer.pages.tokens import data as tokens
from explorer.run import open_run
from explorer.ui.wording import Scope

STATISTICS = ("entropy", "sink_mass", "mean_distance", "window_mass")
SCOPE = Scope(30)
# means and shares pass through float32 once
CLOSE = 1e-5


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "known.duckdb", level="attention")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run without attention."""
    written = write_run(tmp_path_factory.mktemp("run") / "ids.duckdb")
    with open_run(written.path) as opened:
        yield opened


def prompt_tokens(known, prompt_id):
    found = [t for t in known.tokens if t["prompt_id"] == prompt_id and t["phase"] == "prompt"]
    return sorted(found, key=lambda token: token["position"])


# ---- queries


@pytest.mark.parametrize("domain", [None, "law", "code", "", "nowhere"])
def test_prompts_with_attention(run, known, domain):
    frame = queries.attention_prompts(run, domain=domain)
    expected = [
        number
        for number, (name, _) in enumerate(PROMPTS)
        if number != WITHOUT_ATTENTION and (domain is None or (name or "") == domain)
    ]
    assert frame["prompt_id"].tolist() == expected
    for row in frame.itertuples():
        assert row.tokens == len(prompt_tokens(known, row.prompt_id))
        assert (row.bin_width, row.every) == (BIN_WIDTH, 1)
        assert row.bins == math.ceil(row.tokens / BIN_WIDTH)


def test_a_run_without_attention_has_no_rows(bare):
    assert queries.attention_prompts(bare).empty
    assert queries.attention_layers(bare).empty
    assert queries.head_stats(bare).empty
    with pytest.raises(RunError, match="no attention map of layer 1, head 0"):
        queries.head_map(bare, 0, 1, 0)


def test_layers_are_labelled_with_their_mixer(run):
    frame = queries.attention_layers(run)
    assert frame["layer"].tolist() == [layer.layer for layer in LAYERS]
    assert frame["kind"].tolist() == ["MambaMixer"] + [queries.HAS_MAP] * 3
    assert pd.isna(frame["heads"].iloc[0]) and frame["heads"].iloc[1] == 3


@pytest.mark.parametrize("where", [{}, {"domain": "code"}, {"domain": ""}])
def test_statistics_of_heads_are_means_over_queries(run, known, where):
    frame = queries.head_stats(run, **where).set_index(["layer", "head"])
    chosen = [
        prompt
        for prompt, (name, _) in enumerate(PROMPTS)
        if prompt != WITHOUT_ATTENTION
        and ("domain" not in where or (name or "") == where["domain"])
    ]
    assert set(frame.index) == {(layer, head) for _, layer, head in known.attention}
    for (layer, head), row in frame.iterrows():
        facts = [known.attention[prompt, layer, head] for prompt in chosen]
        counts = [fact["queries"] for fact in facts]
        assert (row["prompts"], row["queries"]) == (len(facts), sum(counts))
        for name in STATISTICS:
            mean = np.average([fact[name] for fact in facts], weights=counts)
            assert row[name] == pytest.approx(mean)


def test_every_map_is_the_one_that_was_written(run, known):
    for (prompt, layer, head), fact in known.attention.items():
        found = queries.head_map(run, prompt, layer, head)
        assert (found.tokens, found.bin_width) == (fact["queries"], BIN_WIDTH)
        assert found.weights.ravel() == pytest.approx(np.array(fact["map"]), abs=CLOSE)
        assert found.weights.sum(axis=1) == pytest.approx(np.ones(len(found.weights)), abs=CLOSE)


@pytest.mark.slow
def test_keys_of_a_token(run, known):
    texts = {token["token_id"]: token for token in known.tokens}
    for (token_id, layer, head), expected in known.keys.items():
        frame = queries.attended_keys(run, token_id, layer, head)
        assert frame["rank"].tolist() == list(range(len(expected)))
        assert list(zip(frame["key_token_id"], frame["weight"], strict=True)) == expected
        for row in frame.itertuples():
            assert row.text == texts[row.key_token_id]["text"]
            assert row.position == texts[row.key_token_id]["position"]
    assert queries.attended_keys(run, 10**6, 1, 0).empty


@pytest.mark.parametrize("prompts", [[0], [4, 1], []])
def test_keys_of_a_layer(run, known, prompts):
    frame = queries.layer_keys(run, prompts, 3)
    place = {token["token_id"]: token for token in known.tokens}
    expected = {
        (place[token]["prompt_id"], head, rank, place[token]["position"], place[key]["position"], w)
        for (token, layer, head), keys in known.keys.items()
        for rank, (key, w) in enumerate(keys)
        if layer == 3 and place[token]["prompt_id"] in prompts
    }
    columns = ["prompt_id", "head", "rank", "query", "key", "weight"]
    assert set(frame[columns].itertuples(index=False, name=None)) == expected
    assert len(frame) == len(expected)


def test_keys_of_one_head(run):
    of_layer = queries.layer_keys(run, [4], 1)
    of_head = queries.prompt_keys(run, 4, 1, 2)
    mine = of_layer[of_layer["head"] == 2]
    assert len(of_head) and of_head["weight"].tolist() == mine["weight"].tolist()
    assert of_head["query"].is_monotonic_increasing


def test_experts_of_several_prompts_leave_out_what_was_generated(run, known):
    frame = data.prompts_experts(run, [0, 4], 1)
    expected = {
        (token["prompt_id"], token["position"], slot, expert)
        for token, slot, expert, _ in known.assignments(1, 0, phase="prompt")
        if token["prompt_id"] in (0, 4)
    }
    assert set(frame.itertuples(index=False, name=None)) == expected


# ---- metrics


def test_uniform_attention_on_paper():
    found = heads.uniform_head([(2, 1)])
    # the first token attends to itself, the second to both alike
    assert found.entropy == pytest.approx(math.log(2) / 2)
    assert found.sink_mass == pytest.approx((1 + 0.5) / 2)
    assert found.mean_distance == pytest.approx(0.25)
    assert found.window_mass == 1
    far = heads.uniform_head([(32, 1)])
    assert far.window_mass == pytest.approx(np.mean([min(k, 16) / k for k in range(1, 33)]))
    assert math.isnan(heads.uniform_head([]).entropy)


def test_skipped_blocks_of_queries_do_not_count():
    assert heads.used_queries(200, 1).tolist() == list(range(200))
    assert heads.used_queries(200, 2).tolist() == [*range(64), *range(128, 192)]


def test_the_constants_are_those_of_the_kernel():
    attention = pytest.importorskip("kernels.ops.attention")
    assert heads.RECENT == attention.RECENT
    assert heads.QUERY_BLOCK == attention.QUERY_BLOCK


def test_tokens_share_an_expert():
    first = [[1, 2], [1, 2], [3, -1], [-1, -1]]
    second = [[2, 5], [3, 4], [-1, 4], [-1, -1]]
    assert metrics.share_expert(first, second).tolist() == [True, False, False, False]
    assert metrics.share_expert(np.zeros((0, 2), int), np.zeros((0, 2), int)).tolist() == []


expert_ids = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=n, max_size=n)
)


def shared(ids, i, j):
    return bool((set(ids[i]) & set(ids[j])) - {-1})


@settings(max_examples=60)
@given(expert_ids)
def test_chance_levels_against_loops(ids):
    by_distance, by_query = metrics.chance_levels(np.array(ids))
    n = len(ids)
    for distance in range(n):
        pairs = [shared(ids, i, i - distance) for i in range(n) if i - distance >= 1 and distance]
        expected = np.mean(pairs) if pairs else np.nan
        assert by_distance[distance] == pytest.approx(expected, nan_ok=True)
    for query in range(n):
        pairs = [shared(ids, query, key) for key in range(1, query)]
        assert by_query[query] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def test_chance_levels_do_not_depend_on_the_blocks_they_are_computed_in(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 8, (50, 2))
    whole = metrics.chance_levels(ids)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    for one, other in zip(whole, metrics.chance_levels(ids), strict=True):
        np.testing.assert_allclose(one, other)


def test_pairs_leave_out_the_query_itself_and_the_first_token():
    ids = [[0, 1], [0, 2], [2, 3], [0, 3]]
    totals = metrics.pair_totals(
        ids, [3, 3, 3, 2], [0, 3, 2, 1], [0.4, 0.3, 0.2, 0.5], [0, 0, 0, 1], n_heads=3
    )
    assert totals.pairs.tolist() == [1, 1, 0]
    assert totals.weight.tolist() == [0.2, 0.5, 0]
    assert totals.shared.tolist() == [0.2, 0.5, 0]
    # at distance 1: (2, 1) and (3, 2) share; before token 3: 1 and 2 share; before 2: 1 does
    assert totals.at_distance.tolist() == [0.2, 0.5, 0]
    assert totals.at_random.tolist() == [0.2, 0.5, 0]


def test_a_key_after_its_query_is_refused():
    with pytest.raises(MetricError, match="keys at or before"):
        metrics.pair_totals([[0], [1]], [0], [1], [1.0], [0], n_heads=1)


def routed(random, n, together):
    """Draw a prompt whose queries attend to a key of their own expert, or to any."""
    ids = random.integers(0, 4, (n, 1))
    pairs = []
    for query in range(2, n):
        same = [key for key in range(1, query) if ids[key, 0] == ids[query, 0]]
        keys = same if together and same else range(1, query)
        pairs.append((query, int(random.choice(list(keys)))))
    query, key = np.array(pairs).T
    return metrics.pair_totals(
        ids, query, key, np.ones(len(query)), np.zeros(len(query), int), n_heads=1
    )


@pytest.mark.parametrize("seed", range(3))
def test_lift_tells_attention_to_ones_own_expert_from_attention_to_any(seed):
    random = np.random.default_rng(seed)
    (yes,) = metrics.together([routed(random, 60, True) for _ in range(20)])
    (no,) = metrics.together([routed(random, 60, False) for _ in range(20)])
    assert yes.lift_low > 2 and yes.share > 0.9
    assert 0.8 < no.lift_low < no.lift < no.lift_high < 1.25
    assert yes.prompts == 20 and yes.pairs == 20 * 58
    assert no.share_low < no.share < no.share_high


def test_few_prompts_have_no_interval():
    random = np.random.default_rng(0)
    (found,) = metrics.together([routed(random, 30, True)])
    assert found.lift > 1 and math.isnan(found.lift_low) and math.isnan(found.share_high)
    assert metrics.together([]) == []
    empty = metrics.AttendedPairs(*(np.zeros(1) for _ in range(5)))
    (nothing,) = metrics.together([empty])
    assert math.isnan(nothing.share) and math.isnan(nothing.lift) and nothing.pairs == 0


# ---- both together


@pytest.mark.parametrize(("layer", "site"), [(1, 0), (3, 1)])
def test_whether_attended_tokens_route_together_in_a_run(run, known, layer, site):
    found = routing_together(run, attention_layer=3, layer=layer, site=site)
    assert (found.n_prompts, found.n_all) == (5, 5)
    assert found.heads["head"].tolist() == [0, 1]
    for head in (0, 1):
        part, whole, covered, asked = 0.0, 0.0, 0.0, 0
        for prompt in range(len(PROMPTS)):
            listed = prompt_tokens(known, prompt)
            first = listed[0]["token_id"]
            experts = {
                token["token_id"]: {
                    e for e, _ in known.routes[token["token_id"], layer, site]["experts"]
                }
                for token in listed
            }
            for token in listed:
                keys = known.keys.get((token["token_id"], 3, head), [])
                covered, asked = covered + sum(w for _, w in keys), asked + bool(keys)
                for key, weight in keys:
                    if key not in (first, token["token_id"]):
                        whole += weight
                        part += weight * bool(experts[key] & experts[token["token_id"]])
        row = found.heads.iloc[head]
        assert row["share"] == pytest.approx(part / whole)
        assert row["covered"] == pytest.approx(covered / asked)
        assert 0 <= row["chance_distance"] <= 1 and 0 <= row["chance_random"] <= 1


def test_a_prompts_experts_by_position(run, known):
    listed = prompt_tokens(known, 4)
    found = prompt_routing(run, prompt_id=4, n_tokens=len(listed), layer=1, site=0)
    for token, ids in zip(listed, found.expert_ids.tolist(), strict=True):
        chosen = [expert for expert, _ in known.routes[token["token_id"], 1, 0]["experts"]]
        assert [expert for expert in ids if expert >= 0] == chosen
    assert found.by_distance == pytest.approx(
        metrics.chance_levels(found.expert_ids)[0], nan_ok=True
    )


def test_prompts_beyond_the_limit_are_left_out_and_counted(run, monkeypatch):
    monkeypatch.setattr("explorer.pages.attention.data.MAX_COMPARED", 50)
    found = routing_together(run, attention_layer=1, layer=1, site=0)
    assert (found.n_prompts, found.n_all) == (1, 5)


def test_domains_without_attention_are_refused_in_words(run):
    with pytest.raises(RunError, match="no attention of these prompts"):
        routing_together(run, attention_layer=1, layer=1, site=0, domain="nowhere")


# ---- figures


def overview(run, measure, **options):
    return figures.head_overview(
        queries.head_stats(run),
        queries.attention_layers(run),
        measure,
        baseline=heads.HeadBaseline(1.5, 0.25, 3.0, 0.9),
        scope=SCOPE,
        n_prompts=5,
        **options,
    )


def cells(figure):
    return next(part for part in figure.data if part.name == "cells")


def heat(figure):
    return next(part for part in figure.data if isinstance(part, go.Heatmap))


def caption(figure):
    return figure.layout.title.subtitle.text.replace("<br>", "; ")


@pytest.mark.parametrize("measure", list(figures.MEASURES))
def test_the_overview_holds_every_recorded_head(run, measure):
    figure = overview(run, measure, chosen=(3, 1))
    stats = queries.head_stats(run)
    clicked = np.asarray(cells(figure).customdata)
    assert clicked[:, :2].tolist() == stats[["layer", "head"]].to_numpy().tolist()
    assert clicked[:, 2] == pytest.approx(stats[measure].to_numpy())
    z = np.asarray(heat(figure).z)
    assert z.shape == (4, 3) and np.isnan(z[0]).all()
    assert "uniform attention: " in caption(figure) and "5 prompts" in caption(figure)
    assert any("MambaMixer" in note.text for note in figure.layout.annotations)
    assert list(figure.layout.shapes[0].x0 + np.array([0, 1])) == [0.5, 1.5]


def test_the_mixer_of_a_layer_is_not_markup(run):
    layers = queries.attention_layers(run).assign(kind=["<b>Mixer</b>", *["attention"] * 3])
    figure = figures.head_overview(
        queries.head_stats(run),
        layers,
        "entropy",
        baseline=heads.uniform_head([(4, 1)]),
        scope=SCOPE,
        n_prompts=1,
    )
    assert "&lt;b&gt;" in figure.layout.annotations[0].text


@pytest.mark.parametrize("prompt", [0, 4])
def test_the_map_shows_the_shares_and_no_later_key(run, prompt):
    found = queries.head_map(run, prompt, 1, 0)
    figure = figures.head_heatmap(found, name="L1.H0", scope=SCOPE, window=range(0, 4))
    z = np.asarray(heat(figure).z)
    assert np.isnan(z[np.triu_indices(len(z), 1)]).all()
    clicked = np.asarray(cells(figure).customdata)
    assert len(clicked) == len(z) * (len(z) + 1) // 2
    for query, key, share, query_end, key_end in clicked.tolist():
        row, column = int(query) // BIN_WIDTH, int(key) // BIN_WIDTH
        assert share == pytest.approx(found.weights[row, column], abs=CLOSE)
        assert z[row, column] == pytest.approx(np.log10(max(share, 1e-3)), abs=1e-4)
        assert query_end < found.tokens and key_end < found.tokens
        assert query_end - query < BIN_WIDTH
    assert f"{BIN_WIDTH} × {BIN_WIDTH} tokens" in caption(figure)


def window(run, prompt, **options):
    listed = tokens.tokens(run, prompt)
    listed = listed[listed["phase"] == "prompt"]
    change = np.linspace(0, 1, len(listed))
    change[0] = np.nan
    figure = token_window(
        queries.head_map(run, prompt, 1, 2),
        range(len(listed)),
        listed["text"].tolist(),
        change,
        name="L1.H2",
        routed="3.0",
        scope=SCOPE,
        token=2,
        **options,
    )
    return figure, change


def test_the_window_has_the_tokens_on_its_axes_and_a_strip_of_changes(run):
    figure, change = window(run, 4)
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext)
    assert figure.layout.xaxis.ticktext[0] == "&lt;script&gt;alert…"
    assert len(figure.layout.xaxis.ticktext) == 9
    strip = next(part for part in figure.data if part.name == "routing change")
    assert list(strip.y) == pytest.approx(change[1:].tolist())
    assert np.asarray(strip.customdata).ravel().tolist() == list(range(1, 9))
    assert "mean over" in caption(figure) and "Jaccard" in caption(figure)
    # cells of two tokens, in the places of their tokens
    assert np.asarray(heat(figure).x).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_the_window_of_keys_is_exact(run):
    keys = queries.prompt_keys(run, 4, 1, 2)
    figure, _ = window(run, 4, keys=keys)
    marks = next(part for part in figure.data if part.name == "heaviest keys")
    assert len(marks.x) == len(keys) <= 9 * RANKS
    assert np.asarray(marks.customdata)[:, 2].tolist() == keys["weight"].tolist()
    assert "heaviest keys" in caption(figure)


def test_an_exact_map_says_so(run):
    found = queries.head_map(run, 4, 1, 2)
    exact = queries.HeadMap(np.tril(np.ones((9, 9))) / np.arange(1, 10)[:, None], 9, 1)
    figure = figures.head_heatmap(exact, name="L1.H2", scope=SCOPE)
    assert "; exact;" in caption(figure) and "mean over" not in caption(figure)
    assert found.bin_width == BIN_WIDTH


def test_a_query_that_was_not_used_is_missing_and_not_zero():
    weights = np.array([[1.0, 0.0], [np.nan, np.nan]])
    figure = figures.head_heatmap(queries.HeadMap(weights, 4, 2), name="L0.H0", scope=SCOPE)
    missing = next(part for part in figure.data if part.name == "cells without a value")
    assert len(missing.x) == 2 and "no query used" in missing.hovertemplate


def test_maps_that_are_too_large_are_cut_and_say_so():
    n = 300
    weights = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    figure = figures.head_heatmap(queries.HeadMap(weights, n, 1), name="L0.H0", scope=SCOPE)
    assert np.asarray(heat(figure).z).size <= 60_000
    assert "of 300 tokens" in caption(figure)


def strings(node):
    if isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize("keys", [False, True])
def test_nothing_from_a_prompt_is_markup(run, keys):
    options = {"keys": queries.prompt_keys(run, 4, 1, 2)} if keys else {}
    figure, _ = window(run, 4, **options)
    drawn = [text for text in strings(figure.to_plotly_json()) if NASTY[1:7] in text]
    assert drawn and all("<script" not in text for text in drawn)


def test_the_figure_of_pairs_shows_shares_and_both_chance_levels(run):
    found = routing_together(run, attention_layer=3, layer=1, site=0)
    figure = together_figure(
        found.heads, attention_layer=3, routed="1.0", chosen=1, n_prompts=5, scope=SCOPE
    )
    by_name = {part.name: part for part in figure.data}
    chosen = by_name["attended keys, head 1"]
    assert chosen.y[0] == pytest.approx(found.heads["share"].iloc[1])
    distance = by_name["by chance, same distance"]
    assert list(distance.y) == pytest.approx(found.heads["chance_distance"].tolist())
    said = caption(figure)
    assert "same distance" in said and "left out" in said and "5 prompts" in said
