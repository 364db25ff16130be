"""What a counts-only export keeps back: sums of a few tokens, and names that may be of people."""

import json
import sys

import duckdb
import numpy as np
import pytest
from tiny_models import build

import capture
from capture.paths import model_name
from capture.store import MIN_PROMPTS, MIN_TOKENS, RunReader, counts_only

pytestmark = pytest.mark.slow

TOGETHER = "(domains put together)"

PEOPLE = 60
VOCAB = 64


@pytest.fixture(scope="module")
def model():
    return build("qwen3_moe")


@pytest.fixture(scope="module")
def secrets():
    """Return the one token that each person wrote."""
    return np.random.default_rng(0).permutation(VOCAB)[:PEOPLE]


@pytest.fixture(scope="module")
def known(model, tmp_path_factory):
    """Return what every token alone does, as whoever has the model finds it: [V, L, E]."""
    path = tmp_path_factory.mktemp("known") / "all.duckdb"
    record(model, [{"ids": [token]} for token in range(VOCAB)], path)
    with duckdb.connect(str(path), read_only=True) as con:
        rows = con.sql("SELECT token_id, layer, expert_id, weight FROM assignments").fetchnumpy()
        shape = con.sql("SELECT max(layer) + 1, max(n_experts) FROM sites").fetchall()[0]
    found = np.zeros((VOCAB, *shape))
    found[rows["token_id"], rows["layer"], rows["expert_id"]] = rows["weight"]
    return found


def record(model, prompts, path, **options):
    capture.record(model, prompts, path, progress=False, sample_tokens=0, level="ids", **options)
    return path


def of_people(secrets):
    return [{"ids": [int(t)], "domain": f"person {n}"} for n, t in enumerate(secrets)]


def of_subjects(**sizes):
    """Return prompts of named domains, each (prompts, tokens a prompt)."""
    random = np.random.default_rng(1)
    return [
        {"ids": random.integers(0, VOCAB, length).tolist(), "domain": name}
        for name, (many, length) in sizes.items()
        for _ in range(many)
    ]


def exported(path):
    out = counts_only(path, path.with_name("counts.duckdb"))
    RunReader.open(out, checked=True).close()
    with duckdb.connect(str(out), read_only=True) as con:
        sums = con.sql(
            "SELECT domain, phase, layer, expert_id, assignments, weight_sum FROM expert_load_by"
        ).df()
        sizes = con.sql(
            "SELECT domain, phase, count(*) AS tokens, count(DISTINCT prompt_id) AS prompts "
            "FROM tokens JOIN prompts USING (prompt_id) GROUP BY ALL"
        ).df()
        pairs = con.sql("SELECT * FROM coactivation").df()
        notes = json.loads(con.sql("SELECT notes FROM run").fetchall()[0][0])
        model = con.sql("SELECT model FROM run").fetchall()[0][0]
    return sums, sizes, pairs, notes, model


def weights(sums, shape):
    found = np.zeros(shape)
    at = tuple(sums[["layer", "expert_id"]].to_numpy().T)
    np.add.at(found, at, sums["weight_sum"])
    return found


def read_back(sums, known, secrets):
    """Return how many people's tokens are read off sums: of their domain, or of a difference."""
    shape = known.shape[1:]
    whole = weights(sums, shape)
    hits = 0
    for n, token in enumerate(secrets):
        own = weights(sums[sums["domain"] == f"person {n}"], shape)
        rest = whole - weights(sums[~sums["domain"].fillna("").str.startswith("person")], shape)
        guesses = [int(np.abs(known - seen).sum((1, 2)).argmin()) for seen in (own, rest)]
        hits += int(token) in guesses
    return hits


def test_the_attack_works_on_sums_that_are_not_kept_back(model, known, secrets, tmp_path):
    path = record(model, of_people(secrets), tmp_path / "run.duckdb")
    with duckdb.connect(str(path), read_only=True) as con:
        sums = con.sql("SELECT domain, layer, expert_id, weight_sum FROM expert_load_by").df()
    assert read_back(sums, known, secrets) >= PEOPLE - 2


@pytest.mark.parametrize(
    ("people", "others", "named"),
    [
        (60, {}, None),
        (60, {"law": (8, 30)}, set()),
        (60, {"law": (8, 30), "code": (6, 20)}, {"law"}),
        (60, {"law": (2, 90), "code": (9, 20)}, {"code"}),
        (60, {"law": (2, 30), "code": (9, 20)}, {"code"}),
    ],
)
def test_a_token_of_one_person_is_not_read_back(
    model, known, secrets, tmp_path, people, others, named
):
    prompts = of_people(secrets[:people]) + of_subjects(**others)
    sums, sizes, pairs, notes, _ = exported(record(model, prompts, tmp_path / "run.duckdb"))
    # as by chance: two guesses at one of 64
    assert read_back(sums, known, secrets[:people]) <= 6
    assert not sizes["domain"].str.startswith("person").any()
    assert notes["least"] == {"tokens": MIN_TOKENS, "prompts": MIN_PROMPTS}
    if named is None:
        assert sums.empty and pairs.empty and notes["left_out"] == ["prompt"]
        return
    # all that is told, and so every difference of it, is of enough tokens and prompts
    assert (sizes["tokens"] >= MIN_TOKENS).all() and (sizes["prompts"] >= MIN_PROMPTS).all()
    assert not pairs.empty and notes["left_out"] == []
    told = sums[sums["layer"] == sums["layer"].max()].groupby("domain")["assignments"].sum()
    top_k = np.count_nonzero(known[0, -1])
    assert told.sum() == top_k * sum(len(prompt["ids"]) for prompt in prompts)
    assert set(told.index) == set(sizes["domain"]) == named | {TOGETHER}


def test_a_phase_may_have_no_domain_of_its_own(model, tmp_path):
    prompts = of_subjects(law=(15, 10), code=(15, 10))
    path = record(model, prompts, tmp_path / "run.duckdb", generate=5)
    sums, sizes, *_ = exported(path)
    found = {phase: set(part["domain"]) for phase, part in sums.groupby("phase")}
    assert found == {"prompt": {"law", "code"}, "generated": {TOGETHER}}
    assert set(sizes["domain"]) == {"law", "code"}


def test_large_domains_keep_names_and_sums(model, tmp_path):
    prompts = of_subjects(law=(8, 30), code=(6, 20))
    path = record(model, prompts, tmp_path / "run.duckdb")
    sums, sizes, pairs, notes, _ = exported(path)
    assert set(sizes["domain"]) == {"law", "code"} and notes["together"] == 0
    with duckdb.connect(str(path), read_only=True) as con:
        whole = con.sql("SELECT domain, phase, layer, expert_id, weight_sum FROM expert_load_by")
        both = whole.df().merge(sums, on=["domain", "phase", "layer", "expert_id"])
        assert len(both) == len(sums)
        np.testing.assert_array_equal(both["weight_sum_x"], both["weight_sum_y"])
        assert len(pairs) == con.sql("SELECT count(*) FROM coactivation").fetchall()[0][0]


def test_a_phase_of_few_tokens_is_left_out_with_the_pairs(model, tmp_path):
    path = record(model, of_subjects(law=(8, 30)), tmp_path / "run.duckdb", generate=2)
    sums, _, pairs, notes, _ = exported(path)
    assert set(sums["phase"]) == {"prompt"} and notes["left_out"] == ["generated"]
    # counted over all phases, they would tell the difference
    assert pairs.empty


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/ann/models/secret/", "secret"),
        ("~/models/mine", "mine"),
        ("./mine", "mine"),
        ("../..", "a local folder"),
        ("C:\\Users\\ann\\mine", "mine"),
        ("work/ann/mine", "mine"),
        ("/x/hub/models--org--name/snapshots/0123", "org/name"),
        ("org/name", "org/name"),
        ("demo", "demo"),
    ],
)
def test_a_model_is_called_by_its_last_name(model, name):
    assert model_name(model) == name


def test_an_export_says_nothing_of_a_home_folder(model, tmp_path):
    path = record(model, of_subjects(law=(8, 30)), tmp_path / "run.duckdb")
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE packed.run SET model = '/home/ann/models/secret'")
    *_, shown = exported(path)
    assert shown == "secret"
    assert b"/home/ann" not in path.with_name("counts.duckdb").read_bytes()


def test_a_domain_may_be_named_in_one_phase_and_not_in_another(tmp_path, monkeypatch):
    from synthetic import write_run

    own = sys.modules["capture.store.rewrite"]
    monkeypatch.setattr(own, "MIN_TOKENS", 3)
    monkeypatch.setattr(own, "MIN_PROMPTS", 1)
    sums, sizes, pairs, notes, _ = exported(write_run(tmp_path / "run.duckdb").path)
    told = sums.groupby("phase")["domain"].agg(set)
    # two and one decoded tokens; two tokens of no domain, put together with five
    assert told["generated"] == {TOGETHER} and told["prompt"] == {"law", "code", TOGETHER}
    assert set(sizes["domain"]) == {"law", "code", TOGETHER} and notes["together"] == 2
    assert not pairs.empty and notes["left_out"] == []
