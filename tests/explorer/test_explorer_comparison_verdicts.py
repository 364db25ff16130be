"""When a difference between two routers is told apart: texts, seeds, domains, and which control."""

import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from capture.swap.losses import SequenceLosses, critical, loss_change
from explorer.comparison.results_file import (
    FORMAT_VERSION,
    SUFFIX,
    empty_rows,
    open_comparison,
    write_comparison,
)
from explorer.comparison.verdicts import (
    UNCLEAR,
    Paired,
    against_controls,
    better_than_chance,
    paired,
    reach,
    with_answers,
    with_controls,
)

pytestmark = pytest.mark.slow

DRAWS = 2000


def compared(tmp_path, losses, tokens, *, results=(), domains=None):
    """Open a comparison whose routers have these losses, {router: {seed: [text]}}."""
    rows = empty_rows()
    rows["comparison"] = [
        {"format_version": FORMAT_VERSION, "settings": "{}", "packages": "{}", "complete": True}
    ]
    rows["sequences"] = [
        {"router": router, "seed": seed, "mode": "live", "sequence": n, "tokens": int(tokens[n]),
         "loss": float(loss), "domain": None if domains is None else domains[n]}
        for router, seeds in losses.items()
        for seed, texts in seeds.items()
        for n, loss in enumerate(texts)
    ]  # fmt: skip
    rows["results"] = [
        {"mode": "live", "experts_per_token": 2.0, "family": "gating", **row} for row in results
    ]
    path = tmp_path / f"r.key{SUFFIX}"
    write_comparison(path, rows)
    return open_comparison(path)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 12, 55, 579])
@pytest.mark.parametrize("noise", ["per text", "per token"])
def test_noise_is_called_a_difference_once_in_twenty(n, noise):
    random, told = np.random.default_rng(n), 0
    for _ in range(DRAWS):
        tokens = random.integers(60, 500, n)
        apart = random.normal(0, 0.05, n) * (np.sqrt(200 / tokens) if noise == "per token" else 1)
        base = SequenceLosses(3.0 * tokens, tokens)
        change = loss_change(base, SequenceLosses((3.0 + apart) * tokens, tokens))
        found = Paired("a", "b", change.change, change.standard_error, math.nan, 1, n,
                       margin=change.margin)  # fmt: skip
        told += found.verdict != UNCLEAR
    # 2,000 draws of a chance of 5%: three standard errors are 1.5%
    assert 0.025 < told / DRAWS < 0.07


@pytest.mark.parametrize("n", [2, 5, 40])
def test_texts_of_one_length_give_students_interval(n):
    apart, tokens = np.random.default_rng(n).normal(0.1, 0.2, n), np.full(n, 30)
    change = loss_change(
        SequenceLosses(np.zeros(n), tokens), SequenceLosses(apart * tokens, tokens)
    )
    assert change.standard_error == pytest.approx(apart.std(ddof=1) / math.sqrt(n))
    assert change.degrees == pytest.approx(n - 1)
    low, high = student_t.interval(0.95, n - 1, change.change, change.standard_error)
    assert change.margin == pytest.approx((high - low) / 2)


def test_the_error_of_uneven_texts_is_that_of_their_mean():
    """Against the truth: means of few texts of uneven lengths vary as much as is said."""
    tokens, random = np.array([500, 60, 60]), np.random.default_rng(0)
    base, means, variances = SequenceLosses(np.zeros(3), tokens), [], []
    for apart in random.normal(0, 1, (20_000, 3)):
        change = loss_change(base, SequenceLosses(apart * tokens, tokens))
        means.append(change.change)
        variances.append(change.standard_error**2)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.03)


def test_one_text_and_an_unknown_number_of_texts_tell_nothing():
    assert math.isnan(critical(0)) and critical(math.inf) == pytest.approx(1.96, abs=0.001)
    assert Paired("a", "b", 5.0, math.nan, math.nan, 1, 1).verdict == UNCLEAR
    assert Paired("a", "b", 5.0, 0.1, math.nan, 1).verdict == UNCLEAR
    assert Paired("a", "b", 5.0, 0.1, math.nan, 1, 3).verdict == "worse"
    assert Paired("a", "b", -0.3, 0.1, math.nan, 1, 3).verdict == UNCLEAR  # 4.3 errors are needed
    assert Paired("a", "b", -0.3, 0.1, math.nan, 1, 30).verdict == "better"


def seeds_of(changes, n, random):
    """Return losses of a router by seed: 3 and the seed's change, and a little of each text's."""
    texts = 3 + random.normal(0, 0.001, n)
    return {seed: texts + change for seed, change in enumerate(changes)}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ([-0.03, -0.031, -0.029], "better"),
        ([-0.06, -0.02, -0.01], UNCLEAR),  # means differ by 0.03 +- 0.015, with two degrees
        ([-0.05, -0.05, -0.05, -0.05, -0.05, 0.001], UNCLEAR),  # one seed is worse
        ([-0.05, -0.05, -0.05, -0.05, -0.05, -0.001], "better"),
    ],
)
def test_seeds_are_the_unit_where_rules_draw(tmp_path, changes, verdict):
    random, n = np.random.default_rng(0), 300
    tokens = random.integers(60, 500, n)
    varied = seeds_of(changes, n, random)
    losses = {
        "varied": varied,
        "fixed": {None: np.full(n, 3.0)},
        # seeds of its own, which hardly matter
        "steady": seeds_of([0.0, 1e-6], n, random),
        "with the same seeds": {seed: np.full(n, 3.0) for seed in varied},
    }
    mirrored = {"better": "worse"}.get(verdict, verdict)
    with compared(tmp_path, losses, tokens) as comparison:
        for a, b, expected in (
            ("varied", "fixed", verdict),
            ("fixed", "varied", mirrored),
            ("varied", "steady", verdict),
            ("varied", "with the same seeds", verdict),
        ):
            found = paired(comparison, a, b)
            assert found.verdict == expected, (a, b)
            assert found.steady == (max(changes) < 0), (a, b)
            assert found.seed_error == pytest.approx(
                np.std(changes, ddof=1) / len(changes) ** 0.5, abs=1e-4
            ), (a, b)
            assert found.standard_error < found.seed_error or len(set(np.round(changes, 2))) == 1


@pytest.mark.parametrize("seeds", [2, 5])
def test_chance_between_seeds_is_not_called_a_difference(tmp_path, seeds):
    """Each seed is better or worse everywhere, by chance: many texts do not make it sure."""
    random, n, told = np.random.default_rng(seeds), 30, 0
    tokens = random.integers(60, 500, n)
    losses = {f"a{draw}": seeds_of(random.normal(0, 0.05, seeds), n, random) for draw in range(80)}
    with compared(tmp_path, {**losses, "b": {None: np.full(n, 3.0)}}, tokens) as comparison:
        told = sum(paired(comparison, name, "b").verdict != UNCLEAR for name in losses)
    assert told <= 10  # of 80; 4 are expected, and fewer where a sign that changes stops some


def test_texts_of_one_domain_may_be_alike(tmp_path):
    """Four texts that say the same twice over are two: the error by domain is larger."""
    losses = {"a": {None: [3.1, 3.1, 3.4, 3.4]}, "b": {None: [3.0] * 4}}
    with compared(tmp_path, losses, [50] * 4, domains=["law", "law", "code", "code"]) as comparison:
        found = paired(comparison, "a", "b")
    # differences 0.1 and 0.4: their standard deviation over the root of four, and of two
    assert found.standard_error == pytest.approx(0.3 / 12**0.5)
    assert found.domain_error == pytest.approx(0.15)
    with compared(tmp_path, losses, [50] * 4) as comparison:
        assert math.isnan(paired(comparison, "a", "b").domain_error)


def test_each_row_names_the_harder_of_its_controls(tmp_path):
    def control(kind, of, change):
        return {"router": f"{kind} for {of}", "family": "control", "control": kind,
                "control_of": of, "loss_change": change}  # fmt: skip

    results = [
        {"router": "native", "family": "", "loss_change": 0.0},
        {"router": "x", "loss_change": 0.08},
        control("equal_compute", "x", 0.07),
        control("matched_per_layer", "x", 0.12),
        {"router": "y", "loss_change": 0.3},
        control("equal_compute", "y", 0.5),
        control("matched_per_layer", "y", 0.4),
        {"router": "z", "loss_change": 0.3},
        {"router": "less", "loss_change": 0.3, "experts_per_token": 1.0},
        {"router": "peeks", "loss_change": 0.3, "causal": False},
        {"router": "random", "family": "control", "loss_change": 5.0},
    ]
    losses = {
        row["router"]: {None: 3 + row["loss_change"] + np.array([0.0, 0.01, 0.02])}
        for row in results
    }
    with compared(tmp_path, losses, [30] * 3, results=results) as comparison:
        table = with_controls(comparison.table).set_index("router")
        beside = against_controls(comparison).set_index(["router", "control"])
        answers = better_than_chance(comparison)
    assert table.loc["x", ["equal_compute", "matched_per_layer"]].tolist() == [0.07, 0.12]
    assert table.loc[["x", "y", "z"], "harder"].tolist() == [
        "equal_compute", "matched_per_layer", "equal_compute"
    ]  # fmt: skip
    # as many experts as the model, so that random sets are the control; none computes as little
    assert table.loc["z", "equal_compute"] == 5.0
    assert table.loc[["native", "less", "random"], "harder"].tolist() == ["", "", ""]
    # better than one of them, and worse than the other, which is the one to beat
    assert beside.loc[("x", "matched_per_layer"), ["verdict", "harder"]].tolist() == [
        "better", False
    ]  # fmt: skip
    assert beside.loc[("x", "equal_compute"), ["verdict", "harder"]].tolist() == ["worse", True]
    assert beside.loc[("z", "equal_compute"), ["other", "verdict"]].tolist() == ["random", "better"]
    assert len(beside) == 6
    one_layer = table.reset_index().assign(layer=0)
    assert with_answers(one_layer, answers)["better_than_chance"].isna().all()
    answers = answers.set_index("router")
    hard = beside.loc[("x", "equal_compute")]
    found = answers.loc["x"]
    assert found["better_than_chance"] == "worse" and found["no_answer"] == ""
    assert found["chance_difference"] == hard["difference"] == pytest.approx(0.01)
    assert found["chance_high"] - found["chance_low"] == pytest.approx(2 * hard["margin"])
    assert answers.loc["z", "better_than_chance"] == "yes"
    # not causal, so that its loss proves nothing
    reasons = answers["no_answer"]
    assert reasons[["native", "less", "random", "peeks"]].tolist() == [
        "the model's own", "no control in this file", "a control", "not causal"
    ]  # fmt: skip
    assert answers.loc[reasons != "", "better_than_chance"].isna().all()


def test_what_a_comparison_can_show_is_said():
    known = {"head_flops_share": 0.379, "expert_flops_share": 0.291, "n_experts": 16}
    said = reach(known)
    assert "38% are its output layer's and 29% its experts'" in said
    assert "cannot fall below 0.71" in said and "One checkpoint with 16 experts in a layer" in said
    # of a file of an older format, and of replay alone
    assert reach({**known, "head_flops_share": None}).startswith("One checkpoint")
    assert reach(dict.fromkeys(known)) == ""
