"""The cost estimate is near the size of the file that comes out."""

import pytest
from test_capture_session import record, tiny, unequal

from capture.estimate import estimate, human_bytes
from capture.selftest import attach


@pytest.mark.parametrize(
    ("level", "sample_tokens"), [("stats", 0), ("ids", 0), ("scores", 0), ("ids", 2000)]
)
def test_the_estimate_is_near_the_size_of_the_run(tmp_path, level, sample_tokens):
    model, prompts = tiny("olmoe"), unequal(40, longest=120) * 12
    path = record(
        model,
        prompts,
        tmp_path / "a.duckdb",
        level=level,
        sample_tokens=sample_tokens,
        batch_tokens=8000,
    )
    cost = estimate(
        n_tokens=sum(map(len, prompts)),
        sites=[site.info for site in attach(model)],
        hidden_size=32,
        level=level,
        sample_tokens=sample_tokens,
    )
    # these prompts have no text, which a run usually stores: too high is the safe side
    assert 0.75 < cost.total_bytes / path.stat().st_size < 1.6
    assert list(cost.bytes_per_token) == ["stats", "ids", "scores"]
    assert f"Level {level}" in cost.lines()[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000, "2.3 MB"), (5e12, "5.0 TB")],
)
def test_bytes_read_like_bytes(count, text):
    assert human_bytes(count) == text
