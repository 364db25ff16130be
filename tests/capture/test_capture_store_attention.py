"""Pairs of experts and attention in the run file: what is stored, refused, recovered, migrated."""

import gzip
import os
import signal
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import opened
import pytest
import synthetic
from store_runs import LAYERS, make_attention, make_forward, make_site, start, with_tokens, write
from test_capture_store_processes import spawn

from capture.errors import StoreError
from capture.store import PairSums, migrate, next_sites, recover, schema
from capture.store import writer as writer_module
from capture.store.sums import count_pairs
from capture.store.tables import pack_maps

pytestmark = pytest.mark.slow

# two sites in layer 4: transitions lead to the last one of a layer
SITES = [make_site(1, 5, 2), make_site(4, 300, 3), make_site(4, 3, 1, site=1), make_site(6, 7, 2)]
BATCH = 7

SELF_JOIN = (
    "SELECT a.layer, a.site, a.expert_id AS expert_a, b.expert_id AS expert_b, count(*) AS tokens"
    " FROM assignments a JOIN assignments b USING (token_id, layer, site) GROUP BY ALL ORDER BY ALL"
)
NEXT_JOIN = (
    "WITH last AS (SELECT layer, max(site) AS site, lead(layer) OVER (ORDER BY layer) AS next_layer"
    " FROM sites GROUP BY layer)"
    " SELECT a.layer, last.next_layer, a.expert_id, b.expert_id AS next_expert_id,"
    " count(*) AS tokens"
    " FROM last JOIN assignments a USING (layer, site) JOIN last AS following"
    " ON following.layer = last.next_layer JOIN assignments b ON b.layer = following.layer"
    " AND b.site = following.site AND b.token_id = a.token_id GROUP BY ALL ORDER BY ALL"
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.duckdb"


def ask(path, sql):
    return opened.reader(path).query(sql).to_pylist()


def check_pairs(path):
    """Compare both views with joins of the assignments."""
    assert ask(path, "SELECT * FROM coactivation ORDER BY ALL") == ask(path, SELF_JOIN)
    found = ask(path, "SELECT * FROM transitions ORDER BY ALL")
    assert found == ask(path, NEXT_JOIN)
    assert {(row["layer"], row["next_layer"]) for row in found} == {(1, 4), (4, 6)}


def pairs_of(forward):
    return count_pairs({s.site_index: s.expert_ids for s in forward.sites}, SITES)


def test_the_next_site_is_the_last_one_of_the_next_layer():
    assert next_sites(SITES) == [2, None, 3, None]


def test_pairs_handed_over_now_and_then_equal_a_self_join(out, random):
    writer = start(out, SITES)
    forwards = [make_forward(n * BATCH, BATCH, SITES, random) for n in range(5)]
    for number, forward in enumerate(forwards):
        writer.append(forward)
        if number in (2, 4):  # for all forward passes since the last time
            since = forwards[max(0, number - 2) if number == 2 else 3 : number + 1]
            for one in since:
                writer.append_pairs(pairs_of(one))
            writer.flush()
    writer.finish(seconds=1)
    check_pairs(out)


def test_pairs_that_were_not_handed_over_are_counted_from_the_rows(out, random, monkeypatch):
    monkeypatch.setattr("capture.store.sums.CHUNK_TOKENS", 5)
    # an interrupted capture leaves gaps: long prompts come first, wherever they stand
    write(out, SITES, [make_forward(n * BATCH, BATCH, SITES, random) for n in (0, 1, 4)])
    check_pairs(out)


def test_level_stats_keeps_the_pairs_that_were_handed_over(out, random):
    writer = start(out, SITES, "stats")
    forward = make_forward(0, BATCH, SITES, random)
    sums = pairs_of(forward)
    writer.append(
        replace(forward, sites=[
            replace(s, **dict.fromkeys(
                ("expert_ids", "weights", "entropy", "margin", "logsumexp", "topk_mass")
            )) for s in forward.sites
        ])
    )  # fmt: skip
    writer.append_pairs(sums)
    sums[0].pairs[:] = 99  # the buffer may be used again
    writer.finish(seconds=1)
    expected = pairs_of(forward)[0].pairs
    rows = ask(out, "SELECT expert_a, expert_b, tokens FROM coactivation WHERE layer = 1")
    assert {(r["expert_a"], r["expert_b"]): r["tokens"] for r in rows} == {
        (int(a), int(b)): int(expected[a, b]) for a, b in np.argwhere(expected)
    }


def test_pairs_that_do_not_cover_the_load_end_the_capture(out, random):
    writer = start(out, SITES)
    first, second = (make_forward(n * BATCH, BATCH, SITES, random) for n in range(2))
    writer.append(first)
    writer.append_pairs(pairs_of(first))
    writer.append(second)
    with pytest.raises(StoreError, match=r"site 0 of layer 1 .* but its pairs cover"):
        writer.finish(seconds=1)
    writer.abandon()
    recover(out.with_name("run.duckdb.partial"))
    check_pairs(out)


def test_a_capture_cut_short_counts_the_pairs_that_did_not_come(out, random):
    writer = start(out, SITES)
    first, second = (make_forward(n * BATCH, BATCH, SITES, random) for n in range(2))
    writer.append(first)
    writer.append_pairs(pairs_of(first))
    writer.append(second)
    writer.finish(seconds=1, complete=False)
    check_pairs(out)


def bad_pairs():
    good = np.eye(5, dtype=np.int64)
    one_sided = good.copy()
    one_sided[0, 1] = 1
    to_next = np.ones((5, 3), np.int64)
    return [
        (PairSums(9, good), "one of the 4 sites, got site_index 9"),
        (PairSums(0, good[:3], to_next, 2), r"pairs of layers.1.moe0 must have shape \[5, 5\]"),
        (PairSums(0, one_sided, to_next, 2), "the same in both orders"),
        (PairSums(0, good, to_next[:, :2], 2), r"transitions .* must have shape \[5, 3\]"),
        (PairSums(0, good, -to_next, 2), "must be counts"),
        (PairSums(0, good, to_next, 1), "lead to site 2, got next_index 1 with counts"),
        (PairSums(0, good), "lead to site 2, got next_index None without counts"),
    ]


@pytest.mark.parametrize(("sums", "message"), bad_pairs())
def test_pairs_that_fit_no_site_are_refused(out, sums, message):
    writer = start(out, SITES)
    with pytest.raises(StoreError, match=message):
        writer.append_pairs([sums])
    writer.abandon()


@pytest.fixture
def known(tmp_path):
    return synthetic.write_run(tmp_path / "known.duckdb", level="attention")


def test_attention_is_stored_as_it_was_handed_over(known):
    first = {}
    for token in known.tokens:
        first.setdefault(token["prompt_id"], token["token_id"])
    rows = ask(known.path, "SELECT * FROM attention_stats")
    assert {(r["prompt_id"], r["layer"], r["head"]) for r in rows} == set(known.attention)
    for row in rows:
        want = known.attention[row["prompt_id"], row["layer"], row["head"]]
        assert {k: row[k] for k in ("queries", *schema.ATTENTION_STATISTICS)} == {
            k: want[k] for k in ("queries", *schema.ATTENTION_STATISTICS)
        }
    for row in ask(known.path, "SELECT * FROM attention_maps JOIN attention_received USING (ALL)"
                   .replace("USING (ALL)", "USING (prompt_id, layer, head, bins)")):  # fmt: skip
        want = known.attention[row["prompt_id"], row["layer"], row["head"]]
        assert row["map"] == want["map"] and row["received"] == want["received"]
    keys = {}
    for row in ask(known.path, "SELECT * FROM attention_top_keys ORDER BY rank"):
        place = keys.setdefault((row["token_id"], row["layer"], row["head"]), [])
        assert row["rank"] == len(place)
        place.append((row["key_token_id"], row["weight"]))
    assert keys == known.keys
    layers = ask(known.path, "SELECT * FROM attention_layers ORDER BY layer")
    assert layers == [
        {k: getattr(layer, k) for k in ("layer", "module", "heads", "kind", "reason")}
        for layer in synthetic.LAYERS
    ]
    prompts = ask(known.path, "SELECT * FROM attention_prompts ORDER BY prompt_id")
    sizes = {n: len(pieces) for n, (_, pieces) in enumerate(synthetic.PROMPTS)}
    assert prompts == [
        {"prompt_id": n, "tokens": size, "bins": -(-size // 2), "bin_width": 2, "every": 1}
        for n, size in sizes.items()
        if n != synthetic.WITHOUT_ATTENTION
    ]


def test_pairs_of_the_known_run(known):
    for site in synthetic.SITES:
        rows = ask(
            known.path,
            "SELECT expert_a, expert_b, tokens FROM coactivation"
            f" WHERE layer = {site.layer} AND site = {site.site}",
        )
        found = {(row["expert_a"], row["expert_b"]): row["tokens"] for row in rows}
        assert found == known.pairs(site.layer, site.site)
    rows = ask(known.path, "SELECT * FROM transitions")
    found = {(row["expert_id"], row["next_expert_id"]): row["tokens"] for row in rows}
    assert found == known.transitions(1, 0, 3, 1)


def test_maps_keep_their_row_sums_and_unused_rows(random):
    maps = np.tril(random.random((3, 9, 9)) ** 6).astype(np.float32) + np.eye(9, dtype=np.float32)
    maps /= maps.sum(axis=-1, keepdims=True)
    maps[1, 4] = np.nan
    cells = pack_maps(maps, 0).to_numpy(zero_copy_only=False).reshape(3, -1)
    row, column = np.tril_indices(9)
    found = np.zeros((3, 9, 9))
    found[:, row, column] = cells / schema.MAP_PARTS
    assert np.isnan(found[1, 4, :5]).all()
    found[1, 4], maps[1, 4] = 0, 0
    np.testing.assert_allclose(found, maps, atol=4e-6)
    sums = found.sum(axis=-1)
    assert sums[1, 4] == 0
    sums[1, 4] = 1
    assert (sums == 1).all()  # exactly


def spoiled():
    base = make_attention(0, 0, 5, np.random.default_rng(0))

    def with_layer(**changes):
        return replace(base, layers=[replace(base.layers[0], **changes), base.layers[1]])

    layer = base.layers[0]
    ahead = layer.maps.copy()
    ahead[0, 0] = [0.5, 0.5, 0]
    later = layer.top_ids.copy()
    later[0, 0, 0] = 3
    return [
        (replace(base, layers=base.layers[:1]), r"recorded in layers \[1, 4\], got \[1\]"),
        (replace(base, tokens=0), "must come once and cover a token, got 0 tokens"),
        (with_layer(entropy=layer.entropy[:2]), r"entropy .* must have shape \[3\], got \[2\]"),
        (with_layer(received=layer.received * np.nan), "received .* must be finite, got nan"),
        (with_layer(maps=layer.maps * 2), "shares that sum to 1, got rows from 2 to 2"),
        (with_layer(maps=ahead), "layer 1 looks ahead"),
        (with_layer(top_ids=later), "attends to itself and to earlier tokens, got the key 4"),
        (with_layer(top_queries=layer.top_queries + 1), "of 5 tokens. Count places"),
    ]


@pytest.mark.parametrize(("rows", "message"), spoiled())
def test_attention_that_cannot_be_is_refused_and_leaves_no_trace(out, random, rows, message):
    writer = start(out, SITES, layers=LAYERS)
    with pytest.raises(StoreError, match=message):
        writer.append_attention(rows)
    good = make_attention(0, 0, 5, random)
    writer.append_attention(good)
    with pytest.raises(StoreError, match=r"prompt 0 must come once .* again"):
        writer.append_attention(good)
    writer.append(make_forward(0, 5, SITES, random))
    writer.finish(seconds=1)
    assert ask(out, "SELECT prompt_id FROM attention_prompts") == [{"prompt_id": 0}]
    assert len(ask(out, "SELECT DISTINCT layer, head FROM attention_top_keys")) == 4


def test_lost_attention_ends_the_capture(out, random):
    writer = start(out, SITES, layers=LAYERS)
    writer.append_attention(make_attention(0, 0, 5, random))
    writer.append(make_forward(0, 5, SITES, random))
    writer.flush()
    writer._connection.execute("DELETE FROM packed.attention_key WHERE layer = 4")
    with pytest.raises(StoreError, match=r"10 rows of the table attention_key .* and 5 are"):
        writer.finish(seconds=1)
    writer.abandon()


# hands over the attention of one prompt and its forward pass, without end
ENDLESS = f"""
import sys
from pathlib import Path
import numpy as np
from store_runs import LAYERS, make_attention, make_forward, make_site, start, with_tokens
from capture.store import writer
from test_capture_store_attention import pairs_of, SITES
writer.COMMIT_SECONDS = 0.05
random = np.random.default_rng(0)
run = start(Path(sys.argv[1]), SITES, layers=LAYERS)
for n in range(10**6):
    run.append_attention(make_attention(n, n * {BATCH}, {BATCH}, random))
    forward = make_forward(n * {BATCH}, {BATCH}, SITES, random)
    run.append(with_tokens(forward, prompt_id=np.full({BATCH}, n, np.uint32)))
    if n % 20 == 9:
        run.append_pairs(pairs_of(forward))
    if n % 10 == 9:
        run.flush()
        print(n + 1, flush=True)
"""


def test_a_killed_capture_keeps_attention_with_its_tokens_and_counts_pairs_again(tmp_path):
    out, partial = tmp_path / "run.duckdb", tmp_path / "run.duckdb.partial"
    with spawn(ENDLESS, out) as process:
        acknowledged = 0
        while acknowledged < 30:
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    assert recover(partial) == out
    prompts = {row["prompt_id"] for row in ask(out, "SELECT DISTINCT prompt_id FROM tokens")}
    assert len(prompts) >= acknowledged
    for view in ("attention_prompts", "attention_stats", "attention_maps", "attention_received"):
        assert {
            r["prompt_id"] for r in ask(out, f"SELECT DISTINCT prompt_id FROM {view}")
        } == prompts
    listed = ask(out, "SELECT count(DISTINCT token_id) AS n FROM attention_top_keys")
    assert listed == [{"n": len(prompts) * BATCH}]
    check_pairs(out)


def test_a_commit_that_fails_keeps_attention_for_the_next(out, random, monkeypatch):
    writer = start(out, SITES, layers=LAYERS)
    writer.append_attention(make_attention(0, 0, 5, random))
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "COMMIT_SECONDS", 0)
        patch.setattr(schema, "CLEAR_ROLLUP", "DELETE FROM packed.no_such_table")
        with pytest.raises(StoreError, match="no_such_table"):
            writer.append(with_tokens(make_forward(0, 5, SITES, random)))
    assert writer._connection.cursor().sql("SELECT * FROM attention_prompts").fetchall() == []
    writer.finish(seconds=1)
    assert len(ask(out, "SELECT * FROM attention_maps")) == 4


def test_a_run_of_version_1_gets_pairs_from_its_rows_and_no_attention(tmp_path):
    old = tmp_path / "old.duckdb"
    data = Path(__file__).parents[1] / "data" / "run_v1.duckdb.gz"
    old.write_bytes(gzip.decompress(data.read_bytes()))
    new = migrate(old, tmp_path / "new.duckdb")
    assert ask(new, "SELECT * FROM coactivation ORDER BY ALL") == ask(new, SELF_JOIN)
    assert ask(new, "SELECT * FROM transitions ORDER BY ALL") == ask(new, NEXT_JOIN) != []
    for view in ("layers", "prompts", "stats", "maps", "received", "top_keys"):
        assert ask(new, f"SELECT * FROM attention_{view}") == []


def test_a_run_of_version_1_at_level_stats_gets_no_pairs(tmp_path):
    old = tmp_path / "old.duckdb"
    data = Path(__file__).parents[1] / "data" / "run_v1.duckdb.gz"
    old.write_bytes(gzip.decompress(data.read_bytes()))
    with duckdb.connect(str(old)) as connection:
        connection.execute("DELETE FROM packed.route; UPDATE packed.run SET level = 'stats'")
    new = migrate(old, tmp_path / "new.duckdb")
    assert ask(new, "SELECT * FROM coactivation") == ask(new, "SELECT * FROM transitions") == []
