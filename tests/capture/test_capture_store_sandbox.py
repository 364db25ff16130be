"""A run file from somebody else: nothing that it brings along is run."""

import shutil

import duckdb
import pytest
from synthetic import PROMPTS, SITES, write_run

from capture.errors import StoreError
from capture.store import RunReader, migrate, recover
from capture.store.reader import MAX_EXPERTS

pytestmark = pytest.mark.slow

FOREVER = "SELECT count(*) FROM range(1000000000000) AS a, range(1000000000000) AS b"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("ours") / "run.duckdb", level="attention")


@pytest.fixture
def forged(written, tmp_path):
    """Return a function that changes a copy of the run with statements of the attacker."""

    def forge(*statements):
        path = tmp_path / "forged.duckdb"
        shutil.copyfile(written.path, path)
        with duckdb.connect(str(path)) as connection:
            for statement in statements:
                connection.execute(statement)
        return path

    return forge


def tokens_of(path):
    with RunReader.open(path) as run:
        rows = run.query("SELECT token_id, text FROM tokens ORDER BY token_id").to_pylist()
        return [(row["token_id"], row["text"]) for row in rows]


def known_tokens(written):
    return [(token["token_id"], token["text"]) for token in written.tokens]


def test_a_view_that_reads_a_local_file_is_not_run(written, forged, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("line\nhidden\n")
    path = forged(
        "DROP VIEW tokens",
        f"CREATE VIEW tokens AS SELECT 0 AS token_id, 0 AS prompt_id, 0 AS position, 'prompt' AS"
        f" phase, 0 AS token, line AS text, 0::FLOAT AS loss FROM read_csv('{secret}')",
    )
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.sql("SELECT text FROM tokens").fetchall() == [("hidden",)]
    assert tokens_of(path) == known_tokens(written)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("view", ["run", "sites", "tokens", "expert_load", "assignments", "gates"])
def test_a_view_that_never_ends_is_not_run(written, forged, view):
    path = forged(f"DROP VIEW {view}", f"CREATE VIEW {view} AS {FOREVER}")
    assert tokens_of(path) == known_tokens(written)
    with RunReader.open(path) as run:
        assert run.query(f"SELECT count(*) AS n FROM {view}")["n"][0].as_py() > 0


@pytest.mark.timeout(30)
def test_a_macro_does_not_stand_in_for_a_function(written, forged):
    path = forged(
        f"CREATE MACRO len(x) AS ({FOREVER})",
        f"CREATE MACRO list_transform(x, f) AS ({FOREVER})",
        f"CREATE MACRO list_resize(x, n) AS ({FOREVER})",
        f"CREATE MACRO packed.sum(x) AS ({FOREVER})",
        f"CREATE MACRO range(x) AS TABLE {FOREVER}",
    )
    with RunReader.open(path) as run, RunReader.open(written.path) as ours:
        for view in ("expert_load", "expert_load_by", "attention_maps", "coactivation"):
            sql = f"SELECT * FROM {view} ORDER BY ALL"
            assert run.query(sql) == ours.query(sql)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "statements",
    [
        ["ALTER TABLE packed.token RENAME TO kept", f"CREATE VIEW packed.token AS {FOREVER}"],
        ["ALTER TABLE packed.run RENAME TO kept", f"CREATE VIEW packed.run AS {FOREVER}"],
        ["ALTER TABLE packed.site ADD COLUMN more VARCHAR DEFAULT 'x'"],
        ["ALTER TABLE packed.prompt DROP COLUMN domain"],
        ["ALTER TABLE packed.prompt ALTER n_tokens TYPE BIGINT"],
        [
            "DROP TABLE packed.sample",
            "CREATE TABLE packed.sample (x INTEGER, token_id INTEGER GENERATED ALWAYS AS"
            " (length(repeat('x', 1000))))",
        ],
        ["DROP TABLE packed.batch"],
        ["DELETE FROM packed.run"],
        ["INSERT INTO packed.run SELECT * FROM packed.run"],
        ["UPDATE packed.run SET slots = 2000000000"],
        ["UPDATE packed.run SET id_bits = 9"],
        [f"UPDATE packed.site SET n_experts = {MAX_EXPERTS + 1}"],
        ["UPDATE packed.site SET n_experts = -1"],
    ],
)
def test_tables_that_are_not_ours_are_refused(forged, statements):
    with pytest.raises(StoreError, match=r"A run file was expected at .*, but it is not one"):
        RunReader.open(forged(*statements))


def test_what_else_the_file_holds_has_no_name(forged):
    path = forged("CREATE TABLE more AS SELECT 1 AS x", "CREATE VIEW evil AS SELECT 2 AS x")
    with RunReader.open(path) as run:
        for name in ("more", "evil", "main.evil"):
            with pytest.raises(StoreError, match="failed"):
                run.query(f"SELECT * FROM {name}")


@pytest.mark.parametrize(
    "sql",
    ["CREATE TABLE t (x INTEGER)", "SELECT 1; SELECT 2", "DETACH run_file", "RESET temp_directory"],
)
def test_a_query_is_one_select(written, sql):
    with (
        RunReader.open(written.path) as run,
        pytest.raises(StoreError, match="expected one SELECT"),
    ):
        run.query(sql)


def recovered(path):
    partial = path.with_name("run.duckdb.partial")
    path.rename(partial)
    return recover(partial)


@pytest.mark.timeout(30)
def test_a_recovery_runs_no_view_and_no_macro(written, forged, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("line\nhidden\n")
    path = forged(
        "DROP VIEW expert_load",
        f"CREATE VIEW expert_load AS SELECT 1 AS layer, 0 AS site, len(line) AS assignments"
        f" FROM read_csv('{secret}')",
        *(f"DROP VIEW {view}" for view in ("coactivation", "sites", "tokens", "run")),
        *(
            f"CREATE VIEW {view} AS {FOREVER}"
            for view in ("coactivation", "sites", "tokens", "run")
        ),
        f"CREATE MACRO packed.sum(x) AS ({FOREVER})",
        f"CREATE MACRO duckdb_tables() AS TABLE {FOREVER}",
        f"CREATE MACRO range(x) AS TABLE {FOREVER}",
        "DELETE FROM packed.coactivation; UPDATE packed.run SET complete = false",
    )
    with RunReader.open(recovered(path)) as run, RunReader.open(written.path) as ours:
        assert not run.info["complete"]
        for table in ("coactivation", "transition", "gate_sum", "rollup"):
            sql = f"SELECT * FROM packed.{table} ORDER BY ALL"
            assert run.query(sql) == ours.query(sql)


def test_a_recovery_computes_no_index(forged):
    path = forged("CREATE INDEX slow ON packed.run ((length(repeat(model, 10))))")
    with pytest.raises(StoreError, match="it has indexes"):
        recovered(path)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("CREATE MACRO duckdb_tables() AS TABLE SELECT 1", "it has macros"),
        (f"CREATE MACRO sum(x) AS ({FOREVER})", "it has macros"),
        ("CREATE INDEX slow ON packed.token ((length(text)))", "it has indexes"),
        ("ALTER TABLE packed.token ADD COLUMN more VARCHAR", "packed.token is not as"),
        ("ALTER TABLE packed.run RENAME TO kept", "no table packed.run"),
    ],
)
def test_a_migration_runs_nothing_of_the_file(forged, tmp_path, statement, reason):
    path = forged("UPDATE packed.run SET schema_version = 2", statement)
    if "RENAME" in statement:
        with duckdb.connect(str(path)) as connection:
            connection.execute(f"CREATE VIEW packed.run AS {FOREVER}")
    with pytest.raises(StoreError, match=reason):
        migrate(path, tmp_path / "new.duckdb")
    assert not (tmp_path / "new.duckdb").exists()


def test_a_run_is_read_as_before(written):
    with RunReader.open(written.path) as run:
        assert run.sites == list(SITES)
        assert run.info["n_prompts"] == len(PROMPTS)
        # a command's output is not mixed with DuckDB's progress
        (shown,) = run.query("SELECT current_setting('enable_progress_bar') AS it")["it"]
        assert not shown
    assert [path.name for path in written.path.parent.iterdir()] == ["run.duckdb"]


def test_a_path_may_hold_a_quote(written, tmp_path):
    path = tmp_path / "it's; DROP.duckdb"
    shutil.copyfile(written.path, path)
    assert tokens_of(path) == known_tokens(written)
