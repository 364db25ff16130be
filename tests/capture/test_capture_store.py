import json

import numpy as np
import opened
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_runs import (
    STATISTICS,
    make_forward,
    make_info,
    make_site,
    start,
    with_site,
    with_tokens,
    write,
)

from capture.errors import StoreError
from capture.store import RECORDED_LEVELS, PromptInfo, RunReader, RunWriter, schema
from capture.store import writer as writer_module

pytestmark = pytest.mark.slow

# the columns that the issue promises to everybody, with the type a stranger's DuckDB reports
PROMISED = {
    "assignments": "token_id INTEGER, layer INTEGER, site INTEGER, slot INTEGER, "
    "expert_id INTEGER, weight FLOAT",
    "tokens": "token_id INTEGER, prompt_id INTEGER, position INTEGER, phase VARCHAR, "
    "token INTEGER, text VARCHAR, loss FLOAT",
    "prompts": "prompt_id INTEGER, text VARCHAR, domain VARCHAR, source VARCHAR",
    "gates": "token_id INTEGER, layer INTEGER, site INTEGER, entropy FLOAT, margin FLOAT, "
    "logsumexp FLOAT, topk_mass FLOAT",
    "scores": "token_id INTEGER, layer INTEGER, site INTEGER, scores FLOAT[]",
    "hidden": "token_id INTEGER, layer INTEGER, site INTEGER, hidden FLOAT[]",
    "sites": "layer INTEGER, site INTEGER, module VARCHAR, n_experts INTEGER, top_k INTEGER, "
    "n_shared_experts INTEGER, score_function VARCHAR, side VARCHAR, expert_kinds VARCHAR[], "
    "dropped BIGINT",
    "expert_load": "layer INTEGER, site INTEGER, expert_id INTEGER, assignments BIGINT, "
    "weight_sum DOUBLE, prob_sum DOUBLE, kind VARCHAR",
    "expert_load_by": "layer INTEGER, site INTEGER, domain VARCHAR, phase VARCHAR, "
    "expert_id INTEGER, assignments BIGINT, weight_sum DOUBLE, prob_sum DOUBLE",
    "gate_sums": "layer INTEGER, site INTEGER, domain VARCHAR, phase VARCHAR, statistic VARCHAR, "
    "tokens BIGINT, total DOUBLE",
    "batches": "batch_id INTEGER, phase VARCHAR, tokens INTEGER",
    "token_batches": "token_id INTEGER, batch_id INTEGER, row_in_batch INTEGER",
    "sampled_tokens": "token_id INTEGER, domain VARCHAR",
    "coactivation": "layer INTEGER, site INTEGER, expert_a INTEGER, expert_b INTEGER, "
    "tokens BIGINT",
    "transitions": "layer INTEGER, next_layer INTEGER, expert_id INTEGER, "
    "next_expert_id INTEGER, tokens BIGINT",
    "attention_layers": "layer INTEGER, module VARCHAR, heads INTEGER, kind VARCHAR, "
    "reason VARCHAR",
    "attention_prompts": "prompt_id INTEGER, tokens INTEGER, bins INTEGER, bin_width INTEGER, "
    "every INTEGER",
    "attention_stats": "prompt_id INTEGER, layer INTEGER, head INTEGER, queries INTEGER, "
    "entropy FLOAT, sink_mass FLOAT, mean_distance FLOAT, window_mass FLOAT",
    "attention_maps": "prompt_id INTEGER, layer INTEGER, head INTEGER, bins INTEGER, map FLOAT[]",
    "attention_received": "prompt_id INTEGER, layer INTEGER, head INTEGER, bins INTEGER, "
    "received FLOAT[]",
    "attention_top_keys": "token_id INTEGER, layer INTEGER, head INTEGER, rank INTEGER, "
    "key_token_id INTEGER, weight FLOAT",
    "run": "model VARCHAR, revision VARCHAR, architecture VARCHAR, dtype VARCHAR, device VARCHAR, "
    "level VARCHAR, vocab_size INTEGER, hidden_size INTEGER, backends VARCHAR, packages VARCHAR, "
    "config VARCHAR, sample VARCHAR, notes VARCHAR, n_prompts BIGINT, n_tokens BIGINT, "
    "n_generated BIGINT, n_truncated_prompts BIGINT, n_layers BIGINT, started_at TIMESTAMP, "
    "seconds DOUBLE, schema_version INTEGER, complete BOOLEAN",
}
SITES = [make_site(1, 5, 2), make_site(4, 300, 9), make_site(4, 3, 1, site=1)]


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.duckdb"


def ask(path, sql):
    """Query a file as a stranger does: plain DuckDB, nothing of ours."""
    return opened.stranger(path).sql(sql).fetchall()


def expected_assignments(forwards, sites):
    """List (token, layer, site, slot, expert) and the weights in that order, from the records."""
    rows = {}
    for forward in forwards:
        for site_rows in forward.sites:
            site = sites[site_rows.site_index]
            for row, token in enumerate(forward.tokens.token_id):
                for slot in range(site.top_k):
                    if site_rows.expert_ids[row, slot] >= 0:
                        key = (int(token), site.layer, site.site, slot)
                        rows[key] = (site_rows.expert_ids[row, slot], site_rows.weights[row, slot])
    keys = sorted(rows)
    return [(*key, int(rows[key][0])) for key in keys], np.float32([rows[key][1] for key in keys])


def test_views_have_the_promised_columns(out, random):
    write(out, SITES, [make_forward(0, 3, SITES, random)])
    for view, columns in PROMISED.items():
        described = ask(out, f"DESCRIBE {view}")
        assert ", ".join(f"{name} {kind}" for name, kind, *_ in described) == columns, view


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_written_is_read(tmp_path_factory, data):
    shapes = data.draw(
        st.lists(
            st.sampled_from([(1, 1), (8, 2), (64, 9), (255, 8), (256, 8), (257, 4), (400, 22)]),
            min_size=1,
            max_size=3,
        )
    )
    sites = [make_site(2 * i + 1, *shape) for i, shape in enumerate(shapes)]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    forwards = [
        make_forward(int(first), size, sites, random)
        for first, size in zip(firsts, sizes, strict=True)
    ]
    out = write(tmp_path_factory.mktemp("run") / "run.duckdb", sites, forwards)

    found = ask(out, "SELECT * FROM assignments ORDER BY token_id, layer, site, slot")
    rows, weights = expected_assignments(forwards, sites)
    assert [row[:5] for row in found] == rows
    np.testing.assert_allclose([row[5] for row in found], weights, rtol=2.0**-11)

    for index, site in enumerate(sites):
        gates = np.float32(
            ask(
                out,
                f"SELECT {', '.join(STATISTICS)} FROM gates WHERE layer = {site.layer}"
                " ORDER BY token_id",
            )
        )
        for column, name in enumerate(STATISTICS):
            given_values = np.concatenate([getattr(f.sites[index], name) for f in forwards])
            np.testing.assert_allclose(gates[:, column], given_values, rtol=2.0**-11, atol=2.0**-25)


def test_tokens_and_batches_are_read_as_written(out, random):
    forwards = [make_forward(0, 4, SITES, random), make_forward(4, 2, SITES, random)]
    forwards[1] = with_tokens(forwards[1], text=None, phase="generated", token_id=np.uint32([5, 4]))
    write(out, SITES, forwards)

    tokens = forwards[0].tokens
    expected = [
        (n, tokens.prompt_id[n], n, "prompt", tokens.token[n], f"t{n}", tokens.loss.tolist()[n])
        for n in range(4)
    ]
    assert ask(out, "SELECT * FROM tokens WHERE token_id < 4 ORDER BY token_id") == expected
    assert (
        ask(out, "SELECT phase, text FROM tokens WHERE token_id >= 4") == [("generated", None)] * 2
    )
    assert ask(out, "SELECT * FROM batches") == [(0, "prompt", 4), (1, "generated", 2)]
    batched = ask(out, "SELECT * FROM token_batches ORDER BY batch_id, row_in_batch")
    assert batched == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3), (5, 1, 0), (4, 1, 1)]


def test_the_run_view_is_one_row_of_facts(out, random):
    info = make_info(
        model="dir/\udcffx", backends={"gate": "torch"}, config={"dtype": None, "path": out}
    )
    prompts = [PromptInfo("A", "a", None, 2, 0), PromptInfo(None, None, "f:2", 1, 3)]
    writer = RunWriter.create(out, info, SITES, prompts)
    generated = with_tokens(make_forward(2, 1, SITES, random), phase="generated")
    for forward in (make_forward(0, 2, SITES, random), generated):
        writer.append(forward)
    writer.finish(seconds=2.5, complete=False, backends={"gate": "triton"}, notes={"why": "test"})

    with RunReader.open(out) as run:
        info, sites = run.info, run.sites
    assert sites == SITES
    documents = {name: json.loads(info[name]) for name in ("backends", "config", "notes", "sample")}
    assert documents == {
        "backends": {"gate": "triton"},
        "config": {"dtype": None, "path": str(out)},
        "notes": {"why": "test"},
        "sample": {},
    }
    counts = ("n_prompts", "n_tokens", "n_generated", "n_truncated_prompts", "n_layers", "seconds")
    assert [info[name] for name in counts] == [2, 3, 1, 1, 2, 2.5]
    assert (info["model"], info["revision"], info["complete"]) == ("dir/\ufffdx", None, False)
    assert ask(out, "SELECT * FROM prompts") == [(0, "A", "a", None), (1, None, None, "f:2")]
    assert ask(out, "SELECT * FROM prompt_sizes") == [(0, 2, 0), (1, 1, 3)]


def test_any_text_is_kept_but_for_half_a_surrogate_pair(out, random):
    texts = ["", "\0", "a\0b", "'; DROP TABLE x; --", "<b>", "🦆", "\u202eשלום", "\r\n\t", "\ufeff"]
    forward = with_tokens(make_forward(0, 11, SITES, random), text=[*texts, "\ud83e", "\udd86x"])
    prompts = [PromptInfo(text, "d\0", text, 1, 0) for text in texts]
    writer = start(out, SITES, prompts=prompts)
    writer.append(forward)
    writer.finish(seconds=0)

    stored = [text for (text,) in ask(out, "SELECT text FROM tokens ORDER BY token_id")]
    assert stored == [*texts, "\ufffd", "\ufffdx"]
    stored = ask(out, "SELECT text, domain, source FROM prompts ORDER BY prompt_id")
    assert stored == [(text, "d\0", text) for text in texts]


@pytest.mark.parametrize("level", RECORDED_LEVELS)
def test_expert_load_sums_the_rollups_and_lists_idle_experts(out, random, level):
    sites = [make_site(0, 4, 1), make_site(2, 300, 3)]
    forwards = [
        make_forward(0, 5, sites, random, level=level, domains=("a", None)),
        make_forward(5, 5, sites, random, level=level, domains=("b",)),
        with_tokens(make_forward(10, 1, sites, random, level=level), phase="generated"),
    ]
    # the second site's router gave no scores in one forward pass: its sum is not known
    forwards[1] = with_site(forwards[1], 1, prob_sum=None)
    write(out, sites, forwards, level)

    load = ask(out, "SELECT * FROM expert_load ORDER BY layer, expert_id")
    assert [row[:3] for row in load] == [
        (site.layer, 0, expert) for site in sites for expert in range(site.n_experts)
    ]
    totals = [[f.sites[index] for f in forwards] for index in range(2)]
    expected = np.concatenate([sum(s.assignments.sum(axis=0) for s in site) for site in totals])
    assert [row[3] for row in load] == expected.tolist()
    assert 0 in expected
    expected = np.concatenate([sum(s.weight_sum.sum(axis=0) for s in site) for site in totals])
    np.testing.assert_allclose([row[4] for row in load], expected, rtol=1e-12)
    expected = sum(s.prob_sum.sum(axis=0) for s in totals[0])
    np.testing.assert_allclose([row[5] for row in load[:4]], expected, rtol=1e-12)
    assert {row[5] for row in load[4:]} == {None}

    groups = ask(
        out,
        "SELECT layer, domain, phase, count(*), sum(assignments), count(prob_sum)"
        " FROM expert_load_by GROUP BY ALL ORDER BY ALL",
    )
    expected = [
        (
            sites[index].layer,
            domain,
            forward.tokens.phase,
            sites[index].n_experts,
            int(forward.sites[index].assignments[row].sum()),
            0 if (index, domain) == (1, "b") and forward is forwards[1] else sites[index].n_experts,
        )
        for index in range(2)
        for forward in forwards
        for row, domain in enumerate(forward.domains)
    ]
    assert sorted(groups, key=repr) == sorted(expected, key=repr)


def test_level_stats_stores_no_rows_per_site(out, random):
    write(out, SITES, [make_forward(0, 4, SITES, random, level="stats")], "stats")
    assert ask(out, "SELECT count(*) FROM gates") == [(0,)]
    assert ask(out, "SELECT count(*) FROM assignments") == [(0,)]
    assert ask(out, "SELECT sum(assignments) > 0 FROM expert_load") == [(True,)]


def test_a_run_without_tokens_has_an_empty_load(out):
    write(out, SITES, [])
    assert ask(out, "SELECT DISTINCT assignments, weight_sum, prob_sum FROM expert_load") == [
        (0, 0.0, None)
    ]
    assert ask(out, "SELECT count(*) FROM expert_load") == [(308,)]
    assert ask(out, "SELECT n_tokens, complete FROM run") == [(0, True)]


def test_an_unknown_statistic_and_an_infinite_one_are_null(out, random):
    forward = make_forward(0, 2, SITES, random)
    margin = np.float32([1.5, np.inf])
    forward = with_site(forward, 0, margin=margin, entropy=None)
    forward = with_tokens(forward, loss=np.ma.MaskedArray([np.nan, np.inf], [True, False]))
    write(out, SITES, [forward])
    found = ask(out, "SELECT entropy, margin FROM gates WHERE layer = 1 ORDER BY token_id")
    assert found == [(None, 1.5), (None, None)]
    assert ask(out, "SELECT count(entropy), count(margin) FROM gates WHERE layer = 4") == [(4, 4)]
    assert ask(out, "SELECT count(loss) FROM tokens") == [(0,)]


def test_a_token_id_that_is_not_known_is_null(out, random):
    forward = with_tokens(make_forward(0, 2, SITES, random), token=np.int32([schema.NO_TOKEN, 7]))
    write(out, SITES, [forward])
    assert ask(out, "SELECT token FROM tokens ORDER BY token_id") == [(None,), (7,)]
    with RunReader.open(out) as run:
        found = run.query("SELECT token FROM tokens ORDER BY token_id")
    assert found["token"].to_pylist() == [None, 7]


def test_scores_and_hidden_of_a_sample(out, random):
    forward = make_forward(7, 4, SITES[:2], random)
    scores = np.float32([[0.1, -np.inf, 2, 3, 4], [5, 6, 7, 8, 9]])
    hidden = np.float32([[1, 2, 3], [4, 5, 6]])
    rows = np.array([1, 3])
    forward = with_site(forward, 0, scores=(rows, scores), hidden=(rows, hidden))
    forward = with_site(forward, 1, hidden=(rows, -hidden))
    write(out, SITES[:2], [forward, make_forward(11, 4, SITES[:2], random)])

    found = ask(out, "SELECT * FROM scores ORDER BY token_id")
    first = [np.float32(0.1).item(), None, 2, 3, 4]
    assert found == [(8, 1, 0, first), (10, 1, 0, [5, 6, 7, 8, 9])]
    found = ask(out, "SELECT layer, token_id, hidden FROM hidden ORDER BY ALL")
    assert found == [
        (1, 8, [1, 2, 3]),
        (1, 10, [4, 5, 6]),
        (4, 8, [-1, -2, -3]),
        (4, 10, [-4, -5, -6]),
    ]
    domain = {0: "a", 1: "b"}
    chosen = [(int(7 + row), domain[int(forward.tokens.prompt_id[row])]) for row in rows]
    assert ask(out, "SELECT * FROM sampled_tokens ORDER BY token_id") == chosen


def test_at_level_scores_every_token_has_scores(out, random):
    site = make_site(0, 3, 1)
    forward = make_forward(0, 2, [site], random)
    scores = random.random((2, 3), np.float32)
    writer = start(out, [site], "scores")
    with pytest.raises(
        StoreError, match=r"every token has scores, but site 0 of layer 0 .* 1 of 2"
    ):
        writer.append(with_site(forward, scores=(np.array([0]), scores[:1])))
    hidden = (np.array([1]), np.ones((1, 3), np.float32))
    writer.append(with_site(forward, scores=(np.arange(2), scores), hidden=hidden))
    writer.finish(seconds=0)
    assert ask(out, "SELECT scores FROM scores ORDER BY token_id") == [
        (s,) for s in scores.tolist()
    ]
    assert ask(out, "SELECT token_id FROM sampled_tokens") == [(1,)]


def test_filters_reach_the_scan_of_the_packed_rows(out, random):
    write(out, SITES, [make_forward(0, 3, SITES, random)])
    plan = ask(out, "EXPLAIN SELECT * FROM assignments WHERE token_id = 2 AND layer = 4")[0][1]
    assert plan.count("Table: run.packed.route") == 1
    assert "Filters: token_id = 2" in plan and "layer = 4" in plan.split("Filters:")[1]


def test_forwards_are_committed_together_but_never_split(out, random, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_ROWS", 40)
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 1e9)
    sites = [make_site(0, 5, 2)]
    writer = start(out, sites)
    committed = []
    for n in range(6):
        writer.append(make_forward(n * 4, 4, sites, random))
        committed.append(
            writer._connection.cursor().sql("SELECT n_tokens FROM run").fetchall()[0][0]
        )
    # a forward has 4 token rows, 4 packed rows and 1 batch row: the fifth passes 40
    assert committed == [0, 0, 0, 0, 20, 20]
    writer.finish(seconds=0)
    assert ask(out, "SELECT n_tokens FROM run") == [(24,)]


def test_a_slow_capture_commits_every_forward(out, random, monkeypatch):
    monkeypatch.setattr(writer_module, "COMMIT_SECONDS", 0)
    writer = start(out, SITES)
    for n in range(3):
        writer.append(make_forward(n, 1, SITES, random))
        found = writer._connection.cursor().sql("SELECT n_tokens FROM run").fetchall()
        assert found == [(n + 1,)]
    writer.abandon()


def test_a_transaction_that_fails_is_undone_and_may_be_tried_again(out, random, monkeypatch):
    writer = start(out, SITES)
    writer.append(make_forward(0, 3, SITES, random))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "CLEAR_ROLLUP", "DELETE FROM packed.no_such_table")
        with pytest.raises(StoreError, match=r"could not be written: .*no_such_table"):
            writer.flush()
    assert writer._connection.cursor().sql("SELECT count(*) FROM tokens").fetchall() == [(0,)]
    writer.append(make_forward(3, 2, SITES, random))
    writer.finish(seconds=0)
    assert ask(out, "SELECT n_tokens FROM run") == [(5,)]


def test_the_callers_buffers_may_be_reused(out, random):
    sites = SITES[:1]
    forward = make_forward(0, 3, sites, random)
    rows, weights = expected_assignments([forward], sites)
    hidden = np.ones((3, 2), np.float32)
    writer = start(out, sites)
    writer.append(with_site(forward, hidden=(np.arange(3), hidden)))
    site = forward.sites[0]
    for buffer in (forward.tokens.token_id, site.expert_ids, site.weights, site.entropy, hidden):
        buffer[:] = 0
    site.assignments[:] = 77
    forward.tokens.token[:] = 77
    writer.finish(seconds=0)
    found = ask(out, "SELECT * FROM assignments ORDER BY token_id, slot")
    assert [row[:5] for row in found] == rows
    np.testing.assert_allclose([row[5] for row in found], weights, rtol=2.0**-11)
    assert ask(out, "SELECT DISTINCT hidden FROM hidden") == [([1, 1],)]
    assert ask(out, "SELECT count(*) FROM tokens WHERE token = 77") == [(0,)]


def test_files_stay_small(out, random):
    sites = [make_site(layer, 16, 2) for layer in range(6)]
    forwards = [make_forward(n * 500, 500, sites, random) for n in range(4)]
    size = write(out, sites, forwards).stat().st_size
    # 2,000 tokens x 6 sites: 12,000 rows of at most 35 bytes, and half a megabyte of empty tables
    assert size < 12_000 * 35 + 2**19
