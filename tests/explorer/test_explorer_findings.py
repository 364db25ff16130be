"""What is worth knowing in a run: planted facts are found, and nothing is found in noise."""

import json

import numpy as np
import pytest
from synthetic import write_run

from explorer.__main__ import main
from explorer.errors import RunError
from explorer.findings import RATE, findings, halves, judge
from explorer.findings.halves import Half, RouterChoices, read_halves
from explorer.findings.kinds import KINDS
from explorer.metrics.attention import pair_totals
from explorer.run import open_run

pytestmark = pytest.mark.slow

EXPERTS, TOP_K, LAYERS, PROMPTS, LENGTH = 8, 2, 3, 32, 30
DOMAINS = ("law", "code", "text", "")


def half(random, choose=None, *, domains=None, entropy=None):
    """Route prompts at random; `choose(layer, prompt, domain, token)` shifts the scores [T, E]."""
    domains = domains if domains is not None else np.array(DOMAINS, object)[np.arange(PROMPTS) % 4]
    prompt = np.repeat(np.arange(PROMPTS), LENGTH)
    token = random.integers(0, 12, len(prompt))
    sites = []
    for layer in range(LAYERS):
        scores = random.random((len(prompt), EXPERTS))
        if choose is not None:
            scores = scores + choose(layer, prompt, domains[prompt], token)
        ids = np.argsort(-scores, axis=1)[:, :TOP_K]
        load = np.zeros((PROMPTS, EXPERTS))
        np.add.at(load, (prompt[:, None], ids), 1)
        sites.append(RouterChoices(str(layer), EXPERTS, TOP_K, ids, load, np.arange(EXPERTS)))
    gate = random.random((len(prompt), LAYERS)) if entropy is None else entropy(domains[prompt])
    sizes = np.full(PROMPTS, float(LENGTH))
    return Half(
        token,
        {t: f"w{t}" for t in range(12)},
        prompt,
        sizes,
        domains,
        gate,
        sites,
        attended={"0": attended(random, sites[0].ids)},
        checkpoints=STEPS,
        # nothing was learned: every checkpoint chooses at random, the last one as itself
        saturation=np.column_stack([random.normal(0.25, 0.05, (PROMPTS, 5)), np.ones(PROMPTS)]),
    )


STEPS = [f"step_{n}" for n in (0, 100, 200, 300, 400, 500)]


def attended(random, ids, key=None):
    """Let two heads attend to an earlier token, by default to any; [P, 2, 2]."""
    query = np.arange(1, LENGTH)
    sums = []
    for mine in ids.reshape(PROMPTS, LENGTH, TOP_K):
        keys = [random.integers(0, query) if key is None else key(mine, head) for head in (0, 1)]
        one = pair_totals(mine, np.tile(query, 2), np.concatenate(keys), np.ones(2 * len(query)),
                          np.repeat([0, 1], len(query)), n_heads=2)  # fmt: skip
        sums.append(np.stack([one.shared, one.at_distance], axis=-1))
    return np.stack(sums)


def kinds_of(found):
    return {one.kind for one in found.found}


def test_nothing_is_found_in_random_routing():
    silent = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        found = judge(half(random), half(random))
        assert set(found.tested) <= set(KINDS) and len(found.tested) >= 5
        silent += not found.found
    assert silent >= 19


def test_shuffled_domains_are_never_what_experts_are_for():
    """Prompts prefer experts, so that tokens are not independent, and domains mean nothing."""
    silent = 0
    for seed in range(20):
        random = np.random.default_rng(100 + seed)
        taste = [random.normal(0, 0.4, (PROMPTS, EXPERTS)) for _ in range(2)]
        labels = [np.array(random.permutation(np.arange(PROMPTS) % 4)) for _ in range(2)]
        halves = [
            half(random, lambda _, prompt, *__, one=one: one[prompt],
                 domains=np.array(DOMAINS, object)[order])
            for one, order in zip(taste, labels, strict=True)
        ]  # fmt: skip
        kinds = kinds_of(judge(*halves))
        silent += not kinds & {"expert of a domain", "hesitation", "unspecialised layer"}
    assert silent >= 19


PLANTED = {
    "dead experts": (
        lambda layer, prompt, *_: -9.0 * np.outer(np.full(len(prompt), layer == 1), np.eye(8)[5]),
        "1 expert is never chosen, of 24: L1.E5.",
        {"layer": "1", "id": "5", "about": "expert"},
    ),
    "overloaded expert": (
        lambda layer, prompt, *_: 0.6 * np.outer(np.full(len(prompt), layer == 2), np.eye(8)[3]),
        "Expert 3 of layer 2 gets",
        {"layer": "2", "id": "3", "about": "expert"},
    ),
    "expert of a domain": (
        lambda layer, _, domain, __: (
            0.5 * np.outer((domain == "code") & (layer == 0), np.eye(8)[6])
        ),
        "Expert 6 of layer 0 belongs to “code”",
        {"layer": "0", "id": "6", "about": "expert"},
    ),
    "expert of a word": (
        lambda layer, _, __, token: 2.0 * np.outer((token == 7) & (layer == 1), np.eye(8)[2]),
        "Expert 2 of layer 1 takes 100% of the tokens “w7”",
        {"layer": "1", "id": "2", "about": "expert"},
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_was_planted_is_found_and_where(kind):
    choose, words, address = PLANTED[kind]
    random = np.random.default_rng(3)
    found = judge(half(random, choose), half(random, choose))
    one = next(one for one in found.found if one.kind == kind)
    assert words in one.sentence and one.address == address and one.q <= RATE
    assert found.summary.startswith(f"In {2 * PROMPTS * LENGTH:,} tokens of {2 * PROMPTS} prompts")


def test_an_expert_that_computes_nothing_is_never_dead():
    random = np.random.default_rng(3)
    halves = [half(random, PLANTED["dead experts"][0]) for _ in range(2)]
    assert any(KINDS["dead experts"](halves[0]))
    skips = [
        one._replace(sites=[site._replace(routed=np.delete(site.routed, 5)) for site in one.sites])
        for one in halves
    ]
    assert not any(KINDS["dead experts"](skips[0]))


def test_pairs_rows_repetition_and_hesitation_are_found():
    random = np.random.default_rng(4)

    def choose(layer, prompt, _, token):
        run = np.cumsum(np.arange(len(prompt)) % 6 == 0)  # stretches of six tokens
        sticky = (np.random.default_rng(9).integers(0, EXPERTS, run[-1] + 1))[run]
        return 1.5 * np.eye(EXPERTS)[sticky] if layer == 2 else 1.5 * np.eye(EXPERTS)[token % 2] * (
            np.isin(token, (3, 4))[:, None]
        )  # fmt: skip

    def entropy(domain):
        sure = np.full((len(domain), LAYERS), 0.5)
        sure[:, 1] += 0.2 * (domain == "law")  # the router of one layer
        return sure + random.normal(0, 0.05, sure.shape)

    found = judge(*(half(random, choose, entropy=entropy) for _ in range(2)))
    assert {"experts in a row", "repetition", "hesitation"} <= kinds_of(found)
    by_kind = {one.kind: one for one in found.found}
    one = by_kind["hesitation"]
    assert one.address == {"layer": "1", "domain": "law", "color": "entropy"}
    assert "layer 1 hesitates" in one.sentence and "70% of its largest value there" in one.sentence
    assert one.effect == pytest.approx(0.2, abs=0.02) and one.n == PROMPTS
    assert by_kind["repetition"].sentence.startswith("Layer 2 keeps an expert")
    assert by_kind["repetition"].low > 0.2


def test_attention_partners_and_the_checkpoint_at_which_routing_settled():
    random = np.random.default_rng(6)
    halves = [half(random), half(random)]

    def partner(mine, head):
        """Head 1 looks for a token with an expert in common."""
        keys = []
        for at in range(1, LENGTH):
            same = np.flatnonzero(np.isin(mine[:at], mine[at]).any(1))
            keys.append(random.choice(same if head and len(same) else np.arange(at)))
        return np.array(keys)

    curve = np.array([0.2, 0.55, 0.8, 0.81, 0.82, 1.0])
    planted = [
        one._replace(
            attended={"2": attended(random, one.sites[2].ids, partner)},
            saturation=np.clip(curve + random.normal(0, 0.05, (PROMPTS, 6)), 0, 1),
        )
        for one in halves
    ]
    by_kind = {one.kind: one for one in judge(*planted).found}
    one = by_kind["attention partners"]
    assert "expert of layer 2 with those that its head 1 attends to" in one.sentence
    assert (
        one.low > 1.3 and one.address == {"layer": "2", "head": "2.1"} and one.page == "attention"
    )
    one = by_kind["settled routing"]
    assert one.sentence.startswith("Routing settled at step_200: for the same tokens it chose 79%")
    assert one.address["runs"].split(",") == STEPS and one.n == PROMPTS
    # a steady drift settles nowhere
    steady = np.linspace(0.2, 0.8, 5)
    drift = [
        one._replace(saturation=np.column_stack(
            [steady + random.normal(0, 0.05, (PROMPTS, 5)), np.ones(PROMPTS)]))
        for one in halves
    ]  # fmt: skip
    assert "settled routing" not in kinds_of(judge(*drift))


def test_a_training_is_read_from_the_runs_beside_it(tmp_path, monkeypatch):
    for step in (10, 20, 300, 4000):
        write_run(tmp_path / f"step_{step}.duckdb", level="attention")
    write_run(tmp_path / "step_5.duckdb", seed=1)  # of other tokens
    write_run(tmp_path / "other_step_1.duckdb")
    with open_run(tmp_path / "step_300.duckdb") as run:
        first, second = read_halves(run)
    assert first.checkpoints == ["step_10", "step_20", "step_300", "step_4000"]
    for one in (first, second):
        assert (one.saturation == 1).all() and one.saturation.shape == (len(one.tokens), 4)
        assert set(one.attended) == {"1.0", "3.0", "3.1"}
    shared = sum(one.attended["3.0"][:, :, 0].sum() for one in (first, second))
    assert shared > 0 and first.attended["3.0"].shape[1:] == (2, 2)
    # of a large run, beginnings of prompts of all domains are read, and all of it is of them alone
    monkeypatch.setattr(halves, "LEAST_TOKENS", 3)
    with open_run(tmp_path / "step_300.duckdb") as run:
        fewer = halves._part(run, 9)
        monkeypatch.setattr(halves, "MAX_ASSIGNMENTS", 18 * sum(site.top_k for site in run.sites))
        begun = read_halves(run)
    assert fewer.prompts["domain"].tolist() == ["", "code", "law"] and fewer.first == 3
    for whole, one in zip((first, second), begun, strict=True):
        rows = np.concatenate([np.flatnonzero(whole.prompt == p)[:3] for p in range(3)])
        np.testing.assert_array_equal(whole.sites[1].ids[rows], one.sites[1].ids)
        np.testing.assert_array_equal(whole.entropy[rows], one.entropy)
        np.testing.assert_array_equal(whole.sites[1].used, one.sites[1].used)
        assert one.domain.tolist() == whole.domain.tolist() and one.first == 3
        assert (one.saturation == 1).all() and one.saturation.shape == (len(one.tokens), 4)
        assert one.attended["3.0"][:, :, 0].sum() <= whole.attended["3.0"][:, :, 0].sum()
    assert "(the first 3 of each, as the run is large)" in judge(*begun).summary


def test_a_layer_that_does_not_specialise_is_named():
    random = np.random.default_rng(5)
    favourite = {"law": 0, "code": 1, "text": 2, "": 3}

    def choose(layer, _, domain, __):
        experts = np.array([favourite[d] for d in domain])
        return (0.8 if layer != 1 else 0.0) * np.eye(EXPERTS)[experts]

    found = judge(half(random, choose), half(random, choose))
    one = next(one for one in found.found if one.kind == "unspecialised layer")
    assert one.sentence.startswith("Layer 1 specialises least") and one.low > 0


def test_halves_hold_each_prompt_once_with_its_rows(tmp_path):
    known = write_run(tmp_path / "known.duckdb")
    with open_run(known.path) as run:
        first, second = read_halves(run)
        few = findings(run)
    assert sorted([*first.domain, *second.domain]) == ["", "code", "code", "law", "law", "text"]
    assert first.domain.tolist().count("law") == second.domain.tolist().count("law") == 1
    assert len(first.token) + len(second.token) == len(known.tokens)
    for at, (layer, site, n_experts) in enumerate([(1, 0, 6), (3, 0, 6), (3, 1, 4)]):
        loads = first.sites[at].load.sum(0) + second.sites[at].load.sum(0)
        experts = [expert for _, _, expert, _ in known.assignments(layer, site)]
        assert loads.tolist() == np.bincount(experts, minlength=n_experts).tolist()
        assert first.sites[at].name == f"{layer}.{site}"
    # six prompts are too few to tell a spread, and that is said
    assert not few.found and not few.tested
    assert "each half needs 8" in few.summary


def test_the_command_prints_sentences_or_json(tmp_path, capsys):
    path = tmp_path / "known.duckdb"
    write_run(path)
    assert main(["findings", str(path)]) == 0
    assert "Nothing can be tested" in capsys.readouterr().out
    assert main(["findings", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    write_run(tmp_path / "sums.duckdb", level="stats")
    with open_run(tmp_path / "sums.duckdb") as run, pytest.raises(RunError, match="--level ids"):
        findings(run)
