"""What the writer and the reader refuse, and with which words."""

import errno
import os
import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from store_runs import make_forward, make_info, make_site, start, with_site, with_tokens, write

from capture.errors import SchemaVersionError, StoreError
from capture.store import RunReader, RunWriter, recover, schema

SITES = [make_site(1, 5, 2), make_site(4, 6, 1)]


@pytest.fixture
def forward():
    return make_forward(0, 4, SITES, np.random.default_rng(0), empty=0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.duckdb"


def changed(values, at, value):
    """Copy an array with one element replaced."""
    values = np.array(values)
    values[at] = value
    return values


def broken_forwards(forward):
    """Map what is wrong to the forward pass that has it and the words of the refusal."""
    site = forward.sites[0]
    rows = np.array([0, 2])
    scores, hidden = np.ones((2, 5), np.float32), np.ones((2, 3), np.float32)
    return {
        "site missing": (
            type(forward)(forward.tokens, forward.domains, forward.sites[:1]),
            r"each of the 2 sites once, got site indices \[0\]",
        ),
        "nan weight": (
            with_site(forward, weights=changed(site.weights, (1, 1), np.nan)),
            "Combine weights must be finite and from 0 to 512, got nan",
        ),
        "negative weight": (
            with_site(forward, weights=changed(site.weights, (1, 1), -0.5)),
            "Combine weights must be finite and from 0 to 512, got -0.5",
        ),
        "id too large": (
            with_site(forward, expert_ids=changed(site.expert_ids, (0, 0), 5)),
            r"site 0 of layer 1 \(layers.1.moe0\) must lie from -1 to 4, got 0..5",
        ),
        "id too small": (
            with_site(forward, expert_ids=changed(site.expert_ids, (0, 0), -2)),
            "must lie from -1 to 4, got -2",
        ),
        "ids and load differ": (
            with_site(forward, assignments=site.assignments[:, ::-1]),
            r"assignments of site 0 of layer 1 .* must count its expert_ids, but expert \d",
        ),
        "lighter expert first": (
            with_site(forward, weights=site.weights[:, ::-1].copy()),
            "must fall from slot to slot",
        ),
        "ids of another shape": (
            with_site(forward, expert_ids=site.expert_ids[:3]),
            r"must have shape \[4, 2\], got \[3, 2\]",
        ),
        "weights of another shape": (
            with_site(forward, weights=site.weights[:, :1]),
            r"the shape of its expert_ids \[4, 2\], got \[4, 1\]",
        ),
        "ids without weights": (with_site(forward, weights=None), "handed over without them"),
        "load of another shape": (
            with_site(forward, weight_sum=site.weight_sum[:1]),
            r"weight_sum of site 0 of layer 1 .* shape \[2, 5\] .*, got \[1, 5\]",
        ),
        "nan load": (
            with_site(forward, prob_sum=changed(site.prob_sum, (0, 0), np.nan)),
            "prob_sum of site 0 of layer 1 .* must be finite",
        ),
        "nan statistic": (
            with_site(forward, entropy=changed(site.entropy, 0, np.nan)),
            "The statistic entropy must be a number, got nan",
        ),
        "statistic too short": (
            with_site(forward, margin=site.margin[:2]),
            "margin of site 0 of layer 1 .* one value per token, 4, got shape .2.",
        ),
        "nan loss": (
            with_tokens(forward, loss=np.ma.MaskedArray([0, np.nan, 0, 0])),
            "loss must be a number where it is not masked, got nan",
        ),
        "nan score": (
            with_site(forward, scores=(rows, changed(scores, (1, 1), np.nan))),
            "scores of site 0 of layer 1 .* must be finite, got nan",
        ),
        "infinite score": (
            with_site(forward, scores=(rows, changed(scores, (1, 1), np.inf))),
            "scores of site 0 of layer 1 .* must be finite, got inf",
        ),
        "too few scores": (
            with_site(forward, scores=(rows, scores[:, :4])),
            r"scores of site 0 of layer 1 .* must have shape \[2, 5\], got \[2, 4\]",
        ),
        "infinite hidden": (
            with_site(forward, hidden=(rows, changed(hidden, (0, 0), -np.inf))),
            "hidden of site 0 of layer 1 .* must be finite, got -inf",
        ),
        "row of no token": (
            with_site(forward, hidden=(np.array([0, 4]), hidden)),
            "Row numbers of hidden of site 0 of layer 1 .* must lie from 0 to 3, got 0..4",
        ),
        "huge token id": (
            with_tokens(forward, token_id=np.uint32([0, 1, 2, 2**31])),
            "token ids up to 2147483647, got 2147483648",
        ),
    }


def test_broken_forward_passes_are_refused_and_leave_no_trace(out, forward):
    writer = start(out, SITES)
    for what, (broken, words) in broken_forwards(forward).items():
        with pytest.raises(StoreError, match=words):
            writer.append(broken)
            pytest.fail(f"{what} was stored")
    writer.append(forward)
    writer.finish(seconds=0)
    with RunReader.open(out) as run:
        assert run.info["n_tokens"] == 4
        loads = run.query("SELECT sum(assignments) AS n FROM expert_load").to_pylist()
    assert loads == [{"n": 4 * 2 + 4 * 1}]


def test_ids_are_refused_at_level_stats(out, forward):
    with pytest.raises(StoreError, match="At level stats expert ids and weights are not stored"):
        start(out, SITES, "stats").append(forward)


def test_a_token_stored_twice_fails_the_accounting_and_keeps_the_partial(out, forward):
    writer = start(out, SITES)
    writer.append(forward)
    writer.append(forward)
    with pytest.raises(StoreError, match="8 tokens were handed in, but 8 rows with 4 different"):
        writer.finish(seconds=0)
    assert not out.exists() and writer.partial.exists()
    writer.abandon()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM packed.route WHERE layer = 4 AND token_id = 2",
         "site 0 of layer 4 .* was handed 4 rows of the table route, and 3"),
        ("UPDATE packed.route SET ids0 = ids0 | 255 WHERE layer = 1 AND token_id = 2",
         "site 0 of layer 1 .* was handed 8 assignments, .* load sums to 8 and its rows to 7"),
        ("DELETE FROM packed.rollup WHERE layer = 4",
         "site 0 of layer 4 .* was handed 4 assignments, .* load sums to 0"),
        ("DELETE FROM packed.hidden WHERE token_id = 2",
         "site 0 of layer 1 .* was handed 2 rows of the table hidden, and 1"),
        ("DELETE FROM packed.token WHERE token_id = 2", "4 tokens were handed in, but 3 rows"),
    ],
)  # fmt: skip
def test_the_accounting_names_what_is_lost(out, forward, damage, words):
    writer = start(out, SITES)
    hidden = (np.array([0, 2]), np.ones((2, 3), np.float32))
    writer.append(with_site(forward, hidden=hidden))
    writer.flush()
    writer._connection.execute(damage)
    with pytest.raises(StoreError, match=words):
        writer.finish(seconds=0)
    assert not out.exists() and writer.partial.exists()
    writer.abandon()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_ctrl_c_while_a_run_is_created_leaves_nothing(out, monkeypatch, kind):
    def interrupted(*_):
        raise kind("Query interrupted")

    monkeypatch.setattr(RunWriter, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(out, SITES)
    assert not list(out.parent.iterdir())


def test_a_name_that_is_too_long_is_refused(out):
    with pytest.raises(StoreError, match="cannot be created"):
        start(out.with_name("a" * 300), SITES)


def test_nothing_is_ever_overwritten(out, forward):
    write(out, SITES, [forward])
    content = out.read_bytes()
    with pytest.raises(StoreError, match=r"already exists, and a run is never overwritten"):
        start(out, SITES)

    with pytest.raises(StoreError, match=r"would look like an unfinished capture"):
        start(out.with_name("run.partial"), SITES)

    other = out.with_name("other")
    writer = start(other, SITES)
    with pytest.raises(StoreError, match=r"left from an unfinished capture. .* capture recover"):
        start(other, SITES)
    writer.append(forward)
    other.write_text("mine")
    with pytest.raises(StoreError, match="appeared while the capture ran"):
        writer.finish(seconds=0)
    with pytest.raises(StoreError, match="already exists"):
        recover(writer.partial)
    assert other.read_text() == "mine" and out.read_bytes() == content
    other.unlink()
    assert recover(writer.partial) == other
    with pytest.raises(StoreError, match=r"is not there, and .*other is: it needs no recovery"):
        recover(writer.partial)
    with RunReader.open(other) as run:
        assert run.info["n_tokens"] == 4


def test_a_file_system_without_hard_links_is_no_obstacle(out, forward, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write(out, SITES, [forward])
    with RunReader.open(out) as run:
        assert run.info["complete"]
    blocked = start(out.with_name("b"), SITES)
    blocked.out.write_text("mine")
    with pytest.raises(StoreError, match="appeared while the capture ran"):
        blocked.finish(seconds=0)
    assert blocked.out.read_text() == "mine" and blocked.partial.exists()


def test_one_missing_folder_is_made(tmp_path):
    writer = start(tmp_path / "runs" / "first.duckdb", SITES)
    assert writer.finish(seconds=0) == tmp_path / "runs" / "first.duckdb"


def test_places_where_no_run_can_be_written(tmp_path):
    with pytest.raises(StoreError, match=r"does not exist. Create it first: mkdir -p"):
        start(tmp_path / "no" / "folder" / "run.duckdb", SITES)
    assert not (tmp_path / "no").exists()
    with pytest.raises(StoreError, match=r"is a folder. Give a name in it: .*run.duckdb"):
        start(tmp_path, SITES)
    with pytest.raises(StoreError, match=r"cannot be created: .* Choose a folder"):
        start(tmp_path / ("x" * 250), SITES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sites", "info", "words"),
    [
        ([], make_info(), "one or more sites"),
        ([SITES[0], SITES[0]], make_info(), r"different \(layer, site\)"),
        ([make_site(0, 2, 3)], make_info(), "1 <= top_k <= n_experts <= 65535, got top_k=3"),
        ([make_site(0, 65536, 3)], make_info(), "n_experts=65536"),
        (
            SITES,
            make_info("ID"),
            "level must be one of counts, stats, ids, scores, attention, got 'ID'",
        ),
        (SITES, make_info(config={"x": float("nan")}), "must be plain JSON"),
    ],
)
def test_facts_that_cannot_be_stored_leave_no_file(out, sites, info, words):
    with pytest.raises(StoreError, match=words):
        RunWriter.create(out, info, sites, [])
    assert list(out.parent.iterdir()) == []


def test_a_finished_writer_takes_no_more(out, forward):
    writer = start(out, SITES)
    writer.finish(seconds=0)
    for call in (lambda: writer.append(forward), writer.flush, lambda: writer.finish(seconds=0)):
        with pytest.raises(StoreError, match="is closed already"):
            call()
    writer.abandon()


def make_text(path):
    path.write_text("token_id,layer\n0,1\n")


def make_nothing(path):
    path.write_bytes(b"")


def make_parquet(path):
    pa.parquet.write_table(pa.table({"x": [1]}), path)


def make_empty_database(path):
    duckdb.connect(str(path)).close()


def make_other_database(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE run (schema_version INTEGER)")


def make_database_without_a_run(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA packed; CREATE TABLE packed.run (schema_version INTEGER)")


def make_database_without_views(path):
    make_database_without_a_run(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"INSERT INTO packed.run VALUES ({schema.SCHEMA_VERSION})")


@pytest.mark.parametrize(
    "make",
    [
        make_text,
        make_nothing,
        make_parquet,
        make_empty_database,
        make_other_database,
        make_database_without_a_run,
        make_database_without_views,
    ],
)
def test_files_that_are_no_run_are_refused(out, make):
    make(out)
    with pytest.raises(StoreError, match=r"A run file was expected at .*, but it is not one"):
        RunReader.open(out)
    partial = out.with_name("run.duckdb.partial")
    shutil.move(out, partial)
    with pytest.raises(StoreError, match=r"A run file was expected at .*, but it is not one"):
        recover(partial)
    assert partial.exists() and not out.exists()


def test_a_damaged_run_is_refused(out, forward):
    write(out, SITES, [forward])
    content = out.read_bytes()
    out.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=r"A run file was expected at .*, but it is not one"):
        RunReader.open(out)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"expected at .*gone, which is nothing. Record one with"):
        RunReader.open(tmp_path / "gone")
    with pytest.raises(StoreError, match="which is a folder"):
        RunReader.open(tmp_path)


def test_a_run_open_elsewhere_in_this_process_is_no_broken_run(out, forward):
    write(out, SITES, [forward])
    with duckdb.connect(str(out), read_only=True), RunReader.open(out) as run:
        assert run.info["n_tokens"] == 4
    with (
        duckdb.connect(str(out)),
        pytest.raises(StoreError, match=r"open in this process with other settings. Close that"),
    ):
        RunReader.open(out)


@pytest.mark.parametrize(
    ("version", "words"),
    [(0, "python -m capture migrate"), (schema.SCHEMA_VERSION + 1, "Update RouteScope")],
)
def test_other_schema_versions_are_refused_by_name(out, forward, version, words):
    write(out, SITES, [forward])
    with duckdb.connect(str(out)) as connection:
        connection.execute("UPDATE packed.run SET schema_version = ?", [version])
    ours = schema.SCHEMA_VERSION
    with pytest.raises(SchemaVersionError, match=f"schema version {version}, .*{ours}. .*{words}"):
        RunReader.open(out)


@pytest.mark.parametrize("name", ["run.duckdb", ".partial", "x.part"])
def test_recover_takes_only_partial_files(tmp_path, name):
    with pytest.raises(StoreError, match=r"recover takes the .partial file"):
        recover(tmp_path / name)


def test_a_query_reads_the_run_and_nothing_else(out, forward):
    write(out, SITES, [forward])
    secret = out.with_name("secret.csv")
    secret.write_text("a\n1\n")
    python_variable = pa.table({"x": [1]})
    assert python_variable.num_rows == 1
    with RunReader.open(out) as run:
        for sql in (
            f"SELECT * FROM read_csv('{secret}')",
            f"SELECT * FROM '{secret}'",
            f"COPY (SELECT 1) TO '{out.parent / 'copy.csv'}'",
            f"ATTACH '{out.parent / 'x.duckdb'}'",
            "SELECT * FROM python_variable",
            "SET enable_external_access = true",
            "CREATE TABLE t (x INTEGER)",
            "DELETE FROM packed.token",
            "SELECT * FROM no_such_view",
            "nonsense",
        ):
            with pytest.raises(StoreError, match=r"The query on .* failed"):
                run.query(sql)
        rows = run.query("SELECT token_id FROM tokens WHERE token_id = $id", {"id": 3})
        assert rows.to_pylist() == [{"token_id": 3}]
        rows = run.query("SELECT token_id FROM tokens WHERE token_id > ? ORDER BY 1", [1])
        assert rows["token_id"].to_pylist() == [2, 3]
    assert sorted(p.name for p in out.parent.iterdir()) == ["run.duckdb", "secret.csv"]
    with pytest.raises(StoreError, match="is closed"):
        run.query("SELECT 1")
    run.close()
