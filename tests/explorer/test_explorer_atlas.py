"""Knocking experts out: against models that lack them, by gradients, in files, as weights."""

import copy

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch

from capture.model.forward import Head, probe_tokens
from capture.model.load import LoadedModel, load_model
from capture.swap.measure import sequence_losses, token_losses
from capture.swap.routers import swap
from capture.swap.rules import OWN_ROUTER, Choice
from explorer.commands.atlas import as_text
from explorer.comparison.atlas import _effects, _halves
from explorer.comparison.atlas_file import (
    FORMAT_VERSION,
    agreement,
    atlases_of,
    read_atlas,
    reliability,
    with_news,
    write_atlas,
)
from explorer.comparison.conditions.catalogue import make_condition
from explorer.comparison.conditions.condition import Applied, Subject
from explorer.comparison.conditions.expert_pruning import ExpertPruning
from explorer.comparison.conditions.knock_out import knocked_out, screened, whole_model, worth
from explorer.comparison.conditions.pruned_checkpoint import write_pruned
from explorer.errors import ComparisonError, ConditionError
from explorer.worker.interventions import Edit, kind_of, read_edits, write_edits
from explorer.worker.what_if import OpenModel, _read, _router, _rules, _write_on

PLACE = (1, 0)


def texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [torch.randint(3, 64, (n,), generator=generator).int().numpy() for n in lengths]


TEXTS = texts(8, seed=3)


@pytest.fixture(scope="module")
def subject():
    return Subject.of(tiny_models.build("mixtral"), TEXTS)


@pytest.fixture(scope="module")
def whole(subject):
    return whole_model(subject, TEXTS)


def test_an_expert_is_taken_out_as_if_its_weights_were_gone(subject, whole):
    removed = knocked_out(subject, TEXTS, whole, PLACE, "removed")
    assert (removed[whole.hits[PLACE] == 0] == 0).all() and (whole.hits[PLACE] == 0).any()
    only = knocked_out(subject, TEXTS, whole, PLACE, "removed", experts=[2])
    np.testing.assert_array_equal(np.delete(only, 2, axis=1), 0.0)
    np.testing.assert_allclose(only[:, 2], removed[:, 2], atol=2e-5)
    for expert in range(removed.shape[1]):
        model = copy.deepcopy(subject.model)
        with torch.no_grad():
            Subject.of(model).sites[1].experts.down_proj[expert] = 0
        found = sequence_losses(model, TEXTS).sums - whole.losses.sums
        np.testing.assert_allclose(removed[:, expert], found, atol=2e-5)


def test_its_weight_goes_to_the_others_as_when_it_is_pruned(subject, whole):
    """Mixtral divides weights by their sum, so that only tokens that chose the expert change."""
    rerouted = knocked_out(subject, TEXTS, whole, PLACE, "rerouted")
    for expert in range(rerouted.shape[1]):
        with ExpertPruning.masked(subject, {PLACE: (expert,)}):
            found = sequence_losses(subject.model, TEXTS).sums - whole.losses.sums
        np.testing.assert_allclose(rerouted[:, expert], found, atol=2e-5)


def test_the_gradient_is_the_slope_of_the_loss_on_the_weight(subject, whole):
    step, expert = 1e-2, int(whole.hits[PLACE].sum(0).argmax())

    class Weaker:
        reads = OWN_ROUTER

        def __init__(self, step):
            self.step = step

        def route(self, inputs):
            ids, weights = inputs.native
            return Choice(ids, weights.where(ids != expert, weights * (1 - self.step)))

    def loss(step):
        rules = {PLACE: Weaker(step)}
        return sum(one.sum(dtype=np.float64) for one in token_losses(
            subject.model, TEXTS, swapped=lambda: swap(
                subject.model, subject.sites, rules, only=[PLACE])))  # fmt: skip

    slope = (loss(step) - loss(-step)) / (2 * step)
    found = screened(subject, TEXTS)
    assert found.first_order[PLACE][:, expert].sum() == pytest.approx(slope, rel=2e-2, abs=1e-4)
    assert (found.fisher[PLACE] >= 0).all()
    assert ((found.fisher[PLACE] > 0) <= (whole.hits[PLACE] > 0)).all()


def test_pruning_drops_what_is_missed_least(subject):
    found = worth(subject, TEXTS, "removed")
    condition = make_condition("prune_atlas(keep=0.5, by='removed')")
    applied = Applied()
    pruned = condition.choose(subject, applied)
    for place, scores in found.items():
        kept = [e for e in range(len(scores)) if e not in pruned[place]]
        assert len(kept) == len(scores) // 2
        assert scores[list(pruned[place])].max() <= scores[kept].min()
    with pytest.raises(ConditionError, match="by should be one of"):
        make_condition("prune_atlas(by='luck')").choose(subject, applied)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_a_pruned_checkpoint_loads_and_loses_what_the_mask_does(family, tmp_path):
    subject = Subject.of(tiny_models.build(family), TEXTS)
    pruned = {(s.info.layer, s.info.site): (s.info.layer % 2, 2) for s in subject.sites}
    loaded = LoadedModel(subject.model, None, family, None)
    folder = write_pruned(loaded, subject, pruned, tmp_path / "smaller")
    again = load_model(folder).model
    with ExpertPruning.masked(subject, pruned):
        masked = sequence_losses(subject.model, TEXTS)
    np.testing.assert_allclose(sequence_losses(again, TEXTS).sums, masked.sums, rtol=1e-4)
    assert sum(p.numel() for p in again.parameters()) < sum(
        p.numel() for p in subject.model.parameters()
    )
    with pytest.raises(ConditionError, match="exists already"):
        write_pruned(loaded, subject, pruned, folder)


def test_what_cannot_be_pruned_uniformly_is_refused(subject, tmp_path):
    loaded = LoadedModel(subject.model, None, "mixtral", None)
    with pytest.raises(ConditionError, match="one number of experts for all layers"):
        write_pruned(loaded, subject, {PLACE: (0,)}, tmp_path / "uneven")
    grouped = Subject.of(tiny_models.build("deepseek_v3"), TEXTS)
    every = {(s.info.layer, s.info.site): (0,) for s in grouped.sites}
    with pytest.raises(ConditionError, match="equal groups"):
        write_pruned(loaded, grouped, every, tmp_path / "groups")
    assert not list(tmp_path.iterdir())


def rows_of(change, hits, *, way="removed", layer=0):
    """Rows of one layer, all texts of ten tokens."""
    lengths, half = np.full(len(change), 10), _halves([""] * len(change), 0)
    found = _effects(change, hits, lengths, half, np.random.default_rng(0))
    return [{"layer": layer, "site": 0, "way": way, "domain": None, **row} for row in found]


FACTS = {
    **{"format_version": FORMAT_VERSION, "created_at": "2026-01-01", "run_name": "a"},
    **{"run_fingerprint": "f", "model": "m", "model_fingerprint": "g", "texts": "t", "seed": 0},
    **{"n_texts": 4, "n_tokens": 40, "native_loss": 2.0, "complete": True},
}


def test_an_atlas_on_paper(tmp_path):
    """Three experts, four texts: the rare one is needed, the busy one is not."""
    hits = np.tile([1, 4, 9], (4, 1))
    change = np.array([[9.0, 1.0, 0.0], [9.0, 2.0, 0.0], [9.0, 1.0, 0.0], [9.0, 2.0, 0.0]])
    path = tmp_path / f"a.{'0' * 8}.atlas"
    estimate = rows_of(change[:, ::-1] + 1, hits, way="fisher")
    write_atlas(path, FACTS, [*rows_of(change, hits), *estimate])
    atlas = read_atlas(path)
    assert atlases_of(tmp_path / "a.duckdb") == [path] and atlas.ways == ["removed", "fisher"]
    rows = with_news(atlas.of("removed"))
    assert rows["loss_change"].tolist() == pytest.approx([1.0, 1.5 / 9, 0.0])
    assert rows["load"].tolist() == pytest.approx([0.1, 0.4, 0.9])
    assert rows["news"].tolist() == ["rare but needed", "", "busy but idle"]
    assert rows["loss_margin"][0] == pytest.approx(0) and rows["loss_margin"][1] > 0
    assert (rows["control_id"] != rows["expert_id"]).all()
    own = rows["loss_change"] - rows["control_change"]
    assert rows["over_control"].tolist() == pytest.approx(own.tolist())
    assert reliability(atlas, "removed").overall == pytest.approx(1)
    assert agreement(atlas, "fisher", "removed").within == pytest.approx(-1)
    some = {"complete": False, "checked": 2, "checked_agreement": -1.0, "exact_seconds": 1e4}
    write_atlas(path, FACTS | some, estimate)
    said = as_text(read_atlas(path))
    assert "2 experts drawn by chance" in said and "correlation of -1.000" in said
    assert "Taking all 3 out in two ways would take about 3 hours" in said
    write_atlas(path, FACTS | {"checked_agreement": float("nan")}, estimate)
    with pytest.raises(ComparisonError, match="a strange checked_agreement"):
        read_atlas(path)


@pytest.mark.parametrize(
    "wrong", [{"load": 1.5}, {"way": "magic"}, {"loss_change": None}, {"layer": -1}]
)
def test_an_atlas_of_a_stranger_is_held_against_what_is_measured(wrong, tmp_path):
    path = tmp_path / "a.0.atlas"
    rows = rows_of(np.ones((2, 3)), np.ones((2, 3), np.int64))
    write_atlas(path, FACTS, [rows[0] | wrong, *rows[1:]])
    with pytest.raises(ComparisonError, match="no atlas"):
        read_atlas(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(ComparisonError, match="no atlas"):
        read_atlas(path)
    with pytest.raises(ComparisonError, match="there is none"):
        read_atlas(tmp_path / "b.atlas")


# ---- what if


def test_edits_are_read_as_they_are_written(subject):
    sites = [site.info for site in subject.sites]
    text = "forbid/1/2/t3,force/0/1/word,swap/1/0-3/like2,k/*/1/from4"
    edits = read_edits(text, sites, n_tokens=5)
    assert write_edits(edits) == text and edits[2] == Edit("swap", "1", 0, 3, "like2")
    for wrong in ("forbid/9/0/all", "forbid/1/99/all", "forbid/*/1/all", "k/1/0/all",
                  "swap/1/2/all", "force/1/2-3/all", "forbid/1/2/t5", "boil/1/2/all"):  # fmt: skip
        with pytest.raises(ComparisonError):
            read_edits(wrong, sites, n_tokens=5)
    assert [kind_of(t) for t in (" the", "12", ".\n", "  ", "\ufffd")] == [
        *("word", "number", "punctuation", "space", "other")
    ]


def test_edits_change_the_tokens_that_they_are_about_and_no_others(subject):
    ids = np.concatenate(TEXTS)[:12]
    opened = OpenModel(("tiny", None), LoadedModel(subject.model, None, "tiny", None),
                    list(subject.sites))  # fmt: skip

    def read(text, router=()):
        edits = read_edits(text, [s.info for s in subject.sites], n_tokens=len(ids))
        rules = _rules(opened, edits, dict(router), ids)
        with torch.inference_mode(), Head(subject.model).open(probe_tokens(subject.model)) as head:
            found = _read(opened, head, ids, rules)
            for position in (6, 3):
                probs = _write_on(opened, head, ids, position, found, rules)
                assert probs[ids[position + 1]].log() == pytest.approx(-found.losses[position])
        return found

    before = read("")
    # a router that learns nothing reads no run
    fewer = read("", _router(opened, None, (), "top_k(k=1)", str))
    assert fewer.losses == pytest.approx(read("k/*/1/all").losses, abs=1e-5) != before.losses
    np.testing.assert_allclose(before.losses, token_losses(subject.model, [ids])[0], atol=1e-5)
    own = [set(one) for one in before.routing[PLACE]]
    expert = before.routing[PLACE][6][0]
    other = next(e for e in range(4) if e not in own[6])

    def changed(text):
        found = read(text)
        return found, [set(one) - {-1} for one in found.routing[PLACE]]

    forbidden, sets = changed(f"forbid/1/{expert}/t6")
    k = len(own[6])
    assert expert not in sets[6] and len(sets[6]) == k
    assert [a for a in range(12) if sets[a] != own[a]] == [6]
    # a token before it is not touched by what comes later
    np.testing.assert_allclose(forbidden.losses[:6], before.losses[:6], atol=1e-5)
    assert forbidden.losses[6] != before.losses[6] and len(forbidden.written[6]) == 16
    assert all(other in one for one in changed(f"force/1/{other}/all")[1])
    assert [len(one) for one in changed("k/1/1/from8")[1]] == [k] * 8 + [1] * 4
    _, sets = changed(f"swap/1/{expert}-{other}/all")
    for a, b in zip(own, sets, strict=True):
        swapped = {other if e == expert else expert if e == other else e for e in a}
        assert b == (swapped if expert in a else a)
