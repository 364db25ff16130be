"""Statistics in the run file against plain Python on the recorded scores."""

import math

import duckdb
import pytest
import tiny_models

import capture


def softmax(row):
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


def sigmoid_share(row):
    parts = [1 / (1 + math.exp(-value)) for value in row]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("mixtral", softmax),
        ("gpt_oss", softmax),
        ("deepseek_v3", sigmoid_share),
        ("phimoe", softmax),  # a rule of its own: measured by the softmax of its scores
    ],
)
def test_recorded_statistics_follow_from_the_recorded_scores(tmp_path, name, shares):
    model = tiny_models.build(name)
    prompts = [{"ids": row} for row in tiny_models.tokens().tolist()]
    run = capture.record(model, prompts, tmp_path / "run", level="scores", progress=False)
    with duckdb.connect(str(run), read_only=True) as connection:
        rows = connection.sql(
            "SELECT scores, entropy, logsumexp, topk_mass, margin, list(expert_id) FROM scores"
            " JOIN gates USING (token_id, layer, site)"
            " JOIN assignments USING (token_id, layer, site) GROUP BY ALL"
        ).fetchall()
    assert rows
    for scores, entropy, logsumexp, mass, margin, chosen in rows:
        probs = shares(scores)
        # half precision in the file
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in probs), rel=1e-3)
        assert logsumexp == pytest.approx(
            math.log(sum(math.exp(s) for s in scores)), rel=1e-3, abs=1e-3
        )
        assert mass == pytest.approx(sum(probs[e] for e in chosen), rel=1e-3)
        assert margin >= 0
