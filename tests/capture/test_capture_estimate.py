"""The cost estimate is near the size of the file that comes out."""

import numpy as np
import pytest
import tiny_models
from test_capture_session import record, tiny, unequal

from capture.errors import ConfigError
from capture.model.selftest import attach
from capture.recorder.estimate import AttentionSize, estimate, human_bytes
from capture.store.records import SiteInfo

pytestmark = pytest.mark.slow


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
    assert list(cost.bytes_per_token) == ["stats", "ids", "scores", "attention"]
    assert f"Level {level}" in cost.lines()[1]


@pytest.mark.parametrize(
    ("lengths", "bins", "every", "top_keys"),
    [([120] * 24, 64, 1, 4), ([600] * 4, 64, 2, 8)],
)
def test_the_estimate_of_attention_is_near_what_it_adds(tmp_path, lengths, bins, every, top_keys):
    model = tiny_models.build("olmoe", max_position_embeddings=1024)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, length).tolist() for length in lengths]
    options = {
        "attention_prompts": len(prompts),
        "attention_bins": bins,
        "attention_every": every,
        "attention_top_keys": top_keys,
    }
    plain = record(model, prompts, tmp_path / "scores.duckdb", level="scores")
    path = record(model, prompts, tmp_path / "a.duckdb", level="attention", **options)
    added = path.stat().st_size - plain.stat().st_size
    size = AttentionSize(lengths, 3, 3 * 4, bins, every, top_keys)
    # a column takes whole blocks of 32 KiB
    assert abs(size.total_bytes - added) < 0.3 * added + 2**16
    cost = estimate(
        n_tokens=sum(lengths),
        sites=[site.info for site in attach(model)],
        hidden_size=32,
        level="attention",
        attention=size,
    )
    assert f"plus the attention of {len(lengths)} prompts at" in cost.lines()[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000, "2.3 MB"), (5e12, "5.0 TB")],
)
def test_bytes_read_like_bytes(count, text):
    assert human_bytes(count) == text


def test_more_pairs_than_are_counted_are_refused_before_anything_is_counted():
    """Product keys: 128 x 128 experts in each of two layers."""
    sites = [SiteInfo(layer, 0, "", 128**2, 64, 1, "softmax") for layer in range(2)]
    given = {"n_tokens": 9, "hidden_size": 32, "level": "ids", "sample_tokens": 0}
    assert estimate(sites=sites[:1], **given).tokens == 9
    with pytest.raises(ConfigError, match="2 routers of up to 16,384 experts have 536,870,912"):
        estimate(sites=sites, **given)
