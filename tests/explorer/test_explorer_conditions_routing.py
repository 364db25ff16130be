"""Flips of routing, students of the gate, smaller models, and whether routing is alike."""

import numpy as np
import pytest
import tiny_models
import torch
from causality_probe import toy_layers, toy_tokens
from test_explorer_conditions import HELD_OUT, subject_of, texts

from capture.model.hooks import SiteObservation
from capture.model.sites import Site
from capture.store import SiteInfo
from capture.swap.rules import Routing
from explorer.comparison.conditions.condition import Subject
from explorer.comparison.conditions.distilled_routers import likeness, measure_students
from explorer.comparison.conditions.effects import measure, run_texts
from explorer.comparison.conditions.routing_changes import (
    RoutingTrace,
    first_divergence,
    gate_entropy,
    margin,
    margin_auc,
    margin_bins,
    set_changed,
    slots_changed,
)
from explorer.comparison.conditions.weights import Precision, Quantised
from explorer.errors import ConditionError
from explorer.survey.distil import (
    DistilSettings,
    cached,
    compare_routing,
    distil,
    in_common,
    information,
    routed,
    start_smaller,
    text_of_tokens,
    windows,
)

pytestmark = pytest.mark.slow

# ---- flips


def test_a_set_is_the_same_in_any_order_and_an_empty_slot_counts():
    """Ids come sorted, so that slots that changed places are no flip."""
    base = np.array([[1, 2], [1, 2], [1, 2], [-1, 3]])
    other = np.array([[1, 2], [1, 3], [-1, 2], [-1, 3]])
    assert set_changed(base, other).tolist() == [False, True, True, False]
    assert slots_changed(base, other).tolist() == [0, 0.5, 0, 0]
    wider = np.array([[1, 2, 5], [-1, 1, 2], [0, 1, 2], [-1, -1, 3]])
    assert set_changed(base, wider).tolist() == [True, False, True, False]


def test_small_margins_foretell_flips():
    """Flips at the two smallest margins: certain; at the largest: never; a tie counts half."""
    margins = np.array([0.1, 0.2, 0.3, 0.4])
    assert margin_auc(margins, np.array([True, True, False, False])) == 1
    assert margin_auc(margins, np.array([False, False, False, True])) == 0
    assert margin_auc(margins, np.array([True, False, False, True])) == 0.5
    assert margin_auc(np.ones(2), np.array([True, False])) == 0.5
    assert np.isnan(margin_auc(margins, np.zeros(4, bool)))


def test_where_routing_diverges_first():
    changed = [np.array([False, True, False]), np.array([False, True, True])]
    assert first_divergence(changed).tolist() == [-1, 0, 1]


def test_bins_hold_equal_numbers_smallest_margins_first():
    bins = margin_bins(np.array([5.0, 1, 4, 2, 3]), bins=2)
    assert [part.tolist() for part in bins] == [[1, 3, 4], [2, 0]]
    assert len(margin_bins(np.arange(3.0), bins=10)) == 3


def test_a_margin_is_the_lead_of_the_last_chosen():
    info = SiteInfo(0, 0, "m", 4, 2, 0, "softmax")
    site = Site(info, torch.nn.Identity(), None, None)
    scores = torch.tensor([[3.0, 1.0, 2.5, 0.5], [0.0, 2.0, 1.0, 4.0]])
    assert margin(site, scores, torch.tensor([[0, 2], [3, 1]])).tolist() == [1.5, 1.0]
    assert gate_entropy(site, torch.zeros(1, 4)).item() == pytest.approx(np.log(4))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_flips_of_a_model_counted_token_by_token(family):
    subject = subject_of(family)
    condition = Quantised(3)
    tables = measure(subject, HELD_OUT, [condition])
    base = run_texts(subject, HELD_OUT).trace
    with condition.open(subject):
        own = run_texts(subject, HELD_OUT).trace
    flips = tables.flips.set_index("layer")
    anywhere: set[int] = set()
    first_here = dict.fromkeys(base.keys, 0)
    for key in base.keys:
        pairs = list(zip(base.sets(key).tolist(), own.sets(key).tolist(), strict=True))
        changed = {t for t, (a, b) in enumerate(pairs) if set(a) != set(b)}
        first_here[key] = len(changed - anywhere)
        anywhere |= changed
        row = flips.loc[key[0]]
        assert row["set_flips"] == pytest.approx(len(changed) / len(pairs))
        lost = [len(set(b) - set(a)) / len(b) for a, b in pairs]
        assert row["slot_flips"] == pytest.approx(np.mean(lost))
        top = (base.heaviest(key) != own.heaviest(key)).mean()
        assert row["top1_flips"] == pytest.approx(top)
        assert row["first_divergence"] == pytest.approx(first_here[key] / len(pairs))
        bins = tables.flip_margins[tables.flip_margins["layer"] == key[0]]
        assert (bins["tokens"] * bins["set_flips"]).sum() == pytest.approx(len(changed))
        assert bins["tokens"].sum() == len(pairs) == row["tokens"]
        assert (bins["margin_low"].diff().dropna() >= 0).all()
    assert 0 < len(anywhere) < len(pairs)
    assert flips.loc[-1]["set_flips"] == pytest.approx(len(anywhere) / len(pairs))


def test_bfloat16_flips_where_margins_are_small():
    subject = subject_of()
    tables = measure(subject, texts(60, seed=5), [Precision("bfloat16", ("router",))])
    whole = tables.flips[tables.flips["layer"] == -1].iloc[0]
    assert 0 < whole["set_flips"] < 0.5
    assert whole["margin_auc"] > 0.9


def test_the_heaviest_is_by_weight_with_the_lower_id_in_a_tie():
    """Rows 1 and 3 are real; the third token of the batch is padding."""
    info = SiteInfo(0, 0, "m", 8, 2, 0, "softmax")
    site, trace = Site(info, torch.nn.Identity(), None, None), RoutingTrace()
    ids = torch.tensor([[4, 1], [5, 2], [0, 3], [7, -1]])
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    seen = SiteObservation(None, ids, weights, None)
    trace.add(site, seen, torch.tensor([0, 1, 3]))
    assert trace.heaviest((0, 0)).tolist() == [1, 2, 7]
    assert trace.sets((0, 0)).tolist() == [[1, 4], [2, 5], [-1, 7]]
    assert trace.tape.choices((0, 0))[0].expert_ids.tolist() == ids.tolist()
    assert trace.margins((0, 0)) is None and trace.entropies((0, 0)) is None


# ---- students


def test_a_student_that_copies_is_alike_and_one_by_chance_is_not():
    inputs = toy_layers(toy_tokens(4, 24, 3))[1, 0]
    native = inputs.native
    same = likeness(native, native, inputs)
    assert same == {"kl": pytest.approx(0, abs=1e-6), "agreement": 1.0, "exact_set": 1.0}
    order = torch.randperm(len(native.scores), generator=torch.Generator().manual_seed(0))
    mixed = Routing(*(part[order] for part in native[:3]))
    by_chance = likeness(mixed, native, inputs)
    assert by_chance["agreement"] < 0.6 and by_chance["kl"] > 0.1
    assert by_chance["exact_set"] < by_chance["agreement"]
    one = Routing(native.scores, native.expert_ids[:, :1], native.weights[:, :1])
    assert likeness(one, native, inputs) == {**same, "agreement": 0.5, "exact_set": 0.0}


def test_students_of_a_model_run_in_it():
    subject = Subject.of(tiny_models.build("olmoe", norm_topk_prob=True), texts(40, seed=1))
    tables = measure_students(subject, HELD_OUT, ["distilled_linear", "look_ahead", "random"])
    rows = tables.students.set_index("student")
    assert rows.loc["distilled_linear", "agreement"] > 0.95
    assert abs(rows.loc["distilled_linear", "loss_change"]) < 0.01
    assert rows.loc["random", "agreement"] < rows.loc["look_ahead", "agreement"]
    assert (rows["chance"] == 3 / 8).all()
    ahead = tables.layers[tables.layers["student"] == "look_ahead"].set_index("layer")
    assert ahead.loc[0, "agreement"] > 0.95, "the first layer reads its own input"


# ---- a smaller model


def test_half_the_layers_start_as_the_teachers():
    subject = subject_of(num_hidden_layers=4)
    smaller = start_smaller(subject, DistilSettings(shrink="layers"))
    assert smaller.origins == (0, 3)
    teacher = subject.model.model.layers
    for own, origin in zip(smaller.model.model.layers, smaller.origins, strict=True):
        for (name, a), (_, b) in zip(
            own.named_parameters(), teacher[origin].named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name


def test_half_the_experts_are_the_most_used_with_their_router_rows():
    subject = subject_of(num_experts_per_tok=2)
    smaller = start_smaller(subject, DistilSettings(shrink="experts"))
    trace = run_texts(subject, subject.calibration).trace
    for layer, (own, old) in enumerate(
        zip(smaller.model.model.layers, subject.model.model.layers, strict=True)
    ):
        load = np.bincount(trace.sets((layer, 0)).flatten(), minlength=8)
        kept = [
            next(e for e in range(8) if torch.equal(row, old.mlp.gate.weight[e]))
            for row in own.mlp.gate.weight
        ]
        assert len(kept) == 4 and load[kept].min() >= np.delete(load, kept).max()
        for e, number in enumerate(kept):
            assert torch.equal(own.mlp.experts.down_proj[e], old.mlp.experts.down_proj[number])


def test_too_few_experts_to_halve():
    with pytest.raises(ConditionError, match="shrink='layers'"):
        start_smaller(subject_of(num_experts_per_tok=5), DistilSettings())


def test_a_smaller_model_learns_its_teachers_predictions_and_is_kept(tmp_path):
    subject = Subject.of(tiny_models.build("olmoe", num_experts_per_tok=2), texts(80, seed=1))
    with torch.no_grad():  # predictions that are worth learning
        subject.model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    settings = DistilSettings(shrink="layers", steps=60, batch=8, length=16, learning_rate=1e-2)
    smaller = cached(subject, settings, folder=tmp_path)
    first, last = np.mean(smaller.losses[:5]), np.mean(smaller.losses[-5:])
    assert last < 0.7 * first
    assert not smaller.model.training
    again = cached(subject, settings, folder=tmp_path, progress=lambda *_: pytest.fail("taught"))
    assert again.origins == smaller.origins and again.losses == smaller.losses
    for (name, a), (_, b) in zip(
        smaller.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    with torch.no_grad():
        subject.model.lm_head.weight += 1
    fresh = cached(subject, DistilSettings(shrink="layers", steps=1, length=16), folder=tmp_path)
    assert len(fresh.losses) == 1 and len(list(tmp_path.iterdir())) == 2
    assert distil(subject, DistilSettings(shrink="layers", steps=1, length=16)).losses == (
        pytest.approx(fresh.losses)
    )


def test_windows_hold_every_token_of_whole_windows():
    rows = windows([np.arange(5, dtype=np.int32), np.arange(5, 12, dtype=np.int32)], 4, seed=0)
    assert rows.shape == (3, 4) and sorted(rows.flatten().tolist()) == list(range(12))
    with pytest.raises(ConditionError, match="At least 20 tokens"):
        windows([np.arange(5, dtype=np.int32)], 20, seed=0)


# ---- is routing alike?


def test_renaming_experts_leaves_routing_alike():
    """The same model with its experts in another order in each layer: alike, though ids differ."""
    subject = subject_of()
    renamed = tiny_models.build("olmoe")
    with torch.no_grad():
        for number, layer in enumerate(renamed.model.layers):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(number))
            for parameter in (layer.mlp.gate.weight, *layer.mlp.experts.parameters()):
                parameter.copy_(parameter[order])
    student = Subject.of(renamed)
    ours, theirs = routed(student, HELD_OUT).trace, routed(subject, HELD_OUT).trace
    assert not np.array_equal(ours.sets((0, 0)), theirs.sets((0, 0)))
    domains = ["a", "b"] * (len(HELD_OUT) // 2)
    table = compare_routing(subject, student, HELD_OUT, domains, (0, 1, 2), pairs=4000)
    assert np.allclose(table["co_routing"], 1)
    assert (table["co_routing_shuffled"].abs() < 0.2).all()
    assert table["best_layer"].tolist() == table["teacher_layer"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(table["entropy"], table["teacher_entropy"], rtol=1e-5)
    np.testing.assert_allclose(table["information"], table["teacher_information"], rtol=1e-9)


def test_what_two_tokens_have_in_common():
    sets = np.array([[0, 1], [1, 2], [-1, 5], [-1, 6]])
    pairs = in_common(sets, np.array([0, 0, 2, 2]), np.array([0, 1, 2, 3]))
    assert pairs.tolist() == [1, 0.5, 0.5, 0]


def test_information_on_paper():
    """Each domain has an expert of its own: ln 2; both use both alike: 0."""
    labels = np.array([0, 0, 1, 1])
    assert information(np.array([[0], [0], [1], [1]]), labels) == pytest.approx(np.log(2))
    assert information(np.array([[0], [1], [0], [1]]), labels) == pytest.approx(0)
    assert information(np.array([[0, 1]] * 4), labels) == pytest.approx(0)


def test_tokens_of_a_trace_know_their_text():
    subject = subject_of()
    ids = [np.full(n, 3 + n) for n in (4, 9, 6)]
    seen = []
    hook = subject.model.model.embed_tokens.register_forward_hook(
        lambda _, args, output: seen.append(args[0].flatten())
    )
    sets = routed(subject, ids).trace.sets((0, 0))
    hook.remove()
    owner = text_of_tokens(ids)
    tokens = torch.cat(seen[1:])
    real = tokens[tokens > 0].tolist()
    assert [3 + len(ids[text]) for text in owner] == real
    assert len(sets) == len(owner) == 19
