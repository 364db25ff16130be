"""Two runs against each other, and checkpoints: by hand, and on recorded runs."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from synthetic import write_run

from explorer import open_run
from explorer.errors import MetricError, RunError
from explorer.metrics import agreement, alignment
from explorer.metrics.specialization import information
from explorer.pages.compare_runs import data, figures
from explorer.pages.compare_runs.data import chosen, common_prompts, common_tokens, prompt_gates
from explorer.pages.trends import data as trends
from explorer.pages.trends.figures import trend_lines
from explorer.queries.load import expert_load_by_domain
from explorer.queries.where import Part

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    paths = [folder / "step_10.duckdb", folder / "step_200.duckdb"]
    for seed, path in enumerate(paths):
        write_run(path, seed=seed)
    with open_run(paths[0]) as a, open_run(paths[1]) as b:
        yield a, b


def test_stretches_end_at_tokens_of_both_models():
    found = alignment.align(["", "ab", "c", "de"], ["abc", "d", "", "e"])
    assert found.start.tolist() == [0, 3] and found.end.tolist() == [3, 5]
    assert found.first.tolist() == [-1, 0, 0, 1]
    assert found.second.tolist() == [0, 1, -1, 1]
    with pytest.raises(MetricError, match="join to the same text"):
        alignment.align(["ab"], ["abc"])


@st.composite
def two_cuts(draw):
    text = draw(st.text(min_size=1, max_size=30))

    def cut():
        ends = sorted({*draw(st.lists(st.integers(0, len(text)), max_size=8)), len(text)})
        return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    return text, cut(), cut()


@given(two_cuts())
def test_stretches_cover_the_text_and_no_token_crosses_one(case):
    text, first, second = case
    found = alignment.align(first, second)
    assert "".join(text[a:b] for a, b in zip(found.start, found.end, strict=True)) == text
    for tokens, segment in ((first, found.first), (second, found.second)):
        end = 0
        for token, number in zip(tokens, segment, strict=True):
            start, end = end, end + len(token)
            if token:
                assert found.start[number] <= start and end <= found.end[number]


def tokens_with(text, losses):
    """Return tokens as a run stores them: with each, the loss of the one after it."""
    return pd.DataFrame(
        {"text": text, "loss": [*losses[1:], None], "normalized_entropy": 0.5, "margin": 0.25}
    )


def stretches_of(text, first, second):
    found = alignment.align(first["text"], second["text"])
    return data._stretches(found, [first, second], text, 0)


def test_the_loss_of_a_stretch_is_what_predicting_its_characters_cost():
    # every character costs as much in both models, however they are cut
    costs = dict(zip("abcdefg", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), strict=True))

    def cut(pieces):
        return tokens_with(pieces, [sum(costs[c] for c in piece) for piece in pieces])

    table = stretches_of("abcdefg", cut(["", "ab", "c", "de", "fg"]), cut(["abc", "d", "e", "fg"]))
    assert table["text"].tolist() == ["abc", "de", "fg"]
    assert table["loss_a"].tolist() == [7, 24, 96]
    # nothing came before the first token of B, so that nobody predicted it
    assert math.isnan(table["loss_b"][0]) and table["loss_b"].tolist()[1:] == [24, 96]
    assert table["tokens_a"].tolist() == [2, 1, 1] and table["tokens_b"].tolist() == [1, 2, 1]


def test_the_loss_of_a_stretch_is_not_guessed():
    known = tokens_with(["x", "a", "b", "c"], [0.0, 1.0, 2.0, 4.0])
    partly = tokens_with(["x", "a", "b", "c"], [0.0, 1.0, None, 4.0])
    whole = tokens_with(["x", "ab", "c"], [0.0, 3.0, 4.0])
    assert stretches_of("xabc", known, whole)["loss_a"].tolist()[1:] == [3, 4]
    losses = stretches_of("xabc", partly, whole)["loss_a"]
    assert math.isnan(losses[1]) and losses[2] == 4
    # a character of two tokens costs both; what ends the prompt may be no character
    several = tokens_with(["x", "a", "", "bc"], [0.0, 1.0, 2.0, 4.0])
    ended = tokens_with(["x", "a", "bc", ""], [0.0, 3.0, 4.0, 8.0])
    table = stretches_of("xabc", several, ended)
    assert table["loss_a"].tolist()[1:] == [3, 4]
    assert table["loss_b"][1] == 3 and math.isnan(table["loss_b"][2])


def test_means_of_stretches_leave_out_what_is_not_known():
    means = alignment.segment_means([1.0, 3.0, math.nan, 5.0], np.array([0, 0, 1, -1]), 2)
    assert means[0] == 2 and math.isnan(means[1])


def test_co_routing_counts_shared_experts_whatever_their_names():
    ids = np.array([[[0, 1], [1, 2], [3, -1]]])
    table = alignment.co_routing(ids)
    assert table.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    renamed = alignment.co_routing((ids + 5) * (ids >= 0) - (ids < 0))
    found = alignment.co_routing_agreement([table], [renamed], draws=10)
    assert found.pairs == 3 and found.correlation == pytest.approx(1.0)


def test_co_routing_of_unrelated_models_is_within_chance():
    random = np.random.default_rng(0)
    sides = [
        alignment.co_routing(np.argsort(random.random((3, 40, 16)), axis=-1)[:, :, :2])
        for _ in range(2)
    ]
    found = alignment.co_routing_agreement([sides[0]], [sides[1]], draws=50)
    assert abs(found.correlation) < 0.2
    assert found.low < 0 < found.high


def test_chance_is_the_correlation_of_shuffled_stretches():
    random = np.random.default_rng(1)
    sides = [
        [
            alignment.co_routing(np.argsort(random.random((2, n, 6)), axis=-1)[:, :, :2])
            for n in (5, 9)
        ]
        for _ in range(2)
    ]
    found = alignment.co_routing_agreement(*sides, draws=20, seed=3)
    again, chance = np.random.default_rng(3), []
    for _ in range(20):
        pairs = ([], [])
        for a, b in zip(*sides, strict=True):
            upper, order = np.triu_indices(len(a), 1), again.permutation(len(b))
            pairs[0].extend(a[upper])
            pairs[1].extend(b[np.ix_(order, order)][upper])
        chance.append(np.corrcoef(*pairs)[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(chance, [0.05, 0.95])))
    assert found.pairs == 10 + 36


def test_the_change_of_load_by_hand():
    def load(counts):
        return pd.DataFrame(
            {
                "layer": 0,
                "site": 0,
                "expert_id": range(len(counts)),
                "n_experts": len(counts),
                "assignments": counts,
                "share": np.array(counts) / sum(counts),
            }
        )

    change = data.load_change(load([9.5, 0]), load([4.5, 4.5]))
    assert change["change"].tolist() == pytest.approx(
        [math.log2(0.5 / (10 / 10.5)), math.log2(0.5 / (0.5 / 10.5))]
    )
    figure = figures.change_heatmap(change, caption="")
    assert figure.data[0].z[0][0] == pytest.approx(change["change"][0])


def test_a_run_against_itself_does_not_differ(pair):
    a, _ = pair
    table = data.token_divergence(a, a)
    assert (table["jaccard"] == 1).all() and (table["exact_set"] == 1).all()
    assert table["js"].max() < 1e-9
    models = data.two_models(a, a)
    assert models.co_routing.correlation == pytest.approx(1.0)
    np.testing.assert_allclose(models.stretches["entropy_a"], models.stretches["entropy_b"])
    assert data.differences(a, a).empty
    assert data.relation(a, a) == (True, True)


def test_chosen_experts_are_those_of_the_view(pair):
    a, b = pair
    prompts = common_prompts(a, b)
    both = common_tokens(a, b, prompts, max_tokens=10_000)
    assert len(both) and (both["position"] >= 0).all()
    same = common_tokens(a, a, common_prompts(a, a), max_tokens=10_000)["token_a"]
    few = common_tokens(a, a, common_prompts(a, a), max_tokens=3)["token_a"]
    assert list(few) == list(same.iloc[[0, (len(same) - 1) // 2, -1]])
    # neither all tokens nor in their order
    tokens = same.to_numpy()[::-2]
    rows = a.query("SELECT * FROM assignments")
    expected = {
        (r.layer, r.site, r.token_id, r.slot): (r.expert_id, r.weight) for r in rows.itertuples()
    }
    for site, found in zip(a.sites, chosen(a, tokens), strict=True):
        for row, token in enumerate(tokens):
            for slot in range(site.top_k):
                place = (site.layer, site.site, token, slot)
                expert, weight = expected.get(place, (-1, 0.0))
                assert found.expert_ids[row, slot] == expert
                assert found.weights[row, slot] == pytest.approx(weight)
    for whole, found in zip(chosen(a, tokens), chosen(a, tokens, weights=False), strict=True):
        assert (found.expert_ids == whole.expert_ids).all() and np.isnan(found.weights).all()
    assert all(len(found.expert_ids) == 0 for found in chosen(a, []))


def test_divergence_of_two_runs_is_that_of_their_sets(pair):
    a, b = pair
    table = data.token_divergence(a, b).set_index(["layer", "site"])
    both = common_tokens(a, b, common_prompts(a, b), max_tokens=10_000)
    site = a.sites[-1]
    sides = [
        chosen(run, both[f"token_{name}"])[-1].expert_ids for run, name in ((a, "a"), (b, "b"))
    ]
    by_hand = []
    for first, second in zip(*sides, strict=True):
        one, two = set(first[first >= 0]), set(second[second >= 0])
        if one | two:
            by_hand.append(len(one & two) / len(one | two))
    assert table.loc[(site.layer, site.site), "jaccard"] == pytest.approx(np.mean(by_hand))
    for number, site in enumerate(a.sites):
        dense = np.zeros((2, len(both), site.n_experts + 1))
        for side, run, name in ((0, a, "token_a"), (1, b, "token_b")):
            found = chosen(run, both[name])[number]
            places = np.where(found.expert_ids >= 0, found.expert_ids, site.n_experts)
            np.put_along_axis(dense[side], places, found.weights, axis=1)
        js = np.nanmean(jensenshannon(*dense[:, :, :-1], axis=1) ** 2)
        assert js > 0 and table.loc[(site.layer, site.site), "js"] == pytest.approx(js)
    few = data.token_divergence(a, b, weights=False, prompts=common_prompts(a, b))
    pd.testing.assert_frame_equal(
        few, table.drop(columns="js").reset_index()[list(few)], check_like=False
    )
    prompt = both.iloc[0]
    tokens = data.prompt_divergence(a, b, prompt["prompt_a"], prompt["prompt_b"])
    differing = tokens["jaccard"] < 1
    assert differing.any()
    assert tokens["first_layer"].notna().equals(differing)


def test_what_is_compared_is_of_the_filters(pair):
    a, _ = pair
    some = np.array([1, 9])
    table = data.token_divergence(a, a, part=Part(slice="x", token_ids=some))
    assert set(table["tokens"]) == set(table["common"]) == {2}
    n = {domain: len(common_prompts(a, a, domain=domain)) for domain in ("law", "code", "", None)}
    assert n == {"law": 2, "code": 2, "": 1, None: 6}
    for filters, prompts in (
        ({"domain": "law"}, {0, 3}),
        ({"part": Part(search="COURT")}, {0}),
        ({"part": Part(slice="x", token_ids=some)}, {0, 1}),
    ):
        found = data.two_models(a, a, **filters)
        assert set(found.stretches["prompt"]) == prompts
        assert found.prompts == found.common == len(prompts)
    nothing = data.two_models(a, a, part=Part(search="nowhere"))
    assert nothing.stretches.empty and nothing.prompts == nothing.common == 0


def test_what_is_compared_is_spread_and_counted(pair):
    a, _ = pair
    found = data.two_models(a, a, max_prompts=3)
    assert list(dict.fromkeys(found.stretches["prompt"])) == [0, 2, 5]
    assert (found.prompts, found.common, found.cut) == (3, 6, 0)
    table = data.token_divergence(a, a, max_rows=4 * len(a.sites))
    assert set(table["tokens"]) == {4} and set(table["common"]) == {30}


def test_what_is_compared_is_of_the_range_of_layers(pair):
    a, b = pair
    rows = a.query("SELECT token_id, avg(entropy) / ln(6) AS mean FROM gates "
                   "WHERE layer = 1 AND token_id < 6 GROUP BY 1 ORDER BY 1")  # fmt: skip
    (found,) = prompt_gates(a, [0], layers=(1, 2))
    np.testing.assert_allclose(found["normalized_entropy"], rows["mean"])
    assert not np.allclose(
        found["normalized_entropy"], prompt_gates(a, [0])[0]["normalized_entropy"]
    )
    whole = data.two_models(a, b)
    upper = data.two_models(a, b, layers=((1, 1), (1, 1)))
    assert whole.co_routing.correlation != upper.co_routing.correlation
    tokens = data.prompt_divergence(a, a, 0, 0, layers=(1, 1))
    assert (tokens["jaccard"] == 1).all()
    prompt = common_tokens(a, b, common_prompts(a, b)).iloc[0]
    for layers, sites in (((1, 1), [0]), ((3, 3), [1, 2])):
        place = prompt["prompt_a"], prompt["prompt_b"]
        table = data.prompt_divergence(a, b, *place, layers=layers)
        sides = chosen(a, table["token_a"]), chosen(b, table["token_b"])
        expected = np.nanmean(
            [agreement.jaccard(sides[0][s].expert_ids, sides[1][s].expert_ids) for s in sites],
            axis=0,
        )
        np.testing.assert_allclose(table["jaccard"], expected)
        assert set(table["first_layer"].dropna()) <= {layers[0]}


def test_checkpoints_are_ordered_by_step_and_the_last_is_settled(pair):
    a, b = pair
    order = trends.in_order([("step_200", b), ("step_10", a)])
    assert [(one.name, one.step) for one in order] == [("step_10", 10), ("step_200", 200)]
    staged = trends.in_order([("stage2_step_5", b), ("step_200", b), ("start", a)])
    assert [one.name for one in staged] == ["start", "step_200", "stage2_step_5"]
    table = trends.trend_table(order)
    last = table[table["name"] == "step_200"]
    assert (last["saturation"] == 1).all()
    first = table[table["name"] == "step_10"]
    assert (first["saturation"] < 1).all() and (first["domain_information"] > 0).all()
    for row in first.itertuples():
        load = expert_load_by_domain(a, row.layer, site=row.site)
        counts = load.pivot(index="domain", columns="expert_id", values="assignments").to_numpy()
        assert row.domain_information == pytest.approx(information(counts))
    figure = trend_lines(table, "saturation", caption="")
    assert list(figure.layout.xaxis.ticktext) == ["10", "200"]


def test_checkpoints_of_other_models_are_refused(pair, tmp_path):
    a, _ = pair
    from synthetic import SITES

    write_run(tmp_path / "other.duckdb", sites=SITES[:1])
    with open_run(tmp_path / "other.duckdb") as other, pytest.raises(RunError, match="one model"):
        trends.in_order([("a", a), ("b", other)])
